"""Numbers as tables show them."""

import pytest

from experiments.report.numbers import fixed, show_count, show_loss, show_seconds
from experiments.report.study_tables import column


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (show_count, 26_873_344, "26.87M"),
        (show_count, 873_472, "873k"),
        (show_count, 999_600, "1.00M"),
        (show_count, 12, "12"),
        (show_seconds, 4.23, "4.2"),
        (show_seconds, 9.96, "10"),
        (show_seconds, 1203.6, "1,204"),
        (show_loss, 0.04129, "0.0413"),
        (show_loss, 1.2, "1.20"),
        (show_loss, 123.4, "123."),
        (show_loss, 1.2e-5, "1.20e-05"),
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
