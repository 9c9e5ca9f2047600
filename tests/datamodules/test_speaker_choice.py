"""The speakers of a limited cache, and the corpus that is limited to them."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from datamodules.manifest import Manifest, write_manifest
from datamodules.scanning import Row
from datamodules.speaker_choice import most_that_fit, share, speaker_order

SPEAKERS = [f"{number}" for number in range(40)]


def manifest_of(folder: Path, speakers: Sequence[str], seconds: int = 1) -> Manifest:
    rows = [
        Row(f"/corpus/{name}/{number}.flac", f"train/{name}/{number}.flac", 16_000 * seconds, name, f"{number}")
        for number, name in enumerate(speakers)
    ]
    write_manifest(str(folder), rows)
    return Manifest(str(folder))


def test_the_order_depends_on_the_seed_and_not_on_other_speakers() -> None:
    order = speaker_order([*SPEAKERS, *SPEAKERS[::-1]], seed=0)
    assert sorted(order) == sorted(SPEAKERS)
    assert order == speaker_order(SPEAKERS, seed=0)
    assert order != speaker_order(SPEAKERS, seed=1)
    assert order != SPEAKERS
    assert [speaker for speaker in order if int(speaker) % 3] == speaker_order(
        [speaker for speaker in SPEAKERS if int(speaker) % 3], seed=0
    )


@pytest.mark.parametrize("limit", [10, 11, 199, 200, 390, 399])
def test_as_many_speakers_are_kept_as_fit(limit: int) -> None:
    kept = most_that_fit(SPEAKERS, lambda speakers: 10 * len(speakers), limit)
    assert kept == SPEAKERS[: limit // 10]
    assert most_that_fit(SPEAKERS, lambda speakers: 10 * len(speakers), 400) == SPEAKERS


def test_the_limit_holds_where_a_speaker_more_may_need_less() -> None:
    """As it does if a short utterance shortens the segments of its bucket."""
    sizes = 20 * np.arange(41) + np.random.default_rng(0).integers(-70, 70, 41)
    assert (np.diff(sizes) < 0).any()
    for limit in range(int(sizes[1]), int(sizes[40]), 7):
        number = len(most_that_fit(SPEAKERS, lambda speakers: int(sizes[len(speakers)]), limit))
        assert sizes[number] <= limit < sizes[number + 1]


@pytest.mark.parametrize("limit", [-5, 9])
def test_a_limit_below_one_speaker_is_an_error(limit: int) -> None:
    with pytest.raises(
        ValueError, match=rf"leaves {max(0, limit)}(e-09)? GB for the training data, but speaker 0, the"
    ):
        most_that_fit(SPEAKERS, lambda speakers: 10 * len(speakers), limit)
    with pytest.raises(ValueError, match="needs 1e-08 GB: raise it, or choose int8"):
        most_that_fit(SPEAKERS[:1], lambda speakers: 10 * len(speakers), limit)


def test_a_manifest_of_some_speakers_has_their_rows_alone(tmp_path: Path) -> None:
    whole = manifest_of(tmp_path / "whole", ["b", "a", "c", "a", "b", "d"])
    part = pickle.loads(pickle.dumps(whole.of_speakers(["d", "a"])))
    assert part.speakers == ["a", "a", "d"]
    assert [part.utterance_id(row) for row in range(len(part))] == ["1", "3", "5"]
    assert [part.transcript(row) for row in range(len(part))] == ["1", "3", "5"]
    assert part.num_samples.tolist() == [16_000] * 3
    assert part.without_transcript == 0
    assert part.of_speakers(["d"]).path(0) == whole.path(5)
    assert share(part, whole, 16_000) == "2 of 4 speakers, 0.00 h of audio kept, 0.00 h left out"


def test_the_hash_is_that_of_the_rows_that_are_kept(tmp_path: Path) -> None:
    whole = manifest_of(tmp_path / "whole", ["a", "b", "c"])
    more = manifest_of(tmp_path / "more", ["a", "b", "c", "d"])
    longer = manifest_of(tmp_path / "longer", ["a", "b", "c"], seconds=2)
    assert whole.of_speakers("ab").row_hash == more.of_speakers("ab").row_hash
    others = [whole.of_speakers("ac"), longer.of_speakers("ab"), whole]
    assert len({whole.of_speakers("ab").row_hash, *(other.row_hash for other in others)}) == 4
