"""``interstack pretrain-teacher``: train a small teacher on a corpus with phone alignments."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import lightning as L
from torch.utils.data import DataLoader
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from callbacks.progress import DistillationProgressBar
from datamodules.alignments import alignment_digest, phone_inventory, read_split
from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_json
from datamodules.folders import is_finished, making, write_marker
from datamodules.phones import FrameLabelDataset, stack_crops
from datamodules.placement import trains_on_cuda, workers_for
from experiments.training.on_cpu import prepare_cpu
from lightning_modules.precision import trainer_precision
from lightning_modules.pretraining import FrameLabelModule, PretrainingConfig

logger = logging.getLogger(__name__)

MARKER = "training.json"


def pretrain_teacher(
    root: str,
    output: str,
    train_splits: list[str] = ["train-clean-100"],  # noqa: B006 (never mutated)
    val_splits: list[str] = ["dev-clean"],  # noqa: B006
    steps: int = 900,
    seed: int = 0,
    recipe: PretrainingConfig = PretrainingConfig(),  # noqa: B008 (frozen)
    accelerator: str = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    num_workers: int | None = None,
    progress_bar: bool = True,
    overwrite: bool = False,
) -> None:
    """Train a small HuBERT to predict the phone of every frame, and write it as a Hugging Face folder.

    The corpus needs alignments: `interstack synthesize` makes both, and datamodules/alignments.py describes the format.
    An existing teacher with the same settings is kept.

    Args:
        root: folder of the splits with alignments/ beside them, or its parent.
        output: the folder that gets the model.
        train_splits: splits to train on.
        val_splits: splits of held-out speakers, for the frame accuracy in training.json.
        steps: optimizer steps, a fixed number so that the result is reproducible; 0 writes the untrained model, as a
            control.
        seed: seed of initialisation, dropout, order and crops.
        recipe: sizes and training settings.
        accelerator: cpu, cuda, mps or auto.
        precision: precision of the training; auto is bf16-mixed on GPUs that have bfloat16, else 32-true.
        num_workers: processes that read audio; default: none on a CPU, on a GPU one less than the cores, from 2 to 8.
        progress_bar: show a progress bar on a terminal, elsewhere a line per minute.
        overwrite: replace a teacher of other settings.
    """
    if steps < 0:
        raise InputError(f"steps={steps} must be 0 (untrained) or more")
    if not train_splits or not val_splits:
        raise InputError(
            f"train_splits={list(train_splits)} and val_splits={list(val_splits)} must each name a folder with "
            "alignments"
        )
    folder = Path(output)
    used = trainer_precision(accelerator) if precision == "auto" else precision
    settings = {"steps": steps, "seed": seed, "train_splits": train_splits, "val_splits": val_splits}
    settings |= {"recipe": asdict(recipe), "alignments": alignment_digest(root, [*train_splits, *val_splits])}
    if steps and used != "32-true":  # left out otherwise, as in the markers of older teachers
        settings["precision"] = used
    if is_finished(folder, MARKER, settings, overwrite):
        logger.info("kept the teacher in %s, which has these settings already", folder)
        return
    phones = phone_inventory([read_split(root, split) for split in (*train_splits, *val_splits)])
    started = time.perf_counter()
    module = FrameLabelModule(recipe, len(phones), steps, seed)
    metrics: dict[str, float] = {}
    if steps:
        train_set = _crops(module, root, train_splits, phones, length=steps * recipe.batch_size, seed=seed)
        val_set = _crops(module, root, val_splits, phones, length=None, seed=seed)
        metrics = train(module, train_set, val_set, seed, accelerator, used, num_workers, progress_bar)
        logger.info("teacher: %.1f %% of held-out frames are right", 100 * metrics["val/frame_accuracy"])
    with making(folder) as new:
        write_model(new, module.hubert.cpu(), phones)
        seconds = round(time.perf_counter() - started, 1)
        parameters = sum(parameter.numel() for parameter in module.hubert.parameters())
        write_marker(new, MARKER, settings, metrics=metrics, seconds=seconds, parameters=parameters)
    logger.info("wrote the teacher to %s", folder)


def _crops(
    module: FrameLabelModule,
    root: str,
    splits: Sequence[str],
    phones: Sequence[str],
    length: int | None,
    seed: int,
) -> FrameLabelDataset:
    crop_samples = round(module.config.crop_seconds * SAMPLE_RATE)
    return FrameLabelDataset(root, splits, phones, crop_samples, length, seed)


def train(
    module: FrameLabelModule,
    train_set: FrameLabelDataset,
    val_set: FrameLabelDataset,
    seed: int,
    accelerator: str = "auto",
    precision: str = "32-true",
    num_workers: int | None = None,
    progress_bar: bool = True,
) -> dict[str, float]:
    """Train ``module`` in place for one pass over the training set; return ``train/loss`` and the held-out ``val/...``.

    The same arguments give the same weights on the same machine, whatever the number of workers.
    """
    L.seed_everything(seed, verbose=False)  # for dropout
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
        callbacks=[DistillationProgressBar()] if progress_bar else None,
        num_sanity_val_steps=0,
    )
    prepare_cpu(trainer)
    on_cuda = trains_on_cuda(trainer)
    workers = workers_for(num_workers, trainer) if on_cuda else num_workers or 0
    train_loader, val_loader = (
        DataLoader(data, module.config.batch_size, collate_fn=stack_crops, num_workers=workers, pin_memory=on_cuda)
        for data in (train_set, val_set)
    )
    trainer.fit(module, train_loader, val_loader)
    return {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()}


def write_model(folder: Path, hubert: HubertModel, phones: Sequence[str]) -> None:
    """Write model, feature extractor (raw audio, as in training) and ``phones.json`` (class index -> phone)."""
    hubert.save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=False, return_attention_mask=True)
    extractor.save_pretrained(folder)
    write_json(folder / "phones.json", list(phones), indent=None)
