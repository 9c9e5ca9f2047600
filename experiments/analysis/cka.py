"""Similarity of the hidden states of two layers: linear CKA and mean cosine.

The functions are pure. Every layer is a matrix (N, D) of N frames (the same in every layer, without padding,
utterances joined) by D features. Sums are taken in float64, whatever the precision of the input.

Tensor names carry shape suffixes: N frames, D and E features.

Example::

    cka = layer_similarity([hidden_BFD.flatten(0, 1) for hidden_BFD in hidden_states[1:]])
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.errors import InputError

Measure = Literal["cka", "cosine"]
Layer = Tensor | NDArray


def linear_cka(x_ND: Layer, y_NE: Layer) -> float:
    """Compute linear centred kernel alignment, in 0 ... 1; 1 means equal up to rotation, shift and one scale factor.

    Feature-space form of Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited",
    equation 4: ``|Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|)`` (Frobenius norms), so memory grows with D E and not with
    N N. The widths may differ. The result is NaN for a layer without any variance.

    Raises:
        InputError: a layer is not (N, D), or the layers have different numbers of frames.
    """
    return layer_similarity([x_ND], [y_NE], measure="cka")[0][0]


def mean_cosine(x_ND: Layer, y_ND: Layer) -> float:
    """Compute the cosine between the two vectors of each frame, averaged over frames, in -1 ... 1.

    Layers are not centred: a large mean shared by all frames makes any two layers similar, so read it beside CKA.

    Raises:
        InputError: a layer is not (N, D), or the shapes differ (project the narrower layer first, or use CKA).
    """
    return layer_similarity([x_ND], [y_ND], measure="cosine")[0][0]


def layer_similarity(
    hidden_states: Sequence[Layer], other: Sequence[Layer] | None = None, measure: Measure = "cka"
) -> list[list[float]]:
    """Compute the similarity of every layer of ``hidden_states`` (rows) with every layer of ``other`` (columns).

    Args:
        hidden_states: L layers, each (N, D); D may differ between layers for ``cka``.
        other: layers of a second model at the same N frames, for example the teacher; None =
            ``hidden_states``.
        measure: ``cka`` (see `linear_cka`) or ``cosine`` (see `mean_cosine`).

    Returns:
        L rows of plain floats; entry [i][j] compares ``hidden_states[i]`` with ``other[j]``.

    Raises:
        InputError: the measure is unknown, a layer is not (N, D), or the layers cannot be compared.
    """
    if measure not in _MEASURES:
        raise InputError(f"measure is {measure!r}; it must be one of {', '.join(_MEASURES)}")
    prepare, compare = _MEASURES[measure]
    rows = [_as_matrix(layer) for layer in hidden_states]
    columns = rows if other is None else [_as_matrix(layer) for layer in other]
    _check_comparable(rows, columns, measure)
    prepared_rows = [prepare(layer_ND) for layer_ND in rows]
    prepared_columns = prepared_rows if other is None else [prepare(layer_ND) for layer_ND in columns]
    return [[float(compare(row, column)) for column in prepared_columns] for row in prepared_rows]


def _as_matrix(layer: Layer) -> Tensor:
    """Convert a layer to (N, D) float64 on its own device."""
    layer_ND = torch.as_tensor(layer).detach().to(torch.float64)
    if layer_ND.ndim != 2 or not layer_ND.numel():
        raise InputError(f"a layer has shape {tuple(layer_ND.shape)}; it must be (frames, features), neither zero")
    return layer_ND


def _check_comparable(rows: Sequence[Tensor], columns: Sequence[Tensor], measure: Measure) -> None:
    frames = {layer_ND.shape[0] for layer_ND in [*rows, *columns]}
    if len(frames) > 1:
        raise InputError(f"layers have {sorted(frames)} frames; all must be taken at the same frames")
    widths = {layer_ND.shape[1] for layer_ND in [*rows, *columns]}
    if measure == "cosine" and len(widths) > 1:
        raise InputError(
            f"layers have widths {sorted(widths)}; cosine needs one width: project the layers first, or use cka"
        )


def _centred_unit(layer_ND: Tensor) -> Tensor:
    """Centre the features and divide by sqrt(|Xc' Xc|), so that CKA is |Yc' Xc|^2 of two such layers."""
    centred_ND = layer_ND - layer_ND.mean(dim=0)
    return centred_ND / torch.linalg.matrix_norm(centred_ND.T @ centred_ND).sqrt()


def _cka_of_units(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    return (y_NE.T @ x_ND).square().sum()


def _unit_frames(layer_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(layer_ND, dim=1)


def _mean_dot(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    return (x_ND * y_ND).sum() / x_ND.shape[0]


_MEASURES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "cka": (_centred_unit, _cka_of_units),
    "cosine": (_unit_frames, _mean_dot),
}
