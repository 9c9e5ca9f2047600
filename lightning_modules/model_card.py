"""The model card of an exported student: Markdown with the front matter of the Hugging Face hub."""

import json
from collections.abc import Iterable
from typing import Any

from transformers import HubertModel

from datamodules.files import finite
from lightning_modules.growth.event import GrowthEvent


def model_card(
    model: HubertModel,
    meta: dict[str, Any],
    name: str,
    usage: str | None = None,
    library: str = "transformers",
    head: dict[str, Any] | None = None,
) -> str:
    """Model card of a student, made from the checkpoint's description of the run.

    It names no licence, because the licences of the teacher and of the data are not known here.

    Args:
        model: the student.
        meta: its checkpoint's description of the run.
        name: name of the folder.
        usage: section that shows how to use the files; default: with transformers.
        library: library that the files are for.
        head: description of the head behind the student, of :meth:`TrainedHead.described`.
    """
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    teacher, settings = _teacher_name(meta["teacher"]), _growth_settings(meta)
    sizes = (
        config.hidden_size,
        getattr(config, "layer_intermediate_sizes", None) or config.intermediate_size,
        getattr(config, "layer_heads", None) or config.num_attention_heads,
    )
    converted = meta.get("converted")
    rows = {
        "Teacher": f"`{teacher}`",
        "Layers": config.num_hidden_layers,
        "Width, feed-forward, heads": ", ".join(map(str, sizes)),
        "Parameters": f"{model.num_parameters():,}",
        "Type of the weights": dtype,
        "Sample rate": f"{meta['sample_rate']} Hz",
        "Waveform": "zero mean and unit variance" if meta["normalize"] else "as it is, not normalised",
    }
    if converted is None:
        rows["Growth policy"] = settings.pop("policy", "none")
        rows |= {key.replace("_", " ").capitalize(): value for key, value in settings.items()}
    sections = [
        _FRONT_MATTER.format(library=library, tag=_tag(head)),
        f"# {name}",
        f"A HuBERT-layout speech encoder of {config.num_hidden_layers} layers, distilled from `{teacher}`."
        if converted is None
        else _CONVERTED.format(layers=config.num_hidden_layers, **converted),
        *([_CUT.format(layers=config.num_hidden_layers, whole=meta["cut_from"])] if "cut_from" in meta else []),
        _table(["Setting", "Value"], rows.items()),
        usage or _usage(model, name, meta["sample_rate"], "" if dtype == "float32" else CAST),
        *([head_section(head)] if head else []),
        *(_trained_sections(meta) if converted is None else _converted_sections(converted)),
    ]
    return "\n\n".join(sections) + "\n"


def _trained_sections(meta: dict[str, Any]) -> list[str]:
    return [
        "## Growth",
        _growth_table([GrowthEvent.from_plain(event) for event in meta.get("growth") or []]),
        "## Metrics",
        _table(["Metric", "Value"], sorted((meta.get("metrics") or {}).items())),
        *(f"## {title}\n\n{_json_block(meta.get(key) or {})}" for title, key in _BLOCKS.items()),
        _CITATION,
    ]


def _converted_sections(converted: dict[str, Any]) -> list[str]:
    """What a conversion left out and assumed, and what differs from the authors' code."""
    left_out, assumed = (", ".join(converted[key]) or "nothing" for key in ("left_out", "assumed"))
    rows = {"File": f"`{converted['file']}`", "SHA-256 of the file": f"`{converted['sha256']}`"}
    rows |= {"Left out": left_out, "Assumed, since the file does not say": assumed}
    remarks = "\n".join(f"* {remark}" for remark in converted["remarks"])
    return ["## Conversion", _table(["Setting", "Value"], rows.items()), remarks]


def _usage(model: HubertModel, name: str, rate: int, cast: str) -> str:
    """The lines that load a student with transformers; other kinds than ``HubertModel`` come with their own code."""
    kind = type(model)
    loaded = ("HubertModel", "") if kind is HubertModel else ("AutoModel", ", trust_remote_code=True")
    if kind is not HubertModel and getattr(kind, "_auto_class", None) is None:
        return f"## Use\n\nThe model is a `{kind.__module__}.{kind.__qualname__}`, whose module must be installed."
    return _USAGE.format(name=name, rate=rate, cast=cast, kind=loaded[0], own=loaded[1])


def head_section(head: dict[str, Any]) -> str:
    """A section about the head behind an encoder, from the description of :meth:`TrainedHead.described`."""
    scores = ", ".join(f"{name} {value:.2f}" for name, value in head["test"].items())
    text = f"A head of task {head['task']}, trained on this encoder with the {head['preset']} preset. Test: {scores}."
    if "symbols" in head:
        text += " Its text is the best path of CTC, without repeats and blanks."
    if head["preset"] == "probe":
        text += " The probe is a linear head that was trained on few utterances for a quick comparison of encoders."
    return f"## Head\n\n{text}"


def _tag(head: dict[str, Any] | None) -> str:
    """The hub's name of what the files do."""
    if head is None:
        return "feature-extraction"
    return "automatic-speech-recognition" if "symbols" in head else "audio-classification"


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
library_name: {library}
pipeline_tag: {tag}
tags:
- speech
- hubert
- knowledge-distillation
- interstack
---"""

CAST = ".to(model.dtype)"

_CUT = """It is cut: these are the first {layers} layers of a student of {whole}. Growth and metrics below are the whole
student's."""

_CONVERTED = """{layout} with {layers} layers ({paper}). Its weights are those of `{file}`, converted with interstack;
cite that paper if you use them."""

_USAGE = """## Use

```python
from transformers import AutoFeatureExtractor, {kind}

extractor = AutoFeatureExtractor.from_pretrained("{name}")
model = {kind}.from_pretrained("{name}"{own}).eval()
inputs = extractor(waveform, sampling_rate={rate}, return_tensors="pt"){cast}
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
