"""Metrics of SUPERB's tasks over a whole test set, in percent.

A slot's text form is ``B-type value E-type``, found with s3prl's patterns. Slot-type F1 compares the *sets* of slot
types of an utterance. Slot-value CER and WER use for each reference value the best hypothesis value of its type, and do
not count extra slots. Slot-edit F1 requires equal values.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_exact_match
from torchmetrics.functional.text import char_error_rate, word_error_rate

SLOT = re.compile(r"B-(\S+) (.+?) E-\1")
BEGIN, END = re.compile(r"B-\S+ "), re.compile(r" E-\S+")


def error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits of space-separated words (or phones) divided by the number of all reference words, a micro average."""
    return 100 * float(word_error_rate(list(hypotheses), list(references)))


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits of characters, spaces included, divided by the number of all reference characters, a micro average."""
    return 100 * float(char_error_rate(list(hypotheses), list(references)))


def accuracy(predicted: Sequence[Sequence[int]], references: Sequence[Sequence[int]], num_classes: int) -> float:
    """Percentage of utterances with all labels correct."""
    wanted, found = torch.tensor(references), torch.tensor(predicted)
    return 100 * float(multiclass_exact_match(found, wanted, num_classes=max(2, num_classes)))


def slots(text: str) -> list[tuple[str, str]]:
    """(type, value) of each slot in a text with single spaces, in order; a slot without an end mark does not count.

    An end mark may go on: ``E-object_name`` ends a slot of type ``object``. Marks in a value are removed.
    """
    return [(match[1], END.sub("", BEGIN.sub("", match[2]))) for match in SLOT.finditer(text)]


def slot_type_f1(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean over utterances of the F1 of the sets of slot types; two empty sets count as equal."""
    pairs = zip(hypotheses, references, strict=True)
    scores = [_set_f1({t for t, _ in slots(one)}, {t for t, _ in slots(two)}) for one, two in pairs]
    return 100 * sum(scores) / len(scores)


def _set_f1(found: set[str], wanted: set[str]) -> float:
    if not found and not wanted:
        return 1.0
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def slot_value_cer(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Character edits of the best values, divided by the characters of all reference values; 0 if there are none."""
    return _slot_value_rate(hypotheses, references, char_error_rate)


def slot_value_wer(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Like :func:`slot_value_cer`, in words; the best value is the one with the fewest word edits."""
    return _slot_value_rate(hypotheses, references, word_error_rate)


def _slot_value_rate(
    hypotheses: Sequence[str], references: Sequence[str], rate: Callable[[list[str], list[str]], Tensor]
) -> float:
    found: list[str] = []
    wanted: list[str] = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        values = slots(hypothesis)
        for slot, value in slots(reference):
            wanted.append(value)
            found.append(_closest(value, [other for kind, other in values if kind == slot], rate))
    return 100 * float(rate(found, wanted)) if wanted else 0.0


def _closest(value: str, candidates: Sequence[str], rate: Callable[[list[str], list[str]], Tensor]) -> str:
    return min(candidates, key=lambda other: float(rate([other], [value])), default="")


def slot_edit_f1(hypotheses: Sequence[str], references: Sequence[str], full: bool) -> float:
    """F1 over all reference slots of a set; 100 if there are no reference slots and no wrong ones.

    A reference slot is right if some hypothesis slot of its type has its value. Otherwise it is missed and, if there
    is a slot of its type, also wrong. With ``full`` every slot of a type that the reference lacks is wrong too.
    """
    counts: Counter[str] = Counter()
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        found, wanted = slots(hypothesis), slots(reference)
        types, wanted_types = {slot for slot, _ in found}, {slot for slot, _ in wanted}
        for slot in wanted:
            counts["right"] += slot in found
            counts["missed"] += slot not in found
            counts["wrong"] += slot not in found and slot[0] in types
        if full:
            counts["wrong"] += sum(slot not in wanted_types for slot, _ in found)
    total = 2 * counts["right"] + counts["missed"] + counts["wrong"]
    return 100 * 2 * counts["right"] / total if total else 100.0
