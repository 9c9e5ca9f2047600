"""Stopping on signals with a checkpoint, SLURM's requeue, and checkpoints that cannot be written."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpointing import RunCheckpoint
from callbacks.requeue import EXIT_SIGTERM
from callbacks.stop_signals import StopSignals
from experiments.cli import run
from tests.callbacks.faults import AskToStop, SendSignal
from tests.helpers import make_data, make_module, make_stacking, make_trainer
from tests.holding import NOTE_BEGINNING, beginnings
from tests.processes import ended, fork_program
from tests.slurm_task import pretend_task

REPOSITORY = Path(__file__).resolve().parents[2]


Fit = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def whole(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run that nothing stops."""
    return fits_below(tmp_path_factory.mktemp("whole"), teacher, corpus)("whole")


@pytest.fixture
def fit(teacher: Path, corpus: Path, tmp_path: Path) -> Fit:
    return fits_below(tmp_path, teacher, corpus)


def fits_below(tmp_path: Path, teacher: Path, corpus: Path) -> Fit:
    """Train four epochs of 3 steps, 2 micro-batches each, growing; returns the last checkpoint."""

    def run(
        name: str, *callbacks: Callback, every_n_steps: int = 0, ckpt_path: Path | None = None, **settings: Any
    ) -> Any:
        own = (make_stacking(), RunCheckpoint(every_n_steps=every_n_steps), *callbacks)
        folder = tmp_path / name
        trainer = make_trainer(folder, *own, enable_checkpointing=True, accumulate_grad_batches=2, **settings)
        data = make_data(corpus, tmp_path / "cache")
        trainer.fit(make_module(teacher), datamodule=data, ckpt_path=ckpt_path and str(ckpt_path))
        return load(folder)

    return run


def load(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether weights, optimizer state and schedule of two checkpoints are the same bits."""
    if one["lr_schedulers"] != other["lr_schedulers"]:
        return False
    return all(_same(one[key], other[key]) for key in ("state_dict", "optimizer_states"))


def _same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("epoch", "batch", "step"),
    [(1, 0, 4), (1, 1, 4), (1, 4, 6), (1, "validation", 6)],
    ids=["first half of a window", "second half", "last window of an epoch", "validation"],
)
def test_sigterm_stops_with_a_checkpoint_that_resumes_exactly(
    epoch: int, batch: Any, step: int, tmp_path: Path, fit: Fit, whole: dict[str, Any]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException) as stop:
        fit("stopped", SendSignal(epoch, batch))
    assert stop.value.code == EXIT_SIGTERM == 143
    assert signal.getsignal(signal.SIGTERM) == before
    stopped = load(tmp_path / "stopped")
    assert stopped["global_step"] == step
    assert not equal(whole, stopped)
    resumed = fit("stopped", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert resumed["global_step"] == whole["global_step"] == 12
    assert equal(whole, resumed)


STOPS: dict[str, tuple[Any, int]] = {
    "batch start": (lambda: AskToStop(1, "on_train_batch_start", 2), 5),
    "first half of a window": (lambda: AskToStop(1, "on_train_batch_end", 0), 4),
    "second half": (lambda: AskToStop(1, "on_train_batch_end", 1), 4),
    "last half of an epoch": (lambda: AskToStop(1, "on_train_batch_end", 5), 6),
    "epoch start": (lambda: AskToStop(1, "on_train_epoch_start"), 4),
    "epoch end": (lambda: AskToStop(0, "on_train_epoch_end"), 3),
    "validation": (lambda: AskToStop(1, "on_validation_end"), 6),
    "early stopping": (lambda: EarlyStopping("val/loss", patience=1, min_delta=100.0), 6),
    "max_time": (lambda: OutOfTime(5), 5),
}


class OutOfTime(Timer):
    """Lightning's ``max_time``, with a clock that counts optimizer steps."""

    def __init__(self, steps: int) -> None:
        super().__init__({"seconds": steps})
        self.steps = 0

    def time_elapsed(self, stage: Any = None) -> float:
        return self.steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.steps = trainer.global_step
        super().on_train_batch_end(trainer, *args, **kwargs)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("name", STOPS)
def test_a_stop_that_is_no_signal_resumes_exactly_too(
    name: str, tmp_path: Path, fit: Fit, whole: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As if it were complete Lightning would end the epoch, and the student grow."""
    make, step = STOPS[name]
    with pytest.raises(SIGTERMException) as stop:
        fit("stopped", make())
    assert stop.value.code == EXIT_SIGTERM
    assert "stopped by trainer.max_time (which counts the time of all attempts) or by a callback" in caplog.text
    assert load(tmp_path / "stopped")["global_step"] == step
    ends = {f"stage_{depth}.ckpt" for depth in range(1, 1 + step // 3)}
    assert {path.name for path in (tmp_path / "stopped" / "checkpoints").glob("stage_*")} == ends
    resumed = fit("stopped", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert equal(whole, resumed)


def test_control_lightning_ends_the_epoch_at_such_a_stop(
    tmp_path: Path, fit: Fit, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "take_over", lambda self, trainer: None)
    fit("stopped", AskToStop(1, "on_train_batch_end", 1))
    assert load(tmp_path / "stopped")["global_step"] == 4
    assert (tmp_path / "stopped" / "checkpoints" / "stage_2.ckpt").is_file()
    assert not equal(whole, fit("stopped", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt"))


def test_a_stop_waits_for_the_least_number_of_epochs(tmp_path: Path, fit: Fit) -> None:
    with pytest.raises(SIGTERMException):
        fit("stopped", AskToStop(0, "on_train_batch_end", 1), min_epochs=2)
    assert load(tmp_path / "stopped")["global_step"] == 6


def test_a_run_that_is_out_of_time_says_so_before_its_first_step(tmp_path: Path, fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_time counts the time of all attempts, so raise it to go on"):
        fit("run", OutOfTime(0))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_in_the_last_epochs_end_there_is_nothing_to_stop(fit: Fit, whole: dict[str, Any]) -> None:
    assert equal(whole, fit("signalled", SendSignal(3, 4)))


def test_control_lightnings_own_handlers_lose_the_step(
    tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "listen", lambda self, trainer: None)
    with pytest.raises(SIGTERMException) as stop:
        fit("stopped", SendSignal(1, 1))
    assert stop.value.code == EXIT_SIGTERM
    assert load(tmp_path / "stopped")["global_step"] == 3  # the end of epoch 0; with the handlers it is 4


# -- SLURM


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pretend_task(tmp_path, monkeypatch)


@pytest.mark.ci
def test_slurms_signal_requeues_between_optimizer_steps(
    slurm: Path, tmp_path: Path, fit: Fit, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    ckpt_path = None
    for attempt, (batch, step) in enumerate([(0, 4), (2, 5), (4, 6)], start=1):
        with pytest.raises(SIGTERMException) as stop:
            fit("run", SendSignal(1, batch, "SIGUSR1"), ckpt_path=ckpt_path)
        assert stop.value.code == EXIT_SIGTERM
        assert slurm.read_text() == "requeue 123\n" * attempt
        assert load(folder)["global_step"] == step
        ckpt_path = folder / "checkpoints" / "last.ckpt"
    assert equal(whole, fit("run", ckpt_path=ckpt_path))


@pytest.mark.parametrize("preempted", [True, False])
def test_a_preempted_run_goes_back_into_the_queue_and_a_cancelled_one_does_not(
    preempted: bool, slurm: Path, fit: Fit
) -> None:
    script = slurm.parent / "bin" / "scontrol"
    time = "2026-11-30T12:00:00" if preempted else "None"
    script.write_text(f"{script.read_text()}echo JobId=123 PreemptTime={time}\n")
    with pytest.raises(SIGTERMException) as stop:
        fit("run", SendSignal(1, 0, "SIGTERM"))
    assert stop.value.code == EXIT_SIGTERM
    assert slurm.read_text().splitlines() == ["show job --oneliner 123", "requeue 123"][: 1 + preempted]


def test_a_requeue_comes_before_the_loggers_end(slurm: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger that waits for its server must not use up the time that SLURM leaves."""
    asked: list[bool] = []

    class Waits(CSVLogger):
        def finalize(self, status: str) -> None:
            asked.append(slurm.exists())

    with pytest.raises(SIGTERMException):
        fit("run", SendSignal(1, 0, "SIGUSR1"), logger=Waits(slurm.parent))
    assert asked
    assert all(asked)


def test_lightning_still_has_what_is_taken_from_it() -> None:
    """Private names that the module touches; if this fails, read the new version's signal_connector.py."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    assert callable(trainer._checkpoint_connector.dump_checkpoint)
    assert hasattr(trainer._accelerator_connector, "cluster_environment")
    assert trainer.received_sigterm is False
    assert issubclass(SIGTERMException, SystemExit)
    for name in ("_slurm_sigusr_handler_fn", "_sigterm_notifier_fn", "register_signal_handlers", "teardown"):
        assert callable(getattr(_SignalConnector, name))


# -- checkpoints that cannot be written


class NoRoom(Callback):
    """From an epoch on, files may have a quarter of the last checkpoint's size: then an error."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            size = (Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, self.limits[1]))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, fit: Fit, whole: dict[str, Any]) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(OSError, match=r"cannot write a checkpoint to .*/run/checkpoints \(File too large\)") as error:
        fit("run", NoRoom(epoch=1))
    assert f"{folder / 'last.ckpt'} is untouched" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt",
        "stage_1.ckpt",
        "step=000000003.ckpt",
    ]
    assert load(tmp_path / "run")["global_step"] == 3
    assert equal(whole, fit("run", ckpt_path=folder / "last.ckpt"))


def test_control_writing_in_place_destroys_the_checkpoint_before(
    tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_in_place(checkpoint: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    monkeypatch.setattr("callbacks.checkpointing._write", write_in_place)
    with pytest.raises((OSError, RuntimeError)):
        fit("run", NoRoom(epoch=1))
    steps = list((tmp_path / "run" / "checkpoints").glob("step=*"))
    assert len(steps) == 2  # the unfinished one took a checkpoint's name
    with pytest.raises((OSError, EOFError, RuntimeError)):
        torch.load(max(steps), weights_only=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path, fit: Fit) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="there is none from before: make room or make the folder writable"):
        fit("run")
    assert folder.is_file()


def test_what_a_kill_left_behind_is_cleared(tmp_path: Path, fit: Fit) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("step=000000001.ckpt.elsewhere-7.tmp", "last.ckpt.elsewhere-7.tmp"):
        (folder / name).write_text("half a checkpoint")
    fit("run")
    assert not list(folder.glob("*.tmp"))


@pytest.mark.ci
def test_resuming_from_an_older_checkpoint_keeps_what_it_writes(tmp_path: Path, fit: Fit) -> None:
    fit("run", every_n_steps=1)
    folder = tmp_path / "run" / "checkpoints"

    def kept() -> list[int]:
        return sorted(int(path.stem.removeprefix("step=")) for path in folder.glob("step=*.ckpt"))

    assert kept() == [11, 12]
    before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}
    for batch, step, expected in ((0, 4, [4]), (2, 5, [4, 5])):
        with pytest.raises(SIGTERMException):
            fit("run", SendSignal(1, batch), every_n_steps=1, ckpt_path=folder / "stage_1.ckpt")
        assert kept() == expected
        assert load(tmp_path / "run")["global_step"] == step
        time.sleep(1.1)  # folders are named by the second
    assert fit("run", every_n_steps=1, ckpt_path=folder / "last.ckpt")["global_step"] == 12
    assert kept() == [4, 5, 11, 12]
    first, second = sorted(folder.glob("abandoned_*"))
    later = {name: content for name, content in before.items() if name != "stage_1.ckpt"}
    assert {path.name: path.read_bytes() for path in first.iterdir()} == later
    assert {path.name for path in second.iterdir()} == {"step=000000004.ckpt", "last.ckpt"}


def test_only_what_an_attempt_has_written_is_removed_by_it(tmp_path: Path, fit: Fit) -> None:
    """Those before it, a user's own, and a damaged one, whatever their steps."""
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(SIGTERMException):
        fit("run", SendSignal(1, 2), every_n_steps=1)
    shutil.copy(folder / "step=000000004.ckpt", folder / "best so far.ckpt")
    (folder / "step=000000001.ckpt").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt") if path.name != "last.ckpt"}
    fit("run", every_n_steps=1, ckpt_path=folder / "step=000000005.ckpt")
    after = {path.name: path.read_bytes() for path in folder.rglob("*.ckpt")}
    assert {name: after.get(name) for name in before} == before


# -- the program


@pytest.mark.ci
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_program_stops_on_a_signal_and_goes_on_with_last(
    sign: signal.Signals, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """At Ctrl-C it writes no checkpoint, so that it ends at once; the last one serves."""
    command = ["fit", "--config", "interleave_equal"]
    settings = {
        "model.student.hidden_size": 16, "model.student.intermediate_size": 24, "model.student.num_heads": 2,
        "model.student.num_layers": 4, "model.objective.layers": "[4]", "growth.stages": "[1,2,3,4]",
        "model.teacher.init_args.model": teacher, "data.root": corpus, "data.train_splits": "[train]",
        "data.val_splits": "[dev]", "data.batch_size": 4, "data.batches_per_epoch": 3, "data.num_workers": 0,
        "trainer.max_epochs": 4, "trainer.accelerator": "cpu", "trainer.devices": 1,
        "trainer.enable_progress_bar": "false", "log_samples": "false", "wandb.mode": "disabled",
        "checkpoint.every_n_steps": 0, "runs_dir": tmp_path, "data.cache_dir": tmp_path / "cache",
    }  # fmt: skip
    command += [*(f"--{name}={value}" for name, value in settings.items()), NOTE_BEGINNING]
    run([*command, "--name=whole"])

    # However late the signal is sent, the run is not over by then.
    hold = ["--trainer.callbacks+=tests.holding.Hold", "--trainer.callbacks.step=9"]
    stopped = fork_program([*command, "--name=run", "--ckpt_path=last", *hold], tmp_path / "output.txt")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    while not last.is_file() and stopped.is_alive():
        time.sleep(0.01)
    assert stopped.pid is not None
    os.kill(stopped.pid, sign)
    code, output = ended(stopped), (tmp_path / "output.txt").read_text()
    assert code == (EXIT_SIGTERM if sign == signal.SIGTERM else 1), output
    lines = [line for line in output.splitlines() if line.startswith("stopped by a signal")]
    assert len(lines) == (sign == signal.SIGTERM)
    assert all(str(tmp_path / "run" / "checkpoints" / "step=") in line for line in lines)
    assert all("--ckpt_path last" in line for line in lines)
    assert "Traceback" not in output
    stop = load(tmp_path / "run")["global_step"]
    assert 3 <= stop < 12

    run([*command, "--name=run", "--ckpt_path=last"])
    assert equal(load(tmp_path / "whole"), load(tmp_path / "run"))
    assert beginnings(tmp_path / "run") == [0, stop]
