"""A folder with an ONNX file of the form that `interstack latency` measures: one convolution of random weights."""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.files import write_json


def save_onnx(
    folder: Path, meta: dict[str, Any] | None = None, output: str = "last_hidden_state", width: int = 8
) -> Path:
    """Write ``model.onnx`` with the output of that name, and ``interstack.json`` if there is ``meta``."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((width, 1, 400)).astype(np.float32)
    constants = {
        "weights": weights,
        "channel": np.array([1]),
        "state": np.array([0]),
        **{f"number_{number}": np.array(number) for number in (400, 320, 1)},
    }
    stacked = output == "hidden_states"
    nodes = [
        helper.make_node("Unsqueeze", ["waveforms", "channel"], ["wave_B1T"]),
        helper.make_node("Conv", ["wave_B1T", "weights"], ["features_BDF"], strides=[320]),
        helper.make_node("Transpose", ["features_BDF"], ["state_BFD"], perm=[0, 2, 1]),
        helper.make_node("Unsqueeze", ["state_BFD", "state"], [output]) if stacked
        else helper.make_node("Identity", ["state_BFD"], [output]),
        helper.make_node("Sub", ["num_samples", "number_400"], ["beyond"]),
        helper.make_node("Div", ["beyond", "number_320"], ["windows"]),
        helper.make_node("Add", ["windows", "number_1"], ["num_frames"]),
    ]  # fmt: skip
    shape: list[Any] = [*([1] if stacked else []), "B", "F", width]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("waveforms", TensorProto.FLOAT, ["B", "T"]),
            helper.make_tensor_value_info("num_samples", TensorProto.INT64, ["B"]),
        ],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("num_frames", TensorProto.INT64, ["B"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    if meta is not None:
        write_json(folder / "interstack.json", meta)
    return folder
