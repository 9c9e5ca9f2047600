"""Tiny teachers, corpora and runs that tests of several files share."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoConfig,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from callbacks.stacking import StackingCallback
from datamodules.librispeech import LibriSpeechDataModule
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.optimisation import OptimizerConfig
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from lightning_modules.teacher_loading import WHISPER
from lightning_modules.whisper import WhisperTeacher

# One table for every trainer-level test: policy -> stages from 1 to 4 (or by doubling) that it can do.
POLICY_STAGES: dict[str, list[int]] = {
    "interleaved": [1, 2, 3, 4],
    "gradual": [1, 2, 3, 4],
    "midas": [1, 2, 3, 4],
    "lidas": [1, 2, 3, 4],
    "stackbert": [1, 2, 4],
    "one_shot_stack": [1, 4],
    "one_shot_interleave": [1, 4],
    "random": [1, 2, 3, 4],
    "identity": [1, 2, 3, 4],
}


def some_policies(least_stages: int = 1) -> list[Any]:
    """All policies, for a test that does not depend on how a policy grows: all but three are slow."""
    fast = ("interleaved", "random", "one_shot_stack")
    policies = [policy for policy, stages in POLICY_STAGES.items() if len(stages) >= least_stages]
    return [pytest.param(policy, marks=() if policy in fast else pytest.mark.slow) for policy in policies]


def save_teacher(folder: Path, layers: int = 4, width: int = 16, **sizes: Any) -> Path:
    """A HuBERT of random weights with 8 convolution channels, and its feature extractor."""
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        config = HubertConfig(
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            conv_dim=[8] * 7,
            **(positions | sizes),
        )
        HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


def whisper_config(layers: int = 4, width: int = 16, positions: int = 100, bins: int = 80) -> WhisperConfig:
    """Sizes of a tiny Whisper; its positions reach ``positions`` / 50 seconds."""
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_target_positions": 8}
    words = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        max_source_positions=positions,
        num_mel_bins=bins,
        **decoder,
        **words,
    )


def save_whisper(folder: Path, **sizes: int) -> Path:
    """A whole Whisper of random weights, larger than usual so that each layer changes its input visibly.

    Its ``sizes`` are those of :func:`whisper_config`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model = WhisperModel(whisper_config(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
    return folder


def save_corpus(root: Path, splits: dict[str, int], seconds: tuple[float, float] = (0.3, 0.8), seed: int = 0) -> Path:
    """Coloured noise in LibriSpeech layout, three utterances to a chapter, with transcripts."""
    generator = np.random.default_rng(seed)
    for number, (split, utterances) in enumerate(splits.items()):
        for utterance in range(utterances):
            speaker, chapter = 100 + 10 * number + utterance % 2, utterance // 3
            folder = root / split / str(speaker) / str(chapter)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{speaker}-{chapter}-{utterance:04d}"
            samples = generator.standard_normal(int(generator.uniform(*seconds) * 16_000)).cumsum()
            samples = 0.5 * samples / np.abs(samples).max()
            soundfile.write(folder / f"{name}.flac", samples, 16_000)
            with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as transcripts:
                transcripts.write(f"{name} HELLO WORLD\n")
    return root


def make_data(root: Path, cache: Path, **settings: object) -> LibriSpeechDataModule:
    defaults: dict[str, object] = {
        "train_splits": ["train"],
        "val_splits": ["dev"],
        "batch_size": 4,
        "num_workers": 0,
        "cache_dir": str(cache),
    }
    return LibriSpeechDataModule(str(root), **(defaults | settings))


def make_module(
    teacher: Path,
    num_layers: int = 4,
    dropout: float = 0.1,
    optimizer: dict[str, object] | None = None,
    objective: dict[str, object] | None = None,
    seed: int = 0,
    teacher_settings: dict[str, Any] | None = None,
    **student: object,
) -> DistillationModule:
    whisper = AutoConfig.from_pretrained(teacher).model_type == WHISPER
    kind: Any = WhisperTeacher if whisper else HuggingFaceTeacher
    if whisper:
        student = {"front_end_init": "random", "conv_channels": 8, **student}
    return DistillationModule(
        kind(str(teacher), **(teacher_settings or {})),
        StudentConfig(16, 24, 2, num_layers, dropout=dropout, **student),
        ObjectiveConfig(**({"layers": [2], "intermediate": "prediction"} | (objective or {}))),
        OptimizerConfig(**({"lr": 1e-3} | (optimizer or {}))),
        seed=seed,
    )


def make_trainer(folder: Path, *callbacks: L.Callback, **settings: object) -> L.Trainer:
    defaults: dict[str, object] = {
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "devices": 1,
    }
    return L.Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **(defaults | settings))


def make_stacking(policy: str = "interleaved", **settings: object) -> StackingCallback:
    stages = POLICY_STAGES[policy]
    return StackingCallback(policy, **({"stages": stages} | settings))
