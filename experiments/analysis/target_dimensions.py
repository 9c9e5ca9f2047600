"""``python -m experiments.analysis.target_dimensions --checkpoints [FILE] --root DIR``: which dimensions are learnt.

For each target of a student: the share of its variance, and of the loss, that its largest dimension has, and how much
of each dimension's variance the student explains (R2 over the frames of held-out speech; a constant explains 0). With
a teacher of a few very large dimensions, such as Whisper, the mean squared error is that of these dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules.errors import InputError
from datamodules.speech_data import AudioBatch
from experiments.analysis.similarity import read_waveforms
from lightning_modules.checkpoint_files import require_sound
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ProjectedDistance
from lightning_modules.teacher_building import found_at


@dataclass(frozen=True)
class Dimensions:
    """One target; shares and R2 are at most 1, R2 can be negative.

    Attributes:
        loss: mean squared error per dimension.
        variance_share, loss_share: of the dimension with the largest variance.
        largest_r2: R2 of that dimension.
        median_r2: median R2 of the others.
    """

    loss: float
    variance_share: float
    loss_share: float
    largest_r2: float
    median_r2: float

    @classmethod
    def of(cls, prediction_ND: Tensor, target_ND: Tensor) -> "Dimensions":
        """From predictions and targets of N frames."""
        variance_D, error_D = target_ND.var(0, correction=0), (prediction_ND - target_ND).square().mean(0)
        r2_D, largest = 1 - error_D / variance_D, int(variance_D.argmax())
        others = torch.cat([r2_D[:largest], r2_D[largest + 1 :]])
        shares = (values_D[largest] / values_D.sum() for values_D in (variance_D, error_D))
        return cls(*map(float, (error_D.mean(), *shares, r2_D[largest], others.median())))


def target_dimensions(
    checkpoints: list[str], root: str, utterances: int = 40, max_seconds: float = 5.0, teacher: str | None = None
) -> None:
    """Print a table of the targets of each checkpoint.

    Args:
        checkpoints: training checkpoints of students.
        root: folder of held-out speech.
        utterances: number of files below root to use, evenly spaced by name.
        max_seconds: longest part of a file that is used.
        teacher: hub name or folder, instead of the one that the checkpoint names.
    """
    waveforms, console = read_waveforms(Path(root), utterances, max_seconds), Console()
    for path in map(Path, checkpoints):
        largest = (f"largest: {measured}" for measured in ("variance, %", "loss, %", "R2"))
        table = Table("target", "loss", *largest, "others: median R2")
        for name, found in measure(path, waveforms, teacher).items():
            shares = (f"{100 * share:.1f}" for share in (found.variance_share, found.loss_share))
            explained = (f"{r2:.3f}" for r2 in (found.largest_r2, found.median_r2))
            table.add_row(name, f"{found.loss:.3g}", *shares, *explained)
        console.print(str(path), table, soft_wrap=True)


@torch.no_grad()
def measure(path: Path, waveforms: Sequence[Tensor], teacher: str | None = None) -> dict[str, Dimensions]:
    """Each target of a checkpoint's student, by name, over these waveforms, each (T,).

    Raises:
        InputError: the checkpoint is missing or damaged, or its run has a loss of its own.
    """
    require_sound(path)
    module = _load(path, teacher)
    objective, student = module.objective, module.student
    if objective.config.loss is not None:
        raise InputError(f"{path} was trained with a loss of its own ({objective.config.loss}): it cannot be split")
    places = objective.positions(student.depth, student.originals)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"output": [], **{f"layer {layer}": [] for layer in places}}
    for waveform_T in waveforms:
        num_samples = torch.tensor([len(waveform_T)])
        batch = AudioBatch(waveform_T[None], num_samples, num_samples)
        target, hidden = objective.normalizer(module.targets(batch)), student(*module.inputs(batch))
        pairs["output"].append(_pair(objective.output_projection, hidden[-1], target.output_BFD))
        for layer, place in places.items():
            pairs[f"layer {layer}"].append(_pair(objective.projection_of(layer), hidden[place], target.hidden[layer]))
    return {name: Dimensions.of(*map(torch.cat, zip(*found, strict=True))) for name, found in pairs.items()}


def _pair(projection: ProjectedDistance, hidden_BFD: Tensor, target_BFD: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and target of one utterance, each (F, D)."""
    return projection.predict(hidden_BFD)[0], target_BFD[0]


def _load(path: Path, teacher: str | None) -> DistillationModule:
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    recipe = checkpoint["interstack"]["recipe"]
    if teacher is not None:
        recipe["teacher"] = found_at(recipe["teacher"], teacher)
    module = DistillationModule(**recipe).eval()
    module.load_state_dict(checkpoint["state_dict"])
    return module


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(target_dimensions)
