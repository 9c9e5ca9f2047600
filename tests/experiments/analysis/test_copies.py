"""Copies beside other pairs of layers at equal distance."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.files import write_json
from experiments.analysis.copies import copies, copy_pairs, mean_at, mean_at_distances


def test_copies_share_a_first_stage_layer() -> None:
    assert copy_pairs([0, 0, 1, None, 1, None]) == [(0, 1), (2, 4)]
    assert copy_pairs([0, 1, 2]) == []


def test_other_pairs_are_taken_at_the_same_distances() -> None:
    cka = np.array([[1, 0.9, 0.5], [0.9, 1, 0.7], [0.5, 0.7, 1]])
    assert mean_at(cka.tolist(), [(0, 1), (0, 2)]) == pytest.approx(0.7)
    assert mean_at_distances(cka.tolist(), [(0, 1), (0, 2)]) == pytest.approx((0.8 + 0.5) / 2)
    assert mean_at_distances(cka.tolist(), [(0, 1)]) == pytest.approx(0.8)


def results(path: Path, ancestry: list[int]) -> str:
    def job(row: str, seed: int, near: float) -> dict[str, object]:
        cka = np.eye(4) + near * (1 - np.eye(4))
        stage = {"ancestry": ancestry if row == "grown" else [0, 1, 0, 1]}
        known = {"id": f"{row}{seed}", "kind": "similarity", "row": row, "seed": seed, "status": "done"}
        return known | {"result": {"runs": [{"stages": [stage]}], "cka": cka.tolist()}}

    jobs = [job("grown", 0, 0.9), job("grown", 1, 0.8), job("other", 0, 0.4)]
    return str(write_json(path, {"study": {"rows": [{"name": "grown"}, {"name": "other"}]}, "jobs": jobs}))


def test_each_seed_is_compared_with_the_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies(results(tmp_path / "results.json", [0, 0, 1, 1]), "grown")
    lines = {line.split("\u2502")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "\u2502" in line}
    assert "0.900" in lines["grown, copies"]
    assert "0.800" in lines["grown, copies"]
    assert "0.400" in lines["other, all pairs"]
    assert " - " in lines["other, all pairs"]
    with pytest.raises(ValueError, match="no copies in the row grown"):
        copies(results(tmp_path / "none.json", [0, 1, 2, 3]), "grown")
    with pytest.raises(ValueError, match="no copies in the row missing"):
        copies(results(tmp_path / "results.json", [0, 0, 1, 1]), "missing")
