"""A GPU computes what a CPU computes, twice the same, and goes on where either stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import optimisation
from lightning_modules.distillation import DistillationModule
from tests.gpu.fits import Fit, Place, checkpoint_after, every_step
from tests.lightning_modules.graphs import TORCH_WARNINGS
from tests.resuming import Scenario, checkpoints, file_differences, fit, hop_problems
from tests.test_switches import SWITCHES, Run
from tests.test_switches import home as home  # a fixture
from tests.test_switches import train as switched


def test_a_growing_fit_equals_the_cpus(place: Place) -> None:
    cpu = place.fit("on_the_cpu", accelerator="cpu")
    here = place.fit("here")
    other = place.fit("another_order", data={"seed": 1})
    assert here.loss_error(cpu) < 1e-4 < other.loss_error(cpu) / 10
    assert here.distance(cpu) < 0.01 * other.distance(cpu)


def test_the_same_run_twice_is_bit_for_bit_the_same(place: Place) -> None:
    first, second = (
        place.fit(f"twice_{n}", module={"dropout": 0.1}, deterministic=True, precision="bf16-mixed") for n in range(2)
    )
    other = place.fit("another_seed", module={"dropout": 0.1, "seed": 1}, deterministic=True, precision="bf16-mixed")
    assert torch.equal(first.losses_S, second.losses_S)
    assert torch.equal(first.weights_N, second.weights_N)
    assert not torch.equal(first.weights_N, other.weights_N)


def test_every_checkpoint_resumes_bit_for_bit(place: Place, tmp_path: Path) -> None:
    """With dropout, bf16 and data workers."""
    few = None if place.device == "cuda" else 2  # tests/callbacks/test_resume.py has more of a CPU
    settings = {"batches_per_epoch": few, "accelerator": place.accelerator}
    scenario = Scenario(num_workers=2, precision="bf16-mixed", **settings)
    assert hop_problems(tmp_path, place.folder, scenario, second_hops=0) == []
    fit(tmp_path / "control", place.folder, scenario)
    two = checkpoints(tmp_path / "control")[:2]
    assert file_differences(*two)
    assert file_differences(two[0], two[0]) == []


@pytest.mark.filterwarnings(*[mark.args[0] for mark in TORCH_WARNINGS])
def test_a_compiled_run_resumes_within_rounding(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "inductor" if place.device == "cuda" else "aot_eager"
    compiled = {"dropout": 0.1, "compile": True, "compile_backend": backend}
    whole = place.fit("compiled", [every_step()], module=compiled)

    def resumed(name: str) -> Fit:
        torch.compiler.reset()  # as in a new process
        return place.fit(name, [every_step()], checkpoint_after(place.folder / "compiled", 5), module=compiled)

    again = resumed("compiled_again")
    assert len(again.losses_S) == 7
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "on_train_batch_start", lambda *_: None)  # which seeds the dropout
        unseeded = resumed("compiled_unseeded")
    assert again.loss_error(whole) < 1e-4 < unseeded.loss_error(whole) / 10


def test_adamw_follows_the_device_of_a_resumed_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a CPU to a GPU and back; on a CPU between the two implementations that stand for them."""
    there: dict[str, Any] = {"accelerator": "cpu", "module": {"optimizer": {"implementation": "foreach"}}}
    here: dict[str, Any] = {"module": {"optimizer": {"implementation": "fused"}}}
    if place.device == "cuda":
        there["module"] = here["module"] = {"optimizer": {"implementation": "auto"}}
    whole = place.fit("there", [every_step()], **there)
    up = place.fit("there_to_here", [every_step()], checkpoint_after(place.folder / "there", 5), **here)
    back = checkpoint_after(place.folder / "there_to_here", 9)
    down = place.fit("here_to_there", [every_step()], back, **there)
    assert _fused(up) == {True}
    assert _fused(down) <= {None, False}
    assert _step_devices(up) == {place.device}
    assert _step_devices(down) == {"cpu"}
    assert max(up.loss_error(whole), down.loss_error(whole)) < 1e-4
    monkeypatch.setattr(optimisation, "_keep_settings", lambda optimizer, state: state)
    assert _fused(place.fit("kept", [every_step()], checkpoint_after(place.folder / "there", 5), **here)) != {True}


def _fused(run: Fit) -> set[bool | None]:
    return {group["fused"] for group in run.trainer.optimizers[0].param_groups}


def _step_devices(run: Fit) -> set[str]:
    """At the last step; Lightning moves a run to the CPU when it ends, but not its counts of steps."""
    return {state["step"].device.type for state in run.trainer.optimizers[0].state.values()}


@pytest.fixture(scope="module")
def plain_and_other(device: str, home: Path) -> tuple[Run, Run]:
    """The plain run here, and one with another order of the data."""
    return _switched(device, home, "plain"), _switched(device, home, "other", seed=1)


def _switched(device: str, home: Path, name: str, **settings: Any) -> Run:
    accelerator = "gpu" if device == "cuda" else "cpu"
    here = {"accelerator": accelerator, "deterministic": True, "float32": "ieee"}
    return switched(home, home / f"{device}_{name}", **here, **settings)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_stays_within_its_bounds(name: str, device: str, home: Path, plain_and_other: tuple[Run, Run]) -> None:
    if device == "cpu" and name != "all of them":
        pytest.skip("tests/test_switches.py has it on a CPU")
    settings, loss_bound, weight_bound = SWITCHES[name]
    plain, other = plain_and_other
    run = _switched(device, home, name.replace(" ", "_"), **settings)
    assert run.loss_error(plain) < loss_bound < other.loss_error(plain) / 2
    assert run.distance(plain) < weight_bound * other.distance(plain)
