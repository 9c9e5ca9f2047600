"""The ``interstack`` program.

``interstack COMMAND --help`` describes each command. ``fit`` and ``validate`` are LightningCLI subcommands; the others
are functions whose signatures are their options. Each command's module is imported only when the command is called.
"""

import importlib
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NoReturn

from callbacks.requeue import EXIT_SIGTERM, ignore_end, listen
from datamodules.errors import InputError, is_foreseen, is_storage_error
from datamodules.files import what_to_do

COMMANDS = {
    "quickstart": (
        "experiments.studies.quickstart",
        "corpus, teacher, four students and a report, on a CPU in minutes",
    ),
    "fit": ("experiments.training.fit", "distil a student that grows while it trains"),
    "fit-together": ("experiments.training.together", "distil several students on one device, in turns batch by batch"),
    "validate": ("experiments.training.fit", "measure the distillation losses of a checkpoint"),
    "cache-targets": (
        "experiments.training.cache_targets",
        "write a teacher's targets to disk, for runs on the same segments",
    ),
    "reproduce": (
        "experiments.studies.reproduce",
        "run a study: distil, export, evaluate, report; finished jobs are kept",
    ),
    "superb": ("experiments.superb.command", "score an encoder on SUPERB's tasks, or probe it in minutes"),
    "export": ("experiments.deployment.export", "write a student as a Hugging Face folder, or an encoder as ONNX"),
    "convert": ("experiments.deployment.convert", "read a published student, such as DistilHuBERT, into such a folder"),
    "latency": ("experiments.deployment.latency", "time encoders beside each other: latency, memory, size and MACs"),
    "streaming": ("experiments.deployment.streaming", "measure hidden states and scores of an encoder that streams"),
    "rescore": ("experiments.deployment.rescore", "score a trained head with another encoder, such as an ONNX file"),
    "bench": ("experiments.bench.command", "time a training step by part and by depth"),
    "bench compare": ("experiments.bench.compare", "time short runs with different switches, in turns"),
    "bench together": ("experiments.bench.together", "time students trained side by side and one after another"),
    "bench scaling": ("experiments.bench.scaling", "step time against processes, length, depth and batch size"),
    "bench growth": ("experiments.bench.growth", "seconds and memory that a growth takes"),
    "bench profile": ("experiments.bench.profile", "profile one step: kernels by kind, and the host's time"),
    "bench kernels": ("experiments.bench.kernels", "time ways to compute the front end and the positional convolution"),
    "bench suite": ("experiments.bench.suite", "all benchmarks of one GPU into one folder, most valuable first"),
    "bench data": ("experiments.bench.data", "throughput of reading, decoding and batching"),
    "pack": ("experiments.corpora.pack", "pack a corpus into a few large 16-bit files, for slow or networked storage"),
    "align": ("experiments.corpora.align", "write phone labels for transcribed speech, by forced alignment"),
    "synthesize": ("experiments.corpora.synthesize", "make a small speech corpus in LibriSpeech layout"),
    "similarity": ("experiments.analysis.similarity", "compare the layers of a student, over the stages of its run"),
    "report": ("experiments.report.command", "tables, plots and one page from a study, a quick start or run folders"),
    "dashboard": ("experiments.dashboards.command", "make the W&B workspace view and report of a study"),
    "pretrain-teacher": ("experiments.corpora.pretrain_teacher", "train a small teacher on a corpus with alignments"),
}

# Parameters that are given without a name: one word, or several where the parameter is a list.
POSITIONAL = {
    "reproduce": "study",
    "convert": "file",
    "similarity": "checkpoints",
    "report": "folders",
    "dashboard": "study",
}

# Warnings that users can do nothing about: from within dependencies, and Lightning's advice about small machines.
DEPENDENCY_WARNINGS = (
    ".*LeafSpec.*",
    r"(?s).*jsonargparse.*",
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
)

CHATTY_LOGGERS = (
    "httpx",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)

HELP = """usage: interstack COMMAND [options]

Distil speech foundation models fast: grow the student's depth while it trains.

commands:
{commands}

`interstack COMMAND --help` lists the options of a command.
A foreseen error is printed as one line; INTERSTACK_TRACEBACK=1 adds its
traceback, which any other error has anyway.
Exit status: 0; 2 after a foreseen error, 1 after another; 130 after an
interrupt (1 while training); 143 if SIGTERM stopped training. `fit` has 143
also if max_time or a callback stopped it, and leaves a checkpoint for
`--ckpt_path last` each time.
"""


def help_text() -> str:
    """The text of ``interstack --help``."""
    return HELP.format(commands="\n".join(f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items()))


def complete_switches(args: list[str], switches: set[str]) -> list[str]:
    """Replace a bare ``--fast`` by ``--fast true`` and ``--dry-run`` by ``--dry_run``, the forms jsonargparse reads."""
    completed: list[str] = []
    for argument, following in pairwise([*args, "--"]):
        name = argument[2:].replace("-", "_")
        switch = argument.startswith("--") and name in switches
        bare = switch and following.startswith("-")
        completed += [f"--{name}" if switch else argument, *(["true"] if bare else [])]
    return completed


@contextmanager
def sigterm_as_status() -> Iterator[None]:
    """Give Lightning's exception after SIGTERM the shells' exit status. It has none, which would be success.

    The first process of each machine has it: Lightning's launcher would take another's for a crash, and kill the first.
    """
    try:
        yield
    except SystemExit as error:
        if error.code is None and type(error).__name__ == "SIGTERMException":  # Lightning is slow to import, see main
            error.code = EXIT_SIGTERM if os.environ.get("LOCAL_RANK", "0") == "0" else 0
        raise


@sigterm_as_status()
def run(args: list[str]) -> None:
    """Run one command in this process; errors are exceptions.

    Raises:
        SystemExit: of status 143, after SIGTERM while it trained or evaluated.
        InputError: the command is unknown, or refuses its input, or ``torchrun`` could not start its ranks again.
    """
    from experiments.command_line import Parser, nearest  # slow, see main
    from experiments.launch.meeting import refuse_shared_store

    refuse_shared_store()
    words = 2 if " ".join(args[:2]) in COMMANDS else 1
    name, rest = " ".join(args[:words]), args[words:]
    known = [other for other in COMMANDS if other.startswith(f"{name} ")]
    if known and rest and not rest[0].startswith("-"):  # an unknown second word, such as `bench foo`
        name = f"{name} {rest[0]}"
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)} (`interstack --help` lists all)")
    module = importlib.import_module(COMMANDS[name][0])
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.disable_progress_bar()  # of reading and writing model files, which is quick
    if name in ("fit", "validate"):
        module.DistillationCLI([name, *rest])
        return
    if name == "fit-together":
        module.fit_together(rest)
        return
    if name == "cache-targets":
        module.TargetsCLI(["cache_targets", *rest])
        return
    from jsonargparse import auto_cli

    command: Callable[..., None] = getattr(module, name.replace("-", "_").replace(" ", "_"))
    parameters = inspect.signature(command).parameters
    switches = {key for key, parameter in parameters.items() if parameter.annotation is bool}
    rest = complete_switches(rest, switches)
    if name not in POSITIONAL:
        auto_cli(command, args=rest, prog=f"interstack {name}", as_positional=False, parser_class=Parser)
        return
    word = POSITIONAL[name]
    several = parameters[word].annotation is not str
    parser = Parser(prog=f"interstack {name}", description=(inspect.getdoc(command) or "").split("\n\n")[0])
    parser.add_argument(word, type=str, nargs="+" if several else None)
    parser.add_function_arguments(command, skip={word}, as_group=False)
    command(**parser.instantiate(parser.parse_args(rest)))


def main() -> int:
    """Run the program; return exit status 0, or 2 after a foreseen error, which is one line. Others are raised,
    or printed where other processes may wait for this one (see ``experiments.training.nccl_exit``).

    SIGTERM during training or evaluation passes through as a ``SystemExit`` of status 143.
    """
    listen()  # first, and before any slow import: SLURM's signal would end the process and the job
    args = sys.argv[1:]
    # Batches of many lengths would fragment a GPU's memory. torch reads this when it first uses CUDA.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.path.append(os.getcwd())  # users name their own policies and teachers by module path
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Lightning repeats advertisements, "GPU available" and seeds for every trainer; the run's folder records the rest.
    for chatty in CHATTY_LOGGERS:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    for message in DEPENDENCY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(version("interstack"))
        return 0
    try:
        return _status("interstack", lambda: run(args))
    finally:
        ignore_end()


def run_module(command: Callable[..., None]) -> NoReturn:
    """Run the function of ``python -m MODULE`` with the command line's options, and exit as ``interstack`` does."""
    from jsonargparse import auto_cli

    from experiments.command_line import Parser

    spec = sys.modules["__main__"].__spec__
    name = f"python -m {spec.name}" if spec else sys.argv[0]

    @sigterm_as_status()
    def action() -> None:
        auto_cli(command, prog=name, as_positional=False, parser_class=Parser)

    sys.exit(_status(name, action))


def _exit_without_waiting() -> Callable[[int], NoReturn] | None:
    """How to exit if other processes may wait for this one, else None."""
    if "torch.distributed" not in sys.modules:  # which is slow to import
        return None
    from experiments.training.nccl_exit import exit_without_waiting, others_may_wait

    return exit_without_waiting if others_may_wait() else None


def _status(program: str, action: Callable[[], object]) -> int:
    """Do something for the program; return its exit status, having printed one line on a foreseen error."""
    try:
        action()
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt) and (leave := _exit_without_waiting()):
            leave(1)  # Lightning's status after Ctrl-C
        raise
    except Exception as error:
        leave = _exit_without_waiting()
        if os.environ.get("INTERSTACK_TRACEBACK") or not is_foreseen(error):
            if leave is None:
                raise
            traceback.print_exc()
            leave(1)
        advice = what_to_do(error) if isinstance(error, OSError) and error.strerror else ""  # else it has its own
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        print(f"{program}: {kind}{error}{advice}", file=sys.stderr)
        status = 1 if is_storage_error(error) else 2  # 2: the same command would fail again
        if leave is not None:
            leave(status)
        return status
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        if leave := _exit_without_waiting():
            leave(130)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
