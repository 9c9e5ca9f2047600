"""Numbers as tables show them."""

import pytest

from experiments.report.numbers import fixed, show_count, show_loss, show_seconds, show_si, unit_for
from experiments.report.study_tables import column


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (show_count, 26_873_344, "26.87M"),
        (show_count, 873_472, "873k"),
        (show_count, 999_600, "1.00M"),
        (show_count, 12, "12"),
        (show_seconds, 4.23, "4.2"),
        (show_seconds, 17.26, "17.3"),
        (show_seconds, 99.96, "100"),
        (show_seconds, 1203.6, "1,204"),
        (show_loss, 0.04129, "0.0413"),
        (show_loss, 1.2, "1.20"),
        (show_loss, 123.4, "123."),
        (show_loss, 1.2e-5, "1.20e-05"),
        (show_si, 6.912e13, "69.1T"),
        (show_si, 12.0, "12"),
        (show_si, 0.5, "0.5"),
        (fixed(2), 1.2449, "1.24"),
    ],
)
def test_digits(show, value, text) -> None:  # type: ignore[no-untyped-def]
    assert show(value) == text


@pytest.mark.parametrize(
    ("key", "title", "better"),
    [
        ("pr/per_legacy", "PR PER, % (legacy)", "low"),
        ("asv/eer", "ASV EER, %", "low"),
        ("asv_probe/min_dcf", "ASV probe minDCF", "low"),
        ("sd/der_fixed", "SD DER, % (fixed)", "low"),
        ("qbe/mtwv", "QBE MTWV, %", "high"),
        ("er/accuracy", "ER accuracy, %", "high"),
    ],
)
def test_columns_of_metrics_know_which_way_is_better(key: str, title: str, better: str) -> None:
    assert (column(key).title, column(key).better) == (title, better)


@pytest.mark.parametrize(("largest", "unit"), [(4.0, "s"), (299.0, "s"), (300.0, "min"), (86400.0, "h")])
def test_an_axis_has_a_unit_of_which_there_are_at_least_five(largest: float, unit: str) -> None:
    assert unit_for(largest, ((1.0, "s"), (60.0, "min"), (3600.0, "h")))[1] == unit
