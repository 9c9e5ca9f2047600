"""Download of missing splits, with torchaudio's part replaced."""

import time
from pathlib import Path
from typing import Any

import pytest
import torchaudio

from datamodules.download import download_missing
from tests.datamodules.corpora import utterance, write_corpus
from tests.processes import ended, fork


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Splits that were asked for; each is 'extracted' as torchaudio does, if its folder is not there."""
    splits: list[str] = []

    def fetch(root: str, url: str, download: bool) -> None:
        assert download
        splits.append(url)
        home = Path(root) / "LibriSpeech"
        if not (home / url).is_dir():
            write_corpus(home, {url: [500, 600]})

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", fetch)
    return splits


@pytest.mark.parametrize("name", ["data", "LibriSpeech"])
def test_only_missing_splits_are_fetched(tmp_path: Path, fetched: list[str], name: str) -> None:
    root = tmp_path / name
    home = root if name == "LibriSpeech" else root / "LibriSpeech"
    write_corpus(home, {"dev-clean": [500]})
    for _ in range(2):
        download_missing([str(root)], ["dev-clean", "test-clean"])
    assert fetched == ["test-clean"]
    assert utterance(home, 1, split="test-clean").is_file()
    assert sorted(path.name for path in home.iterdir()) == ["dev-clean", "test-clean"]


def test_of_several_processes_one_downloads(
    tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, count = torchaudio.datasets.LIBRISPEECH, tmp_path / "count"

    def slowly(*arguments: Any, **options: Any) -> None:
        with count.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        fetch(*arguments, **options)

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", slowly)
    processes = [fork(lambda: download_missing([str(tmp_path)], ["dev-clean"])) for _ in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert count.read_text() == "x"
    assert [path.name for path in (tmp_path / "LibriSpeech").iterdir()] == ["dev-clean"]


def test_an_interrupted_extraction_is_not_taken_for_complete(tmp_path: Path, fetched: list[str]) -> None:
    staging = tmp_path / "LibriSpeech" / ".download-dev-clean"
    write_corpus(staging / "LibriSpeech", {"dev-clean": [500]})
    download_missing([str(tmp_path)], ["dev-clean"])
    assert utterance(tmp_path / "LibriSpeech", 1, split="dev-clean").is_file()
