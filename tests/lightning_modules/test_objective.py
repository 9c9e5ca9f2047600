"""Distances, the layer map, and sums over shares of a global batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.layer_map import l2l_positions
from lightning_modules.objective import (
    DISTANCES,
    Objective,
    ObjectiveConfig,
    ProjectedDistance,
    intermediate_layers,
    l1,
    l1_cosine,
    mse,
)
from lightning_modules.teacher import TeacherTargets

D_STUDENT, D_TEACHER = 6, 10


def make(teacher_layers: int = 12, **settings: object) -> Objective:
    torch.manual_seed(0)
    return Objective(ObjectiveConfig(**settings), D_STUDENT, D_TEACHER, teacher_layers)


def data(depth: int, layers: list[int], frames: int = 7) -> tuple[list[torch.Tensor], TeacherTargets]:
    torch.manual_seed(1)
    hidden = [torch.randn(2, frames, D_STUDENT) for _ in range(depth + 1)]
    targets = TeacherTargets(torch.randn(2, frames, D_TEACHER), {k: torch.randn(2, frames, D_TEACHER) for k in layers})
    return hidden, targets


def projection_of(module: nn.Linear, hidden_BFD: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_BFD, module.weight, module.bias)


def test_the_loss_function_is_named_by_all_that_the_output_loss_depends_on_and_by_nothing_else() -> None:
    own = make().loss_function
    assert own == "mse to hidden states of layer 12 (normalize_targets: none)"
    same: list[dict[str, object]] = [
        {"output_layer": 12},
        {"intermediate": "none"},
        {"intermediate": "prediction", "head": "mlp", "layers": [2]},
        {"weight": 0.1, "output_weight": 0.5},
        {"projection": "shared"},
    ]
    assert {make(**settings).loss_function for settings in same} == {own}
    other: list[dict[str, object]] = [
        {"distance": "l1_cosine"},
        {"targets": "feed_forward"},
        {"normalize_targets": "layer"},
        {"output_layer": 9},
        {"teacher_layers": 24},
        {"loss": "tests.lightning_modules.test_objective.Doubled"},
    ]
    assert len({own, *(make(**settings).loss_function for settings in other)}) == len(other) + 1  # type: ignore[arg-type]


class Doubled(Objective):
    """An objective of a user's own."""


def test_distances_equal_torch() -> None:
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert torch.allclose(mse(a, b).mean(), F.mse_loss(a, b))
    assert torch.allclose(l1(a, b).mean(), F.l1_loss(a, b))
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert torch.allclose(l1_cosine(a, b), (a - b).abs().mean(-1) - torch.log(torch.sigmoid(cosine)))


def test_padding_does_not_count_and_shares_add_up() -> None:
    hidden, target, valid = torch.randn(4, 6, D_STUDENT), torch.randn(4, 6, D_TEACHER), torch.rand(4, 6) > 0.4
    projected = ProjectedDistance(D_STUDENT, D_TEACHER, mse)
    whole = projected(hidden, target, valid) / valid.sum()
    assert torch.allclose(whole, mse(projection_of(projected, hidden), target)[valid].mean())
    assert torch.allclose(projected(hidden, target, None) / 24, mse(projection_of(projected, hidden), target).mean())
    shares = [projected(hidden[s], target[s], valid[s]) for s in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(sum(shares) / valid.sum(), whole)
    # Control: dividing by each share's own count is another number.
    own = [share / valid[s].sum() for share, s in zip(shares, (slice(0, 1), slice(1, 4)), strict=True)]
    assert not torch.allclose(sum(own) / 2, whole, atol=1e-4)


@pytest.mark.parametrize(("depth", "wanted"), [(3, [1, 2]), (6, [2, 4]), (9, [3, 6]), (12, [4, 8])])
def test_block_end_keeps_relative_depth(depth: int, wanted: list[int]) -> None:
    assert list(l2l_positions([4, 8], 12, depth, range(3), "block_end").values()) == wanted


def test_original_follows_the_module() -> None:
    assert l2l_positions([4, 8], 12, 6, [0, 2, 4], "original") == {4: 1, 8: 3}  # interleaved 0 0 1 1 2 2
    assert l2l_positions([4, 8], 12, 6, [0, 1, 2], "original") == {4: 1, 8: 2}  # gradual 0 1 2 0 1 2


@pytest.mark.parametrize(
    ("layers", "output", "depth", "stages", "fitting"),
    [
        ([4, 8], 12, 4, [3, 6, 9, 12], [3, 6, 9]),
        ([1, 2, 3], 4, 3, [4, 8, 12], []),
        ([1, 3], 4, 6, [4, 8, 12], [2]),
        ([3], 6, 9, [2, 4, 6, 8, 10, 12], [2, 4]),
        ([5], 17, 3, [17], []),
    ],
)
def test_a_target_between_layers_is_refused_and_what_would_fit_is_named(
    layers: list[int], output: int, depth: int, stages: list[int], fitting: list[int]
) -> None:
    between = f"teacher layer {layers[0]} of {output} falls between the layers of a student of depth {depth}: "
    with pytest.raises(ValueError, match=between) as error:
        l2l_positions(layers, output, depth, range(depth), "block_end")
    assert f"growth.stages={stages};" in str(error.value)
    named = f"model.objective.layers={fitting} or some" if fitting else "no layer but the output's"
    assert f"this depth fits {named}" in str(error.value)
    for stage in stages:  # what the message promises
        assert len(l2l_positions(layers, output, stage, range(stage), "block_end")) == len(layers)
    assert len(l2l_positions(fitting, output, depth, range(depth), "block_end")) == len(fitting)


def test_default_layers_scale_with_the_teacher() -> None:
    assert intermediate_layers(ObjectiveConfig(), 12) == [4, 8]
    assert intermediate_layers(ObjectiveConfig(), 24) == [8, 16]
    assert intermediate_layers(ObjectiveConfig(weight=0), 12) == []
    with pytest.raises(ValueError, match=r"layers 1 to 12, not \[13\]"):
        intermediate_layers(ObjectiveConfig(layers=[4, 13]), 12)
    above = r"objective.layers=\[4, 8\]: \[8\] would be above .* teacher layer 6; choose layers from 0 to 6"
    with pytest.raises(ValueError, match=above):
        intermediate_layers(ObjectiveConfig(layers=[4, 8], output_layer=6), 12)
    heads = ObjectiveConfig(intermediate="prediction", layers=[4, 8], output_layer=6)
    assert intermediate_layers(heads, 12) == [4, 8]


@pytest.mark.parametrize("distance", sorted(DISTANCES))
@pytest.mark.parametrize("projection", ["per_target", "shared"])
@pytest.mark.parametrize("intermediate", ["l2l", "prediction"])
def test_total_is_output_plus_weighted_sum(intermediate: str, projection: str, distance: str) -> None:
    objective = make(intermediate=intermediate, projection=projection, distance=distance, weight=0.25)
    hidden, targets = data(6, [4, 8])
    terms = objective(hidden, targets, range(3), None, 14)
    expected = DISTANCES[distance](projection_of(objective.output_projection, hidden[-1]), targets.output_BFD).mean()
    assert torch.allclose(terms.output, expected)
    positions = {4: 2, 8: 4} if intermediate == "l2l" else {4: 6, 8: 6}
    for layer, position in positions.items():
        project = objective.projections[str(layer)] if projection == "per_target" else objective.output_projection
        expected = DISTANCES[distance](projection_of(project, hidden[position]), targets.hidden[layer]).mean()
        assert torch.allclose(terms.layers[layer], expected)
    assert torch.allclose(terms.total, terms.output + 0.25 * (terms.layers[4] + terms.layers[8]))
    assert set(terms.named()) == {"loss", "output", "intermediate", "layer_4", "layer_8"}


def test_without_intermediate_loss_nothing_of_it_exists() -> None:
    objective = make(intermediate="none")
    assert [name for name, _ in objective.named_parameters()] == ["output_projection.weight", "output_projection.bias"]
    hidden, targets = data(3, [])
    assert set(objective(hidden, targets, range(3), None, 14).named()) == {"loss", "output"}


def test_frames_must_agree() -> None:
    hidden, _ = data(3, [4, 8])
    _, targets = data(3, [4, 8], frames=8)
    with pytest.raises(ValueError, match="8 frames where the student gives 7"):
        make()(hidden, targets, range(3), None, 14)


# -- layer 0, left-out layers, heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("attach", "originals"), [("block_end", [0, 1, 2]), ("original", [2, 5, 8])])
@pytest.mark.parametrize("depth", [3, 9])
def test_hidden_state_0_learns_layer_0(depth: int, attach: str, originals: list[int]) -> None:
    expected = {4: depth // 3, 8: 2 * depth // 3} if attach == "block_end" else {4: 3, 8: 6}
    assert l2l_positions([0, 4, 8], 12, depth, originals, attach) == {0: 0} | expected


def test_shared_projections_leave_layer_0_its_own() -> None:
    objective = make(layers=[0, 4], projection="shared")
    assert list(objective.projections) == ["0"]
    assert objective.projection_of(4) is objective.output_projection
    assert objective.projection_of(0) is objective.projections["0"]


@pytest.mark.parametrize(
    ("depth", "wanted"), [(3, [4, 8]), (6, [2, 4, 6, 8, 10]), (8, [3, 6, 9]), (12, list(range(1, 12)))]
)
def test_layers_between_are_left_out_and_not_trained(depth: int, wanted: list[int]) -> None:
    objective = make(layers=list(range(1, 12)), unmatched="skip")
    hidden, targets = data(depth, list(range(1, 12)))
    objective.train_matched(depth, range(3))
    terms = objective(hidden, targets, range(3), None, 14)
    assert list(terms.layers) == wanted
    assert set(terms.named()) == {"loss", "output", "intermediate", *(f"layer_{layer}" for layer in wanted)}
    terms.total.backward()
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in objective.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * (1 + len(wanted))


def test_without_any_layer_at_a_depth_only_the_output_is_learned() -> None:
    objective = make(layers=[6], unmatched="skip", output_weight=0.25)
    hidden, targets = data(3, [6])
    terms = objective(hidden, targets, range(3), None, 14)
    assert set(terms.named()) == {"loss", "output"}
    assert terms.total == 0.25 * terms.output


def test_a_layer_that_no_depth_learns_is_refused() -> None:
    make(layers=[1, 4], unmatched="skip").require_matched(12)
    with pytest.raises(ValueError, match="teacher layer 1 of 12 falls between the layers of a student of depth 6"):
        make(layers=[1, 4], unmatched="skip").require_matched(6)


def test_a_head_of_two_layers() -> None:
    objective = make(head="mlp")
    one, two = objective.output_projection, make().output_projection
    assert {name: tuple(p.shape) for name, p in one.named_parameters()} == {
        "weight": (D_TEACHER, D_STUDENT),
        "bias": (D_TEACHER,),
        "inner.weight": (D_STUDENT, D_STUDENT),
        "inner.bias": (D_STUDENT,),
    }
    hidden = torch.randn(2, 3, D_STUDENT)
    inner = hidden @ one.inner.weight.T + one.inner.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    assert torch.allclose(one.predict(hidden), gelu @ one.weight.T + one.bias, atol=1e-6)
    assert torch.equal(two.predict(hidden), projection_of(two, hidden))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_weight": 0.0}, r"output_weight=0\.0 must be positive"),
        ({"output_layer": 0}, "output_layer=0 must be a layer from 1 on"),
        ({"unmatched": "skip", "attach": "original"}, r"unmatched=skip needs model\.objective\.attach=block_end"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)
