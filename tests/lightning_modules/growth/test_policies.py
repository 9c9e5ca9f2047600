import importlib
from collections.abc import Iterator
from itertools import pairwise

import pytest

from lightning_modules.growth.policies import (
    POLICIES,
    compose_ancestry,
    default_stages,
    get_policy,
    kept_positions,
    make_plan,
    register_policy,
)

NAMES = {
    "interleaved",
    "gradual",
    "midas",
    "lidas",
    "stackbert",
    "one_shot_stack",
    "one_shot_interleave",
    "random",
    "identity",
}
# policy, offset, {(depth, target): plan}; "-" is a fresh layer.
TABLE = [
    ("interleaved", "last", {
        (3, 6): "0 0 1 1 2 2", (6, 9): "0 1 1 2 3 3 4 5 5", (9, 12): "0 1 2 2 3 4 5 5 6 7 8 8",
    }),
    ("interleaved", "first", {
        (3, 6): "0 0 1 1 2 2", (6, 9): "0 0 1 2 2 3 4 4 5", (9, 12): "0 0 1 2 3 3 4 5 6 6 7 8",
    }),
    ("gradual", "last", {
        (3, 6): "0 1 2 0 1 2", (6, 9): "0 1 2 3 4 5 3 4 5", (9, 12): "0 1 2 3 4 5 6 7 8 6 7 8",
    }),
    ("midas", "last", {
        (3, 6): "0 1 2 0 1 2", (6, 9): "0 1 2 0 1 2 3 4 5", (9, 12): "0 1 2 3 4 5 3 4 5 6 7 8",
    }),
    ("lidas", "last", {
        (3, 6): "0 1 2 0 1 2", (6, 9): "0 1 2 3 1 2 3 4 5", (9, 12): "0 1 2 3 4 5 3 4 5 6 7 8",
    }),
    ("stackbert", "last", {(3, 6): "0 1 2 0 1 2", (6, 12): "0 1 2 3 4 5 0 1 2 3 4 5"}),
    ("one_shot_stack", "last", {(3, 12): "0 1 2 0 1 2 0 1 2 0 1 2"}),
    ("one_shot_interleave", "last", {(3, 12): "0 0 0 0 1 1 1 1 2 2 2 2"}),
    ("random", "last", {
        (3, 6): "0 1 2 - - -", (6, 9): "0 1 2 3 4 5 - - -", (9, 12): "0 1 2 3 4 5 6 7 8 - - -",
    }),
    ("identity", "last", {
        (3, 6): "0 0 1 1 2 2", (6, 9): "0 1 1 2 3 3 4 5 5", (9, 12): "0 1 2 2 3 4 5 5 6 7 8 8",
    }),
    ("identity", "first", {
        (3, 6): "0 0 1 1 2 2", (6, 9): "0 0 1 2 2 3 4 4 5", (9, 12): "0 0 1 2 3 3 4 5 6 6 7 8",
    }),
]  # fmt: skip


def numbers(text: str) -> list[int | None]:
    return [None if word == "-" else int(word) for word in text.split()]


@pytest.mark.parametrize(("policy", "offset", "plans"), TABLE)
def test_the_table_literally(policy: str, offset: str, plans: dict[tuple[int, int], str]) -> None:
    for (depth, target), plan in plans.items():
        assert make_plan(policy, depth, target, offset) == numbers(plan)


def test_every_policy_is_in_the_table_and_registered() -> None:
    assert {row[0] for row in TABLE} == NAMES == set(POLICIES)


def test_the_two_offsets_differ() -> None:
    assert make_plan("interleaved", 6, 9, "first") != make_plan("interleaved", 6, 9, "last")


@pytest.mark.parametrize(
    ("policy", "offset", "expected"),
    [
        ("interleaved", "last", "0 0 0 0 1 1 1 1 2 2 2 2"),
        ("interleaved", "first", "0 0 0 0 1 1 1 1 2 2 2 2"),
        ("one_shot_interleave", "last", "0 0 0 0 1 1 1 1 2 2 2 2"),
        ("gradual", "last", "0 1 2 0 1 2 0 1 2 0 1 2"),
        ("midas", "last", "0 1 2 0 1 2 0 1 2 0 1 2"),
        ("stackbert", "last", "0 1 2 0 1 2 0 1 2 0 1 2"),
        ("one_shot_stack", "last", "0 1 2 0 1 2 0 1 2 0 1 2"),
        ("random", "last", "0 1 2 - - - - - - - - -"),
    ],
)
def test_ancestry_at_twelve_layers(policy: str, offset: str, expected: str) -> None:
    stages = default_stages(policy)
    ancestry: list[int | None] = list(range(stages[0]))
    for depth, target in pairwise(stages):
        ancestry = compose_ancestry(ancestry, make_plan(policy, depth, target, offset))
    assert ancestry == numbers(expected)


def served(policy: str, max_depth: int = 13, max_target: int = 30) -> Iterator[tuple[int, int]]:
    """All (depth, target) that a policy takes, found by trying."""
    for depth in range(1, max_depth):
        for target in range(depth + 1, max_target):
            try:
                make_plan(policy, depth, target)
            except ValueError:
                continue
            yield depth, target


@pytest.mark.parametrize("policy", sorted(NAMES))
def test_properties_at_every_depth(policy: str) -> None:
    cases = list(served(policy))
    assert cases
    for depth, target in cases:
        plan = make_plan(policy, depth, target)
        assert len(plan) == target
        kept = kept_positions(plan, depth)
        assert kept == sorted(kept)  # kept layers stay in order, so nothing is ever moved below its input
        assert [plan[position] for position in kept] == list(range(depth))
        assert (None in plan) == (policy == "random")


@pytest.mark.parametrize("policy", ["interleaved", "identity"])
@pytest.mark.parametrize("offset", ["last", "first"])
def test_interleaved_clones_stand_right_after_their_originals(policy: str, offset: str) -> None:
    for depth, target in served(policy):
        plan = make_plan(policy, depth, target, offset)
        clones = [position for position in range(1, target) if plan[position] in plan[:position]]
        assert [plan[position - 1] for position in clones] == [plan[position] for position in clones]
        assert len(clones) == target - depth
        stride = depth // (target - depth)
        gaps = {after - before for before, after in pairwise(clones)}
        assert gaps <= {stride + 1}  # spread evenly


def test_stacking_clones_do_not_stand_after_their_originals() -> None:
    plan = make_plan("gradual", 6, 9)
    assert plan[6] != plan[5]


def test_blocks_of_midas_and_lidas_are_repeated_in_place() -> None:
    for policy in ("midas", "lidas"):
        for depth, target in served(policy):
            plan, added = make_plan(policy, depth, target), target - depth
            end = next(position for position in range(1, target + 1) if plan[position] != position)
            assert plan[end : end + added] == plan[end - added : end]
            assert plan[end + added :] == list(range(end, depth))


@pytest.mark.parametrize(
    ("policy", "depth", "target", "plan"),
    [
        ("interleaved", 1, 2, "0 0"),
        ("interleaved", 2, 4, "0 0 1 1"),
        ("interleaved", 4, 6, "0 1 1 2 3 3"),
        ("interleaved", 6, 8, "0 1 2 2 3 4 5 5"),
        ("interleaved", 4, 5, "0 1 2 3 3"),
        ("gradual", 5, 7, "0 1 2 3 4 3 4"),
        ("midas", 8, 10, "0 1 2 3 2 3 4 5 6 7"),
        ("lidas", 5, 7, "0 1 2 1 2 3 4"),
        ("stackbert", 1, 2, "0 0"),
        ("one_shot_stack", 2, 6, "0 1 0 1 0 1"),
        ("random", 1, 4, "0 - - -"),
    ],
)
def test_other_depths(policy: str, depth: int, target: int, plan: str) -> None:
    assert make_plan(policy, depth, target) == numbers(plan)


@pytest.mark.parametrize(
    ("policy", "depth", "target", "fits"),
    [
        ("interleaved", 6, 10, "the targets 7, 8, 9, 12 fit"),
        ("identity", 9, 11, "the targets 10, 12, 18 fit"),
        ("midas", 3, 5, "the targets 4, 6 fit"),
        ("interleaved", 3, 12, "the targets 4, 6 fit"),
        ("gradual", 3, 7, "the targets 4, 5, 6 fit"),
        ("lidas", 3, 8, "the targets 4, 5, 6 fit"),
        ("stackbert", 3, 9, "the targets 6 fit"),
        ("one_shot_stack", 3, 11, "the targets 9, 12 fit"),
        ("one_shot_interleave", 4, 7, "the targets 8 fit"),
    ],
)
def test_refusals_name_the_numbers_and_what_fits(policy: str, depth: int, target: int, fits: str) -> None:
    with pytest.raises(ValueError) as refused:
        make_plan(policy, depth, target)
    message = str(refused.value)
    assert f"{policy} cannot grow {depth} -> {target} layers, K = {target - depth}: it needs " in message
    assert message.endswith(fits)
    for fitting in message.partition("the targets ")[2].removesuffix(" fit").split(", "):
        make_plan(policy, depth, int(fitting))


@pytest.mark.parametrize("policy", sorted(NAMES))
@pytest.mark.parametrize(("depth", "target"), [(3, 3), (3, 2), (0, 3)])
def test_every_policy_needs_a_target_above_the_depth(policy: str, depth: int, target: int) -> None:
    with pytest.raises(ValueError, match=f"{policy} cannot grow {depth} -> {target} layers: .* or more"):
        make_plan(policy, depth, target)


def test_an_unknown_policy_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'interleave': .*gradual, identity, interleaved, lidas"):
        make_plan("interleave", 3, 6)
    with pytest.raises(ValueError, match="unknown policy 'x'"):
        default_stages("x")


def test_offsets_are_refused_where_there_is_no_stride() -> None:
    with pytest.raises(ValueError, match="offset is 'middle': it must be 'last' or 'first'"):
        make_plan("interleaved", 3, 6, "middle")
    with pytest.raises(ValueError, match=r"midas has no offset: .*offset=first \(only identity, interleaved"):
        make_plan("midas", 3, 6, "first")


def test_what_new_layers_start_from() -> None:
    kinds = {name: policy.initialise for name, policy in POLICIES.items()}
    assert kinds.pop("identity") == "zero_output"
    assert set(kinds.values()) == {"copy"}


def test_kept_positions() -> None:
    assert kept_positions([0, 1, 1, 2, 3, 3, 4, 5, 5], 6) == [0, 1, 3, 4, 6, 7]
    assert kept_positions([0, 1, 2, None], 3) == [0, 1, 2]
    for plan in ([0, 1, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="must name every layer from 0 to 2 and no other"):
            kept_positions(plan, 3)


def test_ancestry_of_fresh_layers_stays_unknown() -> None:
    assert compose_ancestry([0, 1, None], [0, 0, 1, 1, 2, 2]) == [0, 0, 1, 1, None, None]


def test_default_stages() -> None:
    assert default_stages("interleaved") == (3, 6, 9, 12)
    assert default_stages("stackbert") == (3, 6, 12)
    assert default_stages("one_shot_stack") == default_stages("one_shot_interleave") == (3, 12)
    assert default_stages("midas", num_layers=4, layers_per_stage=2) == (2, 4)
    assert default_stages("gradual", num_layers=4, layers_per_stage=1) == (1, 2, 3, 4)


def test_default_stages_can_be_planned() -> None:
    for policy in NAMES:
        stages = default_stages(policy)
        for depth, target in pairwise(stages):
            make_plan(policy, depth, target)


def test_stages_that_miss_the_depth_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depths 5, 10, 15, not model\.student\.num_layers=12: 10 or 15 would fit"):
        default_stages("interleaved", 12, 5)
    with pytest.raises(ValueError, match=r"depths 2, 4, 8, 16, not model\.student\.num_layers=12: 8 or 16 would fit"):
        default_stages("stackbert", 12, 2)
    with pytest.raises(ValueError, match=r"depths 3, 6, not model\.student\.num_layers=4: 6 would fit"):
        default_stages("interleaved", 4, 3)
    for layers_per_stage in (0, 12, 13):
        with pytest.raises(ValueError, match=f"layers_per_stage={layers_per_stage} leaves nothing to grow"):
            default_stages("interleaved", 12, layers_per_stage)


def test_a_policy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.growth.policies.POLICIES", dict(POLICIES))

    @register_policy("on_top")
    def on_top(depth: int, target: int) -> list[int | None]:
        return [*range(depth), *[depth - 1] * (target - depth)]

    @register_policy("lossy")
    def lossy(depth: int, target: int) -> list[int | None]:
        return [0] * target

    @register_policy("short")
    def short(depth: int, target: int) -> list[int | None]:
        return [*range(depth)]

    assert get_policy("on_top").plan is on_top
    assert make_plan("on_top", 3, 5) == [0, 1, 2, 2, 2]
    assert default_stages("on_top") == (3, 6, 9, 12)
    with pytest.raises(ValueError, match="must name every layer"):
        make_plan("lossy", 3, 5)
    with pytest.raises(ValueError, match="short made 3 layers of 3 where 5 were requested"):
        make_plan("short", 3, 5)
    with pytest.raises(ValueError, match="already"):
        register_policy("on_top")(on_top)


@pytest.mark.parametrize("name", ["policies", "schedules"])
def test_the_former_place_has_the_same_objects(name: str) -> None:
    former, present = (
        importlib.import_module(f"{place}.{name}") for place in ("callbacks", "lightning_modules.growth")
    )
    public = [key for key, value in vars(present).items() if getattr(value, "__module__", "") == present.__name__]
    assert public
    assert all(getattr(former, key) is getattr(present, key) for key in public if not key.startswith("_"))
