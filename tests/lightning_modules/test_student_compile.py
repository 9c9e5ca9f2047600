"""Regional compilation: one graph for all layers, none added by a growth, no layer bound to another's weights."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from callbacks.ema import StudentEMA
from lightning_modules import compiling, dropout
from lightning_modules.front_end import FrontEnd
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig
from tests.helpers import make_data, make_module, make_stacking, make_trainer, save_corpus, save_teacher
from tests.lightning_modules.graphs import TORCH_WARNINGS, Graphs

pytestmark = TORCH_WARNINGS

# Eager and compiled hidden states (standard deviation 1) differ by 1e-6 at most with aot_eager; inductor fuses sums.
TOLERANCE = {"counting": 5e-6, "inductor": 5e-5}


@pytest.fixture(scope="module")
def front_end() -> FrontEnd:
    layout = {"conv_dim": [8] * 7, "feat_extract_norm": "group", "conv_bias": False}
    student = Student(StudentConfig(32, 48, 2, 1, front_end_init="random"))
    config = copy.deepcopy(student.hubert.config)
    config.update(layout)
    extractor = type(student.hubert.feature_extractor)(config)
    return FrontEnd(layout, extractor.state_dict())


def build(front_end: FrontEnd, depth: int = 6, backend: str | None = "counting", dropout: float = 0.0) -> Student:
    torch.manual_seed(0)
    compiled = {} if backend is None else {"compile": True, "compile_backend": backend}
    return Student(StudentConfig(32, 48, 2, depth, dropout, **compiled), front_end)


def train(student: Student, samples: int = 4000, batch: int = 4, padded: bool = False) -> Tensor:
    """Output and backward pass on a fixed batch in train mode."""
    torch.manual_seed(1)
    waveforms = torch.randn(batch, samples)
    num_samples = torch.linspace(samples, samples // 2, batch).long() if padded else None
    output = student.train()(waveforms, num_samples)[-1]
    student.zero_grad()
    output.square().mean().backward()
    return output.detach()


@torch.no_grad()
def evaluate(student: Student, samples: int = 4000, batch: int = 4) -> Tensor:
    torch.manual_seed(2)
    return student.eval()(torch.randn(batch, samples))[-1]


@pytest.mark.slow  # a fit that grows, below, counts the same at every depth
def test_growth_adds_no_recompilation(graphs: Graphs, front_end: FrontEnd) -> None:
    student = build(front_end, dropout=0.1)
    student.start_at(1)
    train(student)
    # Front end, projection, positional convolution, and one that all layers of a depth share, and so do all depths.
    assert graphs.count == 4
    student.grow([0, 0])
    train(student)
    student.grow([0, 1, 1, 0], "zero_output")
    train(student)
    student.grow([0, 1, 2, 3, None, None], "fresh", seed=1)
    train(student)
    assert all(layer._compiled_call_impl is not None for layer in student.hubert.encoder.layers)
    assert student.hubert.feature_extractor._compiled_call_impl is not None
    assert graphs.count == counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    for samples in (5000, 6000):
        train(student, samples)
    assert graphs.count == 4
    # Control: the count does move, once for evaluation (no dropout, no gradient), of each of the four.
    for samples in (5000, 6000, 4000):
        evaluate(student, samples)
        train(student, samples)
    assert graphs.count == 8
    assert not counters["graph_break"]


@pytest.mark.slow
def test_padding_and_an_odd_batch_stay_within_dynamos_limit(
    graphs: Graphs, front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "RECOMPILE_LIMIT", 8)  # torch's own
    student = build(front_end, depth=3)
    student.start_at(1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for samples in (4000, 5000, 6000):
            for padded in (False, True):
                train(student, samples, padded=padded)
            evaluate(student, samples)
        evaluate(student, 6000, batch=3)  # the last validation batch
        before = graphs.count
        student.grow([0, None, 0], "fresh")
        train(student, 5000)
        train(student, 6000, padded=True)
        evaluate(student, 5000)
        assert graphs.count == before
        assert not counters["graph_break"]
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            change_the_activation(student)


def change_the_activation(student: Student) -> None:
    """For a control: each kind of module is a recompilation, until dynamo refuses."""
    for number in range(9):
        activation = type(f"Activation{number}", (nn.GELU,), {})
        student.hubert.encoder.layers[0].feed_forward.intermediate_act_fn = activation()
        train(student)


@pytest.mark.ci
def test_neither_a_layer_nor_the_front_end_has_a_graph_break(graphs: Graphs, front_end: FrontEnd) -> None:
    student = build(front_end).train()
    hidden_BFD, waveforms_BT = torch.randn(2, 12, 32), torch.randn(2, 4000)
    parts: list[tuple[nn.Module, Tensor, nn.Module]] = [
        (student.hubert.encoder.layers[0], hidden_BFD, student.hubert.encoder.layers[0].feed_forward),
        (student.hubert.feature_extractor, waveforms_BT, student.hubert.feature_extractor.conv_layers[3]),
    ]
    for part, inputs, inner in parts:
        assert torch._dynamo.explain(part)(inputs).graph_break_count == 0
        torch._dynamo.reset()
        inner.register_forward_hook(lambda *_: torch._dynamo.graph_break())  # control: the count sees a break
        assert torch._dynamo.explain(part)(inputs).graph_break_count > 0


@pytest.mark.slow  # a fit that grows, below, has the losses of an eager one
@pytest.mark.parametrize("backend", ["counting", "inductor"])
def test_compiled_and_eager_agree_through_growths(backend: str, graphs: Graphs, front_end: FrontEnd) -> None:
    eager, compiled = build(front_end, backend=None), build(front_end, backend=backend)
    for student in (eager, compiled):
        student.start_at(2)
    for plan in ([0, 0, 1, 1], [0, 1, 2, 3, None, None]):
        for padded in (False, True):
            difference = (train(eager, padded=padded) - train(compiled, padded=padded)).abs().max()
            assert difference < TOLERANCE[backend]
            gradients = zip(eager.parameters(), compiled.parameters(), strict=True)
            assert all((a.grad - b.grad).abs().max() < TOLERANCE[backend] for a, b in gradients)
        assert (evaluate(eager) - evaluate(compiled)).abs().max() < TOLERANCE[backend]
        for student in (eager, compiled):
            student.grow(plan, "fresh" if None in plan else "copy", seed=3)
    # Control: another layer order, with the same weights, is well outside the tolerance.
    layers = list(compiled.hubert.encoder.layers)
    compiled.hubert.encoder.layers = nn.ModuleList([*layers[1:], layers[0]])
    assert (evaluate(eager) - evaluate(compiled)).abs().max() > 20 * TOLERANCE[backend]


@pytest.mark.slow
def test_dropout_is_drawn_in_training_only(graphs: Graphs, front_end: FrontEnd) -> None:
    student = build(front_end, depth=2, dropout=0.3)
    quiet = build(front_end, depth=2, dropout=0.0)
    assert (train(student) - train(quiet)).abs().max() > 0.01
    assert (evaluate(student) - evaluate(quiet)).abs().max() < TOLERANCE["counting"]
    assert (train(student) - train(quiet)).abs().max() > 0.01


@pytest.mark.slow
def test_on_a_cpu_inductor_draws_the_dropout_of_an_eager_run(
    graphs: Graphs, front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, compiled = (build(front_end, depth=2, backend=backend, dropout=0.3) for backend in (None, "inductor"))
    eagerly = train(eager)
    assert (eagerly - train(compiled)).abs().max() < TOLERANCE["inductor"]
    monkeypatch.setattr(dropout, "draws_here", lambda *_: False)  # control: inductor's own numbers
    assert (eagerly - train(build(front_end, depth=2, backend="inductor", dropout=0.3))).abs().max() > 0.01


@pytest.mark.slow
def test_a_copy_is_not_bound_to_its_source(graphs: Graphs, front_end: FrontEnd) -> None:
    student = build(front_end)
    student.start_at(1)
    train(student)
    student.grow([0, 0])
    train(student)
    assert all(parameter.grad is not None for parameter in student.parameters())
    source, clone = student.hubert.encoder.layers
    assert moves_with(source, clone) == (True, False)

    # Control, the trap: a compiled `forward` is an attribute, and its copy is still bound to the first layer.
    trapped = build(front_end, backend=None).hubert.encoder.layers[0]
    trapped.forward = torch.compile(trapped.forward, backend="counting")
    assert moves_with(trapped, copy.deepcopy(trapped)) == (True, True)


@torch.no_grad()
def moves_with(source: nn.Module, clone: nn.Module) -> tuple[bool, bool]:
    """Whether the outputs of ``source`` and ``clone`` change when the weights of ``source`` do."""
    hidden_BFD = torch.randn(2, 12, 32)
    source.eval()
    clone.eval()
    before = source(hidden_BFD), clone(hidden_BFD)
    source.attention.out_proj.weight.add_(torch.randn(32, 32))
    after = source(hidden_BFD), clone(hidden_BFD)
    return not torch.equal(before[0], after[0]), not torch.equal(before[1], after[1])


@pytest.mark.slow  # test_student_kinds.py loads an eager student's weights into a compiled one
@pytest.mark.parametrize("saved", [2, 6])
def test_state_dicts_are_clean_and_loaded_layers_are_compiled(saved: int, graphs: Graphs, front_end: FrontEnd) -> None:
    student = build(front_end, depth=saved)
    train(student)
    eager = build(front_end, depth=4, backend=None)
    eager.load_state_dict(student.state_dict())  # strict: the names are those of an eager student
    assert eager.depth == saved
    loaded = build(front_end, depth=4)
    train(loaded)
    loaded.load_state_dict(student.state_dict())
    assert (evaluate(loaded) - evaluate(eager)).abs().max() < TOLERANCE["counting"]
    assert all(layer._compiled_call_impl is not None for layer in loaded.hubert.encoder.layers)
    assert all(layer._compiled_call_impl is None for layer in eager.hubert.encoder.layers)


@pytest.mark.slow
def test_a_deep_copy_compiles_again(graphs: Graphs, front_end: FrontEnd) -> None:
    student = build(front_end, depth=2)
    train(student)
    twin = copy.deepcopy(student)
    assert torch.equal(train(twin), train(student))
    assert all(layer._compiled_call_impl is not None for layer in twin.hubert.encoder.layers)
    assert graphs.count == 4


@pytest.mark.ci
@pytest.mark.parametrize(("validations", "kinds"), [pytest.param(0, 1, marks=pytest.mark.slow), (1, 2)])
def test_a_fit_that_grows_has_the_losses_of_an_eager_one(
    validations: int, kinds: int, graphs: Graphs, tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    corpus = save_corpus(tmp_path / "corpus", {"train": 12, "dev": 4})
    losses: dict[bool, list[float]] = {True: [], False: []}
    counted: dict[int, int] = {}
    first: list[int] = []
    stacking = {compiled: make_stacking() for compiled in losses}

    class Look(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            losses[pl_module.student.config.compile].append(float(outputs["loss"]))
            first.append(graphs.count)

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if pl_module.student.config.compile:
                counted[pl_module.student.depth] = graphs.count

    for compiled in (False, True):
        module = make_module(teacher, dropout=0.0, compile=compiled, compile_backend="counting")
        trainer = make_trainer(tmp_path, stacking[compiled], StudentEMA(0.9), Look(), limit_val_batches=validations)
        trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    assert len(losses[True]) == 12
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] != losses[True][-2]
    assert list(counted) == [1, 2, 3, 4]
    # Of each part: for training, and for validation; none for growths, nor for the loss measured at them.
    assert set(counted.values()) == {5 * kinds}
    assert first[11:13] == [0, 5]  # control: the count moves, from the eager run to the first compiled step
