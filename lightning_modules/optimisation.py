"""Optimizer, parameter groups, learning-rate schedules, and the transfer of optimizer state over a growth.

Everything here is a pure function of its arguments, except :func:`rebind`, which edits an optimizer in place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from datamodules.errors import InputError

ParameterGroups = list[dict[str, Any]]
OptimizerState = Literal["copy", "zero", "reset"]


@dataclass
class OptimizerConfig:
    """Optimizer and learning-rate schedule; the defaults are the paper's, or ours where it does not state a value.

    Args:
        name: ``adamw``, or ``sgd`` (momentum ``betas[0]``).
        lr: peak learning rate.
        weight_decay: weight decay of matrices and convolution kernels; biases and norms have none.
        betas: AdamW's two decay rates (not stated in the paper).
        eps: AdamW's epsilon (not stated in the paper).
        implementation: ``foreach``, ``fused``, or ``auto`` (fused on CUDA, else torch's default).
        schedule: ``linear`` decay to zero, ``cosine``, ``wsd`` (warm-up, stable, linear decay) or ``constant``.
        warmup_fraction: share of all steps with a rising learning rate.
        decay_fraction: share of all steps in which ``wsd`` lowers the learning rate.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    implementation: Literal["auto", "foreach", "fused"] = "auto"
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    warmup_fraction: float = 0.07
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_fraction <= 1 or not 0 <= self.decay_fraction <= 1:
            raise InputError(
                f"model.optimizer.warmup_fraction={self.warmup_fraction} and model.optimizer.decay_fraction="
                f"{self.decay_fraction} must lie between 0 and 1"
            )


def learning_rate_factor(
    step: int,
    total_steps: int,
    config: OptimizerConfig,
    growth_steps: Sequence[int] = (),
    rewarm_steps: int = 0,
) -> float:
    """Factor on the peak learning rate at optimizer step ``step`` (0-based).

    Args:
        growth_steps: optimizer steps at which the model grew or will grow.
        rewarm_steps: length in steps of the linear warm-up after each growth; 0 continues the one global schedule.
    """
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = _decay(step - warmup, max(1, total_steps - warmup), total_steps, config)
    last_growth = max((g for g in growth_steps if g <= step), default=None)
    if last_growth is not None and step - last_growth < rewarm_steps:
        factor *= (step - last_growth + 1) / rewarm_steps
    return factor


def _decay(step: int, steps: int, total_steps: int, config: OptimizerConfig) -> float:
    """Factor on the learning rate at ``step``, counted from the end of the warm-up, of ``steps`` after it."""
    left = max(0.0, 1 - step / steps)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return left
    if config.schedule == "cosine":
        return 0.5 * (1 - torch.cos(torch.tensor(torch.pi * left, dtype=torch.float64)).item())
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    return min(1.0, left * steps / decay_steps)


def parameter_groups(modules: Iterable[tuple[str, nn.Module]], weight_decay: float) -> ParameterGroups:
    """Two groups, decay and no decay, with names, in the canonical order of ``named_parameters``.

    The order matters, since torch's ``Optimizer.load_state_dict`` matches state by position and checks no shapes. Any
    other order after a growth would silently swap Adam moments on resume. The stored names are checked on loading.
    """
    decay: list[tuple[str, nn.Parameter]] = []
    no_decay: list[tuple[str, nn.Parameter]] = []
    for prefix, module in modules:
        for name, parameter in module.named_parameters(prefix=prefix):
            if parameter.requires_grad:
                (decay if parameter.ndim > 1 else no_decay).append((name, parameter))
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def build_optimizer(groups: ParameterGroups, config: OptimizerConfig) -> Optimizer:
    """Build the optimizer of ``config`` over named ``groups``; it refuses a state dict of other parameters."""
    if config.name == "sgd":
        optimizer: Optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0])
    else:
        on_cuda = all(p.is_cuda for group in groups for _, p in group["params"])
        fused = config.implementation == "fused" or (config.implementation == "auto" and on_cuda)
        foreach = True if config.implementation == "foreach" else None
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None, foreach=foreach
        )
    optimizer.register_load_state_dict_pre_hook(_check_names)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def _check_names(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        names, saved_names = group["param_names"], saved.get("param_names", group["param_names"])
        if names != saved_names:
            differing = sorted(set(names) ^ set(saved_names))[:4] or "only their order"
            raise InputError(
                f"the optimizer state in this checkpoint belongs to other parameters ({len(saved_names)} there, "
                f"{len(names)} here; differing: {differing}): resume with the settings that made it"
            )


STATE_OF_A_GROUP = ("params", "param_names", "lr", "initial_lr")
"""Keys of a parameter group that are no settings. The rates are treated apart, because the schedule changes them."""


def _keep_settings(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace the settings in a loaded state by this optimizer's own, implementation included.

    torch would take the checkpoint's, so a run that is resumed with another rate, decay or betas would go on with the
    old ones. A run that moves from a CPU to a GPU would keep the CPU's loop over parameters, with a wait in every step,
    and the other way round. The step counts move along, since a fused optimizer keeps them on the device and the others
    on the host.
    """
    if len(optimizer.param_groups) != len(state_dict["param_groups"]):
        return state_dict  # torch raises the error
    groups = [
        saved | {key: value for key, value in own.items() if key not in STATE_OF_A_GROUP} | _own_rate(own, saved)
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    on_device = any(group.get("fused") or group.get("capturable") for group in groups)
    state = {
        index: {
            key: value.cpu() if key == "step" and torch.is_tensor(value) and not on_device else value
            for key, value in values.items()
        }
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": groups, "state": state}


def _own_rate(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, float]:
    """This optimizer's peak rate, and the present one: the saved one, scaled if its peak was another."""
    peak, saved_peak = own.get("initial_lr", own["lr"]), saved.get("initial_lr", saved["lr"])
    lr = saved["lr"] if peak == saved_peak else peak * saved["lr"] / saved_peak
    return {"lr": lr} | ({"initial_lr": peak} if "initial_lr" in own else {})


class LearningRates(LambdaLR):
    """Learning rates by a factor of each step, that keep this run's peak rate when they are resumed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})


def rebind(optimizer: Optimizer, groups: ParameterGroups) -> None:
    """Give ``optimizer`` the parameters of ``groups`` after a growth, and keep the object and so its schedulers.

    Parameters that a growth has frozen leave it with their state, and new ones that are frozen get none. The state of
    kept parameters stays valid, because its keys are the tensors. ``add_param_group`` cannot be used, because the
    learning-rate schedulers rely on the number of groups.
    """
    if len(groups) != len(optimizer.param_groups):
        raise RuntimeError(f"{len(optimizer.param_groups)} parameter groups became {len(groups)} at a growth")
    kept = {parameter for group in groups for _, parameter in group["params"]}
    left = [p for group in optimizer.param_groups for p in group["params"] if p not in kept]
    if any(parameter.requires_grad for parameter in left):
        raise RuntimeError("a growth lost parameters that the optimizer trains")
    for parameter in [p for p in optimizer.state if p not in kept]:
        del optimizer.state[parameter]
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameter for _, parameter in new["params"]]
        group["param_names"] = [name for name, _ in new["params"]]


def carry_state(
    optimizer: Optimizer, sources: dict[nn.Parameter, nn.Parameter | None], setting: OptimizerState
) -> None:
    """Set the optimizer state of the parameters after a growth, before :func:`rebind`.

    Args:
        sources: new parameter -> the parameter that it was copied from, ``None`` if it was not copied.
        setting: ``copy`` gives new parameters a copy of their source's state (those without a source start at
            zero); with ``zero`` new parameters start at zero; with ``reset`` all parameters do.
    """
    if setting == "reset":
        optimizer.state.clear()
    elif setting == "copy":
        for new, source in sources.items():
            if source is not None and source in optimizer.state:
                state = optimizer.state[source]
                optimizer.state[new] = {
                    key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()
                }
