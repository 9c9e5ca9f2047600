"""Export of an encoder to a folder with an ONNX file, which needs only onnxruntime and NumPy to run.

The folder holds ``model.onnx``, ``README.md`` (a model card with lines of code that run as they are) and
``interstack.json`` (inputs, outputs, precision and the check of the file; of a student, its run too); with a head also
``labels.json`` (the names of its classes).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_json, write_text
from datamodules.folders import making
from lightning_modules.deployment.encoder import DeployedEncoder, States, cut, deployed
from lightning_modules.deployment.head import DeployedHead, TrainedHead
from lightning_modules.deployment.onnx_file import (
    MODEL_FILE,
    MOST_IN_ONE_FILE,
    OPSET,
    TOLERANCE,
    difference,
    example,
    name_results,
    quantise,
    quietly,
    require,
    require_opset,
    run,
    session,
    versions,
    weights_bytes,
    write_onnx,
)
from lightning_modules.export import (
    CHECKPOINT_FORMAT,
    META_FILE,
    StudentCheckpoint,
    checkpoint_in,
    cut_student,
    load_student,
    refuse_used,
)
from lightning_modules.front_end import noise
from lightning_modules.model_card import head_section, model_card
from lightning_modules.precision import relative_error
from lightning_modules.superb.upstream import FBANK, LoadedEncoder, load_upstream
from lightning_modules.teacher import Teacher

CLASSES_FILE = "labels.json"
Quantize = Literal["none", "int8"]


def export_onnx(
    encoder: str,
    output: str | Path,
    overwrite: bool = False,
    states: States = "last",
    quantize: Quantize = "none",
    layers: int | None = None,
    opset: int = OPSET,
    head: TrainedHead | None = None,
) -> dict[str, Any]:
    """Write the whole folder or nothing, and return the description of the ONNX file.

    Args:
        encoder: checkpoint, run folder, exported folder, or the name or folder of a Hugging Face encoder.
        output: folder to write.
        overwrite: replace an earlier export in ``output``.
        states: ``last`` for the last hidden state, ``all`` for the first layer's input and all layers' outputs.
        quantize: ``int8`` for the linear layers in 8 bits.
        layers: keep only the first layers; ``None``: all.
        opset: version of ONNX's operators.
        head: head behind the encoder, which the file then returns the results of; ``None``: hidden states.

    Raises:
        InputError: the encoder cannot be read or exported, was not the head's, or ``output`` must not be replaced.
    """
    output = Path(output)
    refuse_used(output, overwrite)
    require("onnxruntime")
    require_opset(opset)
    student, teacher = load_encoder(encoder, layers)
    bare = deployed(teacher, "all" if head else states)
    if head is not None:
        head.require_fit(teacher)
    graph = DeployedHead(bare, head) if head else bare
    if quantize == "int8" and (size := weights_bytes(graph)) > MOST_IN_ONE_FILE:
        raise InputError(
            f"--quantize int8 takes encoders of {MOST_IN_ONE_FILE / 1e9:g} GB of float32 weights at most, and "
            f"{encoder!r} has {size / 1e9:.1f} GB: export it in float32, or fewer --layers"
        )
    with making(output) as folder:
        write_onnx(graph, folder / MODEL_FILE, graph.outputs, opset)
        exact = check(graph, folder / MODEL_FILE)
        if exact["difference"] > TOLERANCE:
            raise InputError(
                f"the ONNX file of {encoder!r} differs from PyTorch by {exact['difference']:.2g} of its largest value, "
                f"more than {TOLERANCE}: try another --opset than {opset}"
            )
        if quantize == "int8":
            quantise(folder / MODEL_FILE)
        checked, outputs = exact if quantize == "none" else check(graph, folder / MODEL_FILE), graph.outputs
        if isinstance(graph, DeployedHead):
            name_results(folder / MODEL_FILE, graph.result, graph.texts)
            outputs = (*outputs[:-1], graph.result)
        size = sum(file.stat().st_size for file in folder.iterdir())
        described = description(bare, outputs, quantize, opset) | {"checked": checked, "bytes": size}
        if head is not None:
            described["head"] = head.described()
            write_json(folder / CLASSES_FILE, head.classes(), indent=2)
        write_text(folder / "README.md", card(student, encoder, output.name, described))
        meta = student.meta if student else _origin(encoder, teacher)
        write_json(folder / META_FILE, meta | {"onnx": described}, indent=2)
    return described


def load_encoder(name: str, layers: int | None = None) -> tuple[StudentCheckpoint | None, Teacher]:
    """Load an encoder, cut to ``layers``, and the description of its run if it is a student.

    Raises:
        InputError: there is no such encoder, or it cannot be read.
    """
    path = checkpoint_in(Path(name))
    if path.is_file() or path.suffix == ".ckpt" or (path / META_FILE).is_file():
        student = load_student(path)
        if layers is not None:
            student = cut_student(student, layers)
        return student, LoadedEncoder(student.model, student.meta["normalize"], student.meta["sample_rate"])
    if name == FBANK:
        raise InputError(f"{FBANK} has no weights to export: give a checkpoint, a folder, or a Hugging Face name")
    upstream: Any = load_upstream(name)
    if layers is not None:
        cut(upstream.teacher, layers)
    return None, upstream.teacher


def _origin(encoder: str, teacher: Any) -> dict[str, Any]:
    """What is known of an encoder that is no student: its name and its Hugging Face configuration."""
    config = json.loads(teacher.model.config.to_json_string(use_diff=False))
    return {"format": CHECKPOINT_FORMAT, "encoder": encoder, "config": config}


def description(encoder: DeployedEncoder, outputs: Sequence[str], quantize: Quantize, opset: int) -> dict[str, Any]:
    """Plain values that describe an ONNX file, for programs that read ``interstack.json``."""
    shapes = {
        "hidden_states": ["states", "batch", "frames", "width"],
        "last_hidden_state": ["batch", "frames", "width"],
        "logits": ["batch", "classes"] if "labels" in outputs else ["batch", "frames", "classes"],
        "labels": ["batch", "label lists"],
        "symbols": ["batch", "frames"],
        "phones": ["batch", "frames"],
    }
    return {
        "precision": "float32" if quantize == "none" else quantize,
        "opset": opset,
        "sample_rate": SAMPLE_RATE,
        "inputs": {"waveforms": ["batch", "samples"], "num_samples": ["batch"]},
        "outputs": {name: shapes.get(name, ["batch"]) for name in outputs},
        "shortest_samples": encoder.shortest,
        "samples_per_frame": encoder.hop,
        "longest_samples": encoder.longest,
        "normalizes_waveforms": encoder.teacher.normalize,
        "layers": encoder.num_layers,
        "width": encoder.width,
        "parameters": encoder.num_parameters,
        "versions": versions("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    }


@torch.no_grad()
def check(graph: nn.Module, path: Path) -> dict[str, float]:
    """Compare an ONNX file with its module, on a padded batch of noise and on a second of noise alone.

    Returns:
        ``difference``, the largest one as a share of the output's largest value, and ``relative_error``, its norm.
    """
    opened = session(path)
    worst = {"difference": 0.0, "relative_error": 0.0}
    for batch in (example(), (noise(), torch.tensor([SAMPLE_RATE]))):
        with quietly():
            found, wanted = run(opened, *batch)[0], graph(*batch)[0]
        if not (found.isfinite().all() and wanted.isfinite().all()):
            raise InputError("the encoder, or the ONNX file made of it, returns numbers that are not finite on noise")
        worst["difference"] = max(worst["difference"], difference(found, wanted))
        worst["relative_error"] = max(worst["relative_error"], relative_error(found, wanted))
    return worst


def card(student: StudentCheckpoint | None, encoder: str, name: str, described: dict[str, Any]) -> str:
    """Model card of the folder: the student's own, or a short one of another encoder."""
    outputs, head = list(described["outputs"]), described.get("head")
    shown = READABLE.get(outputs[-1], f"{outputs[0]}.shape, num_frames")
    usage = _USAGE.format(name=name, outputs=", ".join(outputs), shown=shown, facts=_facts(described))
    if student is not None:
        return model_card(student.model, student.meta, name, usage, "onnx", head)
    sizes = f"{described['layers']} layers of width {described['width']}, {described['parameters']:,} parameters"
    sections = [f"# {name}", f"The speech encoder `{encoder}` as an ONNX file: {sizes}.", usage]
    return "\n\n".join([*sections, *([head_section(head)] if head else [])]) + "\n"


READABLE = {"labels": "*labels[0]", "symbols": '" ".join("".join(symbols[0]).split())', "phones": "*phones[0]"}
"""What prints the readable result of an utterance, by the name of the output."""


def _facts(described: dict[str, Any]) -> str:
    checked, precision = described["checked"], described["precision"]
    exact = f"differ from PyTorch's by {checked['difference']:.1e} of the largest value at most"
    error = f"have a relative error of {100 * checked['relative_error']:.1f} %"
    facts = [
        f"Precision {precision}, opset {described['opset']}, {described['bytes'] / 1e6:.1f} MB. On noise its outputs "
        + (exact if precision == "float32" else error) + ".",
        f"An utterance has at least {described['shortest_samples']} samples"
        + (f" and at most {described['longest_samples']}." if described["longest_samples"] else "."),
        "Give the waveform as it is; the file normalises it." if described["normalizes_waveforms"] else "",
    ]  # fmt: skip
    return " ".join(filter(None, facts))


_USAGE = """## Use

```python
import numpy as np
import onnxruntime

# 16 kHz, values from -1 to 1; here a second of noise. Shorter items of a batch are padded at the end.
waveforms = 0.1 * np.random.default_rng(0).standard_normal((1, 16000), np.float32)
num_samples = np.array([16000])
session = onnxruntime.InferenceSession("{name}/model.onnx")
{outputs} = session.run(None, {{"waveforms": waveforms, "num_samples": num_samples}})
print({shown})
```

{facts}"""
