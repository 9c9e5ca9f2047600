"""Every text that a user writes is read alike: marks and line ends of other editors pass, other encodings are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.alignments import read_alignment
from datamodules.corpus import read_transcripts
from datamodules.superb.missing import Published
from datamodules.superb.snips import read_slots
from datamodules.superb.table import TEXT, _splits
from experiments.records.reading import read_metrics
from lightning_modules.superb.tokenizers import read_lexicon

TABLE = "path\tsplit\ttext\n" + "".join(f"{split}.wav\t{split}\tCAF\u00c9\n" for split in ("train", "dev", "test"))
INPUTS: dict[str, tuple[Callable[[str], Any], str]] = {
    "transcripts": (read_transcripts, "19-198-0000 CAF\u00c9 OL\u00c9\n19-198-0001 B\n"),
    "table": (lambda path: _splits(path, TEXT), TABLE),
    "lexicon": (lambda path: read_lexicon([path]), "CAF\u00c9 K AE0\nA AH0\n"),
    "alignment": (read_alignment, "utterance\tphone\tstart_seconds\tend_seconds\nu\t\u00e9\t0\t1\n"),
    "slots": (read_slots, "O\ncaf\u00e9\n"),
    "metrics": (lambda path: list(read_metrics(Path(path))), "step,train/caf\u00e9\n1,2\n"),
}
cases = pytest.mark.parametrize(("read", "text"), INPUTS.values(), ids=INPUTS)


@cases
@pytest.mark.parametrize(("mark", "end"), [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_marks_and_line_ends_of_other_editors_change_nothing(
    read: Callable[[str], Any], text: str, mark: str, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(text.encode())
    plain = read(str(path))
    assert len(plain) > 0
    path.write_bytes((mark + text.replace("\n", end)).encode())
    assert read(str(path)) == plain


@cases
@pytest.mark.parametrize(("encoding", "name"), [("utf-16", "UTF-16"), ("latin-1", "ISO-8859-1")])
def test_another_encoding_is_named_with_file_line_and_remedy(
    read: Callable[[str], Any], text: str, encoding: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"input\.txt, line \d: .*; convert it with `iconv -f {name} -t UTF-8`"):
        read(str(path))


def test_a_text_that_torchaudio_reads_may_have_no_mark(tmp_path: Path) -> None:
    path = tmp_path / "iden_split.txt"
    path.write_bytes(b"1 id10003/video/00001.wav\n")
    corpus = Published("A corpus", "somewhere", "ROOT/")
    corpus.require(str(path))
    path.write_bytes("\ufeff1 id10003/video/00001.wav\n".encode())
    with pytest.raises(ValueError, match=r"iden_split\.txt begins with a byte order mark: save it as UTF-8 without"):
        corpus.require(str(path))
    path.write_bytes(b"1 id10003/vid\xe9o/00001.wav\n")
    with pytest.raises(ValueError, match=r"iden_split\.txt, line 1: this is not UTF-8 text"):
        corpus.require(str(path))
