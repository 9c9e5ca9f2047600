"""Growth inside one fit: every policy, what is kept, what is refused, and that measuring it changes nothing."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging

from callbacks.ema import StudentEMA
from callbacks.stacking import StackingCallback
from callbacks.throughput import ThroughputCallback
from lightning_modules.growth.policies import POLICIES, make_plan
from lightning_modules.optimisation import rebind
from tests.helpers import (
    POLICY_STAGES,
    make_data,
    make_module,
    make_stacking,
    make_trainer,
)


class Recorder(Callback):
    """Loss, depth, learning rate and optimizer groups of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.depths: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.depths.append(pl_module.student.depth)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        assert len(trainer.optimizers[0].param_groups) == 2
        trained = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert trained == {p for p in pl_module.parameters() if p.requires_grad}


def fit(
    folder: Path, teacher: Path, corpus: Path, stacking: StackingCallback, **settings: Any
) -> tuple[L.Trainer, Any, Recorder]:
    recorder = Recorder()
    optimizer = settings.pop("optimizer", None)
    trainer = make_trainer(folder, stacking, recorder, **settings)
    module = make_module(teacher, optimizer=optimizer)
    trainer.fit(module, datamodule=make_data(corpus, folder / "cache"))
    return trainer, module, recorder


def test_the_table_covers_every_policy() -> None:
    assert set(POLICY_STAGES) == set(POLICIES)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_grows_through_its_stages(policy: str, tmp_path: Path, teacher: Path, corpus: Path) -> None:
    stages = POLICY_STAGES[policy]
    _, module, recorder = fit(tmp_path, teacher, corpus, make_stacking(policy))
    assert module.student.depth == 4
    assert sorted(set(recorder.depths)) == stages
    assert recorder.depths == sorted(recorder.depths)
    assert len(recorder.losses) == 12
    assert all(torch.isfinite(torch.tensor(recorder.losses)))
    events = json.loads((tmp_path / "growth.json").read_text())
    assert [event["depth"] for event in events] == stages[1:]
    for depth, event in zip(stages, events, strict=False):
        assert event["plan"] == make_plan(policy, depth, event["depth"])
        assert event["step"] == event["epoch"] * 3
        assert event["parameters"] > 0
        assert event["seconds"] > 0
        assert event["loss_before"] > 0
        assert event["loss_after"] > 0
    assert events[-1]["ancestry"] == module.student.ancestry
    assert events[-1]["parameters"] == sum(p.numel() for p in module.student.parameters())


def test_learning_rate_follows_one_schedule_or_rewarms(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    flat = {"schedule": "constant", "warmup_fraction": 0.0}
    _, _, kept = fit(tmp_path / "a", teacher, corpus, make_stacking(), optimizer=flat)
    assert kept.rates == [1e-3] * 12
    again = make_stacking(lr_after_growth="rewarm", rewarm_steps=2)
    _, _, rewarmed = fit(tmp_path / "b", teacher, corpus, again, optimizer=flat)
    # Rates are read after the scheduler moved on: the dip belongs to steps 3, 6 and 9.
    assert rewarmed.rates == [1e-3, 1e-3, 5e-4, 1e-3, 1e-3, 5e-4, 1e-3, 1e-3, 5e-4, 1e-3, 1e-3, 1e-3]


@pytest.mark.parametrize("setting", ["copy", "zero", "reset"])
def test_optimizer_state_after_a_growth(setting: str, tmp_path: Path, teacher: Path, corpus: Path) -> None:
    seen: dict[str, list[bool]] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:  # right after 1 -> 2, plan [0, 0]
                state = trainer.optimizers[0].state
                layers = pl_module.student.hubert.encoder.layers
                seen["has"] = [layer.attention.q_proj.weight in state for layer in layers]

    stacking = make_stacking(optimizer_state=setting)
    trainer = make_trainer(tmp_path, stacking, Look())
    trainer.fit(make_module(teacher), datamodule=make_data(corpus, tmp_path / "cache"))
    assert seen["has"] == {"copy": [True, True], "zero": [True, False], "reset": [False, False]}[setting]


def test_measuring_the_loss_changes_nothing_bit_for_bit(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    runs = {}
    for name, settings in {"with": {}, "without": {"measure_loss": False, "verify": False}}.items():
        _, module, recorder = fit(tmp_path / name, teacher, corpus, make_stacking(**settings))
        runs[name] = (recorder.losses, [p.detach().clone() for p in module.parameters()])
    assert runs["with"][0] == runs["without"][0]
    assert all(torch.equal(a, b) for a, b in zip(runs["with"][1], runs["without"][1], strict=True))
    # Control: the comparison sees a difference as small as another optimizer state.
    _, _, other = fit(tmp_path / "other", teacher, corpus, make_stacking(optimizer_state="zero"))
    assert other.losses[:3] == runs["with"][0][:3]
    assert other.losses[-1] != runs["with"][0][-1]


@pytest.mark.parametrize("aside", [True, False])
def test_a_growth_is_training_time_and_measuring_the_loss_is_not(
    aside: bool, tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, clock, stacking = make_data(corpus, tmp_path / "cache"), ThroughputCallback(), make_stacking()
    late = 0.0

    def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slowly(*arguments: Any) -> Any:
            nonlocal late
            late += seconds
            return function(*arguments)

        return slowly

    now = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    monkeypatch.setattr("callbacks.throughput.time", now)
    monkeypatch.setattr("callbacks.stacking.rebind", slow(rebind, 1000.0))
    monkeypatch.setattr(data, "example_batch", slow(data.example_batch, 100.0))
    if not aside:  # control
        monkeypatch.setattr(ThroughputCallback, "aside", lambda *_: nullcontext())
    make_trainer(tmp_path, clock, stacking).fit(make_module(teacher), datamodule=data)
    assert late == 3600  # measured before and after each of three growths
    assert 3000 <= clock.train_seconds < 3600 if aside else clock.train_seconds >= 3600
    if aside:  # at each growth the seconds before it
        assert [(event.train_seconds or 0.0) // 1000 for event in stacking.events] == [0, 1, 2]


def test_full_depth_is_the_default(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    _, _, recorder = fit(tmp_path, teacher, corpus, StackingCallback())
    assert set(recorder.depths) == {4}
    assert not (tmp_path / "growth.json").exists()


def test_a_fast_dev_run_has_a_schedule_of_its_own_length(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    _, _, recorder = fit(tmp_path, teacher, corpus, StackingCallback(), fast_dev_run=2)
    assert recorder.rates == [5e-4, 0.0]  # read after the scheduler moved on


@pytest.mark.parametrize(
    ("callback", "trainer", "message"),
    [
        ({}, {"max_epochs": 3}, "max_epochs=3 is too few for 4 stages"),
        ({}, {"max_steps": 5}, "max_steps=5"),
        (
            {"policy": "none", "stages": None},
            {"max_steps": 5},
            "max_epochs=4; set trainer.max_epochs",
        ),
        ({"policy": "none", "stages": None}, {"max_steps": 5, "max_epochs": -1}, "max_steps=5, trainer.max_epochs=-1"),
        ({"stages": [1, 2]}, {}, r"end at 2 layers, but model.student.num_layers=4"),
        ({"stages": [3, 4], "policy": "stackbert"}, {}, "stackbert"),
    ],
)
def test_what_cannot_work_is_refused(
    callback: dict[str, Any],
    trainer: dict[str, Any],
    message: str,
    tmp_path: Path,
    teacher: Path,
    corpus: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(
            tmp_path,
            teacher,
            corpus,
            StackingCallback(**({"policy": "interleaved", "stages": [1, 2, 3, 4]} | callback)),
            **trainer,
        )


@pytest.mark.parametrize(
    ("settings", "warned"), [({"schedule": "prop-1"}, True), ({"stages": [2, 4]}, True), ({}, False)]
)
def test_a_schedule_without_a_policy_is_said_to_have_no_effect(
    settings: dict[str, Any],
    warned: bool,
    tmp_path: Path,
    teacher: Path,
    corpus: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fit(tmp_path, teacher, corpus, StackingCallback(**settings), max_epochs=1)
    assert ("growth.policy=none: all 4 layers train throughout" in caplog.text) == warned


def test_a_stage_whose_loss_has_no_layer_is_refused_before_the_first_step(
    tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    def train(stacking: StackingCallback, num_layers: int = 4, **objective: object) -> int:
        trainer = make_trainer(tmp_path, stacking)
        module = make_module(teacher, num_layers, objective={"intermediate": "l2l", "layers": [2], **objective})
        trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
        return trainer.global_step

    between = r"teacher layer 2 of 4 falls between the layers of a student of depth 3: .* growth.stages=\[2, 4, 6"
    with pytest.raises(ValueError, match=between):
        train(StackingCallback("gradual", stages=[2, 3, 4]))
    with pytest.raises(ValueError, match=between):
        train(StackingCallback(), num_layers=3)
    assert not (tmp_path / "growth.json").exists()
    assert train(StackingCallback("gradual", stages=[2, 3, 4]), attach="original") == 12  # control


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)])
def test_weight_averaging_is_refused(averaging: Callback, tmp_path: Path, teacher: Path, corpus: Path) -> None:
    trainer = make_trainer(tmp_path, make_stacking(), StudentEMA(), averaging)
    with pytest.raises(ValueError, match=f"{type(averaging).__name__} keeps a copy"):
        trainer.fit(make_module(teacher), datamodule=make_data(corpus, tmp_path / "cache"))


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="interleaved"):
        StackingCallback("interleave")


def test_two_optimizers_are_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    module = make_module(teacher)
    module.automatic_optimization = False
    groups = [p for p in module.parameters() if p.requires_grad]
    module.configure_optimizers = lambda: [torch.optim.SGD(groups[:2], 0.1), torch.optim.SGD(groups[2:], 0.1)]
    trainer = make_trainer(tmp_path, make_stacking())
    with pytest.raises(ValueError, match="one optimizer, not 2"):
        trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))


def test_a_deeper_checkpoint_than_the_schedule_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    class Deeper(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.student.grow([0, 0, 0])

    trainer = make_trainer(tmp_path, Deeper(), make_stacking())
    with pytest.raises(ValueError, match="has 3 layers, but the schedule has 1 in epoch 0"):
        trainer.fit(make_module(teacher), datamodule=make_data(corpus, tmp_path / "cache"))


def test_a_shallower_student_than_full_depth_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    class Shallower(Callback):  # as a checkpoint of another run makes it
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.student.start_at(3)

    trainer = make_trainer(tmp_path, Shallower(), StackingCallback())
    with pytest.raises(ValueError, match="has 3 layers, but the schedule has 4 in epoch 0"):
        trainer.fit(make_module(teacher), datamodule=make_data(corpus, tmp_path / "cache"))
