"""``interstack fit-together``: several students, one teacher, in one process on one device.

    interstack fit-together --configs full_l2l,interleave_equal,midas_equal --data.root /data/LibriSpeech

Every student is a full ``interstack fit`` with its own trainer, optimizer, callbacks and run folder, RUNS_DIR/NAME.
They take turns batch by batch (:mod:`experiments.training.lockstep`), so that each batch is loaded once and the teacher
runs once on it. Nothing else is shared, and a student's result is bit for bit that of ``interstack fit`` alone.
Each can be exported, reported, validated, or continued by either command.
"""

import argparse
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpointing import RunCheckpoint
from callbacks.lookup import find_callback
from callbacks.requeue import EXIT_SIGTERM, announce, is_preempted, requeue, under_srun
from callbacks.stop_signals import TERMINATE
from callbacks.throughput import ThroughputCallback
from datamodules.errors import InputError, is_foreseen
from datamodules.files import flatten
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.target_cache import TargetCache
from experiments.command_line import PlainParser
from experiments.training.fit import DistillationCLI
from experiments.training.lockstep import Lockstep, Shared, Stopped, Turns
from lightning_modules.distillation import DistillationModule
from lightning_modules.stopwatch import synchronize
from lightning_modules.teacher import TeacherTargets

log = logging.getLogger(__name__)

MUST_AGREE = (
    *("seed_everything", "data", "model.teacher", "model.cuda", "max_batch_per_device"),
    "model.objective.targets",
    *("trainer.accelerator", "trainer.devices"),
    *("trainer.precision", "trainer.accumulate_grad_batches", "trainer.limit_train_batches"),
    *("trainer.overfit_batches", "trainer.fast_dev_run", "trainer.deterministic", "trainer.benchmark"),
)
"""Settings that decide batches and targets, and those that hold for a whole process: equal for all students."""
OWN = frozenset({"data.run_dir"})


class StudentCLI(DistillationCLI):
    """``interstack fit`` in two steps: the constructor builds everything, then :meth:`start` runs it.

    Args:
        name: name of the student and of its run's folder.
        args: as for :class:`DistillationCLI`.
    """

    bar = False  # several bars would write over each other

    def __init__(self, name: str, args: list[str]) -> None:
        self.name = name
        self.error: BaseException | None = None
        super().__init__(args)

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing yet: Lightning would run the subcommand as soon as it is built."""

    def start(self) -> None:
        """Run the fit."""
        super()._run_subcommand("fit")

    @property
    def agreed(self) -> dict[str, Any]:
        """Values of ``MUST_AGREE`` by dotted name."""
        settings = flatten(self.config.fit.as_dict())
        below = tuple(f"{name}." for name in MUST_AGREE)
        agreed = {k: v for k, v in settings.items() if (k in MUST_AGREE or k.startswith(below)) and k not in OWN}
        targets = settings.get("data.targets")
        if targets is not None and TargetCache(targets).has_features:
            # A batch has the audio or the cached features.
            frozen = self.model.student.config.starts_frozen
            agreed["model.student.front_end"] = "a frozen one" if frozen else "one that is trained"
        return agreed


def fit_together(args: list[str]) -> None:
    """Run the command with these arguments.

    Raises:
        InputError: students cannot share batches and targets, ``interstack fit`` refuses the arguments, or some
            students failed; in the last case the others were finished before.
        RuntimeError: some students failed, and at least one of the errors was not foreseen.
        SystemExit: status 143 after SIGTERM or SLURM's signal, with a checkpoint of every student.
    """
    configs, rest = _parse(args)
    students: list[StudentCLI] = []
    for name, config in configs.items():
        students.append(StudentCLI(name, ["fit", "--config", config, *rest, "--name", name]))
        _refuse(students[0], students[-1])
        share_teacher([student.model for student in students])
    Together(students).run()


def _parse(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """Configuration file of each student by its name, and the arguments that all share."""
    description, details = str(__doc__).split("\n\n", 1)
    parser = PlainParser(
        prog="interstack fit-together",
        description=description,
        epilog=f"{details}\nAll other options are those of `interstack fit` and hold for every student.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--configs",
        required=True,
        help="Shipped names or YAML files, comma-separated, one per student; NAME=FILE sets the student's name.",
    )
    parser.add_argument("--ckpt_path", choices=["last"], help="Continue every student from its newest checkpoint.")
    known, rest = parser.parse_known_args(args)
    given = {argument.split("=")[0] for argument in rest}
    if "--name" in given:
        raise InputError("--name would apply to every student: name them by --configs NAME=FILE,NAME=FILE")
    if "--wandb.id" in given:
        raise InputError("--wandb.id would make all students one run of W&B: give wandb.id in the student's file")
    configs: dict[str, str] = {}
    for item in known.configs.split(","):
        name, separator, file = item.partition("=")
        name, file = (name, file) if separator else (Path(item).stem, item)
        if not name or not file or name in configs:
            raise InputError(f"--configs {known.configs}: every student needs a name and a file of its own")
        configs[name] = file
    if len(configs) < 2:
        raise InputError(f"--configs {known.configs} is one student: use `interstack fit --config {known.configs}`")
    return configs, [*rest, *(["--ckpt_path", known.ckpt_path] if known.ckpt_path else [])]


def _refuse(first: StudentCLI, other: StudentCLI) -> None:
    if (processes := other.trainer.world_size) > 1:
        raise InputError(
            f"students are trained together on one device, not {processes}: add --trainer.devices 1, or train them "
            "apart"
        )
    if not isinstance(other.datamodule, LibriSpeechDataModule):
        raise InputError(
            f"students are trained together on LibriSpeechDataModule, whose batches they can share, not on "
            f"{type(other.datamodule).__name__}: train them apart"
        )
    one, two = first.agreed, other.agreed
    for key in sorted(one.keys() | two.keys()):
        if (a := one.get(key, "not set")) != (b := two.get(key, "not set")):
            raise InputError(
                f"students that are trained together need the same {key}: {first.name} has {a}, {other.name} has {b}; "
                "give it once on the command line, or train them apart"
            )


def share_teacher(modules: Sequence[DistillationModule]) -> None:
    """Give all modules the teacher of the first, which then returns every layer that any of them needs."""
    if any(module.masks is not None for module in modules):
        raise InputError(
            "students that are trained together share their targets, which masks of their own would change: set "
            "model.objective.masked=none, or train them apart"
        )
    chosen = [module.objective.output_layer for module in modules]
    highest = [max([module.objective.output_layer, *module.objective.layers]) for module in modules]
    if len(set(chosen)) > 1 or len(set(highest)) > 1:
        raise InputError(
            f"students that are trained together need the same output layer and highest layer of the teacher, not "
            f"{chosen} and {highest}: make model.objective.output_layer and the last of model.objective.layers equal"
        )
    for module in modules:
        module.share_teacher(modules[0].teacher)
    modules[0].teacher.select_layers(sorted({k for module in modules for k in module.objective.layers}), chosen[0])


class Together:
    """Run the students in threads, and pass signals and interrupts on to them.

    Args:
        students: students that are built but not started.
    """

    def __init__(self, students: Sequence[StudentCLI]) -> None:
        self.students = students
        self.lockstep = Lockstep([student.name for student in students])
        self.shared = Shared()
        self._signal: int | None = None
        for student in students:
            self._connect(student)

    def _connect(self, student: StudentCLI) -> None:
        clock, device = find_callback(student.trainer, ThroughputCallback), student.trainer.strategy.root_device
        assert clock is not None
        clock.students = len(self.students)
        turns = Turns(student.name, self.lockstep, self.shared, partial(clock.aside, device), clock.charge)

        def finished(ask: Callable[[], TeacherTargets]) -> TeacherTargets:
            targets = ask()
            synchronize(device)  # the teacher's time is charged to all, so it must hold nothing else
            return targets

        student.datamodule.relay = turns.relay
        student.model.share_targets(lambda ask: turns.targets(partial(finished, ask)))

    def run(self) -> None:
        """Train all students to the end; :func:`fit_together` lists the errors."""
        started = time.perf_counter()
        threads = [threading.Thread(target=self._fit, args=[s], name=s.name, daemon=True) for s in self.students]
        with self._noting_signals(), _lines_with_names():
            for thread in threads:
                thread.start()
            try:
                self._wait(threads)
            except KeyboardInterrupt:
                self.lockstep.stop()
                self._wait(threads)
                raise
            finally:
                self.shared.close()
        self._report(time.perf_counter() - started)

    def _fit(self, student: StudentCLI) -> None:
        """Train one student; the body of its thread."""
        try:
            self.lockstep.begin(student.name)
            student.start()
        except (
            BaseException
        ) as error:  # SIGTERM's exception, which ends one student after another, is not a subclass of Exception
            student.error = error
            if not isinstance(error, Stopped | SIGTERMException):
                log.error("failed: %s: %s", type(error).__name__, error, exc_info=not is_foreseen(error))
        finally:
            self.lockstep.leave(student.name)

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.2)
                if self._signal is not None:
                    self._terminate()

    def _terminate(self) -> None:
        # Python runs signal handlers in the main thread only. Repeated, since a run that starts drops earlier signals.
        for student in self.students:
            checkpoint = find_callback(student.trainer, RunCheckpoint)
            assert checkpoint is not None
            checkpoint.signals.received = TERMINATE

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        def note(signum: int, frame: FrameType | None) -> None:
            self._signal = signum
            if signum == signal.SIGUSR1:
                announce()

        signals = [signal.SIGTERM, *([signal.SIGUSR1] if under_srun() else [])]
        before = {number: signal.signal(number, note) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _report(self, seconds: float) -> None:
        errors = {student.name: student.error for student in self.students if student.error is not None}
        failed = {name: error for name, error in errors.items() if not isinstance(error, SIGTERMException)}
        texts = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
        summary = f"{len(failed)} of {len(self.students)} students failed, the others went on without them: {texts}"
        if len(errors) > len(failed):  # some were stopped, and go on later whatever happened to the others
            if failed:
                log.error(summary)
            if self._signal == signal.SIGUSR1 or (self._signal and under_srun() and is_preempted()):
                requeue()
            wanted = all(isinstance(error, SIGTERMException) and error.code == 0 for error in errors.values())
            raise SystemExit(0 if wanted and self._signal is None else EXIT_SIGTERM)
        if failed:
            kind = InputError if all(map(is_foreseen, failed.values())) else RuntimeError
            raise kind(summary) from next(iter(failed.values()))
        teacher, data = self.shared.targets.total_seconds, self.shared.batches.total_seconds
        log.info(
            "%d students in %.1f s, of which the teacher took %.1f s and loading %.1f s, once for all",
            *(len(self.students), seconds, teacher, data),
        )


@contextmanager
def _lines_with_names() -> Iterator[None]:
    """Begin each log line with the student's name, which is the name of its thread."""
    before = [(handler, handler.formatter) for handler in logging.getLogger().handlers]
    for handler, _ in before:
        handler.setFormatter(logging.Formatter("%(threadName)s: %(message)s"))
    try:
        yield
    finally:
        for handler, formatter in before:
            handler.setFormatter(formatter)
