"""Metrics of SUPERB's tasks over a whole test set, in percent.

A slot's text form is ``B-type value E-type``. Slot-type F1 compares the *sets* of slot types of an utterance;
slot-value CER takes for each reference value the best hypothesis value of its type, and charges nothing for extra
slots.
"""

import re
from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import multiclass_exact_match
from torchmetrics.functional.text import char_error_rate, edit_distance, word_error_rate

SLOT = re.compile(r"B-(\S+) (.+?) E-\1(?!\S)")
MARK = re.compile(r"\s*[BE]-\S+\s*")


def error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits of space-separated words (or phones) over all reference words: a micro average."""
    return 100 * float(word_error_rate(list(hypotheses), list(references)))


def accuracy(predicted: Sequence[Sequence[int]], references: Sequence[Sequence[int]], num_classes: int) -> float:
    """Share of utterances all of whose labels are right."""
    wanted, found = torch.tensor(references), torch.tensor(predicted)
    return 100 * float(multiclass_exact_match(found, wanted, num_classes=max(2, num_classes)))


def slots(text: str) -> list[tuple[str, str]]:
    """(type, value) of each slot in a text, in order; a slot without its end is none."""
    return [(match[1], MARK.sub(" ", match[2]).strip()) for match in SLOT.finditer(text)]


def slot_type_f1(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean over utterances of the F1 of the sets of slot types; two empty sets agree."""
    pairs = zip(hypotheses, references, strict=True)
    scores = [_set_f1({t for t, _ in slots(one)}, {t for t, _ in slots(two)}) for one, two in pairs]
    return 100 * sum(scores) / len(scores)


def _set_f1(found: set[str], wanted: set[str]) -> float:
    if not found and not wanted:
        return 1.0
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def slot_value_cer(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Character edits of the best values over the characters of all reference values; 0 if there are none."""
    found: list[str] = []
    wanted: list[str] = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        values = slots(hypothesis)
        for slot, value in slots(reference):
            wanted.append(value)
            found.append(_closest(value, [other for kind, other in values if kind == slot]))
    return 100 * float(char_error_rate(found, wanted)) if wanted else 0.0


def _closest(value: str, candidates: Sequence[str]) -> str:
    return min(candidates, key=lambda other: int(edit_distance([other], [value], reduction="sum")), default="")
