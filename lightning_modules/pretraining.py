"""Training of a teacher on frame labels: a small HuBERT that learns to classify the phone of each frame.

It is for users without a pretrained model. Masked prediction learns nothing in minutes. Phone labels at several layers
give hidden states that a linear probe can read, in minutes on two cores. The corpus must have alignments (format: see
``datamodules/alignments.py``).

Shapes: B batch, T samples (16 kHz), F frames, C classes (phones).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from datamodules.errors import InputError
from lightning_modules import positions
from lightning_modules.optimisation import OptimizerConfig, learning_rate_factor

IGNORED = -100
"""Label of frames that are not scored; torch's ``cross_entropy`` leaves it out by default."""


@dataclass(frozen=True)
class PretrainingConfig:
    """Sizes of the teacher and its training; the defaults are those of the quick start (2.6M parameters).

    Args:
        hidden_size: width D of the Transformer.
        num_layers: depth, a multiple of 3; the losses are at one third, two thirds and all of the layers.
        num_heads: attention heads per layer.
        intermediate_size: width of the feed-forward layers.
        conv_channels: width of the seven convolutions.
        dropout: dropout of hidden states, attention weights and feed-forward activations.
        batch_size: crops per step; at equal audio, many small steps learn far more than few large ones.
        crop_seconds: length of a crop; a shorter utterance is padded, and its padding is not scored.
        lr: peak learning rate.
        warmup: share of the steps in which the learning rate rises linearly; after them it falls linearly to zero.
    """

    hidden_size: int = 128
    num_layers: int = 12
    num_heads: int = 4
    intermediate_size: int = 512
    conv_channels: int = 64
    dropout: float = 0.05
    batch_size: int = 4
    crop_seconds: float = 2.0
    lr: float = 2e-3
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 16:
            raise InputError(
                f"recipe.hidden_size={self.hidden_size} must be a multiple of recipe.num_heads={self.num_heads} and "
                "of 16 (the groups of the positional convolution)"
            )
        if self.num_layers % 3:
            raise InputError(f"recipe.num_layers={self.num_layers} must be a multiple of 3, for losses at its thirds")
        if self.crop_seconds < 0.025 or self.batch_size < 1:
            raise InputError(
                f"recipe.batch_size={self.batch_size} must be at least 1, "
                f"recipe.crop_seconds={self.crop_seconds} at least 0.025 (one frame)"
            )

    @property
    def supervised_layers(self) -> list[int]:
        """1-based layers whose outputs are classified: 4, 8 and 12 of 12."""
        return [self.num_layers * third // 3 for third in (1, 2, 3)]


def hubert_config(config: PretrainingConfig) -> HubertConfig:
    """HuBERT Base's layout at smaller sizes, without masking and LayerDrop."""
    return HubertConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        conv_dim=(config.conv_channels,) * 7,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        activation_dropout=config.dropout,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        apply_spec_augment=False,
    )


def initial_model(config: PretrainingConfig, seed: int) -> HubertModel:
    """The untrained model from which training starts; it depends on sizes and seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HubertModel(hubert_config(config))
    positions.install(model)
    return model


def supervised_loss(logits: Sequence[Tensor], labels_BF: Tensor) -> Tensor:
    """Mean over layers of the cross entropy of (B, F, C) logits, over frames that are not padding."""
    return torch.stack([nn.functional.cross_entropy(x_BFC.transpose(1, 2), labels_BF) for x_BFC in logits]).mean()


class Batch(Protocol):
    """The fields that the module reads of a batch of ``datamodules.phones``."""

    waveforms: Tensor  # (B, T) float32
    labels: Tensor  # (B, F) int64, IGNORED where the audio is padding


class FrameLabelModule(L.LightningModule):
    """Train a small ``HubertModel`` to classify the phone of every frame, at three layers.

    Attributes:
        hubert: the model, which is kept after training.
        classifiers: one linear layer per supervised layer; discarded after training.

    Args:
        config: sizes and training settings; a plain dict of its fields is accepted too.
        num_phones: number of classes C.
        steps: optimizer steps of the learning-rate schedule.
        seed: random seed of the initialisation.
    """

    def __init__(
        self, config: PretrainingConfig | Mapping[str, Any], num_phones: int, steps: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config if isinstance(config, PretrainingConfig) else PretrainingConfig(**config)
        plain = {"config": asdict(self.config), "num_phones": num_phones, "steps": steps, "seed": seed}
        self.save_hyperparameters(plain)
        self.steps = steps
        self.hubert = initial_model(self.config, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifiers = nn.ModuleList(
                nn.Linear(self.config.hidden_size, num_phones) for _ in self.config.supervised_layers
            )

    def forward(self, waveforms_BT: Tensor) -> list[Tensor]:
        """Logits (B, F, C) of each supervised layer."""
        hidden = self.hubert(waveforms_BT, output_hidden_states=True).hidden_states
        layers = zip(self.classifiers, self.config.supervised_layers, strict=True)
        return [classifier(hidden[layer]) for classifier, layer in layers]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = supervised_loss(self(batch.waveforms), batch.labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch.waveforms)
        valid_BF = batch.labels != IGNORED
        right_BF = (logits[-1].argmax(-1) == batch.labels) & valid_BF
        count = int(valid_BF.sum())
        self.log("val/loss", supervised_loss(logits, batch.labels), batch_size=count)
        self.log("val/frame_accuracy", right_BF.sum() / count, batch_size=count)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config, schedule = self.config, OptimizerConfig(schedule="linear", warmup_fraction=self.config.warmup)
        optimizer = torch.optim.AdamW(self.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
