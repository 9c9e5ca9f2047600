"""The objectives of published recipes, as the shipped configurations set them, against loops over three frames.

Nothing of what is expected uses the code of this project: the teacher's states come from Hugging Face's model, heads
and distances are worked out number by number from the papers' formulas.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModel

from datamodules.loading import AudioBatch
from lightning_modules.distillation import DistillationModule
from tests.conftest import REPOSITORY
from tests.helpers import make_module, save_teacher
from tests.lightning_modules.teachers import waveforms

FRAMES, SAMPLES = 3, 400 + 2 * 320
Vector = list[float]
States = dict[int, list[Vector]]  # by layer, then by frame


def squared(predicted: Vector, target: Vector) -> float:
    return sum((a - b) ** 2 for a, b in zip(predicted, target, strict=True)) / len(target)


def absolute(predicted: Vector, target: Vector) -> float:
    return sum(abs(a - b) for a, b in zip(predicted, target, strict=True)) / len(target)


def cosine(predicted: Vector, target: Vector) -> float:
    product = sum(a * b for a, b in zip(predicted, target, strict=True))
    return product / math.sqrt(sum(a * a for a in predicted) * sum(b * b for b in target))


def absolute_and_sigmoid(predicted: Vector, target: Vector) -> float:
    return absolute(predicted, target) - math.log(1 / (1 + math.exp(-cosine(predicted, target))))


def absolute_and_cosine(predicted: Vector, target: Vector) -> float:
    return absolute(predicted, target) - cosine(predicted, target)


class ByHand:
    """Heads of a module's objective, read from its state dict, and the states that they are applied to."""

    def __init__(self, module: DistillationModule, own: States, teacher: States) -> None:
        self.weights = {name: value.tolist() for name, value in module.objective.state_dict().items()}
        self.own, self.teacher = own, teacher

    def linear(self, name: str, vector: Vector) -> Vector:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return [b + sum(w * x for w, x in zip(row, vector, strict=True)) for row, b in zip(weight, bias, strict=True)]

    def two_layers(self, name: str, vector: Vector) -> Vector:
        inner = self.linear(f"{name}.inner", vector)
        return self.linear(name, [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner])

    def mean(
        self,
        distance: Callable[[Vector, Vector], float],
        head: Callable[[str, Vector], Vector],
        state: int,
        layer: int,
        name: str,
    ) -> float:
        """Of the distances over the frames, from a student state through a head to a teacher layer."""
        pairs = zip(self.own[state], self.teacher[layer], strict=True)
        return sum(distance(head(name, own), target) for own, target in pairs) / FRAMES


def projection(layer: int) -> str:
    return "output_projection" if layer == 12 else f"projections.{layer}"


def distilhubert(hand: ByHand) -> float:
    """Chang et al., ICASSP 2022, equation 1, and s3prl's ``DistillerForPretrain``: the mean of L1 and cosine terms."""
    last = max(hand.own)
    terms = [hand.mean(absolute_and_sigmoid, hand.two_layers, last, k, projection(k)) for k in (4, 8, 12)]
    return sum(terms) / 3


def half(hand: ByHand) -> float:
    """Ashihara et al., Interspeech 2022: layer to layer, with DistilHuBERT's distance."""
    return sum(hand.mean(absolute_and_sigmoid, hand.linear, k, k, projection(k)) for k in (4, 8, 12)) / 3


def fithubert(hand: ByHand) -> float:
    """Lee et al., Interspeech 2022, and the ``train.py`` of its repository: 1.0 for the last layer, 0.1 for the others.

    Jang et al., Interspeech 2023 (MaskHuBERT, ARMHuBERT) keep it, with other states.
    """
    depth = max(hand.own)
    learned = [k for k in range(1, 12) if k * depth % 12 == 0]
    others = sum(hand.mean(squared, hand.linear, k * depth // 12, k, projection(k)) for k in learned)
    return hand.mean(squared, hand.linear, depth, 12, "output_projection") + 0.1 * others


def dphubert(hand: ByHand) -> float:
    """Peng et al., Interspeech 2023, and the ``DistillLoss`` of its repository; layers 4, 8, 12 share a projection."""
    shared = [hand.mean(absolute_and_cosine, hand.linear, k, k, "output_projection") for k in (4, 8, 12)]
    return (hand.mean(absolute_and_cosine, hand.linear, 0, 0, "projections.0") + sum(shared)) / 4


def usad(hand: ByHand) -> float:
    """Chang et al., arXiv 2506.18843, with one teacher: feed-forward features of every third layer."""
    terms = [hand.mean(absolute_and_sigmoid, hand.two_layers, k, k, projection(k)) for k in (3, 6, 9, 12)]
    return sum(terms) / 4


RECIPES: dict[str, tuple[Callable[[ByHand], float], int]] = {
    "distilhubert": (distilhubert, 2),
    "half_12layer": (half, 12),
    "fithubert": (fithubert, 12),
    "fithubert, grown to 3": (fithubert, 3),
    "maskhubert": (fithubert, 12),
    "armhubert": (fithubert, 12),
    "dphubert_objective": (dphubert, 12),
    "usad_objective": (usad, 12),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 12 layers that change their input visibly."""
    folder = save_teacher(tmp_path_factory.mktemp("teacher"), layers=12)
    model = AutoModel.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.encoder.layers.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def objective_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / f"experiments/configs/{name}.yaml").read_text())["model"]["objective"]


@torch.no_grad()
def states_of(folder: Path, waveforms_BT: Tensor, mask_BF: Tensor | None = None) -> tuple[States, States]:
    """Hidden states and outputs of feed-forward blocks of Hugging Face's own model."""
    model, blocks = AutoModel.from_pretrained(folder).eval(), {}
    for number, layer in enumerate(model.encoder.layers, start=1):
        layer.feed_forward.register_forward_hook(lambda _, __, output, k=number: blocks.update({k: output[0].tolist()}))
    hidden = model(waveforms_BT, mask_time_indices=mask_BF, output_hidden_states=True).hidden_states
    return listed(hidden), blocks


def listed(hidden_states: Sequence[Tensor]) -> States:
    return {number: hidden_BFD[0].tolist() for number, hidden_BFD in enumerate(hidden_states)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_on_three_frames_is_the_one_worked_out_by_hand(recipe: str, folder: Path) -> None:
    by_hand, depth = RECIPES[recipe]
    objective = {"intermediate": "l2l"} | objective_of(recipe.partition(",")[0])
    masked = "masked" in objective
    masks = {"mask_time_prob": 0.8, "mask_time_length": 1} if masked else {}
    grown = "grown" in recipe
    module = make_module(folder, num_layers=12 if grown else depth, dropout=0.0, objective=objective, **masks)
    if grown:
        module.student.start_at(depth)
    lengths_B = torch.tensor([SAMPLES])
    waves_BT = waveforms(1, SAMPLES)
    batch = AudioBatch(waves_BT, lengths_B, lengths_B, segments=torch.tensor([2]))
    mask_BF = module.mask_of(batch)
    with torch.no_grad():
        own = listed(module.student(waves_BT, mask_BF=mask_BF))
        found = float(module.losses(batch).total)
    hidden, blocks = states_of(folder, waves_BT)
    teacher = blocks if objective.get("targets") == "feed_forward" else hidden
    if mask_BF is not None:
        assert mask_BF[0].any()
        assert not mask_BF[0].all()
        seen, _ = states_of(folder, waves_BT, mask_BF)
        # Masked frames learn the states of the whole input, visible ones those of the masked input.
        teacher = {k: [hidden[k][f] if mask_BF[0, f] else seen[k][f] for f in range(FRAMES)] for k in hidden}
    assert found == pytest.approx(by_hand(ByHand(module, own, teacher)), rel=1e-5)
    # Controls: another layer of the teacher, another pass of it, and another frame are other losses.
    other = {layer: teacher[max(layer - 1, min(teacher))] for layer in teacher}
    turned = {layer: frames[::-1] for layer, frames in teacher.items()}
    for wrong in (other, turned, *([hidden, seen] if masked else [])):
        assert abs(by_hand(ByHand(module, own, wrong)) - found) > 1e-4 * abs(found)
