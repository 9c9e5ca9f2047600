"""Distances, the layer map, and sums over shares of a global batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.objective import (
    DISTANCES,
    Objective,
    ObjectiveConfig,
    ProjectedDistance,
    intermediate_layers,
    l1,
    l1_cosine,
    l2l_positions,
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
    above = r"objective.layers=\[4, 8\]: \[8\] would be above .* teacher layer 6; choose layers from 1 to 6"
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
