import numpy as np
import pytest

from lightning_modules.superb.metrics import (
    accuracy,
    character_error_rate,
    error_rate,
    slot_edit_f1,
    slot_type_f1,
    slot_value_cer,
    slot_value_wer,
    slots,
)
from lightning_modules.superb.recipes import build_task
from lightning_modules.superb.tasks import Prediction, TaskInputs


def edits(one: list[str], other: list[str]) -> int:
    """Levenshtein distance by the recurrence."""
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    table[:, 0], table[0] = np.arange(len(one) + 1), np.arange(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return int(table[-1, -1])


def test_error_rate_is_a_micro_average_of_edit_distances() -> None:
    generator = np.random.default_rng(0)
    sides = [[generator.choice(list("abcd"), generator.integers(0, 9)).tolist() for _ in range(30)] for _ in "12"]
    sides[1] = [words or ["a"] for words in sides[1]]
    distance = sum(edits(one, two) for one, two in zip(*sides, strict=True))
    texts = [[" ".join(words) for words in side] for side in sides]
    assert error_rate(*texts) == pytest.approx(100 * distance / sum(map(len, sides[1])))
    assert error_rate([""], ["a b"]) == 100
    distance = sum(edits(list(one), list(two)) for one, two in zip(*texts, strict=True))
    assert character_error_rate(*texts) == pytest.approx(100 * distance / sum(map(len, texts[1])))


def test_slots_are_read_with_their_own_end() -> None:
    assert slots("PLAY B-x JAZZ E-x BY B-y MILES DAVIS E-y") == [("x", "JAZZ"), ("y", "MILES DAVIS")]
    assert slots("B-x JAZZ E-y") == []
    assert slots("B-x A B-y B E-y C E-x") == [("x", "A B C")]  # nested marks are no part of the value
    assert slots("B-x A E-xy E-x") == slots("B-x A E-xy") == [("x", "A")]  # an end mark may go on
    assert slots("B-x AB-y B E-yC E-x") == [("x", "AB")]  # removed, not replaced by a space


def test_slot_type_f1_is_of_sets_and_a_mean_over_utterances() -> None:
    reference = ["B-x A E-x B-x B E-x B-y C E-y", "PLAY", "B-x A E-x", "B-x A E-x"]
    hypothesis = ["B-x A E-x B-z C E-z", "PLAY", "PLAY", "B-x WRONG E-x"]
    # {x, z} and {x, y}: precision and recall 1/2; both empty: 1; one empty: 0; the value does not matter: 1.
    assert slot_type_f1(hypothesis, reference) == pytest.approx(100 * (0.5 + 1 + 0 + 1) / 4)


def test_slot_value_cer_takes_the_best_value_of_a_type() -> None:
    reference = ["B-x ABCD E-x B-y EF E-y"]
    assert slot_value_cer(["B-x ZZZZ E-x B-x ABCE E-x"], reference) == pytest.approx(100 * (1 + 2) / 6)
    assert slot_value_cer(["B-x ABCD E-x B-y EF E-y B-z EXTRA E-z"], reference) == 0
    assert slot_value_cer(["PLAY"], ["PLAY"]) == 0


def test_slot_value_wer_takes_the_value_of_the_fewest_word_edits() -> None:
    reference = ["B-x MILES DAVIS E-x B-y JAZZ E-y"]
    # MILES alone is nearer in words, MILS DAVID in characters.
    hypothesis = ["B-x MILS DAVID E-x B-x MILES E-x"]
    assert slot_value_wer(hypothesis, reference) == pytest.approx(100 * (1 + 1) / 3)
    assert slot_value_cer(hypothesis, reference) == pytest.approx(100 * (2 + 4) / 15)
    assert slot_value_wer(["PLAY"], ["PLAY"]) == 0


def test_slot_edit_f1_wants_equal_values() -> None:
    reference = ["B-x A E-x B-x B E-x B-y C E-y B-w D E-w", "PLAY"]
    hypothesis = ["B-x A E-x B-y WRONG E-y B-z E E-z B-z F E-z", "B-x A E-x"]
    # Right: x A. Missed: x B, y C, w D. Wrong: x and y, which there is one of; with types that the reference lacks also
    # z twice, and x of the second.
    assert slot_edit_f1(hypothesis, reference, full=False) == pytest.approx(100 * 2 / (2 + 3 + 2))
    assert slot_edit_f1(hypothesis, reference, full=True) == pytest.approx(100 * 2 / (2 + 3 + 5))
    assert slot_edit_f1(reference, reference, full=True) == slot_edit_f1(["PLAY"], ["PLAY"], full=True) == 100


def test_an_utterance_is_right_if_all_its_labels_are() -> None:
    assert accuracy([[1, 2, 0], [1, 2, 1]], [[1, 2, 0], [1, 2, 0]], 3) == 50
    assert accuracy([[0], [1], [1], [1]], [[0], [1], [1], [0]], 2) == 75
    assert accuracy([[0]], [[0]], 1) == 100


@pytest.mark.parametrize(
    ("task", "right", "total", "published"),
    [("ks", 266, 3081, 8.63), ("ic", 345, 3793, 9.10), ("sid", 7, 8251, 0.085), ("er", 384, 1085, 35.39)],
)
def test_a_constant_classifier_has_fbank_s_published_accuracy(
    task: str, right: int, total: int, published: float
) -> None:
    """FBANK's rows are those of one answer for all of the published test set, of which so many are right."""
    labels = [["a", "b"]] * (3 if task == "ic" else 1)
    answer = [0] * len(labels)
    targets = ["\t".join("a" * len(labels))] * right + ["\t".join("b" * len(labels))] * (total - right)
    predictions = [Prediction(str(number), target, answer) for number, target in enumerate(targets)]
    found = build_task(task, TaskInputs(labels)).score(predictions, "test")["accuracy"]
    assert found == pytest.approx(published, abs=0.005)
