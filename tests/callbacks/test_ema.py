"""StudentEMA: the average grows by the plan of every policy, resumes exactly, and never holds the teacher."""

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.checkpointing import RunCheckpoint
from callbacks.ema import StudentEMA
from callbacks.stacking import StackingCallback
from lightning_modules.export import load_student
from lightning_modules.growth.policies import make_plan
from tests.helpers import (
    POLICY_STAGES,
    make_data,
    make_module,
    make_stacking,
    make_trainer,
    some_policies,
)

DECAY = 0.8
COPYING = sorted(set(POLICY_STAGES) - {"random", "identity"})
ZEROED = re.compile(r".*layers\.\d+\.(attention\.out_proj|feed_forward\.output_dense)\.")
Weights = dict[str, Tensor]


def weights(module: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Recorder(Callback):
    """Student and average after every optimizer step, the student before it, and the student in validation."""

    def __init__(self, ema: StudentEMA | None) -> None:
        self.ema = ema
        self.before: dict[int, Weights] = {}
        self.after: dict[int, Weights] = {}
        self.averages: dict[int, Weights] = {}
        self.validated: list[Weights] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.setdefault(trainer.global_step, weights(pl_module.student))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.setdefault(trainer.global_step, weights(pl_module.student))
        if self.ema is not None:
            assert self.ema.student.depth == pl_module.student.depth
            assert self.ema.student.ancestry == pl_module.student.ancestry
            assert self.ema.student.originals == pl_module.student.originals
            self.averages.setdefault(trainer.global_step, weights(self.ema.student))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append(weights(pl_module.student))


class Run:
    """One fit of 12 optimizer steps that grows at steps 3, 6 and 9 (or fewer, as the policy has stages)."""

    def __init__(
        self,
        folder: Path,
        teacher: Path,
        corpus: Path,
        policy: str = "interleaved",
        ema: StudentEMA | None = None,
        ckpt_path: Path | None = None,
        ema_first: bool = True,
        **settings: Any,
    ) -> None:
        self.ema, self.folder = ema, folder
        self.recorder = Recorder(ema)
        stacking = StackingCallback() if policy == "none" else make_stacking(policy)
        callbacks: list[Callback] = [stacking, *([ema] if ema else [])]
        if ema_first:
            callbacks.reverse()
        saving = RunCheckpoint(every_n_steps=1, keep=100)
        self.trainer = make_trainer(folder, *callbacks, self.recorder, saving, enable_checkpointing=True, **settings)
        self.module = make_module(teacher)
        data = make_data(corpus, folder / "cache")
        self.trainer.fit(self.module, datamodule=data, ckpt_path=str(ckpt_path) if ckpt_path else None)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step={step:09d}.ckpt"


def regrow(average: Weights, grown: Weights, plan: list[int | None], policy: str, sources: Weights) -> Weights:
    """The average after a growth, from names alone: new layers from ``sources``, fresh values from ``grown``."""
    seen: set[int | None] = set()
    values = {name: value for name, value in average.items() if ".layers." not in name}
    for position, source in enumerate(plan):
        template = average if source not in seen else sources
        cloned = source in seen
        seen.add(source)
        for name in grown:
            if f".layers.{position}." not in name:
                continue
            origin = name.replace(f".layers.{position}.", f".layers.{source}.")
            zero = policy == "identity" and cloned and ZEROED.match(name)
            if source is None:
                values[name] = grown[name]
            else:
                values[name] = torch.zeros_like(grown[name]) if zero else template[origin]
    return values


def reference(run: Run, policy: str, every_n_steps: int = 1, copy_student: bool = False) -> dict[int, Weights]:
    """The average after every step by a plain loop in float64 over the recorded weights of the student.

    ``copy_student`` is the control: new layers of the average are made of the student's layers.
    """
    stages = POLICY_STAGES[policy]
    growth_steps = {event.step: event.depth for event in stacking_of(run).events}
    assert sorted(growth_steps.values()) == stages[1:]
    averages: dict[int, Weights] = {}
    average: Weights = {}
    for step in range(12):
        if step in growth_steps:
            depth = stages[stages.index(growth_steps[step]) - 1]
            plan = make_plan(policy, depth, growth_steps[step])
            sources = run.recorder.after[step] if copy_student else average
            average = regrow(average, run.recorder.before[step], plan, policy, sources)
        new = {name: value.double() for name, value in run.recorder.after[step + 1].items()}
        if not average:
            average = new
        elif step % every_n_steps == 0:
            average = {name: DECAY * average[name].double() + (1 - DECAY) * new[name] for name in new}
        averages[step + 1] = average
    return averages


def stacking_of(run: Run) -> StackingCallback:
    return next(c for c in run.trainer.callbacks if isinstance(c, StackingCallback))


@pytest.mark.ci
@pytest.mark.parametrize("policy", some_policies())
def test_average_equals_the_plain_loop_and_resumes_bit_for_bit(
    policy: str, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    run = Run(tmp_path / "whole", teacher, corpus, policy, StudentEMA(DECAY))
    expected = reference(run, policy)
    assert run.recorder.averages.keys() == expected.keys() == set(range(1, 13))
    assert max(distance(run.recorder.averages[step], expected[step]) for step in expected) < 1e-6
    assert distance(run.recorder.averages[12], run.recorder.after[12]) > 1e-4  # the average is another model
    # Control: copies made of the student's layers instead of the average's.
    if policy in COPYING or policy == "identity":
        wrong = reference(run, policy, copy_student=True)
        assert distance(run.recorder.averages[12], wrong[12]) > 1e-4
    # Resume: in the middle of the first stage, at a boundary before its growth, and in a deep stage.
    for step in (2, 3, 10):
        resumed = Run(tmp_path / str(step), teacher, corpus, policy, StudentEMA(DECAY), run.checkpoint(step))
        assert min(resumed.recorder.after) == step + 1
        for later in range(step + 1, 13):
            assert equal(resumed.recorder.after[later], run.recorder.after[later])
            assert equal(resumed.recorder.averages[later], run.recorder.averages[later])


def test_a_lost_average_is_seen_by_the_resume_test(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path / "whole", teacher, corpus, ema=StudentEMA(DECAY))
    checkpoint = torch.load(run.checkpoint(4), weights_only=True)
    checkpoint["state_dict"] = copy.deepcopy(checkpoint["current_model_state"])  # the average is the student
    torch.save(checkpoint, tmp_path / "lost.ckpt")
    resumed = Run(tmp_path / "resumed", teacher, corpus, ema=StudentEMA(DECAY), ckpt_path=tmp_path / "lost.ckpt")
    assert equal(resumed.recorder.after[12], run.recorder.after[12])
    assert distance(resumed.recorder.averages[12], run.recorder.averages[12]) > 1e-5


def test_training_does_not_see_the_average(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    averaged = Run(tmp_path / "with", teacher, corpus, ema=StudentEMA(DECAY))
    plain = Run(tmp_path / "without", teacher, corpus)
    for step in range(1, 13):
        assert equal(averaged.recorder.after[step], plain.recorder.after[step])
    # Validation and the model that fit leaves behind have the averaged weights, without the callback they have not.
    steps = (3, 6, 9, 12)
    for step, seen in zip(steps, averaged.recorder.validated, strict=True):
        assert equal(seen, averaged.recorder.averages[step])
    assert equal(weights(averaged.module.student), averaged.recorder.averages[12])
    assert equal(plain.recorder.validated[-1], plain.recorder.after[12])
    assert equal(weights(plain.module.student), plain.recorder.after[12])


def test_updates_every_n_steps_and_in_accumulation(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path, teacher, corpus, ema=StudentEMA(DECAY, every_n_steps=2), accumulate_grad_batches=2)
    expected = reference(run, "interleaved", every_n_steps=2)
    assert max(distance(run.recorder.averages[step], expected[step]) for step in expected) < 1e-6
    assert equal(run.recorder.averages[1], run.recorder.averages[2])
    assert not equal(run.recorder.averages[2], run.recorder.averages[3])


@pytest.mark.parametrize("ema_first", [False, True])
def test_order_of_the_callbacks_does_not_matter(ema_first: bool, tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path, teacher, corpus, ema=StudentEMA(DECAY), ema_first=ema_first, max_epochs=4)
    assert distance(run.recorder.averages[12], reference(run, "interleaved")[12]) < 1e-6


def test_full_depth_runs_are_averaged_too(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path, teacher, corpus, "none", StudentEMA(DECAY))
    assert run.ema is not None
    assert run.ema.student.depth == 4
    assert distance(run.recorder.averages[12], run.recorder.after[12]) > 1e-4


def test_checkpoints_hold_both_and_no_teacher(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path, teacher, corpus, ema=StudentEMA(DECAY))
    for step, depth in ((2, 1), (8, 3)):
        checkpoint = torch.load(run.checkpoint(step), weights_only=True)
        average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
        assert average.keys() == current.keys()
        assert all(name.startswith(("student.", "objective.")) for name in average)
        for name, value in run.recorder.averages[step].items():
            assert torch.equal(average[f"student.{name}"], value)
            assert torch.equal(current[f"student.{name}"], run.recorder.after[step][name])
        exported = load_student(run.checkpoint(step)).model  # what is exported is the average
        assert exported.config.num_hidden_layers == depth
        averaged = {name.removeprefix("hubert."): v for name, v in run.recorder.averages[step].items()}
        assert equal(weights(exported), averaged)


def test_the_average_takes_the_memory_of_one_student(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path, teacher, corpus, ema=StudentEMA(DECAY))
    assert run.ema is not None
    assert run.ema._average_model is not None
    held = sum(p.numel() for p in run.ema._average_model.parameters())
    assert held == sum(p.numel() for p in run.module.parameters())
    own = {p.data_ptr() for p in run.module.parameters()} | {p.data_ptr() for p in run.module.teacher.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in run.ema._average_model.parameters())


def test_resuming_without_the_callback_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    run = Run(tmp_path / "whole", teacher, corpus, ema=StudentEMA(DECAY))
    with (
        pytest.warns(UserWarning, match=r"add the following callbacks: \['StudentEMA'\]"),  # Lightning's own word
        pytest.raises(ValueError, match="holds an average of the weights beside them"),
    ):
        Run(tmp_path / "resumed", teacher, corpus, ckpt_path=run.checkpoint(5))


def test_a_run_can_take_up_averaging(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    plain = Run(tmp_path / "plain", teacher, corpus)
    with pytest.warns(UserWarning, match="not created with WeightAveraging"):
        run = Run(tmp_path / "on", teacher, corpus, ema=StudentEMA(DECAY), ckpt_path=plain.checkpoint(5))
    assert equal(run.recorder.averages[6], plain.recorder.after[6])  # the first update copies
    assert equal(run.recorder.after[12], plain.recorder.after[12])
    assert not equal(run.recorder.averages[12], plain.recorder.after[12])


@pytest.mark.parametrize(("decay", "every_n_steps"), [(1.0, 1), (-0.1, 1), (0.9, 0)])
def test_bad_settings_are_named(decay: float, every_n_steps: int) -> None:
    with pytest.raises(ValueError, match=f"decay={decay}, every_n_steps={every_n_steps}"):
        StudentEMA(decay, every_n_steps)


def test_the_command_line_turns_it_on(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.training.fit import DistillationCLI

    monkeypatch.setenv("WANDB_MODE", "disabled")
    student = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_layers": 2}
    arguments = {
        "data.root": corpus,
        "data.train_splits": "[train]",
        "data.val_splits": "[dev]",
        "data.batch_size": 4,
        "data.num_workers": 0,
        "data.cache_dir": tmp_path / "cache",
        "model.teacher.init_args.model": teacher,
        **{f"model.student.{name}": value for name, value in student.items()},
        "model.objective.layers": "[2]",
        "model.objective.intermediate": "prediction",
        "growth.policy": "gradual",
        "growth.layers_per_stage": 1,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "runs_dir": tmp_path,
        "name": "averaged",
        "log_samples": "false",
        "trainer.callbacks+": "callbacks.ema.StudentEMA",
        "trainer.callbacks.decay": 0.9,
    }
    cli = DistillationCLI(["fit", *(f"--{name}={value}" for name, value in arguments.items())])
    ema = next(c for c in cli.trainer.callbacks if isinstance(c, StudentEMA))
    assert (ema.decay, ema.student.depth) == (0.9, 2)
    assert equal(weights(ema.student), weights(cli.model.student))
    checkpoint = torch.load(tmp_path / "averaged" / "checkpoints" / "last.ckpt", weights_only=True)
    name = "student.hubert.encoder.layers.1.attention.q_proj.weight"
    assert torch.equal(checkpoint["state_dict"][name], ema.student.state_dict()[name.removeprefix("student.")])
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
