"""``interstack quickstart``: make corpus, teacher, four students, probes and a report, on a CPU in minutes.

It needs no corpus, no weights and no GPU. Finished parts are kept, so the command can be interrupted and started again.
Students are trained by the code path of ``interstack fit``.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import HubertModel

from callbacks.hardware import hardware
from datamodules.audio import read_audio
from datamodules.errors import InputError
from datamodules.files import read_json, write_json
from experiments.analysis.cka import layer_similarity
from experiments.records.runs import RunFolder, git_commit
from experiments.report.build import build_report
from experiments.report.document import ReferenceRow, ReportNotes, ReportRun
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData
from experiments.training.fit import DistillationCLI
from lightning_modules.export import load_student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """Size of every part; ``budget`` is seconds per part as measured on two cores."""

    minutes: float
    teacher_steps: int
    epochs: int
    batches_per_epoch: int
    probe_steps: int
    budget: dict[str, int]


FULL = Size(20.0, 900, 8, 60, 300, {"corpus": 2, "teacher": 120, "each of 4 students": 115, "each of 6 probes": 25})
FAST = Size(2.0, 60, 4, 4, 50, {"corpus": 1, "teacher": 20, "each of 4 students": 8, "each of 6 probes": 7})

# System -> shipped config. GradStack uses the prediction-style loss, as in the paper.
STUDENTS = {
    "Full L2L": "full_l2l",
    "GradStack": "gradstack_equal",
    "MIDAS": "midas_equal",
    "InterleaveStack": "interleave_equal",
}


def quickstart(output: str = "runs/quickstart", fast: bool = False, seed: int = 0) -> None:
    """Make a corpus and a teacher, distil four students, compare them in one report.

    Args:
        output: folder for everything; finished parts in it are kept.
        fast: take one to two minutes instead of about eleven, with models too poor to compare.
        seed: seed of corpus, teacher, students and probes.
    """
    from experiments.corpora.pretrain_teacher import pretrain_teacher
    from experiments.corpora.synthesize import synthesize

    folder, size, console = Path(output), FAST if fast else FULL, Console()
    console.width = max(console.width, 104)  # the table of results needs it
    _check_settings(folder, {"fast": fast, "seed": seed})
    _print_budget(console, size, folder)
    started = time.perf_counter()
    with _part(console, "corpus"):
        synthesize(output=str(folder / "corpus"), minutes=size.minutes, seed=seed)
    root = folder / "corpus" / "LibriSpeech"
    with _part(console, "teacher"):
        pretrain_teacher(root=str(root), output=str(folder / "teacher"), steps=size.teacher_steps, seed=seed)
        pretrain_teacher(root=str(root), output=str(folder / "untrained"), steps=0, seed=seed)
    for label, config in STUDENTS.items():
        with _part(console, f"student: {label}"):
            _train(folder, root, config, size, seed)
    probes = _probe_all(console, folder, root, size, seed)
    paths = build_report(folder, *_rows(folder, root, probes), _notes(fast))
    console.print(paths.table)
    console.print(f"report: {paths.html} ({(time.perf_counter() - started) / 60:.1f} minutes in this call)")


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with a quick start of other settings: one table must not mix them."""
    path = folder / "quickstart.json"
    if path.is_file() and read_json(path) != settings:
        raise InputError(
            f"{folder} holds a quick start with {read_json(path)}, not {settings}: choose another "
            "--output, or delete it"
        )
    write_json(path, settings)


def _print_budget(console: Console, size: Size, folder: Path) -> None:
    table = Table("part", "seconds on two cores", title=f"quick start in {folder}")
    for part, seconds in size.budget.items():
        table.add_row(part, str(seconds))
    total = sum(s * int(part.split()[2]) if part.startswith("each") else s for part, s in size.budget.items())
    table.add_row("all", f"{total} ({total / 60:.0f} minutes)")
    console.print(table)


@contextmanager
def _part(console: Console, name: str) -> Iterator[None]:
    started = time.perf_counter()
    console.rule(name)
    yield
    console.print(f"{name}: {time.perf_counter() - started:.0f} s")


def _train(folder: Path, root: Path, config: str, size: Size, seed: int) -> None:
    """Run ``interstack fit`` with a small shipped config; finished runs are kept, interrupted ones continued."""
    run = folder / "students" / config
    if (run / "summary.json").is_file():
        log.info("kept the finished run in %s", run)
        return
    arguments = ["fit", "--config", config, "--config", "quickstart", "--name", config]
    arguments += ["--runs_dir", str(run.parent), "--seed_everything", str(seed)]
    arguments += ["--data.root", str(root), "--model.teacher.init_args.model", str(folder / "teacher")]
    arguments += ["--trainer.max_epochs", str(size.epochs)]
    arguments += ["--data.batches_per_epoch", str(size.batches_per_epoch)]
    if RunFolder(run).used:
        arguments += ["--ckpt_path", "last"]
    DistillationCLI(arguments)


def _checkpoint(folder: Path, config: str) -> Path:
    return folder / "students" / config / "checkpoints" / "last.ckpt"


def _student(folder: Path, config: str) -> HubertModel:
    return load_student(_checkpoint(folder, config)).model.eval()


def _probe_all(console: Console, folder: Path, root: Path, size: Size, seed: int) -> dict[str, dict[str, Any]]:
    """Probe teacher, untrained teacher and students; each result is kept in ``probes/NAME``."""
    data = TaskData(root=str(root), num_workers=0)
    results: dict[str, dict[str, Any]] = {}
    for name in ["teacher", "untrained", *STUDENTS.values()]:
        with _part(console, f"phone probe: {name}"):
            upstream = folder / name if name in ("teacher", "untrained") else _checkpoint(folder, name)
            output = str(folder / "probes" / name)
            results[name] = superb_probe(str(upstream), data, output, seed=seed, updates=size.probe_steps)
    return results


def _rows(folder: Path, root: Path, probes: dict[str, dict[str, Any]]) -> tuple[list[ReportRun], list[ReferenceRow]]:
    teacher = HubertModel.from_pretrained(folder / "teacher").eval()
    waveforms = [torch.from_numpy(read_audio(str(path))) for path in sorted(root.glob("test-clean/*/*/*.flac"))[:12]]
    teacher_layers = _hidden_states(teacher, waveforms)
    runs = []
    for label, config in STUDENTS.items():
        layers = _hidden_states(_student(folder, config), waveforms)
        similarity = {
            "student layers (CKA)": layer_similarity(layers),
            "student and teacher (CKA)": layer_similarity(layers, teacher_layers),
        }
        probe = probes[config]
        runs.append(
            ReportRun(folder / "students" / config, label, probe["test"]["per"], probe["layer_weights"], similarity)
        )
    size = sum(parameter.numel() for parameter in teacher.parameters())
    references = [
        ReferenceRow("Teacher", probes["teacher"]["test"]["per"], size),
        ReferenceRow("Untrained teacher", probes["untrained"]["test"]["per"], size),
    ]
    return runs, references


@torch.no_grad()
def _hidden_states(model: HubertModel, waveforms: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the layers over all frames of ``waveforms``: one (N, D) for each layer."""
    layers: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    for waveform_T in waveforms:
        states = model(waveform_T[None], output_hidden_states=True).hidden_states[1:]
        for layer, state_1FD in zip(layers, states, strict=True):
            layer.append(state_1FD[0])
    return [torch.cat(layer) for layer in layers]


def _notes(fast: bool) -> ReportNotes:
    from importlib.metadata import version

    return ReportNotes(
        title="Quick start (fast)" if fast else "Quick start",
        command="interstack " + " ".join(sys.argv[1:]),
        commit=git_commit() or "unknown (not a clone)",
        hardware=hardware(torch.device("cpu")),
        versions={name: version(name) for name in ("torch", "lightning", "transformers", "numpy")},
        data="synthetic speech (eSpeak NG), LibriSpeech layout",
    )
