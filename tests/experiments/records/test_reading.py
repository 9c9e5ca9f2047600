"""Run folders as a trainer, an interruption and a resume leave them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.records.reading import read_metrics, read_run
from tests.experiments.report.made_up_runs import write_run


def metrics(folder: Path, text: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text)
    return path


def test_last_row_of_a_repeated_step_wins_and_columns_are_merged_apart(tmp_path: Path) -> None:
    text = "step,train/loss,val/loss\n10,0.9,\n20,0.8,\n20,,0.5\n10,0.7,\n20,0.6,\n30,0.4,\n"
    found = read_metrics(metrics(tmp_path, text))
    assert found["train/loss"].steps.tolist() == [10, 20, 30]
    assert found["train/loss"].values.tolist() == [0.7, 0.6, 0.4]
    assert found["val/loss"].steps.tolist() == [20]
    assert found["val/loss"].values.tolist() == [0.5]


def test_nan_is_kept_and_text_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    assert math.isnan(read_metrics(metrics(tmp_path, "step,train/loss\n1,nan\n"))["train/loss"].values[0])
    with pytest.raises(ValueError, match=r"metrics\.csv: line 3 "):
        read_metrics(metrics(tmp_path, "step,train/loss\n1,0.1\n2,oops\n"))
    with pytest.raises(ValueError, match="no column 'step'"):
        read_metrics(metrics(tmp_path, "epoch,train/loss\n1,0.1\n"))


def test_a_last_line_cut_off_in_writing_is_an_error_or_missing_values(tmp_path: Path) -> None:
    found = read_metrics(metrics(tmp_path, "step,train/loss,val/loss\n1,0.1,0.2\n2,0.3\n"))
    assert found["train/loss"].steps.tolist() == [1, 2]
    assert found["val/loss"].steps.tolist() == [1]


def test_a_finished_run(tmp_path: Path) -> None:
    log = read_run(write_run(tmp_path / "run", (3, 6, 9, 12), policy="interleaved"))
    assert log.finished
    assert log.policy == "interleaved"
    assert log.depth_profile() == [(0, 3), (10, 6), (20, 9), (30, 12)]
    assert log.mean_depth() == pytest.approx(7.5)
    assert log.growth[-1].ancestry == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    np.testing.assert_allclose(log.seconds_at([0, 1, 10]), [0, 2.5, 25])


def test_mean_depth_weighs_stages_by_their_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", (3, 12))
    events = json.loads((folder / "growth.json").read_text())
    (folder / "growth.json").write_text(json.dumps([events[0] | {"step": 10}]))
    assert read_run(folder).mean_depth() == pytest.approx((10 * 3 + 30 * 12) / 40)


def test_an_unfinished_run_has_what_it_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", (3, 6))
    (folder / "summary.json").unlink()
    log = read_run(folder)
    assert not log.finished
    assert (log.steps, log.depth, log.train_seconds, log.val_output) == (40, 6, None, None)


def test_an_empty_folder_is_a_run_that_knows_nothing(tmp_path: Path) -> None:
    log = read_run(tmp_path)
    assert log.depth_profile() == []
    assert log.mean_depth() is None
    assert np.isnan(log.seconds_at([1, 2])).all()


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such run folder"):
        read_run(tmp_path / "absent")
    folder = write_run(tmp_path / "run", (3, 6))
    (folder / "growth.json").write_text('[{"epoch": 1}]')
    with pytest.raises(ValueError, match=r"growth\.json: a growth event lacks the key 'step'"):
        read_run(folder)
    (folder / "growth.json").write_text("[")
    with pytest.raises(ValueError, match=r"growth\.json, line 1: this is not JSON"):
        read_run(folder)
