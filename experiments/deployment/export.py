"""``interstack export``: write a student as a Hugging Face folder, or any encoder as an ONNX file."""

import logging
from functools import partial
from typing import Literal

from datamodules.errors import InputError
from experiments.deployment.trained_head import read_head
from lightning_modules.deployment.classifier import attached
from lightning_modules.deployment.encoder import States
from lightning_modules.deployment.onnx_export import Quantize, export_onnx
from lightning_modules.deployment.onnx_file import OPSET
from lightning_modules.export import Dtype, export_student

logger = logging.getLogger(__name__)


def export(
    checkpoint: str,
    output: str,
    overwrite: bool = False,
    format: Literal["huggingface", "onnx"] = "huggingface",
    layers: int | None = None,
    dtype: Dtype = "float32",
    states: States = "last",
    quantize: Quantize = "none",
    opset: int = OPSET,
    head: str | None = None,
) -> None:
    """Write a student, or for ONNX any encoder, as a folder with a model card.

    Args:
        checkpoint: training checkpoint of any depth, run folder or exported folder; for ONNX also the name or folder of
            a Hugging Face encoder, such as facebook/hubert-base-ls960.
        output: folder to write.
        overwrite: replace an earlier export in the output folder.
        format: files for transformers, or one file for onnxruntime.
        layers: keep only this many layers from the first on; default: all.
        dtype: type of the weights in a folder for transformers.
        states: hidden states that an ONNX file returns, the last one or all.
        quantize: int8 writes the linear layers of an ONNX file in 8 bits.
        opset: version of ONNX's operators.
        head: folder of one finished run of interstack superb on this encoder, whose head then gives labels or text in
            place of hidden states; default: no head.
    """
    _refuse_mixed(format, dtype, states, quantize, opset)
    if head is not None and states != "last":
        raise InputError("--states and --head exclude each other: a head returns its results in place of hidden states")
    trained = None if head is None else read_head(head)
    if format == "onnx":
        described = export_onnx(checkpoint, output, overwrite, states, quantize, layers, opset, trained)
        message = "exported %d layers, %d parameters to %s: %.1f MB in %s; on noise a relative error of %.1e"
        sizes = described["layers"], described["parameters"], output, described["bytes"] / 1e6
        logger.info(message, *sizes, described["precision"], described["checked"]["relative_error"])
        return
    attach = None if trained is None else partial(attached, trained=trained)
    student = export_student(checkpoint, output, overwrite, layers, dtype, attach)
    message = "exported %d layers, %d parameters to %s"
    logger.info(message, student.model.config.num_hidden_layers, student.model.num_parameters(), output)


def _refuse_mixed(format: str, dtype: str, states: str, quantize: str, opset: int) -> None:
    """Refuse an option that the chosen format would ignore."""
    if format == "onnx" and dtype != "float32":
        raise InputError(f"--dtype {dtype} is for --format huggingface; an ONNX file is float32, or --quantize int8")
    given = {"states": states != "last", "quantize": quantize != "none", "opset": opset != OPSET}
    if format == "huggingface" and (ignored := [f"--{name}" for name, is_given in given.items() if is_given]):
        raise InputError(f"{', '.join(ignored)}: only for --format onnx")
