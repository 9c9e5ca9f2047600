"""Run one job: its command in its own process, with a log and the result as JSON.

``OUTPUT/jobs/ID/job.json`` holds everything that a job needs, so that it can run here or on another machine that sees
the same folder. A job is done when ``job.json`` says so; that is written last.
"""

import ctypes
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from datamodules.corpus import home_of_splits
from datamodules.errors import InputError
from datamodules.files import read_json, read_text, write_json, write_text
from datamodules.librispeech import LibriSpeechDataModule
from experiments.deployment.macs import superb_gmacs
from experiments.records.accounting import measured, student_layout
from experiments.records.reading import run_record
from experiments.records.runs import RunFolder, git_commit
from experiments.records.settings_yaml import dump_settings, load_settings
from experiments.studies.matching import cost_ratio, matched
from experiments.studies.plan import Inputs, Job
from experiments.training.defaults import default_of
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.student_config import StudentConfig

log = logging.getLogger(__name__)

# Variables of a scheduler or launcher around this process: they make Lightning take a job's process for a rank.
LAUNCHER_PREFIXES = ("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SUBMITIT_", "PMI_")
INTERRUPTED = 130
"""Exit status of a command that its runner ended."""


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(output: Path, job_id: str) -> dict[str, Any]:
    """Read ``job.json`` of a job; empty if there is none."""
    path = output / "jobs" / job_id / "job.json"
    return read_json(path) if path.is_file() else {}


def is_done(output: Path, job_id: str) -> bool:
    """Whether the job is finished and its result exists."""
    return read_record(output, job_id).get("status") == "done" and (output / "jobs" / job_id / "result.json").is_file()


def read_result(output: Path, job_id: str) -> dict[str, Any]:
    """Read ``result.json`` of a finished job."""
    return read_json(output / "jobs" / job_id / "result.json")


class Workspace:
    """The folders of one study's jobs, and the command-line settings that are added to their commands.

    Args:
        output: folder of the study.
        inputs: corpora, teacher (if no job trains one) and lexicon; relative paths are those of the present directory.
        study: name of the study, used as W&B group.
        wandb: settings of W&B, as for ``fit``.
        devices: devices per distillation job.
    """

    def __init__(
        self,
        output: Path,
        inputs: Inputs = Inputs(),  # noqa: B008 (frozen)
        study: str = "",
        wandb: Mapping[str, Any] | None = None,
        devices: int = 1,
    ) -> None:
        self.output, teacher = output.resolve(), inputs.teacher
        self.root = str(Path(inputs.root).resolve()) if inputs.root else None
        self.roots = {task: str(Path(folder).resolve()) for task, folder in inputs.roots.items()}
        self.lexicon = [str(Path(path).resolve()) for path in inputs.lexicon]
        self.teacher = str(Path(teacher).resolve()) if teacher and Path(teacher).is_dir() else teacher
        self.study, self.wandb, self.devices = study, dict(wandb or {}), devices

    def path(self, job: Job) -> Path:
        """Folder of the job."""
        return self.output / job.folder

    def needed(self, job: Job, kind: str) -> str | None:
        """Find the id of the job of that kind that ``job`` needs, directly or through other jobs."""
        for needed in job.needs:
            record = read_record(self.output, needed)
            if record["kind"] == kind:
                return needed
        for needed in job.needs:
            if found := self.needed(job_of(read_record(self.output, needed)), kind):
                return found
        return None

    def data_root(self, job: Job) -> str:
        """Find the folder of the splits, or of the corpus of an evaluation's task."""
        if job.task in self.roots:
            return self.roots[job.task]
        if self.root is not None:
            return self.root
        return str(self.output / "jobs" / str(self.needed(job, "corpus")) / "corpus" / "LibriSpeech")

    def takes_lexicon(self, job: Job) -> bool:
        """Whether this evaluation uses the lexicon of the command line."""
        return "lexicon" in job.settings.get("inputs", {})

    def teacher_of(self, job: Job) -> str:
        """Find the teacher: the folder that a job trained, else the given hub name or folder."""
        trained = self.needed(job, "teacher")
        return str(self.output / "jobs" / trained / "teacher") if trained else str(self.teacher)

    def command(self, job: Job) -> list[str]:
        """Build the arguments of the ``interstack`` program."""
        return getattr(self, f"_{job.kind}")(job)

    def _corpus(self, job: Job) -> list[str]:
        return ["synthesize", "--output", str(self.path(job) / "corpus"), *_options(job.settings)]

    def _teacher(self, job: Job) -> list[str]:
        corpus = self.output / "jobs" / job.needs[0] / "corpus" / "LibriSpeech"
        arguments = ["pretrain-teacher", "--root", str(corpus), "--output", str(self.path(job) / "teacher")]
        return [*arguments, "--progress_bar", "false", *_options(job.settings)]

    def _targets(self, job: Job) -> list[str]:
        arguments = ["cache-targets", "--config", self._config(job), *self._teacher_and_data(job)]
        arguments += ["--seed_everything", str(job.seed)]  # a front end may be drawn from it
        return [*arguments, "--output", str(self.path(job) / "targets")]

    def _distil(self, job: Job) -> list[str]:
        arguments = ["fit", "--config", self._config(job), "--name", (self.output / job.run).name]
        arguments += self._training_options(job)
        if self.devices > 1:
            arguments += ["--trainer.devices", str(self.devices), "--trainer.strategy", "ddp"]
        return arguments

    def _together(self, job: Job) -> list[str]:
        members = [job_of(read_record(self.output, member)) for member in job.settings["members"]]
        configs = ",".join(f"{member.run.name}={self._config(member)}" for member in members)
        return ["fit-together", "--configs", configs, *self._training_options(members[0])]

    def _config(self, job: Job) -> str:
        """Write the configuration of a run and return its path."""
        settings = {key: value for key, value in job.settings.items() if key != "inputs"}
        if job.match:
            target, reference = (read_result(self.output, job.match[part]) for part in ("target", "reference"))
            settings = matched(settings, cost_ratio(target, reference, job.match["cost"]))
        if job.kind == "distil" and (cache := self.needed(job, "targets")):
            folder = str(self.output / "jobs" / cache / "targets")
            settings["data"] = settings.get("data", {}) | {"targets": folder}
        settings["wandb"] = self._wandb_of(job)
        config = self.path(job) / "config.yaml"
        write_text(config, dump_settings(settings))
        return str(config)

    def _training_options(self, job: Job) -> list[str]:
        """Build the options that ``fit`` and ``fit-together`` share."""
        arguments = ["--runs_dir", str((self.output / job.run).parent), "--seed_everything", str(job.seed)]
        return [*arguments, *self._teacher_and_data(job), "--ckpt_path", "last"]

    def _teacher_and_data(self, job: Job) -> list[str]:
        return ["--data.root", self.data_root(job), "--model.teacher.init_args.model", self.teacher_of(job)]

    def is_trained(self, job: Job) -> bool:
        """Whether the run of a ``distil`` job is finished, alone or trained side by side with others."""
        return job.kind == "distil" and (self.output / job.run / "summary.json").is_file()

    def _export(self, job: Job) -> list[str]:
        run = self.output / job_of(read_record(self.output, job.needs[0])).run
        arguments = ["export", "--checkpoint", str(run / "checkpoints" / "last.ckpt")]
        return [*arguments, "--output", str(self.path(job) / "student"), "--overwrite", "true"]

    def _evaluate(self, job: Job) -> list[str]:
        upstream = self.needed(job, "export")
        model = str(self.output / "jobs" / upstream / "student") if upstream else self.teacher_of(job)
        model = job.settings.get("upstream", model)
        options = _options({key: value for key, value in job.settings.items() if key not in ("inputs", "upstream")})
        options += _options({"data.lexicon": self.lexicon}) if self.takes_lexicon(job) else []
        task, _, preset = job.task.partition("_")
        arguments = ["superb", "--task", task, "--preset", preset or "superb", "--data.root", self.data_root(job)]
        arguments += ["--upstream", model, "--output", str(self.path(job)), "--seed", str(job.seed)]
        arguments += ["--trainer.progress_bar", "false", *_options({"wandb": self._wandb_of(job)})]
        return [*arguments, *options]

    def _wandb_of(self, job: Job) -> dict[str, Any]:
        """Add the group and tag by which the study's dashboard finds a run."""
        return {"group": self.study, "tags": [job.row], **self.wandb}

    def _similarity(self, job: Job) -> list[str]:
        distil = job_of(read_record(self.output, job.needs[0]))
        splits = distil.settings.get("data", {}).get("val_splits", default_of(LibriSpeechDataModule, "val_splits"))
        root = Path(self.data_root(job))
        home = Path(home_of_splits(str(root), splits)) if root.is_dir() else root
        held_out = next((home / split for split in splits if (home / split).is_dir()), root)
        arguments = ["similarity", str(self.output / distil.run), "--root", str(held_out)]
        arguments += ["--output", str(self.path(job))]
        return [*arguments, "--row", job.row, "--seed", str(job.seed)]

    def collect(self, job: Job) -> dict[str, Any]:
        """Collect the result of a job whose command succeeded."""
        result: dict[str, Any] = {"row": job.row, "seed": job.seed, "commit": git_commit()}
        if job.kind == "distil":
            config = load_settings(read_text(self.path(job) / "config.yaml"))
            teacher = AutoConfig.from_pretrained(self.teacher_of(job))
            run = RunFolder(self.output / job.run)  # its commit may be older than the present one
            result |= {"commit": run.commit or result["commit"], "attempts": len(run.attempts)}
            result |= {"run": str(job.run), **run_record(run.path)}
            return result | measured(run.path, teacher, config) | sizes(job, teacher)
        path = self.path(job) / "result.json"
        if job.kind in ("evaluate", "similarity"):
            if job.kind == "evaluate":
                path = superb_result(self.path(job), job)
            if not path.is_file():
                raise InputError(f"{path} is missing: the command succeeded, but wrote no result")
            result |= read_json(path)
            if "test" in result:
                result["metrics"] = result["test"]
            return result | ({"task": job.task} if job.task else {}) | {"row": job.row, "seed": job.seed}
        return result


def sizes(job: Job, teacher: Any) -> dict[str, float]:
    """Compute what settings alone say of the student of a ``distil`` job, with its teacher's configuration."""
    student = StudentConfig(**job.settings.get("model", {}).get("student", {}))
    return {"superb_gmacs": sum(superb_gmacs(student_layout(student, teacher)))}


def loss_function(job: Job, teacher: Any) -> str:
    """Name what the output loss of a ``distil`` job measures, with its teacher's configuration."""
    objective = ObjectiveConfig(**job.settings.get("model", {}).get("objective", {}))
    return objective.loss_function(teacher.num_hidden_layers)


def superb_result(folder: Path, job: Job) -> Path:
    """Find ``result.json`` below ``folder``, of the given learning rate or of the one that a sweep chose."""
    folder = folder / job.task
    chosen = folder / f"chosen_seed{job.seed}.json"
    rate = f"{read_json(chosen)['chosen_lr']:g}" if chosen.is_file() else "*"
    found = sorted(folder.glob(f"lr{rate}_seed{job.seed}/result.json"))
    return found[0] if len(found) == 1 else folder / f"lr{rate}_seed{job.seed}" / "result.json"


def job_of(record: Mapping[str, Any]) -> Job:
    """Build the job that ``job.json`` describes."""
    return Job(**{key: record[key] for key in Job.__dataclass_fields__ if key in record})


def _options(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    arguments: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            arguments += _options(value, f"{prefix}{key}.")
        else:
            arguments += [f"--{prefix}{key}", value if isinstance(value, str) else json.dumps(value)]
    return arguments


def environment(visible_devices: str | None) -> dict[str, str]:
    """Copy this process's environment without a launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_PREFIXES)}
    return kept if visible_devices is None else kept | {"CUDA_VISIBLE_DEVICES": visible_devices}


def _die_with_parent() -> None:
    """Send SIGTERM to the job when its runner is killed, so that a run still writes its checkpoint (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def execute(
    workspace: Workspace,
    job: Job,
    visible_devices: str | None = None,
    stop: threading.Event | None = None,
    launch: "Launch | None" = None,
) -> bool:
    """Run the job to its end, and return whether it is done.

    The job's folder is locked while its process lives, so this waits for a process that outlived its runner.

    Args:
        workspace: workspace of the study.
        job: job to run; the jobs that it needs must be done.
        visible_devices: value of ``CUDA_VISIBLE_DEVICES``; ``None`` leaves it unchanged.
        stop: event; once it is set, the process gets SIGTERM.
        launch: function that runs the command; default: in a process of its own.
    """
    stop = stop or threading.Event()
    folder = workspace.path(job)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        while not stop.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError as error:
                log.warning("%s cannot be locked (%s): let no second runner work there", folder, error.strerror)
                break
        if is_done(workspace.output, job.id):
            return True
        if stop.is_set():
            return False
        environ = environment(visible_devices)
        return _execute(
            workspace, job, lambda words, log: (launch or _launch)(words, log, environ, lock.fileno(), stop)
        )


def _execute(workspace: Workspace, job: Job, launch: Callable[[list[str], Path], int]) -> bool:
    folder, started, ending = workspace.path(job), time.perf_counter(), "interrupted"
    text = folder / "log.txt"
    record = job.described() | {"status": "running", "started": now(), "log": str(text.relative_to(workspace.output))}
    try:
        record["arguments"] = workspace.command(job)
        write_json(folder / "job.json", record)
        trained = workspace.is_trained(job)
        status = 0 if trained else launch(record["arguments"], text)
        if status == 0:
            result = workspace.collect(job)
            write_json(folder / "result.json", result)
        ending = "done" if status == 0 else "interrupted" if status == INTERRUPTED else "failed"
    except (ValueError, KeyError, OSError, TypeError) as error:
        with text.open("a", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}\n")
        ending = "failed"
    except Exception:
        with text.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        ending = "failed"
        raise
    finally:
        seconds = round(time.perf_counter() - started, 2)
        write_json(folder / "job.json", record | {"status": ending, "finished": now(), "seconds": seconds})
    return ending == "done"


Launch = Callable[[list[str], Path, dict[str, str], int, threading.Event], int]
"""Runs a command with a log file and environment, holds the lock, ends it at the event, and returns its exit status."""


def header(arguments: list[str]) -> str:
    """Make the line of a log before the output of a command."""
    return f"# {now()} interstack {' '.join(arguments)}\n"


def _launch(arguments: list[str], log: Path, variables: dict[str, str], lock: int, stop: threading.Event) -> int:
    with log.open("a", encoding="utf-8") as file:
        file.write(header(arguments))
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            pass_fds=[lock],
            preexec_fn=_die_with_parent,
        )
        try:
            while True:
                try:
                    return process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    if stop.is_set():
                        process.terminate()
                        return process.wait() and INTERRUPTED
        except BaseException:  # such as submitit's at the end of a job's time: the run writes its checkpoint first
            process.terminate()
            process.wait()
            raise
