"""A compiled teacher: its targets, how many graphs it needs, and that nothing of it breaks a graph."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import make_module
from tests.lightning_modules.graphs import TORCH_WARNINGS, Graphs
from tests.lightning_modules.teachers import FAMILIES, LAYERS, PADDED, padded_waveforms, waveforms
from tests.lightning_modules.test_distillation import make_batch

pytestmark = [*TORCH_WARNINGS, pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")]


def teachers(folder: Path, backend: str = "counting", **settings: Any) -> tuple[HuggingFaceTeacher, HuggingFaceTeacher]:
    """An eager one and a compiled one."""
    eager = HuggingFaceTeacher(str(folder), **settings)
    compiled = HuggingFaceTeacher(str(folder), compile=True, compile_backend=backend, **settings)
    for teacher in (eager, compiled):
        teacher.select_layers([2], None)
        teacher.prepare(torch.device("cpu"))
    return eager, compiled


def difference(
    one: HuggingFaceTeacher, two: HuggingFaceTeacher, inputs_BT: Tensor, lengths: Tensor | None = None
) -> float:
    expected = two(inputs_BT, lengths).named()
    targets = one(inputs_BT, lengths).named()
    return max(float((targets[name] - value).abs().max()) for name, value in expected.items())


@pytest.mark.ci
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f == "hubert" else [pytest.mark.slow]) for f in FAMILIES],
)
def test_targets_equal_the_eager_ones_and_no_graph_breaks(
    family: str, folders: dict[str, Path], graphs: Graphs
) -> None:
    eager, compiled = teachers(folders[family])
    assert difference(compiled, eager, waveforms()) < 1e-4
    assert difference(compiled, eager, padded_waveforms(), PADDED) < 1e-4
    assert all(layer._compiled_call_impl is not None for layer in compiled.model.encoder.layers)
    assert graphs.count > 0
    assert not counters["graph_break"]
    other = compiled(waveforms()).hidden[2]  # control: another layer, or audio, is well outside the tolerance
    assert float((other - eager(waveforms().flip(0)).hidden[2]).abs().max()) > 0.01


@pytest.mark.ci
def test_one_graph_serves_all_layers_and_all_lengths(folders: dict[str, Path], graphs: Graphs) -> None:
    _, compiled = teachers(folders["hubert"])
    compiled(waveforms())
    # Convolutions, feature projection, positional convolution, and the layers.
    assert graphs.count == counters["stats"]["unique_graphs"] == 4
    for num_samples in (9000, 10_000, 8000, 12_000):
        compiled(waveforms(num_samples=num_samples))
    assert torch.equal(copy.deepcopy(compiled)(waveforms()).output_BFD, compiled(waveforms()).output_BFD)
    assert graphs.count == 4
    compiled(padded_waveforms(), PADDED)  # control: a mask is another kind of input, to the layers
    assert graphs.count == 5


@pytest.mark.ci
def test_what_stays_behind_is_the_teacher_itself(folders: dict[str, Path], graphs: Graphs) -> None:
    eager, compiled = teachers(folders["hubert"])
    compiled(waveforms())
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert len(compiled.model.encoder.layers) == LAYERS
    assert type(compiled.model.encoder.layers[0]) is type(eager.model.encoder.layers[0])
    assert compiled.spec()["init_args"]["compile"] is True


@pytest.mark.ci
def test_bf16_and_compilation_go_together(tmp_path: Path, folders: dict[str, Path], graphs: Graphs) -> None:
    eager, compiled = teachers(folders["hubert"], precision="bf16")
    assert eager.precision_used == compiled.precision_used
    assert graphs.count == 0  # the check of bf16 compiles nothing
    assert difference(compiled, eager, waveforms()) < 0.1
    assert graphs.count == 4


@pytest.mark.slow
def test_with_inductor(folders: dict[str, Path], graphs: Graphs) -> None:
    eager, compiled = teachers(folders["hubert"], "inductor")
    for num_samples in (8000, 9000, 10_000):
        assert difference(compiled, eager, waveforms(num_samples=num_samples)) < 1e-3


@pytest.mark.slow
def test_a_compiled_teacher_and_student_train_as_eager_ones(folders: dict[str, Path], graphs: Graphs) -> None:
    losses = []
    for compiled in (False, True):
        settings = {"compile": compiled, "compile_backend": "counting"}
        module = make_module(folders["hubert"], 1, dropout=0.0, teacher_settings=settings, **settings)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for lengths in ([8000] * 2, [9000] * 2, [8000, 5000]):
                for training in (True, False):
                    module.train(training)
                    with torch.set_grad_enabled(training):
                        losses.append(float(module.losses(make_batch(lengths)).total.detach()))
    assert losses[6:] == pytest.approx(losses[:6], rel=1e-4)
    assert graphs.count > 0
    assert len({round(loss, 3) for loss in losses[:6]}) > 2  # control
