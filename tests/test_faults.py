"""Faults of the machine during long writes: kills, full disks, limits, read-only folders, SIGTERM in the set-up.

Each is let happen to a real command; then the same command is given again, and must end as if nothing had been.
"""

import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from experiments import cli
from tests.callbacks.test_checkpointing import equal
from tests.datamodules.superb import corpora
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE
from tests.processes import ended, fork, fork_program
from tests.tiny_run import TINY

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a teacher, and what undisturbed commands make of them."""
    folder = tmp_path_factory.mktemp("faults")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 36, "dev": 4})
    corpora.speech_commands(folder / "keywords")
    (folder / "whole").mkdir()
    for name in COMMANDS:
        call(folder, name, "whole")
    return folder


def pack(home: Path, place: str) -> list[str]:
    output = ["--output", str(home / place / "packed"), "--splits", "[train]", "--cache_dir", str(home / "cache")]
    return ["pack", "--root", str(home / "corpus"), *output]


def common(home: Path) -> list[str]:
    places = {"data.root": "corpus", "model.teacher.init_args.model": "teacher", "data.cache_dir": "cache"}
    return [*TINY, *(f"--{name}={home / place}" for name, place in places.items())]


def cache(home: Path, place: str) -> list[str]:
    settings = ["--data.crop", "fixed", "--shard_megabytes", "1", "--batch_seconds", "2"]
    return ["cache-targets", *common(home), *settings, "--output", str(home / place / "targets")]


def fit(home: Path, place: str) -> list[str]:
    folder = ["--runs_dir", str(home / place), "--name", "run", "--ckpt_path", "last"]
    return ["fit", *common(home), "--trainer.max_epochs", "4", *folder]


def export(home: Path, place: str) -> list[str]:
    checkpoint = home / "whole" / "run" / "checkpoints" / "last.ckpt"
    return ["export", "--checkpoint", str(checkpoint), "--output", str(home / place / "student"), "--overwrite"]


def superb(home: Path, place: str) -> list[str]:
    corpus = ["--upstream", str(home / "teacher"), "--data.root", str(home / "keywords")]
    updates = ["--updates", "2", "--eval_every", "1", "--trainer.progress_bar", "false", "--wandb.mode", "disabled"]
    settings = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.num_workers", "0", *updates]
    return ["superb", "--task", "ks", *corpus, *settings, "--output", str(home / place / "superb")]


COMMANDS: dict[str, tuple[Callable[[Path, str], list[str]], str]] = {
    "pack": (pack, "packed/train/*.pcm"),
    "cache-targets": (cache, "targets/*.targets"),
    "fit": (fit, "run/checkpoints/last.ckpt"),
    "superb": (superb, "superb/ks/*/last.ckpt"),
    "export": (export, "student/model.safetensors"),
}


def call(home: Path, name: str, place: str) -> int:
    """The exit status of the program, in this process."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["interstack", *COMMANDS[name][0](home, place)]
    try:
        return cli.main()
    finally:
        sys.argv, sys.path[:] = argv, path


def made(home: Path, name: str, place: str) -> dict[str, bytes]:
    """The large files that a command has made."""
    return {path.name: path.read_bytes() for path in sorted((home / place).glob(COMMANDS[name][1]))}


def assert_as_if_nothing_had_been(home: Path, name: str, place: str) -> None:
    assert call(home, name, place) == 0
    if name in ("fit", "superb"):
        ends = [next((home / where).glob(COMMANDS[name][1])) for where in ("whole", place)]
        one, other = (torch.load(path, weights_only=name == "fit") for path in ends)
        assert equal(one, other)
    else:
        whole = made(home, name, "whole")
        assert whole
        assert made(home, name, place) == whole
    assert not list((home / place).rglob("*.tmp"))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel ends a write beyond it with an error, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.ci
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_twice_costs_one_line_each(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"full {name}"
    largest = max(map(len, made(home, name, "whole").values()))
    for share in (2, 3):
        with files_of_at_most(largest // share):
            assert call(home, name, place) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interstack: ")]
        assert "File too large" in line
        assert str(home / place) in line
        assert "make room" in line
        assert not made(home, name, place) or name in ("fit", "superb")  # whose earlier checkpoints stay
    assert_as_if_nothing_had_been(home, name, place)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_to_is_named(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(home, name, "/sys/interstack") == 2  # nobody may, root included
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interstack: ")]
    assert "'/sys/interstack" in line
    assert "make it writable, or choose another folder" in line


def test_the_table_of_faults_names_tests_that_are_there() -> None:
    table = (REPOSITORY / "docs" / "faults.md").read_text()
    named = re.findall(r"`((?:[a-z_]+/)*test_[a-z_]+\.py)(?:::(test_\w+))?`|`(test_\w+)`", table)
    assert len(named) > 50
    all_tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    for file, test, alone in named:
        text = (REPOSITORY / "tests" / file).read_text() if file else all_tests
        found = re.search(rf"((?:@.*\n)*)def {test or alone}\(", text)
        assert not (test or alone) or found, (file, test or alone)
        # `make test-slurm` runs those of a SLURM, as the page says.
        assert found is None or "@pytest.mark.slow" not in found[1] or file.startswith("slurm/"), (file, test or alone)


@pytest.mark.parametrize("name", ["fit", "superb", "pack", "cache-targets"])
def test_what_a_killed_process_left_half_written_is_cleared_away(name: str, home: Path) -> None:
    place = f"half written {name}"
    folders = {"fit": "run/checkpoints", "superb": "superb/ks", "pack": "packed/.unfinished-train/100"}
    folder = home / place / folders.get(name, ".unfinished-targets")
    folder.mkdir(parents=True)
    (folder / "last.ckpt.elsewhere-7.tmp").write_text("half")
    if name == "superb":  # whose folder has the settings in its name
        shutil.copytree(next((home / "whole" / "superb" / "ks").iterdir()).parent, folder, dirs_exist_ok=True)
        (own,) = (path for path in folder.iterdir() if path.is_dir())
        (folder / "last.ckpt.elsewhere-7.tmp").replace(own / "last.ckpt.elsewhere-7.tmp")
        (own / "result.json").unlink()
    assert_as_if_nothing_had_been(home, name, place)


# -- kills ------------------------------------------------------------------------------------------------------------


def kill_after(seconds: float, home: Path, name: str, place: str) -> bool:
    """Start a command in a child process and kill it; whether it was still running."""
    child = fork(call, home, name, place)
    child.join(seconds)
    running = child.is_alive()
    child.kill()
    child.join()
    return running


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", ["pack", "cache-targets", "export"])
def test_killed_at_ten_random_moments(name: str, home: Path) -> None:
    place, generator, killed, moments = f"killed {name}", random.Random(name), 0, 0
    started = time.perf_counter()
    assert not kill_after(PATIENCE, home, name, f"timed {name}")
    duration = time.perf_counter() - started
    while killed < 10:
        moments += 1
        assert moments < 100
        if kill_after(generator.uniform(0.2, 1.0) * duration, home, name, place):
            killed += 1
        else:
            duration *= 0.8
            shutil.rmtree(home / place)
    assert_as_if_nothing_had_been(home, name, place)
    assert not list((home / place).glob("**/.unfinished-*"))


# -- SIGTERM in the set-up --------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("sign", [pytest.param("run.lock", marks=pytest.mark.slow), "config_1.yaml"])
def test_sigterm_during_set_up_loses_nothing(sign: str, home: Path) -> None:
    place = f"stopped at {sign}"
    process = fork_program(fit(home, place), home / f"{place}.txt")
    deadline = time.monotonic() + PATIENCE
    while not (home / place / "run" / sign).exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.terminate()
    code, output = ended(process), (home / f"{place}.txt").read_text()
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM), output
    assert "Traceback" not in output
    assert_as_if_nothing_had_been(home, "fit", place)


# -- metrics.csv ------------------------------------------------------------------------------------------------------


# The slow ones are between the other two, which read no line and lose one.
@pytest.mark.ci
@pytest.mark.parametrize(
    "cut",
    [
        "empty",
        "in the last line",
        *(pytest.param(cut, marks=pytest.mark.slow) for cut in ("in the first line", "before the last newline")),
    ],
)
def test_a_half_written_metrics_file_is_continued(cut: str, home: Path) -> None:
    place = f"metrics cut {cut}"
    shutil.copytree(home / "whole", home / place)
    folder = home / place / "run"
    checkpoint = next((folder / "checkpoints").glob("stage_3.ckpt"))
    path = folder / "metrics.csv"
    whole = path.read_bytes()
    lengths = {"in the first line": 7, "in the last line": len(whole) - 4, "before the last newline": len(whole) - 1}
    path.write_bytes(whole[: lengths.get(cut, 0)])
    kept = path.read_text().rpartition("\n")[0].splitlines()
    arguments = [*fit(home, place), "--ckpt_path", str(checkpoint)]
    cli.run(arguments)
    lines = path.read_text().splitlines()
    columns = lines[0].count(",")
    assert [line.count(",") for line in lines] == [columns] * len(lines)
    assert lines[: len(kept)] == kept
    assert len(lines) > len(kept)
