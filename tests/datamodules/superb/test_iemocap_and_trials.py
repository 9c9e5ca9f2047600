"""The corpora of ER (folds) and ASV (trials, lengths without silence), and tables with trials."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from datamodules.audio import BadAudioError
from datamodules.superb import lengths
from datamodules.superb.effects import Effects
from datamodules.superb.iemocap import FOLDS, read_iemocap
from datamodules.superb.lengths import Lengths
from datamodules.superb.registry import SuperbData, find_source, read_corpus
from datamodules.superb.rows import Reading, Trial
from datamodules.superb.trials import read_trials, trials_file
from datamodules.superb.voxceleb_trials import read_voxceleb1_trials
from tests.datamodules.superb import corpora


def test_each_fold_tests_its_session(tmp_path: Path) -> None:
    root = corpora.iemocap(tmp_path)
    for number, fold in enumerate(FOLDS, 1):
        corpus = read_iemocap(str(root), reading=Reading(fold=fold))
        assert {row.speaker for row in corpus.tests["test"]} == {f"Ses{number:02d}F"}
        assert (len(corpus.train), len(corpus.dev), len(corpus.tests["test"])) == (12, 4, 4)
        assert f"Ses{number:02d}F" not in {row.speaker for row in [*corpus.train, *corpus.dev]}
        assert corpus.labels == [list(corpora.EMOTIONS)]


def test_the_split_is_that_of_s3prl(tmp_path: Path) -> None:
    """s3prl calls random_split after torch.manual_seed(0); the first indices at the size of fold 1 are known."""
    order = torch.randperm(4446, generator=torch.Generator().manual_seed(0)).tolist()
    assert (order[:4], order[3556:3559]) == ([224, 1110, 4359, 1515], [158, 1584, 1948])
    before = torch.get_rng_state()
    corpus = read_iemocap(str(corpora.iemocap(tmp_path)), reading=Reading(fold="fold2"))
    assert torch.equal(torch.get_rng_state(), before)
    listed = json.loads((tmp_path / "IEMOCAP/meta_data/Session2/train_meta_data.json").read_text())["meta_data"]
    torch.manual_seed(0)
    parts = torch.utils.data.random_split(range(16), [12, 4])  # type: ignore[arg-type, var-annotated]
    for part, rows in zip(parts, (corpus.train, corpus.dev), strict=True):
        assert [Path(listed[index]["path"]).stem for index in part.indices] == [row.key for row in rows]


def test_a_missing_list_and_one_of_another_form_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"IEMOCAP is not there: .*s3prl/iemocap_split"):
        read_iemocap(str(tmp_path), reading=Reading(fold="fold1"))
    root = corpora.iemocap(tmp_path / "corpus")
    path = root / "IEMOCAP/meta_data/Session1/train_meta_data.json"
    path.write_text('{"meta_data": []}')
    with pytest.raises(ValueError, match=r"Session1.train_meta_data.json is no list of s3prl's: .*labels"):
        read_iemocap(str(root), reading=Reading(fold="fold1"))


def test_speakers_of_trials_are_not_trained_on(tmp_path: Path) -> None:
    corpus = read_corpus("asv", SuperbData(str(corpora.voxceleb1_trials(tmp_path)), cache_dir=str(tmp_path / "cache")))
    assert corpus.labels == [["id10001", "id10002", "id10003"]]
    assert [row.key for row in corpus.train if row.speaker == "id10001"] == ["id10001-video0-00001"]  # one is short
    assert (len(corpus.train), corpus.too_short) == (5, 1)
    assert corpus.dev == corpus.tests["test"]
    assert corpus.trials["dev"] == corpus.trials["test"]
    assert corpus.trials["test"].pairs[0] == Trial("id10270-video1-00001", "id10270-video1-00002", True)
    assert [trial.matches for trial in corpus.trials["test"].pairs] == [True, False, True, False]


def test_the_two_archives_may_be_apart(tmp_path: Path) -> None:
    root = corpora.voxceleb1_trials(tmp_path / "one")
    whole = read_voxceleb1_trials(str(root))
    for part, names in (("dev", "id1000*"), ("test", "id1027*")):
        (root / part / "wav").mkdir(parents=True)
        for folder in (root / "wav").glob(names):
            folder.rename(root / part / "wav" / folder.name)
    (root / "wav").rmdir()
    (root / "veri_test.txt").rename(root / "voxceleb1_test_v2.txt")
    apart = read_voxceleb1_trials(str(root))
    assert [row.key for row in apart.train] == [row.key for row in whole.train]
    assert apart.trials == whole.trials


def test_faults_of_the_list_of_trials_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"VoxCeleb1 is not there: .* has neither voxceleb1_test_v2.txt nor veri_test"):
        read_voxceleb1_trials(str(tmp_path))
    root = corpora.voxceleb1_trials(tmp_path / "corpus")
    path = root / "veri_test.txt"
    good = path.read_text()
    path.write_text(good + "1 id10270/video1/00001.wav\n")
    with pytest.raises(ValueError, match=r"veri_test.txt, line 5: .* is no trial"):
        read_voxceleb1_trials(str(root))
    path.write_text(good + "1 id10270/video1/00001.wav id10270/video1/00009.wav\n")
    with pytest.raises(ValueError, match=r"names id10270/video1/00009.wav, which is in none of"):
        read_voxceleb1_trials(str(root))


def test_one_kind_of_trials_only_is_an_error(tmp_path: Path) -> None:
    """A random part of the recordings may leave no pair, or pairs of one kind."""
    root = corpora.voxceleb1_trials(tmp_path)
    data = SuperbData(str(root), cache_dir=str(tmp_path / "cache"), max_eval_utterances=2)
    with pytest.raises(ValueError, match="not of both kinds"):
        read_corpus("asv", data)


def silence_and_tone(path: Path) -> Path:
    tone_T = 0.3 * np.sin(2 * np.pi * 200 * np.arange(16_000) / 16_000)
    soundfile.write(path, np.concatenate([np.zeros(16_000), tone_T, np.zeros(8_000)]), 16_000)
    return path


def test_lengths_without_silence_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, effects = silence_and_tone(tmp_path / "a.wav"), Effects(-3.0, remove_silence=True)

    def open_cache() -> Lengths:
        return Lengths([str(path)], effects, False, str(tmp_path / "cache"))

    first = open_cache()
    length = first.of(str(path))
    assert 14_000 < length < 18_000
    first.save()
    decoded: list[str] = []
    read = lengths.read_audio
    monkeypatch.setattr(
        lengths, "read_audio", lambda path, *more, **other: decoded.append(path) or read(path, *more, **other)
    )
    assert open_cache().of(str(path)) == length
    assert not decoded
    os.utime(path, (0, 0))  # the control: a file that has changed is decoded again, and once only
    again = open_cache()
    assert again.of(str(path)) == length
    again.save()
    assert open_cache().of(str(path)) == length
    assert decoded == [str(path)]


def test_lengths_that_are_found_during_a_save_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads measure while one writes."""
    first, second = (str(silence_and_tone(tmp_path / name)) for name in ("a.wav", "b.wav"))
    known = Lengths([first, second], Effects(-3.0, remove_silence=True), False, str(tmp_path / "cache"))
    known.of(first)
    write = lengths.write_json

    def write_while_measuring(path: Path, value: dict[str, list[int]], **other: None) -> Path:
        for _ in value:
            known.of(second)
        return write(path, value, **other)

    monkeypatch.setattr(lengths, "write_json", write_while_measuring)
    known.save()
    assert list(json.loads(known.path.read_text())) == [first]
    known.save()
    assert list(json.loads(known.path.read_text())) == [first, second]


def test_an_utterance_of_silence_is_bad_audio(tmp_path: Path) -> None:
    root = corpora.voxceleb1_trials(tmp_path)
    soundfile.write(root / "wav/id10270/video1/00001.wav", np.zeros(32_000), 16_000)
    with pytest.raises(BadAudioError, match=r"00001.wav: has 0 samples without its silence, at least 5440 are needed"):
        read_corpus("asv", SuperbData(str(root), cache_dir=str(tmp_path / "cache")))


def write_trials(table: Path, lines: list[str]) -> Path:
    path = Path(trials_file(str(table)))
    path.write_text("\n".join(["split\tfirst\tsecond\tmatches", *lines]) + "\n")
    return path


def test_a_table_has_its_trials_beside_it(tmp_path: Path) -> None:
    data = SuperbData(str(corpora.table(tmp_path)), cache_dir=str(tmp_path / "cache"))
    corpora_of = {task: find_source(task).corpus_of(data) for task in ("asv", "qbe")}
    speakers = corpora_of["asv"].read(data, Reading())
    assert speakers.trials["test"].pairs == [
        Trial("audio/test-0", "audio/test-1", True),
        Trial("audio/test-0", "audio/test-2", False),
    ]
    assert speakers.labels == [["tone0", "tone1", "tone2"]]
    queries = corpora_of["qbe"].read(data, Reading())
    assert queries.trials == speakers.trials
    assert not queries.train
    Path(trials_file(data.root)).unlink()
    with pytest.raises(ValueError, match=r"needs its trials in .*table.trials.tsv"):
        corpora_of["asv"].require(data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere\taudio/dev-0\taudio/dev-1\t1", "line 2: 'nowhere' is no split"),
        ("dev\taudio/dev-0\taudio/dev-9\t1", "line 2: split 'dev' of .* has no utterance 'audio/dev-9'"),
        ("dev\taudio/dev-0\taudio/dev-1\tyes", "line 2: matches is 'yes'; give 1 or 0"),
        ("dev\taudio/dev-0\taudio/dev-1\t1", "has no trial of split 'test'"),
    ],
)
def test_faults_of_a_table_s_trials_are_errors(line: str, message: str, tmp_path: Path) -> None:
    table = corpora.table(tmp_path)
    write_trials(table, [line])
    rows = {split: corpora.rows([1, 1], ["", ""]) for split in ("train", "dev", "test")}
    rows["dev"] = [row.__class__(f"audio/dev-{number}", "", 1, "") for number, row in enumerate(rows["dev"])]
    with pytest.raises(ValueError, match=message):
        read_trials(str(table), rows)


@pytest.mark.parametrize("links", [False, True])
def test_archives_in_folders_of_their_own_serve_sid_and_asv(tmp_path: Path, links: bool) -> None:
    """s3prl's layout for ASV; who has made one folder of links as well for SID is not told of doubled utterances."""
    one = corpora.voxceleb1_trials(tmp_path / "one")
    corpora.voxceleb1(one)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    for speaker in sorted((two / "wav").iterdir()):
        part = two / ("test" if speaker.name in corpora.TESTED else "dev") / "wav"
        part.mkdir(parents=True, exist_ok=True)
        speaker.rename(part / speaker.name)
        if links:
            speaker.symlink_to(part / speaker.name)
    if not links:
        (two / "wav").rmdir()
    for task in ("sid", "asv"):
        expected, found = (
            read_corpus(task, SuperbData(str(root), cache_dir=str(tmp_path / "cache"))) for root in (one, two)
        )
        assert [row.key for row in found.train] == [row.key for row in expected.train]
        assert {name: len(rows) for name, rows in found.splits.items()} == {
            name: len(rows) for name, rows in expected.splits.items()
        }


@pytest.mark.parametrize("hop", [160, 320, 640])
def test_the_shortest_utterance_of_asv_follows_the_encoders_hop(hop: int, tmp_path: Path) -> None:
    root = corpora.voxceleb1_trials(tmp_path)
    path = root / "wav" / corpora.TESTED[0] / "video1" / "00001.wav"
    for frames, fits in ((16, False), (18, True)):
        corpora.write_tone(path, frames * hop / 16_000, 10)
        data = SuperbData(str(root), cache_dir=str(tmp_path / f"{frames}"), on_bad_audio="error")
        if fits:
            assert read_corpus("asv", data, hop=hop).dev
        else:
            with pytest.raises(BadAudioError, match=f"at least {17 * hop} are needed"):
                read_corpus("asv", data, hop=hop)
