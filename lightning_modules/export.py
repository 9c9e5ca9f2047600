"""Export of a training checkpoint of any depth to a Hugging Face folder, and loading of both as a model.

    interstack export --checkpoint runs/NAME/checkpoints/last.ckpt --output my-student

The folder holds ``config.json`` and ``model.safetensors`` (``HubertModel.from_pretrained``),
``preprocessor_config.json`` (``AutoFeatureExtractor``), ``README.md`` (a model card made from the run) and
``interstack.json`` (the checkpoint's whole description of the run).
"""

import json
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from datamodules.errors import InputError
from datamodules.files import finite, read_json, write_json, write_text
from datamodules.folders import making
from lightning_modules.checkpoint_files import require_sound
from lightning_modules.damage import naming_damage
from lightning_modules.growth.event import GrowthEvent

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
META_FILE = "interstack.json"
STUDENT_PREFIX = "student.hubert."
REQUIRED = ("student_config", "normalize", "sample_rate", "teacher")


class StudentCheckpoint(NamedTuple):
    """A saved student and the description of its run.

    Attributes:
        model: the student in float32 on the CPU, in eval mode.
        meta: plain values that describe the run: config, recipe, teacher, ancestry, growth, data, metrics.
    """

    model: HubertModel
    meta: dict[str, Any]


def load_student(path: str | Path) -> StudentCheckpoint:
    """Load the student of a training checkpoint (of any depth) or of an exported folder.

    Raises:
        InputError: ``path`` is neither, or was written by a newer version.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    checkpoint = read_checkpoint(path)
    meta = _checked(checkpoint["interstack"], path)
    model = HubertModel(HubertConfig.from_dict(meta["student_config"]))
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
        meta = _checked(read_json(folder / META_FILE), folder / META_FILE)
        return StudentCheckpoint(HubertModel.from_pretrained(folder).eval(), meta)


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


def export(checkpoint: str, output: str, overwrite: bool = False) -> None:
    """Write a student as a Hugging Face folder with a model card.

    Args:
        checkpoint: training checkpoint of any depth.
        output: folder to write.
        overwrite: replace an earlier export in the output folder.
    """
    student = export_student(checkpoint, output, overwrite)
    logger.info(
        "exported %d layers, %d parameters to %s",
        student.model.config.num_hidden_layers,
        student.model.num_parameters(),
        output,
    )


def export_student(checkpoint: str | Path, output: str | Path, overwrite: bool = False) -> StudentCheckpoint:
    """Write the whole folder or nothing, and return the student that was written.

    Raises:
        InputError: the checkpoint cannot be read, or ``output`` must not be replaced.
    """
    output = Path(output)
    _refuse_used(output, overwrite)
    student = load_student(checkpoint)
    with making(output) as folder:
        student.model.save_pretrained(folder)
        Wav2Vec2FeatureExtractor(
            do_normalize=student.meta["normalize"],
            return_attention_mask=True,  # as in training, where padded items have a mask
            sampling_rate=student.meta["sample_rate"],
        ).save_pretrained(folder)
        write_text(folder / "README.md", model_card(student, output.name))
        write_json(folder / META_FILE, student.meta, indent=2)
    return student


def _refuse_used(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise InputError(f"output {str(output)!r} is a file: give the name of a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"output folder {str(output)!r} is not empty: give another one, or set overwrite=true")
    if not (output / META_FILE).is_file():  # a user's files, which a typing error must not delete
        raise InputError(f"output folder {str(output)!r} is not an earlier export, so it is kept: give another one")


def model_card(student: StudentCheckpoint, name: str) -> str:
    """Markdown with the front matter of the Hugging Face hub, made from the checkpoint's description of the run.

    It names no licence, because the licences of the teacher and of the data are not known here.
    """
    config, meta = student.model.config, student.meta
    teacher, settings = _teacher_name(meta["teacher"]), _growth_settings(meta)
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
    rows = {
        "Teacher": f"`{teacher}`",
        "Layers": config.num_hidden_layers,
        "Width, feed-forward, heads": ", ".join(map(str, sizes)),
        "Parameters": f"{student.model.num_parameters():,}",
        "Sample rate": f"{meta['sample_rate']} Hz",
        "Waveform": "zero mean and unit variance" if meta["normalize"] else "as it is, not normalised",
        "Growth policy": settings.pop("policy", "none"),
        **{key.replace("_", " ").capitalize(): value for key, value in settings.items()},
    }
    sections = [
        _FRONT_MATTER,
        f"# {name}",
        f"A HuBERT-layout speech encoder of {config.num_hidden_layers} layers, distilled from `{teacher}`.",
        _table(["Setting", "Value"], rows.items()),
        _USAGE.format(name=name, rate=meta["sample_rate"]),
        "## Growth",
        _growth_table([GrowthEvent.from_plain(event) for event in meta.get("growth") or []]),
        "## Metrics",
        _table(["Metric", "Value"], sorted((meta.get("metrics") or {}).items())),
        *(f"## {title}\n\n{_json_block(meta.get(key) or {})}" for title, key in _BLOCKS.items()),
        _CITATION,
    ]
    return "\n\n".join(sections) + "\n"


def _teacher_name(spec: dict[str, Any]) -> str:
    return str(spec.get("init_args", {}).get("model") or spec.get("class_path"))


def _growth_settings(meta: dict[str, Any]) -> dict[str, Any]:
    """Growth policy, schedule and stages; taken from the growth events if the checkpoint keeps no settings."""
    events = meta.get("growth") or []
    return dict(meta.get("growth_settings") or ({"policy": events[-1]["policy"]} if events else {}))


def _growth_table(events: list[GrowthEvent]) -> str:
    """A table with one row per growth. Layers count from 0, and a dash stands for a fresh layer."""
    if not events:
        return "The student did not grow: it has had this depth from the start."
    head = [
        "Epoch",
        "Step",
        "Policy",
        "Layers",
        "Plan (source of each layer)",
        "Ancestry (first-stage layer)",
    ]
    rows = (
        [
            event.epoch,
            event.step,
            event.policy,
            f"{event.depth_before} -> {event.depth}",
            _layers(event.plan),
            _layers(event.ancestry),
        ]
        for event in events
    )
    return _table(head, rows)


def _layers(sources: Iterable[int | None]) -> str:
    return " ".join("-" if source is None else str(source) for source in sources)


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def _json_block(values: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(finite(values), indent=2)}\n```"


_BLOCKS = {"Recipe": "recipe", "Data": "data", "Versions": "versions"}

_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- speech
- hubert
- knowledge-distillation
- interstack
---"""

_USAGE = """## Use

```python
from transformers import AutoFeatureExtractor, HubertModel

extractor = AutoFeatureExtractor.from_pretrained("{name}")
model = HubertModel.from_pretrained("{name}").eval()
inputs = extractor(waveform, sampling_rate={rate}, return_tensors="pt")
hidden_states = model(**inputs, output_hidden_states=True).hidden_states
```"""

_CITATION = """## Citation

Trained with interstack, after E. Kim, K. Lee, "Fast Speech Foundation Model Distillation Using Interleaved
Stacking", Interspeech 2026, arXiv 2606.11766.

```bibtex
@inproceedings{kim2026interleaved,
  author = {Kim, E. and Lee, K.},
  title = {Fast Speech Foundation Model Distillation Using Interleaved Stacking},
  booktitle = {Interspeech},
  year = {2026},
  note = {arXiv 2606.11766}
}
```"""
