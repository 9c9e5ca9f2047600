"""Learning rates as functions of the step; optimizer state over a growth and a resume."""

import copy

import pytest
import torch
from torch import nn

from lightning_modules import optimisation
from lightning_modules.optimisation import (
    OptimizerConfig,
    build_optimizer,
    carry_state,
    learning_rate_factor,
    parameter_groups,
    rebind,
)


def factors(total: int = 100, growth: tuple[int, ...] = (), rewarm: int = 0, **settings: object) -> list[float]:
    config = OptimizerConfig(**settings)
    return [learning_rate_factor(step, total, config, growth, rewarm) for step in range(total)]


def test_linear_schedule_is_its_formula() -> None:
    values = factors()
    assert values[:7] == pytest.approx([(step + 1) / 7 for step in range(7)])
    assert values[7:] == pytest.approx([1 - step / 93 for step in range(93)])


def test_cosine_and_constant_and_wsd() -> None:
    cosine = factors(schedule="cosine", warmup_fraction=0.0)
    assert cosine[0] == pytest.approx(1.0)
    assert cosine[50] == pytest.approx(0.5)
    assert set(factors(schedule="constant", warmup_fraction=0.0)) == {1.0}
    wsd = factors(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    assert set(wsd[10:80]) == {1.0}
    assert wsd[90] == pytest.approx(0.5)
    assert wsd[99] == pytest.approx(0.05)


def test_rewarm_dips_after_a_growth_only() -> None:
    plain, rewarmed = factors(), factors(growth=(50,), rewarm=10)
    assert rewarmed[:50] == plain[:50]
    assert rewarmed[60:] == plain[60:]
    assert rewarmed[50] == pytest.approx(plain[50] / 10)
    assert rewarmed[54] == pytest.approx(plain[54] / 2)


def test_fractions_are_checked() -> None:
    with pytest.raises(ValueError, match=r"warmup_fraction=1.5"):
        OptimizerConfig(warmup_fraction=1.5)


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def groups(net: Net) -> list[dict]:
    return parameter_groups([("net", net)], 0.1)


def step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(3)
    optimizer.zero_grad()
    net(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


def test_groups_split_matrices_from_the_rest_in_canonical_order() -> None:
    decay, no_decay = groups(Net(2))
    assert [name for name, _ in decay["params"]] == ["net.layers.0.weight", "net.layers.1.weight", "net.head.weight"]
    assert [name for name, _ in no_decay["params"]] == ["net.layers.0.bias", "net.layers.1.bias", "net.head.bias"]
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def grown(setting: str) -> tuple[Net, torch.optim.Optimizer, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    net = Net(1)
    optimizer = build_optimizer(groups(net), OptimizerConfig())
    step(net, optimizer)
    source, clone = net.layers[0], copy.deepcopy(net.layers[0])
    net.layers = nn.ModuleList([source, clone])
    carry_state(optimizer, dict(zip(clone.parameters(), source.parameters(), strict=True)), setting)
    rebind(optimizer, groups(net))
    return net, optimizer, source, clone


def test_optimizer_state_settings() -> None:
    _, optimizer, source, clone = grown("copy")
    assert torch.equal(optimizer.state[clone.weight]["exp_avg"], optimizer.state[source.weight]["exp_avg"])
    assert optimizer.state[clone.weight]["exp_avg"] is not optimizer.state[source.weight]["exp_avg"]
    _, optimizer, source, clone = grown("zero")
    assert source.weight in optimizer.state
    assert clone.weight not in optimizer.state
    _, optimizer, source, clone = grown("reset")
    assert not optimizer.state


@pytest.mark.parametrize("setting", ["copy", "zero", "reset"])
def test_a_grown_optimizer_trains_and_reloads(setting: str) -> None:
    net, optimizer, _, _ = grown(setting)
    step(net, optimizer)
    torch.manual_seed(9)
    twin = Net(2)
    twin.load_state_dict(net.state_dict())
    reloaded = build_optimizer(groups(twin), OptimizerConfig())
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(net, optimizer)
        step(twin, reloaded)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_appending_parameters_instead_would_swap_moments_and_is_refused() -> None:
    net, optimizer, _, _ = grown("copy")
    saved = copy.deepcopy(optimizer.state_dict())
    order = saved["param_groups"][0]["param_names"]
    order.append(order.pop(1))  # what `params += new` would have stored
    with pytest.raises(ValueError, match="only their order"):
        build_optimizer(groups(net), OptimizerConfig()).load_state_dict(saved)


@pytest.mark.parametrize(("saved", "own"), [("foreach", "fused"), ("fused", "foreach"), ("auto", "fused")])
def test_the_implementation_is_the_runs_and_not_the_checkpoints(saved: str, own: str) -> None:
    net = Net(2)
    first = build_optimizer(groups(net), OptimizerConfig(implementation=saved))
    step(net, first)
    state = copy.deepcopy(first.state_dict())
    twin = build_optimizer(groups(net), OptimizerConfig(implementation=own))
    wanted = [(group["foreach"], group["fused"]) for group in twin.param_groups]
    twin.load_state_dict(state)
    assert [(group["foreach"], group["fused"]) for group in twin.param_groups] == wanted
    assert all(twin.state[p]["exp_avg"].equal(first.state[p]["exp_avg"]) for p in net.parameters())
    step(net, twin)
    # Control: torch's own takes the checkpoint's.
    plain = torch.optim.AdamW(groups(net), **{own: True})
    plain.load_state_dict(state)
    assert [(group["foreach"], group["fused"]) for group in plain.param_groups] != wanted


@pytest.mark.parametrize(("own", "device"), [("fused", "meta"), ("foreach", "cpu")])
def test_step_counts_lie_where_the_implementation_wants_them(own: str, device: str) -> None:
    """As between a CPU and a GPU: the parameters of the run that goes on lie on another device, here ``meta``."""
    net = Net(1)
    first = build_optimizer(groups(net), OptimizerConfig(implementation="foreach" if own == "fused" else "fused"))
    step(net, first)
    moved = Net(1).to("meta")
    twin = torch.optim.AdamW(groups(moved), foreach=True)
    for group in twin.param_groups:
        group["foreach"], group["fused"] = own == "foreach", own == "fused"  # torch refuses to make a fused one there
    twin.register_load_state_dict_pre_hook(optimisation._keep_settings)
    twin.load_state_dict(first.state_dict())
    assert {twin.state[p]["step"].device.type for p in moved.parameters()} == {device}
    assert {twin.state[p]["exp_avg"].device.type for p in moved.parameters()} == {"meta"}


def test_another_number_of_groups_is_torchs_own_error() -> None:
    net = Net(1)
    optimizer = build_optimizer(groups(net), OptimizerConfig())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        build_optimizer(groups(net), OptimizerConfig()).load_state_dict(saved)


def test_rebind_refuses_lost_parameters() -> None:
    net = Net(2)
    optimizer = build_optimizer(groups(net), OptimizerConfig())
    net.layers = nn.ModuleList([net.layers[0]])
    with pytest.raises(RuntimeError, match="lost parameters"):
        rebind(optimizer, groups(net))


def test_weight_decay_and_sgd() -> None:
    net = Net(1)
    optimizer = build_optimizer(groups(net), OptimizerConfig(name="sgd", betas=(0.8, 0.9)))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.8
