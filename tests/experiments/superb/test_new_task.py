"""A new task is a class, a reader of its corpus and a row in each of the two tables; nothing else knows its name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.superb.missing import Published
from datamodules.superb.recipes import DataRecipe
from datamodules.superb.registry import SOURCES, Corpus, SuperbData, TaskSource
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus
from datamodules.superb.table import LABEL
from experiments.superb.options import TaskData
from experiments.superb.preparation import require_inputs
from lightning_modules.superb.classification_tasks import ClassificationTask
from lightning_modules.superb.recipes import TASK_RECIPES
from lightning_modules.superb.tasks import Prediction, TaskRecipe
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb
from tests.helpers import save_teacher

EMOTIONS = {"calm": 0, "excited": 40}  # each label has its tone
PUBLISHED = Published("Tones", "nowhere", "ROOT/SPLIT/LABEL/*.wav")


class MoodRecognition(ClassificationTask):
    def score(self, predictions: list[Prediction], split: str) -> dict[str, float]:  # type: ignore[override]
        return super().score(predictions, split) | {"utterances": float(len(predictions))}


def read_tones(data: SuperbData, reading: Reading) -> SuperbCorpus:
    def rows(split: str) -> Iterator[Row]:
        for path in sorted((Path(data.root) / split).glob("*/*.wav")):
            yield Row(f"{path.parent.name}-{path.stem}", str(path), 0, path.parent.name)

    splits = {split: list(rows(split)) for split in ("train", "dev", "test")}
    return measured_corpus(splits, data.labels or [sorted(EMOTIONS)], reading, [lambda row: row.target])


def save_tones(root: Path) -> Path:
    for split, number in (("train", 8), ("dev", 2), ("test", 3)):
        for label, tone in EMOTIONS.items():
            for index in range(number):
                corpora.write_tone(root / split / label / f"{index}.wav", 0.3 + 0.02 * index, tone)
    return root


@pytest.fixture
def emotions(monkeypatch: pytest.MonkeyPatch) -> None:
    tones = Corpus(read_tones, lambda data: PUBLISHED.require(str(Path(data.root) / "train")))
    source = TaskSource(tones, DataRecipe("balanced", batch_size=4, accumulate=2), LABEL, ("emotions",))
    recipe = TaskRecipe(MoodRecognition, 1e-2, 30_000, 1_000, "accuracy", higher_is_better=True)
    monkeypatch.setitem(SOURCES, "mood", source)
    monkeypatch.setitem(TASK_RECIPES, "mood", recipe)


@pytest.mark.usefixtures("emotions")
@pytest.mark.parametrize("preset", ["superb", "probe"])
def test_a_new_task_is_trained_and_scored(preset: str, tmp_path: Path) -> None:
    root = save_tones(tmp_path / "tones")
    result = superb(
        "mood", save_teacher(tmp_path / "teacher"), root, tmp_path / "out", "--updates", "40", "--preset", preset
    )
    assert result["test"]["utterances"] == 6
    assert result["test"]["accuracy"] > 80
    assert result["batch_size"] == (8 if preset == "superb" else 16)
    (file,) = (tmp_path / "out").glob("*/*/test_predict.txt")
    assert file.read_text().startswith("calm-0 ")


@pytest.mark.usefixtures("emotions")
def test_its_corpus_labels_and_tables_are_those_of_its_row(tmp_path: Path) -> None:
    table = corpora.table(tmp_path / "corpus")
    assert list(superb("mood", "fbank", table, tmp_path / "out", "--updates", "1")["tests"]) == ["test", "other"]
    with pytest.raises(ValueError, match=r"`labels` has 2 lists; task mood needs 1 \(emotions\)"):
        superb("mood", "fbank", table, tmp_path / "labels", "--data.labels", "[[a], [b]]")
    with pytest.raises(ValueError, match=r"Tones is not there: .*train does not exist. Get it from nowhere"):
        require_inputs("mood", TaskData(str(tmp_path / "none")))


def test_without_its_rows_there_is_no_such_task(tmp_path: Path) -> None:
    """The control."""
    with pytest.raises(ValueError, match="there is no task 'mood'"):
        superb("mood", "fbank", save_tones(tmp_path / "tones"), tmp_path / "out", "--updates", "1")


def test_both_tables_have_the_same_tasks() -> None:
    assert list(SOURCES) == list(TASK_RECIPES)
