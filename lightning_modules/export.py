"""Students in files: a training checkpoint of any depth, and the Hugging Face folder that is made of one.

The folder of :func:`export_student` holds ``config.json`` and ``model.safetensors`` (``HubertModel.from_pretrained``),
``preprocessor_config.json`` (``AutoFeatureExtractor``), ``README.md`` (a model card made from the run) and
``interstack.json`` (the checkpoint's whole description of the run). A student that is no ``HubertModel`` comes with
the file that defines it, for ``AutoModel.from_pretrained(folder, trust_remote_code=True)``.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import HubertModel, PreTrainedModel, Wav2Vec2FeatureExtractor

from datamodules.errors import InputError
from datamodules.files import read_json, write_json, write_text
from datamodules.folders import making
from lightning_modules.architectures import HUBERT, build_model, find_architecture
from lightning_modules.checkpoint_files import require_sound
from lightning_modules.damage import naming_damage
from lightning_modules.model_card import model_card

CHECKPOINT_FORMAT = 1
META_FILE = "interstack.json"
STUDENT_PREFIX = "student.hubert."
Dtype = Literal["float32", "float16", "bfloat16"]
REQUIRED = ("student_config", "normalize", "sample_rate", "teacher")


class StudentCheckpoint(NamedTuple):
    """A saved student and the description of its run.

    Attributes:
        model: the student in float32 on the CPU, in eval mode; see :mod:`lightning_modules.architectures`.
        meta: plain values that describe the run: config, recipe, teacher, ancestry, growth, data, metrics.
    """

    model: HubertModel
    meta: dict[str, Any]


def load_student(path: str | Path) -> StudentCheckpoint:
    """Load the student of a training checkpoint (of any depth), of a run folder's last one, or of an exported folder.

    Raises:
        InputError: ``path`` is neither, or was written by a newer version.
    """
    path = checkpoint_in(Path(path))
    if path.is_dir():
        return _load_folder(path)
    checkpoint = read_checkpoint(path)
    meta = _checked(checkpoint["interstack"], path)
    model = build_model(meta["student_config"], meta.get("architecture"))
    weights = {
        key.removeprefix(STUDENT_PREFIX): value
        for key, value in checkpoint.get("state_dict", {}).items()
        if key.startswith(STUDENT_PREFIX)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"weights and student_config of {str(path)!r} disagree: {detail}") from error
    return StudentCheckpoint(model.eval(), meta)


def checkpoint_in(path: Path) -> Path:
    """The last checkpoint of a run folder; any other path is returned as it is."""
    last = path / "checkpoints" / "last.ckpt"
    return last if last.is_file() else path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the contents of a training checkpoint on the CPU.

    Raises:
        InputError: ``path`` is not a training checkpoint, or is damaged.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {str(path)!r}: give a .ckpt file or an exported folder")
    require_sound(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{str(path)!r} is not an interstack checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "interstack" not in checkpoint:
        raise InputError(f"{str(path)!r} is not an interstack checkpoint: it has no 'interstack' entry")
    return checkpoint


def _load_folder(folder: Path) -> StudentCheckpoint:
    if not (folder / META_FILE).is_file():
        raise InputError(f"{str(folder)!r} holds no {META_FILE}: give a .ckpt file or a folder of `interstack export`")
    with naming_damage(folder):
        meta = read_json(folder / META_FILE)
        if "onnx" in meta:
            raise InputError(f"{str(folder)!r} holds an ONNX file: give the checkpoint that it was made of")
        meta = _checked(meta, folder / META_FILE)
        meta.pop("head", None)  # it stays in the folder
        return StudentCheckpoint(_architecture(meta).from_pretrained(folder, dtype=torch.float32).eval(), meta)


def _architecture(meta: dict[str, Any]) -> type[HubertModel]:
    return find_architecture(meta.get("architecture") or meta["student_config"].get("model_type", HUBERT))


def is_of_own_kind(folder: Path) -> bool:
    """Whether a folder holds an exported student that transformers has no class for."""
    meta = read_json(folder / META_FILE) if (folder / META_FILE).is_file() else {}
    return "student_config" in meta and _architecture(meta) is not HubertModel


def _checked(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    version = meta.get("format")
    if not isinstance(version, int):
        raise InputError(f"{str(path)!r} is not an interstack checkpoint: its format is {version!r}")
    if version > CHECKPOINT_FORMAT:
        raise InputError(
            f"{str(path)!r} has format {version}, but this interstack reads up to {CHECKPOINT_FORMAT}: "
            "install a newer one"
        )
    missing = [key for key in REQUIRED if key not in meta]
    if missing:
        raise InputError(f"the interstack entry of {str(path)!r} lacks {', '.join(missing)}")
    return meta


class Attached(NamedTuple):
    """A student, alone or with a head behind it.

    Attributes:
        model: both, as a class of transformers.
        usage: section of the model card that shows how to use it; ``None``: that of a student alone.
        head: plain values that describe the head.
    """

    model: PreTrainedModel
    usage: str | None = None
    head: dict[str, Any] | None = None


def export_student(
    checkpoint: str | Path,
    output: str | Path,
    overwrite: bool = False,
    layers: int | None = None,
    dtype: Dtype = "float32",
    attach: Callable[[StudentCheckpoint, str], Attached] | None = None,
) -> StudentCheckpoint:
    """Write the whole folder or nothing, and return the student that was written.

    Args:
        checkpoint: training checkpoint of any depth, run folder or exported folder.
        output: folder to write.
        overwrite: replace an earlier export in ``output``.
        layers: keep only the first layers; ``None``: all.
        dtype: type of the weights in the folder.
        attach: puts a head behind the student, for a folder of the given name; ``None``: no head.

    Raises:
        InputError: the checkpoint cannot be read, has fewer layers, or ``output`` must not be replaced.
    """
    output = Path(output)
    refuse_used(output, overwrite)
    student = load_student(checkpoint)
    if layers is not None:
        student = cut_student(student, layers)
    student.model.to(getattr(torch, dtype)).float()  # a head must have been trained on these weights
    whole = attach(student, output.name) if attach else Attached(student.model)
    for model in (student.model, whole.model):
        model.to(getattr(torch, dtype))
    write_student(student, output, whole)
    return student


def write_student(student: StudentCheckpoint, output: Path, whole: Attached) -> None:
    """Write the whole folder or nothing.

    Args:
        student: the student and its description.
        output: folder to write.
        whole: the student, alone or with a head behind it.
    """
    with making(output) as folder:
        whole.model.save_pretrained(folder)
        Wav2Vec2FeatureExtractor(
            do_normalize=student.meta["normalize"],
            return_attention_mask=True,  # as in training, where padded items have a mask
            sampling_rate=student.meta["sample_rate"],
        ).save_pretrained(folder)
        card = model_card(student.model, student.meta, output.name, whole.usage, head=whole.head)
        write_text(folder / "README.md", card)
        write_json(folder / META_FILE, student.meta | ({"head": whole.head} if whole.head else {}), indent=2)


def cut_student(student: StudentCheckpoint, layers: int) -> StudentCheckpoint:
    """Cut a student to its first ``layers`` layers, in place, and its description too.

    Raises:
        InputError: it does not have so many layers.
    """
    model, meta = student
    available = model.config.num_hidden_layers
    cut_layers(model.encoder, model, layers)
    config = meta["student_config"] | {"num_hidden_layers": layers}
    own = {"student_config": config, "cut_from": meta.get("cut_from", available)}
    if "ancestry" in meta:
        own["ancestry"] = meta["ancestry"][:layers]
    rest = {key: value for key, value in meta.items() if key != "originals"}  # positions that may be gone
    return StudentCheckpoint(model, rest | own)


def cut_layers(encoder: Any, model: Any, layers: int) -> None:
    """Keep the first ``layers`` layers of ``encoder``, a part of the Hugging Face ``model``, in place.

    Raises:
        InputError: it does not have so many layers.
    """
    available = len(encoder.layers)
    if not 1 <= layers <= available:
        raise InputError(f"layers={layers}, but the encoder has {available}: choose from 1 to {available}")
    encoder.layers, model.config.num_hidden_layers = encoder.layers[:layers], layers


def refuse_used(output: Path, overwrite: bool) -> None:
    """Refuse a file, a folder that is no earlier export, and an earlier export without ``overwrite``."""
    if output.is_file():
        raise InputError(f"output {str(output)!r} is a file: give the name of a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"output folder {str(output)!r} is not empty: give another one, or set overwrite=true")
    if not (output / META_FILE).is_file():  # a user's files, which a typing error must not delete
        raise InputError(f"output folder {str(output)!r} is not an earlier export, so it is kept: give another one")
