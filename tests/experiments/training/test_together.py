"""Students that are trained together are, bit for bit, those that are trained apart."""

import contextlib
import csv
import json
import logging
import multiprocessing
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import requeue
from callbacks.guards import DivergedError
from callbacks.requeue import EXIT_SIGTERM
from datamodules.errors import InputError
from datamodules.loading import AudioDataset
from experiments.training import together
from experiments.training.fit import CONFIGS, DistillationCLI
from experiments.training.together import Together, fit_together
from lightning_modules.distillation import DistillationModule
from lightning_modules.teacher import HuggingFaceTeacher
from tests.conftest import REPOSITORY
from tests.ddp.launch import environment
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE
from tests.processes import wait_for
from tests.resuming import differences, file_differences
from tests.slurm_task import pretend_task
from tests.test_configs import SHRUNK
from tests.test_kill import processes_of

# Output loss only and no growth; L2L; prediction heads, an average of the weights and a step that is not finite.
STUDENTS = ("full", "interleave_equal", "poisoned")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of every command: 4 epochs of 2 steps of 2 micro-batches, clipped hard, dropout as shipped."""
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher", layers=12)
    save_corpus(folder / "corpus", {"train": 8, "dev": 2})
    inputs = ["--data.root", str(folder / "corpus"), "--model.teacher.init_args.model", str(folder / "teacher")]
    inputs += ["--data.cache_dir", str(folder / "cache"), "--trainer.log_every_n_steps", "1"]
    return [*SHRUNK, *inputs, "--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.05"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The configuration of each student."""
    poisoned = yaml.safe_load((CONFIGS / "gradstack_equal.yaml").read_text())
    callbacks = [
        {"class_path": "tests.callbacks.faults.PoisonLoss", "init_args": {"batches": [5]}},
        {"class_path": "callbacks.ema.StudentEMA", "init_args": {"decay": 0.9}},
    ]
    path = tmp_path_factory.mktemp("configs") / "one.yaml"
    path.write_text(yaml.safe_dump(poisoned | {"trainer": {"callbacks": callbacks}}))
    return {"full": "full", "interleave_equal": "interleave_equal", "poisoned": f"poisoned={path}"}


@pytest.fixture(scope="module")
def apart(arguments: list[str], files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of separate runs."""
    runs = tmp_path_factory.mktemp("apart")
    for name, file in files.items():
        config = file.split("=")[-1]
        DistillationCLI(["fit", "--config", config, *arguments, "--name", name, "--runs_dir", str(runs)])
    return runs


def problems(apart: Path, together: Path, name: str) -> list[str]:
    """Where the checkpoints of a student, or the losses that it logged, are not those of its separate run."""
    one, other = apart / name, together / name
    found = [path.name for path in sorted((one / "checkpoints").iterdir())]
    # Those of earlier attempts are there too.
    assert set(found) <= {path.name for path in (other / "checkpoints").iterdir()}
    texts = [f for file in found for f in file_differences(one / "checkpoints" / file, other / "checkpoints" / file)]
    texts += differences(losses(one), losses(other), "losses")
    return texts


def losses(run: Path) -> dict[str, dict[str, str]]:
    """By metric and step; the last value that was written counts, since a resumed run repeats some."""
    found: dict[str, dict[str, str]] = {}
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key in row.keys() & {"train/loss", "train/output", "train/intermediate", "train/lr", "val/loss"}:
                if row[key]:
                    found.setdefault(key, {})[row["step"]] = row[key]
    return found


@pytest.mark.ci
def test_students_are_those_of_separate_runs(
    arguments: list[str],
    files: dict[str, str],
    apart: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts = count_calls(monkeypatch)
    with caplog.at_level(logging.INFO):
        fit_together(["--configs", ",".join(files.values()), *arguments, "--runs_dir", str(tmp_path)])
    assert {name: problems(apart, tmp_path, name) for name in STUDENTS} == {name: [] for name in STUDENTS}

    # 16 micro-batches and 4 validations of one batch in two parts; besides, a batch of every student's before and
    # after a growth.
    growths = [len(json.loads((tmp_path / name / "growth.json").read_text())) for name in STUDENTS[1:]]
    assert counts["batches"] == 16 + 4 * 2 + 2 * sum(growths)
    assert counts["teacher"] == 16 + 4 * 2 + 2 * sum(growths)
    summaries = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in STUDENTS}
    assert [summaries[name]["students"] for name in STUDENTS] == [3, 3, 3]
    checkpoint = torch.load(tmp_path / "poisoned" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["NonFiniteGuard"]["skipped_steps"] == 1


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Micro-batches that are decoded, and waveforms that the teacher hears."""
    counts: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    decode = counted("batches", AudioDataset.__getitem__)
    for method in ("__getitem__", "__getitems__"):
        monkeypatch.setattr(AudioDataset, method, decode)
    monkeypatch.setattr(HuggingFaceTeacher, "forward", counted("teacher", HuggingFaceTeacher.forward))
    return counts


@pytest.mark.ci
def test_without_fresh_randomness_for_each_student_they_are_not(
    arguments: list[str], apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: seeded for the first student only, the second draws other dropout masks."""
    seed = DistillationModule.on_train_batch_start

    def seed_first(self: DistillationModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.default_root_dir.endswith("full"):
            seed(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "on_train_batch_start", seed_first)
    fit_together(["--configs", "full,interleave_equal", *arguments, "--runs_dir", str(tmp_path)])
    assert problems(apart, tmp_path, "full") == []
    one, other = (
        torch.load(runs / "interleave_equal" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for runs in (apart, tmp_path)
    )
    assert max(float((one[key] - other[key]).abs().max()) for key in one if torch.is_tensor(one[key])) > 1e-4


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pretend_task(tmp_path, monkeypatch)


@pytest.mark.ci
@pytest.mark.parametrize("signal_name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_saves_all_and_they_go_on_from_different_places(
    signal_name: str, slurm: Path, arguments: list[str], apart: Path, tmp_path: Path
) -> None:
    signals: dict[str, Any] = {"class_path": "tests.callbacks.faults.SendSignal"}
    signals["init_args"] = {"epoch": 1, "batch": 1, "signal_name": signal_name}
    config = yaml.safe_load((CONFIGS / "interleave_equal.yaml").read_text()) | {"trainer": {"callbacks": [signals]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["--configs", f"full,interleave_equal={tmp_path / 'config.yaml'}", *arguments, "--ckpt_path", "last"]
    command += ["--runs_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        fit_together(command)
    assert stop.value.code == EXIT_SIGTERM
    asked = {"SIGTERM": "show job --oneliner 123\n", "SIGUSR1": "requeue 123\n"}
    assert slurm.read_text() == asked[signal_name]
    assert requeue.announced() is (signal_name == "SIGUSR1")
    steps = {name: sorted((tmp_path / name / "checkpoints").glob("step=*.ckpt")) for name in STUDENTS[:2]}
    assert {name: len(files) for name, files in steps.items()} == {"full": 2, "interleave_equal": 2}
    assert not (tmp_path / "full" / "summary.json").exists()
    shutil.copyfile(steps["full"][0], tmp_path / "full" / "checkpoints" / "last.ckpt")  # one step behind
    alone = ["fit", "--config", "interleave_equal", *arguments, "--ckpt_path", "last", "--runs_dir"]
    shutil.copytree(tmp_path / "interleave_equal", tmp_path / "alone" / "interleave_equal")
    DistillationCLI([*alone, str(tmp_path / "alone")])
    assert problems(apart, tmp_path / "alone", "interleave_equal") == []

    config["trainer"]["callbacks"] = []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit_together(command)
    assert problems(apart, tmp_path, "full") == problems(apart, tmp_path, "interleave_equal") == []


def test_students_that_were_stopped_go_back_into_the_queue_though_another_failed(
    slurm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    errors = {"a": DivergedError("not finite"), "b": SIGTERMException()}
    students = [SimpleNamespace(name=name, error=error) for name, error in errors.items()]
    with pytest.raises(SystemExit) as stop:
        Together._report(SimpleNamespace(students=students, _signal=signal.SIGUSR1), 1.0)  # type: ignore[arg-type]
    assert stop.value.code == EXIT_SIGTERM
    assert slurm.read_text() == "requeue 123\n"
    assert "1 of 2 students failed, the others went on without them: a: DivergedError: not finite" in caplog.text
    with pytest.raises(InputError, match="1 of 1 students failed"):  # control
        Together._report(SimpleNamespace(students=students[:1], _signal=None), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "number", "status"), [(0, None, 0), (143, None, 143), (0, signal.SIGTERM, 143)])
def test_a_wanted_stop_is_no_failure_under_torchruns_restarts(code: int, number: int | None, status: int) -> None:
    """As `RunCheckpoint` says by its exception's code."""
    students = [SimpleNamespace(name=name, error=SIGTERMException(code)) for name in "ab"]
    with pytest.raises(SystemExit) as stop:
        Together._report(SimpleNamespace(students=students, _signal=number), 1.0)  # type: ignore[arg-type]
    assert stop.value.code == status


@pytest.mark.slow  # SIGTERM is above, kills of single runs are in test_kill.py
@pytest.mark.parametrize(("signal_name", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_a_kill_and_an_interrupt_leave_no_trace(
    signal_name: str, status: int, arguments: list[str], apart: Path, tmp_path: Path
) -> None:
    """``kill -9``, or Ctrl-C, when one of the two has made a step that the other has not, then the same command."""
    stop = {"class_path": "tests.callbacks.faults.SendSignal"}
    stop["init_args"] = {"epoch": 2, "batch": 0, "signal_name": signal_name}
    config = yaml.safe_load((CONFIGS / "interleave_equal.yaml").read_text()) | {"trainer": {"callbacks": [stop]}}
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(config))
    command = [*arguments, "--runs_dir", str(tmp_path), "--ckpt_path", "last", "--configs"]
    process = [sys.executable, "-m", "experiments.cli", "fit-together", *command]
    workers = ["--data.num_workers", "1"]  # of a loader that all share: nobody's but the process's to end
    stopped = subprocess.run(
        [*process, f"full,interleave_equal={tmp_path / 'stopped.yaml'}", *workers],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=PATIENCE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    assert stopped.returncode == status, stopped.stderr
    assert ("interstack: interrupted" in stopped.stderr) == (signal_name == "SIGINT")
    assert not any((tmp_path / name / "summary.json").exists() for name in STUDENTS[:2])
    if Path("/proc/self/environ").is_file():
        wait_for(lambda: not processes_of(str(tmp_path)))
    fit_together([*command, "full,interleave_equal"])
    assert problems(apart, tmp_path, "full") == problems(apart, tmp_path, "interleave_equal") == []


@pytest.mark.ci
def test_a_student_that_fails_leaves_the_others_alone(
    arguments: list[str], apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    every = [{"class_path": "tests.callbacks.faults.PoisonLoss", "init_args": {"batches": list(range(16))}}]
    config = {"trainer": {"callbacks": every}, "guard": {"max_skipped_steps": 2}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    command = ["--configs", f"{tmp_path / 'bad.yaml'},full", *arguments, "--runs_dir", str(tmp_path)]
    command += ["--wandb.mode", "offline"]
    with pytest.raises(InputError, match=r"1 of 2 students failed, .* bad: DivergedError: .* not finite in 2"):
        fit_together(command)
    assert problems(apart, tmp_path, "full") == []
    # Each has a W&B run of its own.
    ids = {name: json.loads((tmp_path / name / "run.json").read_text())["wandb_id"] for name in ("bad", "full")}
    for name, run_id in ids.items():
        (folder,) = (path for path in (tmp_path / name / "wandb").glob("offline-run-*") if path.is_dir())
        assert folder.name.endswith(f"-{run_id}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look-up
@pytest.mark.parametrize(
    "more",
    [
        ["--data.num_workers", "2"],
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.val_check_interval", "1"],  # several validations in an epoch
        ["--model.student.compile", "true", "--model.student.compile_backend", "aot_eager"],
        ["--model.student.front_end", "shared"],
        ["--data.length", "pad", "--growth.optimizer_state", "reset"],
    ],
    ids=lambda more: more[0],
)
def test_settings_that_hold_for_all_change_nothing(more: list[str], arguments: list[str], tmp_path: Path) -> None:
    names = ("full_l2l", "midas_equal")
    for name in names:
        DistillationCLI(["fit", "--config", name, *arguments, *more, "--runs_dir", str(tmp_path / "apart")])
    fit_together(["--configs", ",".join(names), *arguments, *more, "--runs_dir", str(tmp_path / "together")])
    assert [problems(tmp_path / "apart", tmp_path / "together", name) for name in names] == [[], []]
    assert not multiprocessing.active_children()


MASKS = ["--model.student.mask_time_prob", "0.8", "--model.student.mask_time_length", "2"]


@pytest.mark.parametrize(
    ("configs", "more", "message"),
    [
        ("full", [], "is one student: use"),
        ("full,full", [], "every student needs a name and a file of its own"),
        ("full,", [], "every student needs a name and a file of its own"),
        ("full,midas_equal", ["--name", "x"], "--name would apply to every student"),
        ("full,midas_equal", ["--wandb.id", "x"], "--wandb.id would make all students one run"),
        ("full,{other}", [], "need the same data.max_samples: full has 250000, other has 8000"),
        ("full,{deterministic}", [], "need the same trainer.deterministic: full has None, deterministic has True"),
        ("full,{cuda}", [], "need the same model.cuda.float32: full has tf32, cuda has ieee"),
        ("full,{blocks}", [], "need the same model.objective.targets: full has hidden, blocks has feed_forward"),
        ("full,midas_equal", ["--trainer.devices", "2"], "on one device, not 2: add --trainer.devices 1"),
        (
            "full,midas_equal",
            ["--model.objective.masked", "drawn", *MASKS],
            "share their targets, which masks of their",
        ),
        ("full,midas_equal,{lower}", [], r"same output layer and highest layer of the teacher, not \[12, 12, 8\]"),
    ],
)
def test_what_is_refused(configs: str, more: list[str], message: str, arguments: list[str], tmp_path: Path) -> None:
    for name, config in {
        "other": {"data": {"max_samples": 8000}},
        "deterministic": {"trainer": {"deterministic": True}},
        "cuda": {"model": {"cuda": {"float32": "ieee"}}},
        "blocks": {"model": {"objective": {"targets": "feed_forward"}}},
        "lower": {"model": {"objective": {"output_layer": 8}}},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    names = ("other", "deterministic", "cuda", "blocks", "lower")
    configs = configs.format_map({name: tmp_path / f"{name}.yaml" for name in names})
    with pytest.raises(ValueError, match=message):
        fit_together([*arguments, *more, "--runs_dir", str(tmp_path / "runs"), "--configs", configs])


@pytest.mark.parametrize("has_features", [False, True])
def test_a_cache_with_features_serves_frozen_front_ends_or_trained_ones(
    has_features: bool, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch has the features or the audio."""
    monkeypatch.setattr(together, "TargetCache", lambda folder: SimpleNamespace(has_features=has_features))
    monkeypatch.setattr(together.Together, "run", lambda self: None)
    for front_end in ("frozen", "shared"):
        (tmp_path / f"{front_end}.yaml").write_text(f"model: {{student: {{front_end: {front_end}}}}}")
    cached = [*arguments, "--data.crop", "fixed", "--data.targets", "cache"]
    configs = [f"{tmp_path / name}.yaml" for name in ("frozen", "shared")]
    fit_together([*cached, "--runs_dir", str(tmp_path / "alike"), "--configs", ",".join(configs)])
    message = "same model.student.front_end: frozen has a frozen one, full has one that is trained"
    with pytest.raises(InputError, match=message) if has_features else contextlib.nullcontext():
        fit_together([*cached, "--runs_dir", str(tmp_path / "other"), "--configs", f"{configs[0]},full"])
