"""Layer similarity against definitions worked out in another way, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.analysis.cka import layer_similarity, linear_cka, mean_cosine


def layer(num_frames: int = 200, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(num_frames, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def gram_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Linear CKA by its definition over frames: HSIC of centred Gram matrices (N, N)."""
    frames = len(x_ND)
    centre_NN = torch.eye(frames, dtype=torch.float64) - 1 / frames
    grams = [centre_NN @ (z.double() @ z.double().T) @ centre_NN for z in (x_ND, y_NE)]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))


def test_cka_equals_its_definition_over_frames() -> None:
    x_ND, y_NE = layer(width=6), layer(width=9, seed=1)
    y_NE[:, :3] += x_ND[:, :3]
    assert linear_cka(x_ND, y_NE) == pytest.approx(gram_cka(x_ND, y_NE), rel=1e-10)
    assert linear_cka(x_ND, y_NE) != pytest.approx(gram_cka(x_ND, layer(width=9, seed=2)), rel=1e-2)


def test_cka_ignores_rotation_shift_and_one_scale_but_not_a_scale_per_feature() -> None:
    x_ND = layer()
    rotation_DD = torch.linalg.qr(layer(6, 6, seed=3)).Q
    assert linear_cka(x_ND, 3 * x_ND @ rotation_DD + 7) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x_ND, x_ND * torch.tensor([9.0, 1, 1, 1, 1, 1])) < 0.9


def test_cka_of_unrelated_layers_is_small() -> None:
    assert linear_cka(layer(5000, seed=0), layer(5000, seed=1)) < 0.01


def test_cka_keeps_its_precision_under_a_large_mean() -> None:
    x_ND = layer()
    shifted_ND = (x_ND.double() + 1e4).to(torch.float32)
    assert linear_cka(x_ND, shifted_ND) == pytest.approx(1, abs=1e-4)


def test_cka_of_a_constant_layer_is_nan() -> None:
    assert math.isnan(linear_cka(layer(), torch.ones(200, 6)))


def test_mean_cosine_by_hand() -> None:
    x_ND = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    y_ND = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert mean_cosine(x_ND, y_ND) == pytest.approx(0.5)
    assert mean_cosine(x_ND, -x_ND) == pytest.approx(-1)


def test_similarity_within_one_model_is_symmetric_with_ones_on_the_diagonal() -> None:
    hidden_states = [layer(seed=seed) for seed in range(3)]
    for measure in ("cka", "cosine"):
        matrix = np.array(layer_similarity(hidden_states, measure=measure))
        assert matrix.shape == (3, 3)
        np.testing.assert_allclose(matrix, matrix.T)
        np.testing.assert_allclose(np.diag(matrix), 1)
        assert abs(matrix[0, 1]) < 0.9


def test_rows_are_the_first_model_and_columns_the_second() -> None:
    student = [layer(width=4, seed=seed) for seed in range(2)]
    teacher = [layer(width=8, seed=9), torch.cat([student[1], student[1]], dim=1), layer(width=8, seed=8)]
    matrix = np.array(layer_similarity(student, teacher))
    assert matrix.shape == (2, 3)
    assert matrix[1, 1] == pytest.approx(1)
    assert matrix[0, 1] < 0.5
    assert matrix[1, 0] == pytest.approx(linear_cka(student[1], teacher[0]))


def test_takes_arrays_and_low_precision() -> None:
    x_ND = layer()
    assert layer_similarity([x_ND.numpy()])[0][0] == pytest.approx(1)
    assert layer_similarity([x_ND.bfloat16()], [x_ND])[0][0] == pytest.approx(1, abs=1e-3)


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="one width"):
        mean_cosine(layer(width=4), layer(width=8))
    with pytest.raises(ValueError, match=r"\[100, 200\] frames"):
        linear_cka(layer(100), layer(200))
    with pytest.raises(ValueError, match="shape"):
        linear_cka(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="cka, cosine"):
        layer_similarity([layer()], measure="rbf")  # type: ignore[arg-type]
