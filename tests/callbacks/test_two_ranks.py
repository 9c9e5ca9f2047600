"""Faults that reach one of two ranks: both must do the same, and none may wait for the other for ever."""

import json
from pathlib import Path

import pytest

from callbacks.requeue import EXIT_SIGTERM
from tests.callbacks import two_ranks
from tests.ddp.launch import environment
from tests.helpers import save_corpus, save_teacher
from tests.processes import fork_ranks


@pytest.mark.ci
def test_both_ranks_skip_stop_and_fail_together(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    save_corpus(tmp_path / "corpus", {"train": 12, "dev": 4})
    fork_ranks(two_ranks.main, tmp_path, output=tmp_path / "output.txt", variables=environment())
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))

    # Micro-batches before which Lightning asks for a signal: those of the first step, and all of 12 steps of two.
    assert first["waits"] == second["waits"] == [2, 24]

    assert first["skip"] == second["skip"] != first["whole"]
    assert first["finite"]
    assert first["skipped"] == second["skipped"] == [0, 1]

    assert (first["code"], second["code"]) == (EXIT_SIGTERM, 0)
    assert first["step"] == 5  # sent in step 4, of which the ranks tell each other while they compute step 5
    assert first["resumed"] == second["resumed"] == first["whole"]

    assert (first["asked"], second["asked"]) == ([EXIT_SIGTERM, 5], [0, 5])
    assert first["asked_resumed"] == second["asked_resumed"] == first["whole"]

    # A growth that writes features stops before its epoch, of which nothing is lost.
    assert (first["growth"], second["growth"]) == ([EXIT_SIGTERM, 3], [0, 3])
    assert first["growth_resumed"] == second["growth_resumed"] == [4, True]

    # The same kind of error, and so the same exit status: whether to start again, and whether a traceback is printed.
    assert [text for text, *_ in first["unwritten"]] == ["[Errno 116] stale", "no layers", "'a bug'"]
    elsewhere = "the first process could not write the features: its error says why"
    assert second["unwritten"] == [[elsewhere, True, True], [elsewhere, False, True], [elsewhere, False, False]]
    assert [kind for _, *kind in first["unwritten"]] == [kind for _, *kind in second["unwritten"]]

    assert first["clocks"] == second["clocks"]
    assert "each of the 2 processes takes from a clock of its own" in first["clocks"]

    assert first["apart"] == second["apart"]
    assert "ranks go on from checkpoints of different steps (5, 6)" in first["apart"][0]
    assert first["apart"][1]  # a job's script starts again

    # Else torchrun would start a run again that EarlyStopping has ended.
    assert (first["under restarts"], second["under restarts"]) == ([0, EXIT_SIGTERM], [0, 0])

    assert first["error"] == second["error"]
    assert "(No space left on device); there is none from before" in first["error"]
