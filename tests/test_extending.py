"""Every example of docs/extending.md, saved as the file that it names, does what the page says."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.files import read_json, write_json
from datamodules.superb.registry import SOURCES
from experiments.cli import run
from experiments.report import study_tables
from experiments.training.fit import DistillationCLI
from lightning_modules.superb.recipes import TASK_RECIPES
from tests.conftest import REPOSITORY
from tests.datamodules.superb import corpora
from tests.experiments.report.made_up_study import write_study
from tests.tiny_run import TINY

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {name: code for code, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE, re.DOTALL)}
OPTIONS = re.findall(r"`interstack fit (--[^`]*my_[^`]*)`", PAGE)


@pytest.fixture(autouse=True)
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a user who has saved all examples."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in EXAMPLES:
        sys.modules.pop(Path(name).stem, None)


def fit(inputs: Path, name: str, *arguments: str) -> DistillationCLI:
    """Train 4 epochs of 3 steps with the corpus and the teacher in ``inputs``, unless ``arguments`` name others."""
    words = [*TINY]
    if not any(word.startswith("--data") for word in arguments):
        words += ["--data.root", str(inputs / "corpus"), "--data.cache_dir", str(inputs / "cache")]
    else:
        pairs = zip(TINY[::2], TINY[1::2], strict=True)
        words = [word for pair in pairs if not pair[0].startswith("--data.") for word in pair]
    if "--model.teacher" not in arguments:
        words += ["--model.teacher.init_args.model", str(inputs / "teacher")]
    return DistillationCLI(["fit", *words, "--runs_dir", "runs", "--name", name, *arguments])


def test_the_page_has_an_example_and_a_command_for_every_door() -> None:
    names = "my_policies my_schedules my_distances my_losses my_students my_teachers my_data score_emotions my_report"
    assert list(EXAMPLES) == [f"{name}.py" for name in names.split()]
    assert len(OPTIONS) == 7


OWN = {option.rsplit("my_", 1)[1].split(".")[0]: option for option in OPTIONS}


@pytest.fixture(scope="module")
def plain(inputs: Path) -> dict[str, Any]:
    """Control: the summary of the same run without an example."""
    cli = fit(inputs, "plain", "--runs_dir", str(inputs / "runs"))
    return dict(read_json(Path(cli.trainer.default_root_dir) / "summary.json"))


@pytest.mark.ci
@pytest.mark.parametrize("part", ["policies", "schedules", "distances", "losses", "students", "data"])
def test_an_example_trains_and_changes_the_run(part: str, inputs: Path, plain: dict[str, Any]) -> None:
    words = shlex.split(OWN[part].replace("DIR", str(inputs / "corpus")))
    more = ["--growth.stages", "[2, 4]"] if part == "policies" else []
    cli = fit(inputs, part, *words, *more)
    summary, events = read_json(Path(f"runs/{part}/summary.json")), read_json(Path(f"runs/{part}/growth.json"))
    assert (summary["depth"], cli.trainer.current_epoch) == (4, 4)
    if part == "policies":
        assert [event["plan"] for event in events] == [[0, 1, 1, 0]]
    elif part == "schedules":
        assert [event["epoch"] for event in events] == [1, 2, 3]
        assert summary["mean_depth"] == 2.5
    elif part == "data":
        assert summary["steps"] == 4 * 2  # 12 files in batches of 8
        assert summary["val_output"] > 0
    else:
        assert summary["train_loss"] != pytest.approx(plain["train_loss"], rel=0.03)


def test_a_schedule_that_does_not_fit_the_run_is_refused(inputs: Path) -> None:
    Path("my_schedules.py").write_text("def late(stages, epochs):\n    return [1] * stages\n")
    with pytest.raises(ValueError, match=r"my_schedules\.late gives stages of \[1, 1, 1, 1\] epochs: .* 5 in all"):
        fit(inputs, "bad", "--growth.schedule", "my_schedules.late", "--trainer.max_epochs", "5")


@pytest.mark.ci
def test_the_teacher_trains_a_student_and_is_scored(inputs: Path) -> None:
    assert OWN["teachers"].split()[:2] == ["--model.teacher", "my_teachers.Spectra"]
    cli = fit(inputs, "own", *OWN["teachers"].split(), "--trainer.max_epochs", "4")
    assert cli.trainer.global_step == 12
    assert cli.model.objective.output_projection.weight.shape[0] == 201
    assert "`interstack superb --upstream my_teachers.Spectra`" in PAGE
    score("superb", "--task", "sid", "--upstream", "my_teachers.Spectra", "--data.root", str(table()))
    assert len(read_json(Path("scores/result.json"))["layer_weights"]) == 12


def table() -> Path:
    return corpora.table(Path("corpus"))


SCORE = ["--preset", "probe", "--updates", "1", "--trainer.accelerator", "cpu", "--trainer.progress_bar", "false"]
SCORE += ["--output", "scores", "--wandb.mode", "disabled", "--data.num_workers", "0"]


def score(*arguments: str) -> None:
    run([*arguments, *SCORE])


def python(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Run an example as ``python NAME ARGUMENTS`` does."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(name, run_name="__main__")


def test_the_task_is_trained_and_scored_on_a_table(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (SOURCES, TASK_RECIPES):
        monkeypatch.setitem(registry, "emotion", None)  # to be taken out again after the test
        monkeypatch.delitem(registry, "emotion")
    words = ["--upstream", str(inputs / "teacher"), "--data.root", str(table())]
    with pytest.raises(ValueError, match="there is no task 'emotion'"):  # control
        score("superb", "--task", "emotion", *words)
    assert "`python score_emotions.py --upstream students/first --data.root emotions.tsv`" in PAGE
    python(monkeypatch, "score_emotions.py", *words, *SCORE)
    assert "accuracy" in read_json(Path("scores/result.json"))["test"]
    assert list(Path("scores").glob("*/*/test_predict.csv"))


def test_the_column_is_shown_by_its_title_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study_tables.COLUMNS, "audio_seconds", None)  # to be taken out again after the test
    folder = write_study(Path("studies/mine"), seeds=1, rows=("full_l2l", "interleave_equal"))
    for path in folder.glob("jobs/distil-*/result.json"):
        write_json(path, read_json(path) | {"audio_seconds": 90.0})
    study = json.loads((folder / "study.json").read_text()) | {"columns": ["val_output", "audio_seconds"]}
    write_json(folder / "study.json", study)
    python(monkeypatch, "my_report.py", str(folder), "--files", "[report.md]")
    text = (folder / "report.md").read_text()
    assert "| Audio, min |" in text
    assert " 1.5 |" in text
