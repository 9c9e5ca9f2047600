"""Every command of the README runs: as it stands, shrunk, or (what needs a corpus or GPUs) with --print_config."""

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.cli import COMMANDS, run
from experiments.training.fit import CONFIGS
from tests.conftest import REPOSITORY
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE

DOCS = ("launching.md", "teachers.md", "extending.md", "installing.md", "studies.md", "reproducing.md", "superb.md")
DOCS += ("performance.md", "caching.md", "deployment.md", "streaming.md", "published.md")
PAGES = [
    REPOSITORY / "README.md",
    *(REPOSITORY / "docs" / name for name in DOCS),
    REPOSITORY / "benchmarks" / "README.md",
]
PARSED = ("fit", "fit-together", "validate", "cache-targets", "superb", "export", "latency", "rescore", "streaming")
READ = ("report", "similarity", "dashboard", "align")  # they have no --print_config
# Each of the others has a test of its own, here or beside its code.
TESTED = {*PARSED, *READ, *("bench", "pack", "reproduce", "synthesize", "pretrain-teacher", "convert")}
# What makes a command small enough for a test; the later of two values wins.
SMALL = {
    "synthesize": ["--minutes", "0.5", "--voices", "3"],
    "pretrain-teacher": ["--steps", "1", "--recipe.crop_seconds", "0.5", "--progress_bar", "false"],
    "quickstart": ["--fast"],
    "superb": ["--updates", "2", "--trainer.accelerator", "cpu", "--wandb.mode", "disabled"],
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def interstack_commands(pages: Sequence[Path] = PAGES) -> list[str]:
    """Arguments after the program's name; ``-m experiments.cli`` is how ``torchrun`` names it."""
    lines = [line for page in pages for line in commands(page)]
    found = [re.search(r"(?:^|\s)(?:interstack|-m experiments\.cli) (.*)", line) for line in lines]
    return [f"interstack {match[1]}" for match in found if match]


def command_of(line: str) -> str:
    words = shlex.split(line)[1:3]
    return " ".join(words) if " ".join(words) in COMMANDS else words[0]


def call(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        ["env", *(f"{k}={v}" for k, v in environment.items()), *command],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


def test_there_are_commands_to_test() -> None:
    named = {command_of(line) for line in interstack_commands()}
    assert named == set(COMMANDS) - {"quickstart"}  # which is behind `make quickstart`
    assert {name for name in named if not name.startswith("bench ")} == TESTED
    assert "make quickstart" in commands(PAGES[0])
    assert "make test" in commands(PAGES[0])


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page) if line.startswith("make")}))
def test_make_targets_exist(line: str) -> None:
    subprocess.run(["make", "--dry-run", *shlex.split(line)[1:]], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.parametrize(
    "line",
    [line for line in interstack_commands() if command_of(line) in PARSED or command_of(line).startswith("bench ")],
)
def test_training_commands_parse_and_resolve(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keep_configs(line, capsys)
    printed = resolved(line, capsys)
    assert any(
        setting in printed
        for setting in ("growth", "lexicon", "rounds", "steps_per_stage", "budget", "opset", "accelerator")
    )


@pytest.mark.parametrize("line", [line for line in interstack_commands() if command_of(line) in READ])
def test_other_commands_are_called_with_their_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = shlex.split(line)[1:]
    module, calls = importlib.import_module(COMMANDS[name][0]), []
    command = getattr(module, name)
    monkeypatch.setattr(module, name, functools.wraps(command)(lambda **options: calls.append(options)))
    run([name, *arguments])
    (options,) = calls
    for name, value in pairwise(arguments):
        if name.startswith("--"):
            assert str(options[name.removeprefix("--")]).replace("'", "") == value


def resolved(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--print_config`` (or ``--help``, where the line asks for it) says of a command."""
    arguments = shlex.split(line)[1:]
    more = [] if {"--help", "--print_config"} & set(arguments) else ["--print_config"]
    with pytest.raises(SystemExit) as stop:
        run([*arguments, *more])
    printed = capsys.readouterr()
    assert stop.value.code in (0, None), printed.err
    return printed.out


def keep_configs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Write the configuration that a command reads from a run's folder, as the command that began the run keeps it."""
    for path, name in re.findall(r"(runs/(\w+)/config_1\.yaml)", line):
        began = next(other for other in interstack_commands() if f"--name {name} " in other)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(resolved(began, capsys))


def runs_of(lines: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, list[Any]]:
    """By the name that a run was given: what must not change in it, of each of its commands."""
    runs: dict[str, list[Any]] = {}
    for line in lines:
        if command_of(line) in ("fit", "validate") and re.search(r"--name |/config_1\.yaml", line):
            keep_configs(line, capsys)
            settings = yaml.safe_load(resolved(line, capsys))
            runs.setdefault(settings["name"], []).append({key: settings[key] for key in ("growth", "model", "data")})
    return runs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_one_run_have_its_settings(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = runs_of(interstack_commands([page]), capsys)
    assert [name for name, (first, *others) in runs.items() if any(other != first for other in others)] == []


def test_control_a_run_continued_without_its_settings_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = "interstack fit --config interleave_equal --name a"
    (first, second) = runs_of([f"{fit} --growth.schedule prop-2", f"{fit} --ckpt_path last"], capsys)["a"]
    assert first != second


@pytest.mark.ci
def test_bench_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in interstack_commands() if command_of(line) == "bench")
    monkeypatch.chdir(tmp_path)
    small = [
        *("--depths", "[3]", "--batch_size", "1", "--seconds", "0.5", "--rounds", "1", "--accelerator", "cpu"),
        *("--teacher", str(save_teacher(tmp_path / "teacher", layers=3)), "--student.hidden_size", "16"),
        *("--student.intermediate_size", "24", "--student.num_heads", "2"),
    ]
    arguments = shlex.split(line)[1:]
    run([*arguments, *small])
    written = tmp_path / arguments[arguments.index("--output") + 1]
    assert [row["depth"] for row in json.loads(written.read_text())["depths"]] == [3]


def test_pack_makes_the_corpus_of_its_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = (line for line in interstack_commands() if shlex.split(line)[1] == "pack")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    splits = ["train-clean-100", "train-clean-360", "train-other-500", "dev-clean"]
    save_corpus(tmp_path / "corpus", dict.fromkeys(splits, 1))
    places = {"/data/LibriSpeech": str(tmp_path / "corpus"), "/data/packed": str(tmp_path / "packed")}
    run([places.get(word, word) for word in shlex.split(line)[1:]])
    assert all((tmp_path / "packed" / split / "00000.pcm").is_file() for split in splits)


@pytest.mark.parametrize("line", [line for line in interstack_commands() if shlex.split(line)[1] == "reproduce"])
def test_studies_plan(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w-]*lexicon[\w-]*\.txt", line):
        Path(name).write_text("HELLO HH AH L OW\n")
    corpus = save_corpus(tmp_path / "corpus", {"train-clean-100": 2})
    arguments = [re.sub(r"/data/\w+", str(corpus), word) for word in shlex.split(line)[1:]]
    run([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])])
    assert "what is left to do" in capsys.readouterr().out


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_the_corpus_of_ones_own_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpus, teacher and student in the order and with the paths of docs/teachers.md, and README's export."""
    lines = [line for line in interstack_commands() if "small" in line or "synthesize" in line]
    assert [shlex.split(line)[1] for line in lines] == ["synthesize", "pretrain-teacher", "fit", "superb"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        shrunk = SMALL.get(name) or [
            *("--data.val_splits", "[]", "--data.batch_size", "2", "--data.batches_per_epoch", "1"),
            *("--data.max_samples", "8000", "--trainer.max_epochs", "4", "--trainer.accelerator", "cpu"),
            *("--model.student.hidden_size", "32", "--model.student.intermediate_size", "32"),
            *("--trainer.devices", "1", "--wandb.mode", "disabled"),
        ]
        run([name, *arguments, *shrunk])
    checkpoint = tmp_path / "runs" / "small" / "checkpoints" / "last.ckpt"
    (export,) = (line for line in interstack_commands([REPOSITORY / "README.md"]) if " export " in line)
    arguments = [str(checkpoint) if "last.ckpt" in word else word for word in shlex.split(export)[1:]]
    run(arguments)
    python = re.search(r"```python\n(from transformers.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert python is not None
    subprocess.run([sys.executable, "-c", python[1]], cwd=tmp_path, check=True, capture_output=True, timeout=PATIENCE)


@pytest.mark.slow  # CI runs `make quickstart ARGS=--fast` itself
def test_quickstart_makes_its_report_and_keeps_finished_parts(tmp_path: Path) -> None:
    """``make quickstart ARGS=--fast``, then again: the second call repeats nothing."""
    first = call(["quickstart", *SMALL["quickstart"]], tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    output = tmp_path / "runs" / "quickstart"
    page = (output / "report.html").read_text()
    assert "miniature" in page
    assert all(name in page for name in ("Full L2L", "GradStack", "MIDAS", "InterleaveStack", "Untrained teacher"))
    assert (output / "loss_vs_time.png").stat().st_size > 10_000
    assert (output / "teacher" / "config.json").is_file()
    assert (output / "students" / "midas_equal" / "summary.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".ckpt", ".flac")}
    again = call(["quickstart", *SMALL["quickstart"]], tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    other = call(["quickstart", *SMALL["quickstart"], "--seed", "1"], tmp_path)
    assert other.returncode == 2
    assert "choose another --output" in other.stderr


# The second is an array, which tests/experiments/launch/test_slurm_script.py has with a program that is quick.
@pytest.mark.ci
@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_job_script_passes_its_arguments_on(place: int, tmp_path: Path) -> None:
    """``sbatch`` as the page has it, with an ``srun`` that only runs what it is given, and that only parses."""
    line = [line for line in commands(PAGES[1]) if line.startswith("sbatch")][place]
    _, *words = shlex.split(line)
    array, (script, *arguments) = words[:1] == ["--array"], words[2:] if words[0] == "--array" else words
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nshift\nexec "$@" --print_config\n')
    (tmp_path / "bin" / "interstack").write_text(f'#!/bin/bash\nexec {sys.executable} -m experiments.cli "$@"\n')
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    variables |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    variables |= {"SLURM_ARRAY_TASK_ID": "1"} if array else {}
    result = subprocess.run(
        ["bash", str(REPOSITORY / script), *arguments],
        cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    name = ("name: seed1", "seed_everything: 1") if array else ("name: first",)
    assert all(text in result.stdout for text in ("num_nodes: 2", "devices: '4'", "policy: interleaved", *name))


def test_every_config_is_in_the_readme() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", text))
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - {"quickstart"} <= named
