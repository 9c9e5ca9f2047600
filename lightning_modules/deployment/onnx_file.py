"""ONNX files of encoders: writing, quantisation to 8 bits, and a check of what was written.

onnx, onnxscript and onnxruntime are optional (``pip install 'interstack[onnx]'``).

Shapes: B batch, T samples.
"""

import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.front_end import noise

MODEL_FILE = "model.onnx"
INPUTS = ("waveforms", "num_samples")
OPSET = 20
"""Default version of ONNX's operators: the first with GELU as one of them."""
OLDEST_OPSET = 18
"""The oldest version that torch's exporter writes."""
MOST_IN_ONE_FILE = 2_000_000_000
"""Bytes of weights; an ONNX file of more than 2 GiB needs a second one for them."""
TOLERANCE = 1e-4
"""Largest difference between ONNX and PyTorch in float32, as a share of an output's largest value (at least 1)."""
CHATTY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnx_ir.passes", "root")


def require(*packages: str) -> None:
    """Refuse with one line if one of these packages of the extra ``onnx`` is not installed."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(f"ONNX needs the package {name}: pip install 'interstack[onnx]'") from error


def require_opset(opset: int) -> None:
    """Refuse a version of ONNX's operators that cannot be written, or that the installed onnx does not know."""
    require("onnx", "onnxscript")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"opset={opset}: choose from {OLDEST_OPSET}, the oldest that torch's exporter writes, to {newest}, the "
            f"newest that onnx {onnx.__version__} knows"
        )


def example() -> tuple[Tensor, Tensor]:
    """A padded batch of noise: waveforms (2, T) and their samples (2,), 1 s and 0.6 s."""
    return torch.cat([noise(), noise().flip(1)]) * 0.1, torch.tensor([16_000, 9_600])


def write_onnx(graph: nn.Module, path: Path, outputs: Sequence[str], opset: int = OPSET) -> None:
    """Write a module of waveforms (B, T) and num_samples (B,) as ONNX, for any B and T.

    Args:
        graph: the module, such as a :class:`DeployedEncoder`; its parameters are stored in the file.
        path: file to write.
        outputs: names of the module's outputs.
        opset: version of ONNX's operators.

    Raises:
        InputError: onnx is not installed, or the version is out of range.
    """
    require_opset(opset)
    free = torch.export.Dim.DYNAMIC
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            example(),
            dynamo=True,
            dynamic_shapes=({0: free, 1: free}, {0: free}),
            input_names=list(INPUTS),
            output_names=list(outputs),
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=weights_bytes(graph) > MOST_IN_ONE_FILE)


def weights_bytes(graph: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in graph.state_dict().values())


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages as they are imported; another distribution, as ``onnxruntime-gpu``, may provide one."""
    return {name: str(importlib.import_module(name).__version__) for name in packages}


@contextmanager
def quietly() -> Iterator[None]:
    """Keep warnings of encoders and exporters, which a user can do nothing about, and their progress to themselves."""
    levels = {name: logging.getLogger(name).level for name in CHATTY_LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def quantise(path: Path) -> None:
    """Make the matrix products of linear layers in an ONNX file int8 in place: weights per channel, inputs as they run.

    Convolutions stay in float32: as int8 they took a quarter less time, and a student's states were wrong by 64 %
    instead of 2 %. Weights are unsigned, since signed ones overflow 16-bit sums on a CPU with AVX2 only.
    """
    require("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, quietly():
        prepared = Path(folder) / MODEL_FILE
        # Symbolic shapes are not needed, and their inference does not know all operators of the exporter.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QUInt8
        )


def name_results(path: Path, name: str, texts: Sequence[str]) -> None:
    """Replace an ONNX file's last output, numbers of texts, by the texts themselves (in place).

    Args:
        path: file of :func:`write_onnx`.
        name: name of the new output.
        texts: the texts, which are stored in the file.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path, load_external_data=False)
    numbers = model.graph.output.pop()
    encoded: Any = [text.encode() for text in texts]
    model.graph.initializer.append(helper.make_tensor("texts", TensorProto.STRING, [len(texts)], encoded))
    model.graph.node.append(helper.make_node("Gather", ["texts", numbers.name], [name]))
    shape = [size.dim_param or size.dim_value for size in numbers.type.tensor_type.shape.dim]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.STRING, shape))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def session(path: Path, threads: int | None = None) -> Any:
    """Open an ONNX file on the CPU with onnxruntime; ``threads=None`` leaves their number to it."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about unused initialisers
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many classes, which derive from nothing more
        if type(error).__module__.startswith("onnxruntime"):
            raise InputError(f"{path} is damaged, or no ONNX file: {str(error).splitlines()[0][:200]}") from error
        raise


def run(opened: Any, waveforms_BT: Tensor, num_samples_B: Tensor) -> list[Tensor]:
    """Run an opened ONNX file on a batch; numbers only, in the order of its outputs."""
    inputs = dict(zip(INPUTS, (waveforms_BT.numpy(), num_samples_B.numpy()), strict=True))
    names = [output.name for output in opened.get_outputs() if output.type != "tensor(string)"]
    return [torch.from_numpy(output) for output in opened.run(names, inputs)]


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two outputs, as a share of the largest value of ``wanted`` (at least 1)."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
