"""QbE from the command line: no training, one hidden state chosen on dev, and the leaderboard's list."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from experiments.superb import choosing
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb
from tests.helpers import save_teacher


def test_the_best_hidden_state_on_dev_is_tested(tmp_path: Path) -> None:
    root, teacher = corpora.quesst14(tmp_path / "corpus"), save_teacher(tmp_path / "teacher", layers=2)
    result = superb("qbe", teacher, root, tmp_path / "out")
    folder = tmp_path / "out" / "qbe" / "lr0_seed1337"
    states = json.loads((folder / "states.json").read_text())
    scores = {state: one["mtwv"] for state, one in states.items()}
    assert list(scores) == ["0", "1", "2"]
    best = max(scores, key=lambda state: scores[state])
    assert result["layer_weights"] == [float(str(state) == best) for state in range(3)]
    assert result["dev"] == states[best]
    assert (result["updates"], result["trainable_parameters"], result["best_step"]) == (0, 0, 0)
    assert list(result["tests"]) == ["test"]
    assert not (folder / "last.ckpt").exists()
    root_of_list = ElementTree.fromstring((folder / "benchmark.stdlist.xml").read_text())
    found = {terms.get("termid"): [term.get("file") for term in terms] for terms in root_of_list}
    assert found == {
        f"quesst14_eval_{query:04d}": [f"quesst14_{document:05d}" for document in range(3)] for query in range(2)
    }


def test_a_killed_run_goes_on_with_the_next_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, teacher = corpora.quesst14(tmp_path / "corpus"), save_teacher(tmp_path / "teacher", layers=2)
    whole = superb("qbe", teacher, root, tmp_path / "whole")
    write = choosing.write_json
    chosen: list[int] = []

    def stop_after_the_second(path: Path, done: dict[str, Any]) -> None:
        write(path, done)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(choosing, "write_json", stop_after_the_second)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        superb("qbe", teacher, root, tmp_path / "killed")
    monkeypatch.setattr(choosing, "write_json", lambda path, done: (chosen.append(len(done)), write(path, done)))
    again = superb("qbe", teacher, root, tmp_path / "killed")
    assert chosen == [3]  # only the third state was scored
    assert (again["dev"], again["tests"], again["layer_weights"]) == (
        *(whole["dev"], whole["tests"], whole["layer_weights"]),
    )


def test_a_table_has_several_tests_and_fbank_one_state(tmp_path: Path) -> None:
    result = superb("qbe", "fbank", corpora.table(tmp_path / "corpus"), tmp_path / "out", "--lr_sweep")
    assert list(result["tests"]) == ["test", "other"]
    assert result["layer_weights"] == [1.0]
    folder = tmp_path / "out" / "qbe" / "lr0_seed1337"
    assert (folder / "other-benchmark.stdlist.xml").is_file()


def test_there_is_no_probe_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task qbe has no preset 'probe': give --preset superb"):
        superb("qbe", "fbank", corpora.table(tmp_path / "corpus"), tmp_path / "out", "--preset", "probe")
