"""``interstack latency``: rows in turns, its files, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HubertConfig

from datamodules.errors import InputError
from datamodules.files import write_json
from experiments.cli import run
from experiments.deployment import measuring
from experiments.deployment.latency import available_threads, check, latency
from experiments.deployment.measuring import Worker, describe, measure, summarised
from experiments.deployment.rows import Row, find_rows
from experiments.deployment.scores import find_scores
from experiments.deployment.tables import markdown, picture
from tests.conftest import REPOSITORY
from tests.experiments.deployment.tiny_onnx import save_onnx

STUDY = REPOSITORY / "experiments" / "results" / "table1_whisper" / "results.json"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Two ONNX folders, whose processes start quickly: one with its student's description, one without."""
    meta = {
        "student_config": HubertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4).to_dict(),
        "onnx": {"precision": "float32", "parameters": 4_200_000},
    }
    return {
        "known": str(save_onnx(tmp_path / "known", meta)),
        "bare": str(save_onnx(tmp_path / "bare", output="hidden_states")),
    }


@pytest.mark.ci
def test_files_and_their_content(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "out"
    options = ["--seconds", "[1, 0.5]", "--batch_size", "3", "--threads", "[1, 2]", "--rounds", "2"]
    scores = ["--scores", str(STUDY), "--score_names", '{"known": "full_l2l"}', "--metric", "pr_probe/per"]
    run(["latency", "--models", json.dumps(models), "--output", str(place), *options, *scores])
    result = json.loads((place / "latency.json").read_text())
    known, bare = result["rows"]
    assert [run["batch"] for run in known["threads"]["2"]["runs"]] == [1, 1, 3, 3]
    assert [run["seconds"] for run in known["threads"]["2"]["runs"]] == [0.5, 1, 0.5, 1]
    assert all(len(run["turns_ms"]) == 2 for run in bare["threads"]["1"]["runs"])
    assert [(each["batch"], each["seconds"]) for each in known["threads"]["1"]["memory"]] == [(1, 1), (3, 1)]
    assert known["gmacs_per_second"] > 0
    assert known["parameters"] == 4_200_000
    assert (bare["gmacs_per_second"], bare["superb_gmacs"], bare["parameters"]) == (None, None, None)
    assert (known["computes"], bare["computes"]) == ("last hidden state", "all hidden states")
    assert known["difference"] is not None
    assert 0 < known["score"] < 100
    assert bare["score"] is None
    text = (place / "latency.md").read_text()
    assert text.partition("\n![")[0] in capsys.readouterr().out
    assert "Lower scores are better" in text
    assert "| bare | ONNX | unknown | - |" in text
    assert "(all hidden states: bare, ONNX unknown)" in text
    assert "## 2 threads" in text
    assert (place / "latency.png").read_bytes().startswith(b"\x89PNG")


class Recorded:
    """Stands in for a worker, and keeps the requests of all."""

    requests: list[tuple[str, int, float]] = []

    def __init__(self, row: Row, threads: int, seconds: float, folder: Path) -> None:
        self.row, self.first, self.asked = row, {"start": {}, "libraries_mb": 1.0}, 0

    def ask(self, batch: int, seconds: float) -> dict[str, Any]:
        self.asked += 1
        self.requests.append((self.row.name, batch, seconds))
        return {"laps": [3.0, 1.0, 2.0], "peak_mb": 100.0 * self.asked, "now_mb": 50.0}

    def close(self) -> None:
        self.requests.append((self.row.name, 0, 0.0))


def test_rows_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "Worker", Recorded)
    monkeypatch.setattr(Recorded, "requests", [])
    rows = [Row(name, name, name, "ONNX", "float32", None) for name in "ab"]
    (first, _) = measure(rows, 1, [5.0, 1.0], 2, rounds=2)
    inputs = [(1, 1.0), (1, 5.0), (2, 1.0), (2, 5.0)]
    turns = [[(name, *each) for each in inputs for name in order] for order in ("ba", "ab", "ba")]
    assert Recorded.requests[:24] == [each for turn in turns for each in turn]
    assert {name for name, *_ in Recorded.requests[24:]} == {"a", "b"}  # both are ended
    # The peak of one utterance is read before any batch is run, in the turn that is not counted.
    assert [(each["batch"], each["peak_mb"]) for each in first["memory"]] == [(1, 200.0), (2, 400.0)]
    assert [run["turns_ms"] for run in first["runs"]] == [[2000.0, 2000.0]] * 4


def test_summary_of_turns() -> None:
    found = summarised(2, 5.0, [1.0, 4.0, 2.0, 3.0, 5.0])
    assert (found["median_ms"], found["quartiles_ms"], found["real_time_factor"]) == (3000, [2000, 4000], 0.3)
    assert summarised(1, 5.0, [1.0])["quartiles_ms"] == [1000, 1000]


def test_distance_is_from_the_float32_row_of_the_same_name(models: dict[str, str], tmp_path: Path) -> None:
    (row,) = find_rows({"a": models["known"]}, ["float32"], tmp_path)
    other = Row("a", row.source, models["bare"], "ONNX", "int8", None)
    alone = Row("b", row.source, models["bare"], "ONNX", "int8", None)
    assert [each["difference"] for each in describe([row, other, alone], 1, 0.5)] == [0, 0, None]


@pytest.mark.parametrize("process_ends", [False, True])
def test_a_row_that_fails_is_named(
    process_ends: bool, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = find_rows({"first": models["known"]}, ["float32"], tmp_path)
    if process_ends:
        monkeypatch.setattr("sys.executable", "/bin/false")
    else:
        (Path(row.path) / "model.onnx").write_bytes(b"no model")
    kind, says = (RuntimeError, "ended with status 1") if process_ends else (InputError, "no ONNX file")
    with pytest.raises(kind, match=f"row 'first, ONNX float32': .*{says}"):
        Worker(row, 1, 0.5, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([0.02, 1.0], 1, [1], 1), "every length must have a frame, 0.025 s or more"),
        (([], 1, [1], 1), "every length must have a frame"),
        (([1.0], 1, [0], 1), r"threads=\[0\]: give one number or more, each at least 1"),
        (([1.0], 1, [], 1), "give one number or more"),
        (([1.0], 0, [1], 1), "batch_size=0 and rounds=1 must be at least 1"),
        (([1.0], 1, [1], 0), "rounds=0 must be at least 1"),
    ],
)
def test_refused_numbers(arguments: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check(*arguments)


def test_nothing_is_written_if_a_row_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no score of row 'nobody'"):
        latency(models, str(tmp_path / "out"), scores=str(STUDY), score_names={"known": "nobody"})
    assert not (tmp_path / "out").exists()


def test_threads_of_this_machine() -> None:
    assert available_threads()[0] == 1


def test_scores() -> None:
    found = find_scores(STUDY, ["full_l2l", "other"], None, "pr_probe/per")
    jobs = json.loads(STUDY.read_text())["jobs"]
    of_row = [job["result"] for job in jobs if (job["row"], job["task"]) == ("full_l2l", "pr_probe") and job["result"]]
    tested = [result["metrics"]["per"] for result in of_row]
    assert found.values == {"full_l2l": pytest.approx(sum(tested) / len(tested))}
    assert (found.title, found.better) == ("PR probe PER, %", "low")
    named = find_scores(STUDY, ["student"], {"student": "full_l2l"}, "pr_probe/per")
    assert named.values == {"student": found.values["full_l2l"]}


@pytest.mark.parametrize(
    ("names", "metric", "says"),
    [
        (None, "pr_probe/wer", "has no metric 'pr_probe/wer': did you mean pr_probe/per"),
        ({"student": "full_l2"}, None, "has no score of row 'full_l2': did you mean full_l2l"),
        ({"studnt": "full_l2l"}, None, "'studnt' is no measured encoder: did you mean student"),
    ],
)
def test_scores_that_there_are_not(names: dict[str, str] | None, metric: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_scores(STUDY, ["student"], names, metric)


def test_file_without_scores(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"study": {"rows": [], "seeds": []}, "jobs": []})
    with pytest.raises(InputError, match="has no scores"):
        find_scores(tmp_path / "results.json", ["a"], None, None)


def made_up(score: str | None) -> dict[str, Any]:
    """A result of three rows."""
    runs = [{"batch": 1, "seconds": 5.0, "median_ms": 200.0, "quartiles_ms": [190.0, 230.0], "real_time_factor": 0.04}]
    rows = [
        {
            "name": name, "label": f"{name}, {precision}", "random_weights": name == "b", "format": "PyTorch",
            "precision": precision, "computes": "last hidden state", "parameters": 26_872_960, "weights_mb": 107.5,
            "gmacs_per_second": 3.9, "superb_gmacs": 859.4, "difference": difference,
            "score": 12.5 if score and name == "a" else None,
            "threads": {"1": {"start": {"total": 4.2}, "libraries_mb": 400.0, "runs": runs,
                              "memory": [{"batch": 1, "seconds": 5.0, "peak_mb": None}]}},
        }
        for name, precision, difference in (("a", "float32", 0.0), ("a", "int8", 0.013), ("b", "float32", 0.0))
    ]  # fmt: skip
    return {
        "command": "interstack latency", "commit": "abc", "hardware": "a CPU", "cpu_features": ["avx2"],
        "versions": {"torch": "2"}, "load_before": 0.1, "threads": [1], "seconds": [5.0], "batch_size": 1, "rounds": 3,
        "macs_seconds": 15.0, "score": score, "better": score and "low", "rows": rows,
    }  # fmt: skip


def test_tables_and_picture() -> None:
    text = markdown(made_up("PER, %"))
    assert "| a | PyTorch | int8 | 26.87M | 107.5 | 3.90 | 859 | 1.3e-02 | 12.50 |" in text
    assert "| b (random weights) | PyTorch | float32 | 26.87M | 107.5 | 3.90 | 859 | - | - |" in text
    assert "| a, int8 | 4.2 | 200 [190, 230] | 0.0400 | 400 | - |" in text
    drawn = picture(made_up("PER, %"))
    assert drawn.heading == "Quality against latency"
    assert drawn.figure.axes[0].get_ylabel() == "PER, %"
    (names,) = [[label.get_text() for label in legend.get_texts()] for legend in drawn.figure.legends]
    assert names == ["a", "PyTorch float32", "PyTorch int8"]  # b has no score
    plain = picture(made_up(None))
    assert [label.get_text() for label in plain.figure.axes[0].get_yticklabels()] == [
        "b, float32", "a, int8", "a, float32",
    ]  # fmt: skip
    assert "PER, %" not in markdown(made_up(None))
