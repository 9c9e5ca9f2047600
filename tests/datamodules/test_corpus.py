"""Finding splits and files on disk."""

from pathlib import Path

import pytest

from datamodules.corpus import CorpusSettings, list_files, read_transcripts, split_folders
from tests.datamodules.corpora import utterance, write_audio, write_corpus


def settings(*roots: Path, splits: tuple[str, ...] = ("train",)) -> CorpusSettings:
    return CorpusSettings(roots=tuple(str(root) for root in roots), splits=splits)


@pytest.mark.parametrize("home", [".", "LibriSpeech", "my_copy"])
def test_a_root_is_the_folder_of_splits_or_its_parent(tmp_path: Path, home: str) -> None:
    write_corpus(tmp_path / home, {"train": [500]})
    assert split_folders(settings(tmp_path)) == [("train", str((tmp_path / home).resolve() / "train"))]


def test_several_roots_are_joined(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", {"train": [500, 600]})
    write_corpus(tmp_path / "b", {"train": [700], "other": [800]})
    both = settings(tmp_path / "a", tmp_path / "b", tmp_path / "a", splits=("other", "train"))
    files = [file.relative for file in list_files(split_folders(both)) if file.is_audio]
    assert [name.split("/")[0] for name in files] == ["other", "train", "train", "train"]


def test_a_parent_of_several_corpora_leaves_a_choice(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", {"train": [500]})
    write_corpus(tmp_path / "b", {"train": [500]})
    with pytest.raises(ValueError, match=r"several folders with these splits.*/a, .*/b"):
        split_folders(settings(tmp_path))
    write_corpus(tmp_path / "LibriSpeech", {"train": [500]})
    assert split_folders(settings(tmp_path))[0][1] == str(tmp_path / "LibriSpeech" / "train")


def test_a_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"dev-clean": [500], "test-clean": [500]})
    with pytest.raises(ValueError, match=rf"no split 'train' in {tmp_path}; it has dev-clean, test-clean"):
        split_folders(settings(tmp_path))
    with pytest.raises(ValueError, match=r"folder .*/nowhere does not exist"):
        split_folders(settings(tmp_path / "nowhere"))


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train" / "19").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"split 'train' is empty: .*/train has no audio file"):
        list_files(split_folders(settings(tmp_path)))


def test_files_are_audio_and_transcripts_in_a_fixed_order(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train": [500, 600]})
    write_audio(utterance(tmp_path, 3, suffix="mp3"), 4000)
    write_audio(utterance(tmp_path, 2, suffix="wav"), 500)
    utterance(tmp_path, 0).with_name("._19-198-0000.flac").write_bytes(b"attributes")
    utterance(tmp_path, 0).with_name("notes.txt").write_text("ignored")
    files = list_files(split_folders(settings(tmp_path)))
    names = ["0000.flac", "0001.flac", "0002.wav", "0003.mp3"]
    assert [file.relative for file in files if file.is_audio] == [f"train/19/198/19-198-{name}" for name in names]
    assert [Path(file.path).name for file in files if not file.is_audio] == ["19-198.trans.txt"]
    assert files[0].speaker == "19"
    assert files[0].size == utterance(tmp_path, 0).stat().st_size


@pytest.mark.parametrize("twin", ["wav", "mp3", "FLAC", "WAV"])
def test_an_utterance_in_two_formats_is_refused(tmp_path: Path, twin: str) -> None:
    write_corpus(tmp_path, {"train": [500, 600]})
    write_audio(utterance(tmp_path, 10, suffix=twin.lower()), 500)  # control: another utterance
    assert len(list_files(split_folders(settings(tmp_path)))) == 4
    path = utterance(tmp_path, 1, suffix="flac")
    path.with_suffix(f".{twin}").write_bytes(path.read_bytes())
    both = rf"0001\.\w+ and {tmp_path}.*0001\.\w+ are one utterance twice: remove one of them"
    with pytest.raises(ValueError, match=both):
        list_files(split_folders(settings(tmp_path)))


def test_transcripts_are_utf8_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.trans.txt"
    path.write_text("19-198-0000 TWO  WORDS \n\n19-198-0001\n", encoding="utf-8")
    assert read_transcripts(str(path)) == {"19-198-0000": "TWO  WORDS", "19-198-0001": ""}
    path.write_bytes(b"19-198-0000 A\n19-198-0001 \xff\xfe\n")
    with pytest.raises(ValueError, match=r"a\.trans\.txt, line 2: this is not UTF-8 text"):
        read_transcripts(str(path))


@pytest.mark.parametrize("gap", ["\t", "  ", " \t "])
@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_transcripts_of_other_editors_are_read(tmp_path: Path, gap: str, mark: str, end: str) -> None:
    path = tmp_path / "a.trans.txt"
    path.write_bytes(f"{mark}19-198-0000{gap}ONE TWO{end}19-198-0001{gap}THREE\u2028FOUR{end}".encode())
    assert read_transcripts(str(path)) == {"19-198-0000": "ONE TWO", "19-198-0001": "THREE\u2028FOUR"}
