"""A published student as a folder of this project: for transformers, SUPERB, latency and ONNX, as an exported one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import HubertConfig, HubertModel

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import read_text
from lightning_modules.architectures import COMPACT, HUBERT, build_model
from lightning_modules.export import CHECKPOINT_FORMAT, Attached, StudentCheckpoint, refuse_used, write_student
from lightning_modules.published.checkpoint import read_contents
from lightning_modules.published.layouts import Published, read_published
from lightning_modules.published.renaming import listed

PAPERS = {
    "DistilHuBERT": "H.-J. Chang et al., DistilHuBERT, ICASSP 2022, arXiv 2110.01900",
    "FitHuBERT": "Y. Lee et al., FitHuBERT, Interspeech 2022, arXiv 2207.00555",
    "MaskHuBERT": "K. Jang et al., Recycle-and-Distill, Interspeech 2023, arXiv 2305.11685",
    "ARMHuBERT": "K. Jang et al., Recycle-and-Distill, Interspeech 2023, arXiv 2305.11685",
    "STaRHuBERT": "K. Jang et al., STaR, ICASSP 2024, arXiv 2312.09040",
    "DPHuBERT": "Y. Peng et al., DPHuBERT, Interspeech 2023, arXiv 2305.17651",
}


def convert_published(
    path: str | Path, output: str | Path, config: str | Path | None = None, overwrite: bool = False
) -> StudentCheckpoint:
    """Write the whole folder or nothing, and return the student that was written.

    Args:
        path: checkpoint file of a published student.
        output: folder to write.
        config: YAML file with the section ``distiller``; ``None``: the file's own settings, or the published ones.
        overwrite: replace an earlier export in ``output``.

    Raises:
        InputError: the file cannot be read, its layout is not known, or ``output`` must not be replaced.
    """
    path, output = Path(path), Path(output)
    refuse_used(output, overwrite)
    settings = None if config is None else read_settings(Path(config))
    contents = read_contents(path)
    try:
        published = read_published(contents, settings)
        model = model_of(published)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    student = StudentCheckpoint(model, described(published, model.config, path))
    write_student(student, output, Attached(model))
    return student


def read_settings(path: Path) -> dict[str, Any]:
    """Read the section ``distiller`` of a YAML file."""
    try:
        settings = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    found = settings.get("distiller") if isinstance(settings, dict) else None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} has no section `distiller`: give the configuration that the checkpoint came with")
    return found


def model_of(published: Published) -> HubertModel:
    """Build the model with its weights in float32; a plain ``HubertModel`` where that suffices.

    Raises:
        InputError: a weight is missing, left over or of another shape.
    """
    model_type = HUBERT if published.fields.keys() <= HubertConfig().to_dict().keys() else COMPACT
    with torch.device("meta"):
        model = build_model({"model_type": model_type, **published.fields}).eval()
    _require_fit(published.weights, model.state_dict())
    model.load_state_dict({name: value.float() for name, value in published.weights.items()}, assign=True)
    return model


def _require_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} has {list(value.shape)}, not {list(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems = {
        "it lacks": sorted(expected.keys() - weights.keys()),
        "no part of the model has": sorted(weights.keys() - expected.keys()),
        "of the wrong shape:": wrong,
    }
    found = [f"{text} {listed(names)}" for text, names in problems.items() if names]
    if found:
        raise InputError(f"its weights, in HuBERT's names, do not fit: {'; '.join(found)}")


def described(published: Published, config: Any, path: Path) -> dict[str, Any]:
    """Plain values for ``interstack.json``."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "format": CHECKPOINT_FORMAT,
        "student_config": json.loads(config.to_json_string(use_diff=False)),
        "normalize": published.normalize,
        "sample_rate": SAMPLE_RATE,
        "teacher": {
            "class_path": "lightning_modules.teacher.HuggingFaceTeacher",
            "init_args": {"model": published.teacher},
        },
        "converted": {
            "layout": published.layout,
            "paper": PAPERS[published.layout],
            "file": path.name,
            "sha256": digest,
            "left_out": published.left_out,
            "assumed": published.assumed,
            "remarks": published.remarks,
        },
    }
