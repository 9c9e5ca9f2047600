import pytest

from lightning_modules.growth.schedules import depth_at, growth_epochs, mean_depth, stage_lengths

STAGES = (3, 6, 9, 12)


@pytest.mark.parametrize(
    ("schedule", "max_epochs", "expected"),
    [
        ("equal", 75, [19, 19, 19, 18]),
        ("prop-0", 75, [19, 19, 19, 18]),
        ("prop-1", 75, [8, 15, 22, 30]),
        ("prop-2", 75, [3, 10, 22, 40]),
        ("prop-1", 8, [1, 2, 2, 3]),
        ("equal", 8, [2, 2, 2, 2]),
        ("equal", 4, [1, 1, 1, 1]),
        ("prop-1", 4, [1, 1, 1, 1]),
        ("prop-1.0", 75, [8, 15, 22, 30]),
        ("prop-0.5", 75, [12, 17, 21, 25]),
        ("equal", 100, [25, 25, 25, 25]),
        ("prop-1", 100, [10, 20, 30, 40]),
    ],
)
def test_lengths_literally(schedule: str, max_epochs: int, expected: list[int]) -> None:
    assert stage_lengths(schedule, 4, max_epochs) == expected


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2, 3, 7.25, 99.5])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6, 12])
def test_lengths_fill_the_run_and_leave_no_stage_empty(alpha: float, num_stages: int) -> None:
    for max_epochs in range(num_stages, 120):
        lengths = stage_lengths(f"prop-{alpha}", num_stages, max_epochs)
        assert sum(lengths) == max_epochs
        assert min(lengths) >= 1


def test_exact_ties_go_to_the_earlier_stage() -> None:
    # Shares 10/3, 40/3, 30, 160/3: the first, second and fourth tie at 1/3 for one epoch. With floats the
    # remainder of the fourth is larger by a rounding error, and it would win.
    assert stage_lengths("prop-2", 4, 100) == [4, 13, 30, 53]
    # Shares 1.5, 3, 4.5 of 9: the first and the third tie.
    assert stage_lengths("prop-1", 3, 9) == [2, 3, 4]


def test_an_empty_stage_takes_an_epoch_from_the_longest() -> None:
    # Shares 0.08, 0.64, 2.16, 5.12 of 8 round to 0, 1, 2, 5.
    assert stage_lengths("prop-3", 4, 8) == [1, 1, 2, 4]


@pytest.mark.parametrize("schedule", ["explicit-2,5,8", [2, 5, 8], (2, 5, 8)])
def test_explicit_growth_epochs(schedule: str | list[int]) -> None:
    lengths = stage_lengths(schedule, 4, 12)
    assert lengths == [2, 3, 3, 4]
    assert growth_epochs(lengths) == [2, 5, 8]


def test_no_growth_is_one_stage() -> None:
    for schedule in ("equal", "prop-2", []):
        assert stage_lengths(schedule, 1, 5) == [5]
        assert growth_epochs([5]) == []


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("explicit-2,5", "names 2 growth epochs .*, but 4 stages need 3"),
        ("explicit-2,5,8,9", "names 4 growth epochs"),
        ("explicit-2,5,5", r"\[2, 5, 5\] must increase and lie from 1 to 9, inside the run of 10"),
        ("explicit-5,2,8", "must increase"),
        ("explicit-0,2,5", "must increase and lie from 1 to 9"),
        ("explicit-2,5,10", "must increase and lie from 1 to 9"),
        ([-1, 2, 5], "must increase and lie from 1 to 9"),
        ("Equal", "unknown schedule 'Equal': write equal, prop-ALPHA"),
        ("prop", "unknown schedule"),
        ("prop--1", "unknown schedule"),
        ("prop-100", "below 100"),
        ("prop-1e3", "unknown schedule"),
        ("explicit-", "unknown schedule"),
        ("explicit-1, 2", "unknown schedule"),
    ],
)
def test_refusals(schedule: str | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_lengths(schedule, 4, 10)


@pytest.mark.parametrize("schedule", ["equal", "prop-1", "explicit-1,2,3"])
def test_fewer_epochs_than_stages_is_an_error(schedule: str) -> None:
    with pytest.raises(ValueError, match="max_epochs=3 is too few for 4 stages"):
        stage_lengths(schedule, 4, 3)
    assert stage_lengths(schedule, 4, 4) == [1, 1, 1, 1]


def test_depth_changes_at_the_growth_epochs_only() -> None:
    lengths = stage_lengths("prop-1", 4, 8)
    assert [depth_at(epoch, STAGES, lengths) for epoch in range(9)] == [3, 6, 6, 9, 9, 12, 12, 12, 12]
    assert growth_epochs(lengths) == [1, 3, 5]


def test_mean_depth_of_the_two_schedules_of_the_paper() -> None:
    assert mean_depth(STAGES, stage_lengths("equal", 4, 100)) / 12 == 0.625
    assert mean_depth(STAGES, stage_lengths("prop-1", 4, 100)) / 12 == 0.75
    assert mean_depth((12,), [75]) == 12
