"""The strategy seam: what Lightning must still be, dropping and rebuilding the wrapper, checksums, refusals."""

import ast
import gc
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from callbacks import ddp
from callbacks.stacking import StackingCallback
from datamodules.errors import InputError
from tests.helpers import POLICY_STAGES, make_module, make_stacking, make_trainer, save_teacher

# -- version guard ----------------------------------------------------------------------------------------------------


def test_another_lightning_is_refused() -> None:
    ddp.require_lightning("2.6.6")
    with pytest.raises(InputError, match=r"lightning 2\.7\.0 is installed.*<2\.7"):
        ddp.require_lightning("2.7.0")


CONFIGURE_DDP = """
def configure_ddp(self) -> None:
    log.debug(f"{self.__class__.__name__}: configuring DistributedDataParallel")
    assert isinstance(self.model, pl.LightningModule)
    self.model = self._setup_model(self.model)
    self._register_ddp_hooks()
"""
SETUP_MODEL = """
@override
def _setup_model(self, model: Module) -> DistributedDataParallel:
    device_ids = self.determine_ddp_device_ids()
    log.debug(f"setting up DDP model with device ids: {device_ids}, kwargs: {self._ddp_kwargs}")
    ctx = torch.cuda.stream(torch.cuda.Stream()) if device_ids is not None else nullcontext()
    with ctx:
        return DistributedDataParallel(module=model, device_ids=device_ids, **self._ddp_kwargs)
"""
MODEL_GETTER = """
@property
def model(self) -> Optional[Module]:
    return self._model if self._model is not None else self._lightning_module
"""
MODEL_SETTER = """
@model.setter
def model(self, new_model: Optional[Module]) -> None:
    self._model = new_model
"""


def normalised(source: str) -> str:
    """Code without comments, layout and docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


def lightning_functions(strategy: type[Strategy] = DDPStrategy) -> list[tuple[Callable[..., Any], str]]:
    model = inspect.getattr_static(strategy, "model")
    assert isinstance(model, property)
    assert model.fget is not None
    assert model.fset is not None
    return [
        (strategy.configure_ddp, CONFIGURE_DDP),  # type: ignore[attr-defined]
        (strategy._setup_model, SETUP_MODEL),  # type: ignore[attr-defined]
        (model.fget, MODEL_GETTER),
        (model.fset, MODEL_SETTER),
    ]


def test_lightning_is_what_this_was_checked_against() -> None:
    for function, expected in lightning_functions():
        assert normalised(inspect.getsource(function)) == normalised(expected), (
            f"{L.__name__} {L.__version__} has changed {function.__qualname__}: check callbacks/ddp.py against it"
        )


def test_the_guard_sees_a_change() -> None:
    class Other(DDPStrategy):
        def configure_ddp(self) -> None:
            self.model = self._setup_model(self.model)

        def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
            return DistributedDataParallel(model, device_ids=[self.root_device.index])

        @property
        def model(self) -> nn.Module | None:
            return self._model

        @model.setter
        def model(self, new_model: nn.Module | None) -> None:
            self._model = self._wrapped = new_model

    for function, expected in lightning_functions(Other):
        assert normalised(inspect.getsource(function)) != normalised(expected)


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", *POLICY_STAGES])
def test_ddp_moves_no_inputs_to_a_gpu(policy: str, tmp_path: Path) -> None:
    """Lengths stay on the host; on a CPU, DDP never moves anything."""
    trainer = make_trainer(tmp_path, strategy=DDPStrategy())
    trainer.strategy.parallel_devices = [torch.device("cuda", 0)]
    assert trainer.strategy.determine_ddp_device_ids() == [0]
    stacking = StackingCallback("none") if policy == "none" else make_stacking(policy)
    stacking.setup(trainer, make_module(save_teacher(tmp_path / "teacher")), "fit")
    assert trainer.strategy.determine_ddp_device_ids() is None


def test_another_strategy_is_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    ddp.leave_inputs(trainer)
    assert vars(trainer.strategy).get("determine_ddp_device_ids") is None


# -- the wrapper ------------------------------------------------------------------------------------------------------


class Two(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


@pytest.fixture
def trainer() -> Iterator[Any]:
    """Of one process in a group of its own, with a real strategy."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    strategy = DDPStrategy(
        accelerator=CPUAccelerator(),
        parallel_devices=[torch.device("cpu")],
        cluster_environment=LightningEnvironment(),
    )
    yield SimpleNamespace(strategy=strategy, world_size=1, current_epoch=3)
    torch.distributed.destroy_process_group()


def wrapped(trainer: Any) -> Two:
    module = Two()
    ddp.unwrap(trainer, module)
    ddp.rewrap(trainer)
    return module


def test_unwrap_kills_the_wrapper_and_rewrap_makes_another(trainer: Any) -> None:
    module = wrapped(trainer)
    old = weakref.ref(trainer.strategy.model)
    assert isinstance(old(), DistributedDataParallel)
    gc.disable()  # it must die by itself: a growth calls no collector
    try:
        ddp.unwrap(trainer, module)
        assert old() is None
    finally:
        gc.enable()
    assert trainer.strategy.model is module
    ddp.rewrap(trainer)
    assert isinstance(trainer.strategy.model, DistributedDataParallel)
    assert trainer.strategy.model.module is module


def test_the_new_wrapper_reduces_new_parameters(trainer: Any) -> None:
    def reduced(grow_inside: bool) -> int:
        """Parameters that the reducer knows of, after one layer was added."""
        module = wrapped(trainer)
        if grow_inside:
            module.layers.append(nn.Linear(3, 3))
        else:
            ddp.unwrap(trainer, module)
            module.layers.append(nn.Linear(3, 3))
            ddp.rewrap(trainer)
        trainer.strategy.model(torch.ones(1, 3)).sum().backward()
        return trainer.strategy.model._get_ddp_logging_data()["num_parameter_tensors"]

    assert reduced(grow_inside=False) == 6
    assert reduced(grow_inside=True) == 4  # control: the old wrapper runs, and leaves the new layer out


def test_rewrap_wants_an_unwrapped_model(trainer: Any) -> None:
    wrapped(trainer)
    with pytest.raises(AssertionError):
        ddp.rewrap(trainer)


def test_one_device_needs_no_wrapper() -> None:
    strategy = SingleDeviceStrategy(torch.device("cpu"), CPUAccelerator())
    alone = SimpleNamespace(strategy=strategy, world_size=1)
    module = Two()
    ddp.unwrap(alone, module)
    ddp.rewrap(alone)
    assert alone.strategy.model is module


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "cannot grow a model under FSDPStrategy: use a single device or trainer.strategy=ddp"),
        (DDPStrategy(static_graph=True), "static_graph=True cannot follow a growing model"),
        (DDPStrategy(ddp_comm_state=object(), ddp_comm_hook=noop_hook), "ddp_comm_state holds tensors of"),
        (DDPStrategy(find_unused_parameters=True), "find_unused_parameters=True would hide a layer .*strategy=ddp"),
    ],
)
def test_what_cannot_follow_a_growth_is_refused(strategy: Strategy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddp.require_supported(SimpleNamespace(strategy=strategy))


@pytest.mark.parametrize(
    "strategy", [DDPStrategy(), DDPStrategy(ddp_comm_hook=noop_hook), SingleDeviceStrategy(torch.device("cpu"))]
)
def test_ddp_and_single_devices_are_supported(strategy: Strategy) -> None:
    ddp.require_supported(SimpleNamespace(strategy=strategy))


# -- checksums --------------------------------------------------------------------------------------------------------


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def test_equal_states_have_equal_checksums() -> None:
    first = ddp.checksum(*stepped())
    assert first.shape == (4,)
    assert first.dtype == torch.int64
    assert torch.equal(first, ddp.checksum(*stepped()))


def flip(tensor: Tensor) -> None:
    """Change the lowest bit of the first number."""
    tensor.data.view(-1)[:1].view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize("part", ["weight", "buffer", "exp_avg", "exp_avg_sq", "step"])
def test_a_single_bit_anywhere_changes_the_checksum(part: str) -> None:
    module, optimizer = stepped()
    before = ddp.checksum(module, optimizer)
    weight = module[0].weight
    known = {"weight": weight, "buffer": module[1].running_mean}
    flip(known[part] if part in known else optimizer.state[weight][part])
    assert not torch.equal(ddp.checksum(module, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_format_has_a_checksum(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 3).to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = ddp.checksum(module, optimizer)
    flip(module.weight)
    assert not torch.equal(ddp.checksum(module, optimizer), before)


def gathering(others: list[Tensor]) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda own: torch.stack([own, *others]))
    return SimpleNamespace(strategy=strategy, world_size=1 + len(others), current_epoch=3)


def test_ranks_that_differ_are_named() -> None:
    module, optimizer = stepped()
    same = ddp.checksum(module, optimizer)
    ddp.verify_ranks(gathering([same, same]), module, optimizer)
    with pytest.raises(InputError, match=r"growth at epoch 3 ranks \[2\] hold other parameters"):
        ddp.verify_ranks(gathering([same, same + 1]), module, optimizer)


def test_one_process_has_nothing_to_compare() -> None:
    ddp.verify_ranks(gathering([]), *stepped())
