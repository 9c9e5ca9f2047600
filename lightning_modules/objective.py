"""The distillation objective: output loss + weight x intermediate loss.

Source: Kim and Lee, Interspeech 2026, section 2. Settings for the losses of DistilHuBERT, HALF, FitHuBERT, ARMHuBERT,
DPHuBERT and USAD are in docs/published.md.
Shapes: B batch, F frames, D width of the student or teacher. Teacher layers are counted from 1, as are student
hidden states (0 is the input of the first layer).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.compiling import compile_in_place
from lightning_modules.layer_map import Attach, Unmatched, l2l_positions
from lightning_modules.lookup import find_named
from lightning_modules.masking import Masked
from lightning_modules.target_normalization import NORMALIZATIONS, Normalization, TargetNormalizer
from lightning_modules.teacher import TeacherTargets

Distance = Callable[[Tensor, Tensor], Tensor]
Head = Literal["linear", "mlp"]


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


def l1_cosine_raw(prediction_BFD: Tensor, target_BFD: Tensor) -> Tensor:
    """DPHuBERT's distance (Peng et al., Interspeech 2023), L1 - cosine similarity: (B, F); at least -1."""
    return l1(prediction_BFD, target_BFD) - F.cosine_similarity(prediction_BFD.float(), target_BFD.float(), dim=-1)


DISTANCES: dict[str, Distance] = {"mse": mse, "l1": l1, "l1_cosine": l1_cosine, "l1_cosine_raw": l1_cosine_raw}


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
    """A head from student to teacher width, and the distance of its output to a target, summed over valid frames.

    Both are in one module, so that compilation can fuse the distance with the matrix product before it.

    Args:
        student_width: D of the student.
        teacher_width: D of the teacher.
        distance: distance of the output to a target.
        head: ``linear``, or ``mlp``: Linear(D, D), GELU, Linear(D, teacher D).
    """

    def __init__(self, student_width: int, teacher_width: int, distance: Distance, head: Head = "linear") -> None:
        super().__init__(student_width, teacher_width)
        self.inner = nn.Linear(student_width, student_width) if head == "mlp" else None
        self.distance = distance

    def predict(self, hidden_BFD: Tensor) -> Tensor:
        """The head's output (B, F, teacher D) for hidden states (B, F, student D)."""
        if self.inner is not None:
            hidden_BFD = F.gelu(self.inner(hidden_BFD))
        return super().forward(hidden_BFD)

    def forward(  # type: ignore[override]  # a Linear for its state dict and initialisation only
        self, hidden_BFD: Tensor, target_BFD: Tensor, valid_BF: Tensor | None
    ) -> Tensor:
        """Scalar distance between hidden states (B, F, student D) and a target (B, F, teacher D), over valid frames."""
        return summed(self.distance(self.predict(hidden_BFD), target_BFD), valid_BF)


@dataclass
class ObjectiveConfig:
    """Losses of the student; the defaults are the paper's L2L objective.

    Args:
        distance: ``mse``, ``l1``, ``l1_cosine`` (DistilHuBERT's), ``l1_cosine_raw`` (DPHuBERT's), or the dotted path
            of a function of your own, such as ``my_module.my_distance``. It is used for the output loss and the
            intermediate loss.
        intermediate: ``l2l`` (student layers against teacher layers), ``prediction`` (heads on the last student layer
            predict the teacher layers) or ``none``.
        weight: factor of the intermediate loss, the sum over its layers; at 0 that loss is not computed at all.
        output_weight: factor of the output loss. A recipe that takes the mean over N targets has 1 / N here and for
            the intermediate loss.
        layers: teacher layers (from 1) of the intermediate loss; default: at one and two thirds of
            the output layer, i.e. 4 and 8 of 12, or 8 and 16 of 24. 0 is the input of the first layer. With ``l2l`` the
            input of the student's first layer learns it.
        output_layer: teacher layer of the output loss; default: the last.
        attach: student layer that learns a target after a growth. ``block_end`` is the last layer of the target's
            block, ``original`` the module that learned it in the first stage.
        unmatched: what is done about a layer of ``l2l`` that falls between two student layers at a shallow depth.
            ``refuse`` is an error before the first step; ``skip`` leaves the layer out, and its projection untrained,
            until the student is deep enough. At full depth every layer must have a student layer.
        projection: ``per_target`` has one linear layer from student to teacher width for each target, which moves with
            it; ``shared`` uses the projection of the output loss for all targets but layer 0, which has its own.
        targets: ``hidden`` learns the hidden states of the teacher; ``feed_forward`` the outputs of the feed-forward
            blocks of the same layers, before they are added to the residual stream, as USAD and data2vec do.
        head: ``linear`` projects with one linear layer; ``mlp`` with two and a GELU between them, the first of the
            student's width, as DistilHuBERT and USAD do.
        masked: masked distillation, as MaskHuBERT and ARMHuBERT do it. Frames of the student's input are masked by
            ``model.student.mask_time_prob`` and ``mask_time_length``. At these it learns what the teacher outputs for
            the whole input, and at the others what it outputs for the same masked input. ``none`` masks nothing;
            ``drawn`` draws other masks in every epoch; with ``fixed`` a segment always has the same mask, so that
            targets can be cached. Validation has no masks.
        mask_seed: random seed of masks that are ``fixed``. It is separate from the run's seed, so that runs of several
            seeds share a cache.
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
    output_weight: float = 1.0
    layers: list[int] | None = None
    output_layer: int | None = None
    attach: Attach = "block_end"
    unmatched: Unmatched = "refuse"
    projection: Literal["per_target", "shared"] = "per_target"
    head: Head = "linear"
    targets: Literal["hidden", "feed_forward"] = "hidden"
    masked: Masked = "none"
    mask_seed: int = 0
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
        if self.mask_seed < 0:
            raise InputError(f"model.objective.mask_seed={self.mask_seed} must be at least 0")
        if self.statistics_seconds <= 0:
            raise InputError(f"model.objective.statistics_seconds={self.statistics_seconds} must be positive")
        if self.weight < 0:
            raise InputError(
                f"model.objective.weight={self.weight} is negative: use 0 to switch the intermediate loss off"
            )
        if self.output_weight <= 0:
            raise InputError(f"model.objective.output_weight={self.output_weight} must be positive")
        if self.output_layer is not None and self.output_layer < 1:
            raise InputError(f"model.objective.output_layer={self.output_layer} must be a layer from 1 on")
        if self.targets == "feed_forward" and 0 in (self.layers or []):
            raise InputError(
                f"model.objective.layers={self.layers} and model.objective.targets=feed_forward: layer 0 is the input "
                "of the first layer and has no feed-forward block; choose layers from 1 on"
            )
        if (self.unmatched, self.attach) == ("skip", "original"):
            raise InputError(
                "model.objective.unmatched=skip needs model.objective.attach=block_end: a layer that was left out in "
                "the first stage was learned by no module there"
            )

    def loss_function(self, teacher_layers: int) -> str:
        """Name what the output loss measures, as ``mse to hidden states of layer 12 (normalize_targets: none)``.

        Output losses of two runs with one teacher are the same function if this text is the same. Weights, heads and
        the intermediate loss are no part of it.
        """
        states = {"hidden": "hidden states", "feed_forward": "feed-forward outputs"}[self.targets]
        text = f"{self.distance} to {states} of layer {self.output_layer or teacher_layers}"
        return f"{text} (normalize_targets: {self.normalize_targets})" + (f", in {self.loss}" if self.loss else "")


def intermediate_layers(config: ObjectiveConfig, num_layers: int) -> list[int]:
    """Teacher layers of the intermediate loss, ascending, for a teacher of ``num_layers``."""
    if config.intermediate == "none" or config.weight == 0:
        return []
    output = config.output_layer or num_layers
    if config.layers is None:
        return sorted({round(output * part / 3) for part in (1, 2)} - {0, output})
    if bad := [layer for layer in config.layers if not 0 <= layer <= num_layers]:
        raise InputError(
            f"model.objective.layers={config.layers}: the teacher has layers 1 to {num_layers}, not {bad} (0 is the "
            "input of the first)"
        )
    if config.intermediate == "l2l" and (bad := [layer for layer in config.layers if layer > output]):
        raise InputError(
            f"model.objective.layers={config.layers}: {bad} would be above the student's last layer, which learns "
            f"teacher layer {output}; choose layers from 0 to {output}, or another model.objective.output_layer"
        )
    return sorted(set(config.layers))


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
        self.loss_function = config.loss_function(teacher_layers)
        self.output_layer = config.output_layer or teacher_layers
        self.layers = intermediate_layers(config, teacher_layers)
        settings = student_width, teacher_width, get_distance(config.distance), config.head
        self.output_projection = ProjectedDistance(*settings)
        own = [layer for layer in self.layers if config.projection == "per_target" or layer == 0]
        self.projections = nn.ModuleDict({str(layer): ProjectedDistance(*settings) for layer in own})
        self.normalizer = TargetNormalizer(
            config.normalize_targets, self.layers, teacher_width, config.statistics_seconds
        )

    def projection_of(self, layer: int) -> ProjectedDistance:
        """The projection for the target of a teacher layer."""
        own = str(layer) in self.projections
        return cast(ProjectedDistance, self.projections[str(layer)] if own else self.output_projection)

    def positions(self, depth: int, originals: Sequence[int]) -> dict[int, int]:
        """Student hidden state that each intermediate target is compared with; only the targets of this depth."""
        config = self.config
        if config.intermediate == "prediction":
            return dict.fromkeys(self.layers, depth)
        return l2l_positions(self.layers, self.output_layer, depth, originals, config.attach, config.unmatched)

    def require_matched(self, full_depth: int) -> None:
        """Refuse targets that a student would not learn at its full depth either.

        Raises:
            InputError: with ``unmatched=skip`` a layer falls between two student layers at this depth.
        """
        if (self.config.intermediate, self.config.unmatched) == ("l2l", "skip"):
            l2l_positions(self.layers, self.output_layer, full_depth, range(full_depth), "block_end")

    def train_matched(self, depth: int, originals: Sequence[int]) -> None:
        """Let the projections of this depth's targets be trained, and no others.

        DDP waits for the gradient of every parameter that can be trained, so one of a target that is left out must not
        be such a parameter.
        """
        if self.config.unmatched == "skip":
            matched = self.positions(depth, originals)
            for layer, projection in self.projections.items():
                projection.requires_grad_(int(layer) in matched)

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
            layers[layer] = self.projection_of(layer)(hidden_states[position], targets.hidden[layer], valid_BF)
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
            originals: positions of the first-stage layers; see :func:`lightning_modules.layer_map.l2l_positions`.
            valid_BF: true where a frame is not padding; ``None`` if no item is padded.
            num_frames: divisor of the sums over frames, the number of valid frames of the *global* batch. With it,
                instead of this rank's number, the sum over ranks and accumulation steps is exact also where these hold
                different numbers of frames. It is infinite for a share that does not count, whose losses are 0.

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
        total = self.config.output_weight * output
        if terms:
            total = total + self.config.weight * intermediate
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
