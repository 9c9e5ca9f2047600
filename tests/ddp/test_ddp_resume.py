"""A run that was begun with one process goes on with two as if nothing had happened, and the other way round."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ddp.launch import Launched, launch_once, once, ranks_agree
from tests.ddp.scenarios import STEPS, STEPS_PER_EPOCH, Record, Scenario, run_alone
from tests.ddp.test_ddp_growth import HALF_TOLERANCE, MARGIN, TOLERANCE

pytestmark = pytest.mark.ci  # as test_ddp_growth.py

# In mid-epoch at the first depth, at an epoch's end (before a growth), in mid-epoch after one and two growths.
RESUMED = (1, 2, 3, 5, 6)
FAST = (2, 5)  # a growth comes first, and the middle of an epoch after two growths
SLOW = {f"two, from {k}" for k in RESUMED if k not in FAST}
STEPS_RESUMED = [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in RESUMED]
FORGOTTEN = ("forget_optimizer", "forget_place")


def base(home: Path) -> Scenario:
    return Scenario("one", str(home), optimizer="adamw-fused", accumulate=2, clip=0.3, every_n_steps=1)


@pytest.fixture(scope="module")
def begun_alone(home: Path) -> dict[str, Record]:
    """Uninterrupted runs of one process, with their checkpoints in ``home``."""
    scenarios = [
        base(home),
        replace(base(home), name="one, 16-mixed", optimizer="adamw-foreach", precision="16-mixed"),
    ]
    return once(home / "resume-one", lambda: {scenario.name: run_alone(scenario) for scenario in scenarios})


@pytest.fixture(scope="module")
def records(home: Path, begun_alone: dict[str, Record]) -> Launched:
    """Runs of two processes: one uninterrupted, the others from checkpoints of one process."""
    one, two = base(home), replace(base(home), every_n_steps=None)
    half = replace(one, name="one, 16-mixed", optimizer="adamw-foreach", precision="16-mixed")
    scenarios = [
        replace(one, name="two"),
        *(replace(two, name=f"two, from {k}", checkpoint=one.checkpoint_after(k)) for k in RESUMED),
        replace(half, name="two, 16-mixed", every_n_steps=None, checkpoint=half.checkpoint_after(3)),
        *(replace(two, name=fault, checkpoint=one.checkpoint_after(3), fault=fault) for fault in FORGOTTEN),
        *(replace(two, name=f"validate {k}", kind="validate", checkpoint=one.checkpoint_after(k)) for k in (1, 8)),
    ]
    return Launched(scenarios, SLOW, home / "resume-two")


def difference(uninterrupted: Record, resumed: Record) -> float:
    """Of the losses; learning rate, depth, epoch and rows of each global batch must be equal."""
    rest = uninterrupted["steps"][STEPS - len(resumed["steps"]) :]
    for key in ("step", "epoch", "depth", "lr", "index"):
        assert [step[key] for step in resumed["steps"]] == [step[key] for step in rest], key
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(rest, resumed["steps"], strict=True))


@pytest.mark.parametrize("step", STEPS_RESUMED)
def test_one_process_goes_on_as_two(step: int, begun_alone: dict[str, Record], records: Launched) -> None:
    resumed = records[f"two, from {step}"]
    assert len(resumed["steps"]) == STEPS - step
    assert difference(begun_alone["one"], resumed) <= TOLERANCE
    assert abs(begun_alone["one"]["val_loss"] - resumed["val_loss"]) <= TOLERANCE
    assert all(ranks_agree(resumed))
    assert resumed["growths"] == begun_alone["one"]["growths"]


@pytest.mark.parametrize("step", STEPS_RESUMED)
def test_two_processes_go_on_as_one(step: int, home: Path, records: Launched) -> None:
    uninterrupted = records["two"]  # which writes the checkpoints
    name, checkpoint = f"one, from {step} of two", replace(base(home), name="two").checkpoint_after(step)
    resumed = run_alone(replace(base(home), name=name, every_n_steps=None, checkpoint=checkpoint))
    assert len(resumed["steps"]) == STEPS - step
    assert difference(uninterrupted, resumed) <= TOLERANCE
    assert resumed["growths"] == uninterrupted["growths"]


def test_every_global_batch_of_an_epoch_is_another(records: Launched) -> None:
    # Or the equality of rows above would say nothing.
    batches = [tuple(step["index"]) for step in records["two"]["steps"]]
    assert len(set(batches)) > STEPS_PER_EPOCH
    assert all(a != b for a, b in itertools.pairwise(batches))


@pytest.mark.slow  # of one process: tests/callbacks/test_resume.py
def test_accumulation_may_change_at_an_epochs_end(home: Path) -> None:
    more = replace(base(home), name="one, twice the micro-batches", accumulate=4, every_n_steps=0)
    uninterrupted, checkpoint = run_alone(more), more.checkpoint_after(STEPS_PER_EPOCH)
    half = replace(base(home), name="two, half the micro-batches", every_n_steps=None, checkpoint=checkpoint)
    resumed = launch_once([half], home / "resume-half")[half.name]
    assert len(resumed["steps"]) == STEPS - STEPS_PER_EPOCH
    assert difference(uninterrupted, resumed) <= TOLERANCE


def test_the_scaler_comes_back_too(begun_alone: dict[str, Record], records: Launched) -> None:
    one, resumed = begun_alone["one, 16-mixed"], records["two, 16-mixed"]
    assert difference(one, resumed) <= HALF_TOLERANCE
    assert resumed["scales"][0] == resumed["scales"][1] == one["scales"][0][3:]
    assert one["scales"][0][3] != 2.0**8  # what a new one would begin with


def test_without_the_optimizers_state_the_losses_differ(begun_alone: dict[str, Record], records: Launched) -> None:
    assert difference(begun_alone["one"], records["forget_optimizer"]) > MARGIN


def test_without_the_place_in_the_data_the_rows_differ(begun_alone: dict[str, Record], records: Launched) -> None:
    with pytest.raises(AssertionError, match=r"^index"):
        difference(begun_alone["one"], records["forget_place"])


@pytest.mark.parametrize(("step", "depth"), [(1, 1), (STEPS, 4)])
def test_a_module_of_any_depth_validates_a_checkpoint_of_any(
    step: int, depth: int, home: Path, records: Launched
) -> None:
    # The module is built with 4 layers and loads 1 (the runs above: it starts with 1 and loads 2 and more).
    checkpoint = base(home).checkpoint_after(step)
    scenario = replace(base(home), name=f"validate {step} alone", kind="validate", every_n_steps=None)
    one, two = run_alone(replace(scenario, checkpoint=checkpoint)), records[f"validate {step}"]
    assert one["depth"] == two["depth"] == depth
    assert abs(one["val_loss"] - two["val_loss"]) <= TOLERANCE
    other = records["validate 8" if step == 1 else "validate 1"]
    assert abs(one["val_loss"] - other["val_loss"]) > MARGIN
