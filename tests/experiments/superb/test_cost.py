"""Costs of SUPERB's tasks, held against the hours of audio that s3prl's recipes are known to need."""

import pytest
from transformers import HubertConfig

from experiments.superb.cost import CORPORA, cost_of, markdown
from lightning_modules.superb.recipes import SUPERB_TASKS, TASK_RECIPES

HOURS = {"pr": 11_300, "asr": 11_300, "ks": 1_800, "ic": 4_000, "sid": 12_000, "er": 6_000, "asv": 19_000, "sd": 4_000}


@pytest.mark.parametrize("task", HOURS)
def test_hours_of_audio_follow_from_the_recipe(task: str) -> None:
    assert cost_of(task, HubertConfig()).train_hours == pytest.approx(HOURS[task], rel=0.05)


def test_the_lstm_heads_cost_as_much_as_the_encoder_and_linear_ones_nothing() -> None:
    shares = {task: one.head_flops / one.flops for task in CORPORA if (one := cost_of(task, HubertConfig()))}
    assert all(0.4 < shares[task] < 0.5 for task in ("asr", "sf"))
    assert all(shares[task] < 0.02 for task in ("pr", "ks", "ic", "sid", "er"))


def test_every_trained_task_has_a_row() -> None:
    assert set(CORPORA) == {task for task in SUPERB_TASKS if TASK_RECIPES[task].updates}
    assert markdown(HubertConfig()).count("\n") == len(CORPORA) + 1
