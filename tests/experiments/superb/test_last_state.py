"""Heads that see the last hidden state alone, as DistilHuBERT and FitHuBERT were scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.teacher import HuggingFaceTeacher
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb
from tests.helpers import save_teacher


def head_of(output: Path) -> dict[str, torch.Tensor]:
    (best,) = output.glob("*/*/best.ckpt")
    state = torch.load(best, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if "weights_L" not in key}


@pytest.mark.parametrize("preset", ["superb", "probe"])
def test_a_run_is_that_of_an_encoder_with_no_other_state(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, teacher = corpora.speech_commands(tmp_path / "corpus"), save_teacher(tmp_path / "teacher", layers=2)
    more = ["--preset", preset, "--updates", "4", "--lr", "0.01"]
    last = superb("ks", teacher, root, tmp_path / "last", *more, "--states", "last")
    assert (last["layer_weights"], last["hidden_states"]) == ([0.0, 0.0, 1.0], 3)
    everything = superb("ks", teacher, root, tmp_path / "all", *more)
    assert everything["trainable_parameters"] == last["trainable_parameters"] + 3
    with pytest.raises(ValueError, match=r"holds a run with other settings \(states: all there, last now\)"):
        superb("ks", teacher, root, tmp_path / "all", *more, "--states", "last")
    all_states = HuggingFaceTeacher.all_states
    monkeypatch.setattr(HuggingFaceTeacher, "all_states", lambda *inputs: all_states(*inputs)[-1:])
    only = superb("ks", teacher, root, tmp_path / "only", *more)
    assert (only["layer_weights"], only["test"], only["dev"]) == ([1.0], last["test"], last["dev"])
    found, wanted, other = (head_of(tmp_path / name) for name in ("last", "only", "all"))
    assert found.keys() == wanted.keys() == other.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not all(found[key].shape == other[key].shape and torch.equal(found[key], other[key]) for key in other)


def test_a_task_that_chooses_a_state_has_no_other_to_choose(tmp_path: Path) -> None:
    root, teacher = corpora.quesst14(tmp_path / "corpus"), save_teacher(tmp_path / "teacher", layers=2)
    result = superb("qbe", teacher, root, tmp_path / "out", "--states", "last")
    assert result["layer_weights"] == [0.0, 0.0, 1.0]
    assert list(json.loads((tmp_path / "out/qbe/lr0_seed1337/states.json").read_text())) == ["2"]


def test_a_finished_run_of_an_earlier_version_saw_all_states(tmp_path: Path) -> None:
    root = corpora.table(tmp_path / "corpus")
    first = superb("sid", "fbank", root, tmp_path / "out", "--updates", "1")
    (path,) = (tmp_path / "out").glob("*/*/config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    del config["states"]
    path.write_text(json.dumps(config))
    assert superb("sid", "fbank", root, tmp_path / "out", "--updates", "1") == first
