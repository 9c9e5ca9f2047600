"""The distillation objective: output loss + weight x intermediate loss.

Source: Kim and Lee, Interspeech 2026, section 2; the prediction heads follow DistilHuBERT (Chang et al., ICASSP 2022).
Shapes: B batch, F frames, D width of the student or teacher. Teacher layers are counted from 1, as are student
hidden states (0 is the input of the first layer).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.compiling import compile_in_place
from lightning_modules.lookup import find_named
from lightning_modules.target_normalization import NORMALIZATIONS, Normalization, TargetNormalizer
from lightning_modules.teacher import TeacherTargets

Distance = Callable[[Tensor, Tensor], Tensor]


def mse(prediction_BFD: Tensor, target_BFD: Tensor) -> Tensor:
    """Squared error, mean over the width: (B, F)."""
    return (prediction_BFD.float() - target_BFD.float()).square().mean(-1)


def l1(prediction_BFD: Tensor, target_BFD: Tensor) -> Tensor:
    """Absolute error, mean over the width: (B, F)."""
    return (prediction_BFD.float() - target_BFD.float()).abs().mean(-1)


def l1_cosine(prediction_BFD: Tensor, target_BFD: Tensor) -> Tensor:
    """DistilHuBERT's distance, L1 - log sigmoid(cosine similarity): (B, F)."""
    cosine_BF = F.cosine_similarity(prediction_BFD.float(), target_BFD.float(), dim=-1)
    return l1(prediction_BFD, target_BFD) - F.logsigmoid(cosine_BF)


DISTANCES: dict[str, Distance] = {"mse": mse, "l1": l1, "l1_cosine": l1_cosine}


def get_distance(name: str) -> Distance:
    """The distance with this name, or the function at this dotted path (``my_module.my_distance``).

    Raises:
        InputError: there is no such distance; the message lists the known names.
    """
    own = "a function of two (B, F, D) tensors, my_module.my_distance"
    return cast(Distance, find_named(name, DISTANCES, "model.objective.distance", own))


def summed(distance_BF: Tensor, valid_BF: Tensor | None) -> Tensor:
    """Sum over the valid frames (B, F), or over all with ``None``."""
    if valid_BF is not None:
        distance_BF = distance_BF.masked_fill(~valid_BF, 0.0)
    return distance_BF.sum()


class ProjectedDistance(nn.Linear):
    """A projection from student to teacher width, and the distance of its output to a target, summed over valid frames.

    Both are in one module, so that compilation can fuse the distance with the matrix product before it.
    """

    def __init__(self, student_width: int, teacher_width: int, distance: Distance) -> None:
        super().__init__(student_width, teacher_width)
        self.distance = distance

    def forward(  # type: ignore[override]  # a Linear for its state dict and initialisation only
        self, hidden_BFD: Tensor, target_BFD: Tensor, valid_BF: Tensor | None
    ) -> Tensor:
        """Scalar distance between hidden states (B, F, student D) and a target (B, F, teacher D), over valid frames."""
        return summed(self.distance(super().forward(hidden_BFD), target_BFD), valid_BF)


@dataclass
class ObjectiveConfig:
    """Losses of the student; the defaults are the paper's L2L objective.

    Args:
        distance: ``mse``, ``l1``, ``l1_cosine``, or the dotted path of a function of your own, such as
            ``my_module.my_distance``. It is used for the output loss and the intermediate loss.
        intermediate: ``l2l`` (student layers against teacher layers), ``prediction`` (heads on the last student layer
            predict the teacher layers) or ``none``.
        weight: factor of the intermediate loss; at 0 that loss is not computed at all.
        layers: teacher layers (from 1) of the intermediate loss; default: at one and two thirds of
            the output layer, i.e. 4 and 8 of 12, or 8 and 16 of 24.
        output_layer: teacher layer of the output loss; default: the last.
        attach: student layer that learns a target after a growth. ``block_end`` is the last layer of the target's
            block, ``original`` the module that learned it in the first stage.
        projection: ``per_target`` has one linear layer from student to teacher width for each target, which moves with
            it; ``shared`` uses the projection of the output loss for all targets.
        normalize_targets: ``none`` (as in the paper) keeps the teacher's values; ``layer`` gives every frame
            mean 0 and variance 1 over the width, as data2vec does; ``standardize`` gives every dimension mean 0 and
            variance 1 over a fixed part of the training data, measured once before the first step. Teachers with a
            few very large dimensions, such as Whisper, need ``layer`` or ``standardize``.
        statistics_seconds: seconds of audio from which ``standardize`` measures mean and deviation, in utterances
            spread over the training data.
        loss: dotted path of a subclass of ``lightning_modules.objective.Objective`` of your own, such as
            ``my_losses.WithDeltas``, if another distance is not enough.
    """

    distance: str = "mse"
    intermediate: Literal["l2l", "prediction", "none"] = "l2l"
    weight: float = 0.5
    layers: list[int] | None = None
    output_layer: int | None = None
    attach: Literal["block_end", "original"] = "block_end"
    projection: Literal["per_target", "shared"] = "per_target"
    normalize_targets: Normalization = "none"
    statistics_seconds: float = 600.0
    loss: str | None = None

    def __post_init__(self) -> None:
        get_distance(self.distance)
        get_objective(self.loss)
        if self.normalize_targets not in NORMALIZATIONS:
            raise InputError(
                f"model.objective.normalize_targets={self.normalize_targets!r}: choose {', '.join(NORMALIZATIONS)}"
            )
        if self.statistics_seconds <= 0:
            raise InputError(f"model.objective.statistics_seconds={self.statistics_seconds} must be positive")
        if self.weight < 0:
            raise InputError(
                f"model.objective.weight={self.weight} is negative: use 0 to switch the intermediate loss off"
            )


def intermediate_layers(config: ObjectiveConfig, num_layers: int) -> list[int]:
    """Teacher layers of the intermediate loss, counted from 1, for a teacher of ``num_layers``."""
    if config.intermediate == "none" or config.weight == 0:
        return []
    output = config.output_layer or num_layers
    if config.layers is None:
        return sorted({round(output * part / 3) for part in (1, 2)} - {0, output})
    if bad := [layer for layer in config.layers if not 1 <= layer <= num_layers]:
        raise InputError(f"model.objective.layers={config.layers}: the teacher has layers 1 to {num_layers}, not {bad}")
    if config.intermediate == "l2l" and (bad := [layer for layer in config.layers if layer > output]):
        raise InputError(
            f"model.objective.layers={config.layers}: {bad} would be above the student's last layer, which learns "
            f"teacher layer {output}; choose layers from 1 to {output}, or another model.objective.output_layer"
        )
    return sorted(set(config.layers))


def l2l_positions(
    layers: Sequence[int],
    output_layer: int,
    depth: int,
    originals: Sequence[int],
    attach: Literal["block_end", "original"],
) -> dict[int, int]:
    """Student hidden state (from 1) that learns each teacher layer, at equal relative depth.

    With ``block_end`` student layer t x depth / T, the last of its block, learns teacher layer t of T. Student layers
    1, 2, 3 learn teacher layers 4, 8, 12, then 2, 4, 6, then 3, 6, 9, then 4, 8, 12. With ``original`` the module that
    learned a target in the first stage keeps it, at whatever position that module is now.

    Args:
        originals: for each first-stage layer (0-based), the present position of that module (0-based).

    Raises:
        InputError: a teacher layer falls between two student layers; the message names depths and layers that fit.
    """
    reference = depth if attach == "block_end" else len(originals)
    positions: dict[int, int] = {}
    for layer in layers:
        if (layer * reference) % output_layer:
            fitting = math.lcm(*(output_layer // math.gcd(layer, output_layer) for layer in layers))
            stages = list(range(fitting, max(fitting, 12) + 1, fitting))
            spacing = output_layer // math.gcd(output_layer, reference)
            own = list(range(spacing, output_layer, spacing))
            raise InputError(
                f"teacher layer {layer} of {output_layer} falls between the layers of a student of depth {reference}: "
                f"model.objective.layers={list(layers)} fit depths that are multiples of {fitting}, such as "
                f"growth.stages={stages}; this depth fits "
                + (f"model.objective.layers={own} or some of them" if own else "no layer but the output's")
            )
        position = layer * reference // output_layer
        positions[layer] = position if attach == "block_end" else originals[position - 1] + 1
    return positions


class LossTerms(NamedTuple):
    """The loss that is minimised and its unweighted parts, all scalars."""

    total: Tensor
    output: Tensor
    intermediate: Tensor
    layers: dict[int, Tensor]

    def named(self) -> dict[str, Tensor]:
        """The detached terms by metric name."""
        terms = {"loss": self.total, "output": self.output}
        if self.layers:
            terms["intermediate"] = self.intermediate
        terms |= {f"layer_{layer}": value for layer, value in self.layers.items()}
        return {name: value.detach() for name, value in terms.items()}


class Objective(nn.Module):
    """Projections from student to teacher width and the sum of the losses.

    A subclass of your own writes :meth:`sums`; for parameters of its own also ``__init__(*arguments)``, which passes
    all arguments on. Every parameter must take part in every step, since DDP waits for its gradient.

    Args:
        config: settings of the losses.
        student_width: D of the student.
        teacher_width: D of the teacher.
        teacher_layers: depth of the teacher.
        compile_backend: backend of ``torch.compile`` for projections and distances; ``None``: they run eagerly.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        student_width: int,
        teacher_width: int,
        teacher_layers: int,
        compile_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compile_backend = config, compile_backend
        self.output_layer = config.output_layer or teacher_layers
        self.layers = intermediate_layers(config, teacher_layers)
        widths_and_distance = student_width, teacher_width, get_distance(config.distance)
        self.output_projection = ProjectedDistance(*widths_and_distance)
        own = self.layers if config.projection == "per_target" else []
        self.projections = nn.ModuleDict({str(k): ProjectedDistance(*widths_and_distance) for k in own})
        self.normalizer = TargetNormalizer(
            config.normalize_targets, self.layers, teacher_width, config.statistics_seconds
        )

    def positions(self, depth: int, originals: Sequence[int]) -> dict[int, int]:
        """Student hidden state (from 1) that each intermediate target is compared with."""
        if self.config.intermediate == "prediction":
            return dict.fromkeys(self.layers, depth)
        return l2l_positions(self.layers, self.output_layer, depth, originals, self.config.attach)

    def sums(
        self,
        hidden_states: Sequence[Tensor],
        targets: TeacherTargets,
        originals: Sequence[int],
        valid_BF: Tensor | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Sum each loss over the valid frames of this share of a batch; arguments as for :meth:`forward`.

        Returns:
            The sum of the output loss, and that of the intermediate loss of each teacher layer, which may be empty.
        """
        output = self.output_projection(hidden_states[-1], targets.output_BFD, valid_BF)
        layers: dict[int, Tensor] = {}
        for layer, position in self.positions(len(hidden_states) - 1, originals).items():
            project = self.projections[str(layer)] if self.projections else self.output_projection
            layers[layer] = project(hidden_states[position], targets.hidden[layer], valid_BF)
        return output, layers

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        targets: TeacherTargets,
        originals: Sequence[int],
        valid_BF: Tensor | None,
        num_frames: Tensor | float,
    ) -> LossTerms:
        """Compute the losses of one (micro-)batch.

        Args:
            hidden_states: the student's hidden states, depth + 1 tensors (B, F, D).
            targets: normalised targets of the teacher for the same frames.
            originals: positions of the first-stage layers; see :func:`l2l_positions`.
            valid_BF: true where a frame is not padding; ``None`` if no item is padded.
            num_frames: divisor of the sums over frames, the number of valid frames of the *global* batch. With it,
                instead of this rank's number, the sum over ranks and accumulation steps is exact also where these hold
                different numbers of frames.

        Raises:
            InputError: teacher and student output different numbers of frames.
        """
        if hidden_states[-1].shape[1] != targets.output_BFD.shape[1]:
            raise InputError(
                f"the teacher gives {targets.output_BFD.shape[1]} frames where the student gives "
                f"{hidden_states[-1].shape[1]}: their frame rates must be equal"
            )
        if self.compile_backend is not None:
            compile_in_place([self.output_projection, *self.projections.values()], self.compile_backend)
        output_sum, layer_sums = self.sums(hidden_states, targets, originals, valid_BF)
        output, terms = output_sum / num_frames, {layer: value / num_frames for layer, value in layer_sums.items()}
        intermediate = torch.stack(list(terms.values())).sum() if terms else torch.zeros_like(output)
        total = output + self.config.weight * intermediate if terms else output
        return LossTerms(total, output, intermediate, terms)


def get_objective(name: str | None) -> type[Objective]:
    """The subclass of :class:`Objective` at this dotted path; :class:`Objective` itself for ``None``.

    Raises:
        InputError: there is no such class.
    """
    own = f"a subclass of {__name__}.Objective, my_module.MyObjective"
    found = Objective if name is None else find_named(name, {"Objective": Objective}, "model.objective.loss", own)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise InputError(f"model.objective.loss={name} is not {own}")
    return found
