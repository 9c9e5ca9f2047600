"""The encoders that are measured beside each other: what a user names, as folders from which a worker can load.

A training checkpoint or a run folder is exported first, so that its optimizer state counts in no size and no memory.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, HubertConfig, Wav2Vec2FeatureExtractor

from datamodules.errors import InputError
from datamodules.files import read_json
from experiments.command_line import nearest
from lightning_modules.deployment.onnx_encoder import is_onnx_folder
from lightning_modules.deployment.onnx_file import MODEL_FILE, require
from lightning_modules.export import META_FILE, checkpoint_in, export_student, is_of_own_kind
from lightning_modules.superb.upstream import is_class_path
from lightning_modules.teacher_loading import WHISPER, read_config

PRECISIONS = ("float32", "bfloat16", "int8")
RANDOM = "random:"
SIZES = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Row:
    """One encoder in one format and precision.

    Attributes:
        name: the user's name for the encoder, the same in all precisions.
        source: what the user gave.
        path: folder from which a worker loads it, or a name on the hub, or the path of a class.
        format: ``PyTorch`` or ``ONNX``.
        precision: one of ``PRECISIONS``; of an ONNX file what its export wrote.
        config: Hugging Face configuration; ``None`` if there is none.
        parameters: number of parameters that an ONNX file's export wrote; ``None`` if it is not known before loading.
    """

    name: str
    source: str
    path: str
    format: Literal["PyTorch", "ONNX"]
    precision: str
    config: Any
    parameters: int | None = None

    @property
    def label(self) -> str:
        """Name, format and precision for messages and pictures."""
        return f"{self.name}, {'' if self.format == 'PyTorch' else 'ONNX '}{self.precision}"

    @property
    def random_weights(self) -> bool:
        return self.source.startswith(RANDOM)


def find_rows(models: Mapping[str, str] | Sequence[str], precisions: Sequence[str], folder: Path) -> list[Row]:
    """Find all rows, and write what is not yet a folder below ``folder``.

    Args:
        models: what `interstack latency` takes, by name, or a list, whose last folder or file names are the names.
        precisions: precisions of the PyTorch rows.
        folder: an existing folder for exports and random weights.

    Raises:
        InputError: a precision is unknown, a name is given twice, there is no such encoder, or onnxruntime is missing.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(
                f"precisions: {precision!r} is none of {', '.join(PRECISIONS)}{nearest(precision, PRECISIONS)}"
            )
    named = dict(models) if isinstance(models, Mapping) else _named(models)
    if not named or not precisions:
        raise InputError("models and precisions must each have one entry or more")
    return [row for name, source in named.items() for row in _rows_of(name, source, precisions, folder)]


def _named(models: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for source in models:
        name = Path(source).name
        if name in named:
            raise InputError(
                f'models: {named[name]} and {source} are both named {name}: give names, {{"NAME": "{source}"}}'
            )
        named[name] = source
    return named


def _rows_of(name: str, source: str, precisions: Sequence[str], folder: Path) -> list[Row]:
    path = Path(source)
    if is_onnx_folder(path):
        return [_onnx_row(name, source)]
    if source.startswith(RANDOM):
        path = _draw(source, folder / name)
    elif checkpoint_in(path).is_file() or source.endswith(".ckpt"):
        path = _exported(path, folder / name)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise InputError(
            f"model {name!r}: {source} holds no config.json, {MODEL_FILE} or checkpoints/last.ckpt: give a Hugging "
            "Face folder, an exported student or a run folder"
        )
    elif is_class_path(source):
        return [Row(name, source, source, "PyTorch", precision, None) for precision in precisions]
    config = read_config(str(path) if path.exists() else source, None)
    return [Row(name, source, str(path), "PyTorch", precision, config) for precision in precisions]


def _onnx_row(name: str, source: str) -> Row:
    require("onnxruntime")
    file = Path(source) / META_FILE
    meta = read_json(file) if file.is_file() else {}
    described, values = meta.get("onnx") or {}, meta.get("student_config") or meta.get("config")
    config = None if values is None else AutoConfig.for_model(**values)
    precision, parameters = described.get("precision", "unknown"), described.get("parameters")
    return Row(name, source, source, "ONNX", precision, config, parameters)


def _exported(checkpoint: Path, folder: Path) -> Path:
    export_student(checkpoint, folder)
    return folder


def _draw(source: str, folder: Path) -> Path:
    """Write an encoder of random weights: of given sizes in HuBERT's layout, or of another model's configuration."""
    what = source.removeprefix(RANDOM)
    config: Any
    if sizes := SIZES.fullmatch(what):
        layers, width, heads = map(int, sizes.groups())
        if not layers or not heads or width % (16 * heads):  # the positional convolution has 16 groups
            raise InputError(
                f"{source}: the width must be a multiple of the heads and of 16, and layers and heads positive"
            )
        config = HubertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
        )
    else:
        config = read_config(what, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    if is_of_own_kind(Path(what)):  # by which the folder is known to hold such a student
        shutil.copyfile(Path(what) / META_FILE, folder / META_FILE)
    if config.model_type != WHISPER:
        Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder
