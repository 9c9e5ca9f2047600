"""``interstack bench kernels``: time ways to compute the front end and the positional convolution, in turns.

Each way is timed forward without gradients, as in a teacher, and forward and backward, as in a student. Its output is
compared with float32. Sizes are HuBERT Base's; weights and audio are random.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder, HubertPositionalConvEmbedding

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_json
from experiments.bench.made import made, training_device
from lightning_modules.kernels import compute_dtype, install
from lightning_modules.positions import correlated
from lightning_modules.precision import computing_in
from lightning_modules.stopwatch import milliseconds, synchronize, time_point

WIDTHS = {"teacher": 768, "student": 384}
GPU_CALLS = 20  # of a lap: one call of the small kernels takes no longer than its submission


@dataclass
class Candidate:
    """One way to compute a part."""

    part: str
    name: str
    module: nn.Module
    inputs: Tensor


class WindowedPositions(nn.Module):
    """The positional convolution as one batched matrix product on copied windows."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, hidden_BFD: Tensor) -> Tensor:
        conv, dtype = self.plain.conv, compute_dtype(hidden_BFD)
        weight_DCK = conv.weight.to(dtype)  # C channels of a group, K taps
        width, _, taps = weight_DCK.shape
        batch, frames, groups = *hidden_BFD.shape[:2], conv.groups
        padded_BFD = nn.functional.pad(hidden_BFD.to(dtype), (0, 0, taps // 2, taps // 2 - 1))
        windows_BFGX = padded_BFD.unfold(1, taps, 1).reshape(batch, frames, groups, -1)
        windows_GNX = windows_BFGX.permute(2, 0, 1, 3).reshape(groups, batch * frames, -1)
        output_GNO = torch.bmm(windows_GNX, weight_DCK.reshape(groups, width // groups, -1).transpose(1, 2))
        output_BFD = output_GNO.view(groups, batch, frames, -1).permute(1, 2, 0, 3).reshape(batch, frames, width)
        return self.plain.activation(output_BFD + conv.bias.to(dtype))


class TransformedPositions(nn.Module):
    """The positional convolution by Fourier transforms in float32, on any device."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, hidden_BFD: Tensor) -> Tensor:
        with torch.autocast(hidden_BFD.device.type, enabled=False):
            return self.plain.activation(correlated(self.plain.conv, hidden_BFD.float()))


def bench_kernels(
    batch_size: int = 4,
    seconds: float = 5.0,
    rounds: int = 5,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    precision: Literal["32", "bf16"] = "32",
    compile: bool = False,
    output: str | None = None,
) -> None:
    """Time the front end and the positional convolution computed in several ways; print a table, write JSON.

    Args:
        batch_size: utterances per batch.
        seconds: length of each utterance.
        rounds: counted turns of every way; median and ratio are over these.
        accelerator: cpu, gpu or auto.
        precision: 32, or bf16 by autocast.
        compile: compile every way with torch.compile.
        output: JSON file to write after every round.
    """
    if min(batch_size, rounds) < 1 or seconds < 0.1:
        raise InputError(
            f"batch_size={batch_size} and rounds={rounds} must be positive, seconds={seconds} at least 0.1"
        )
    device = training_device(accelerator)
    candidates = make_candidates(batch_size, seconds, device)
    errors = [error(candidate, candidates, precision) for candidate in candidates]
    if compile:
        for candidate in candidates:
            candidate.module.compile(dynamic=True)
    times: list[list[tuple[float, float]]] = [[] for _ in candidates]
    for turn in range(rounds + 1):
        for candidate, own in zip(candidates, times, strict=True):
            lap = forward_ms(candidate, precision), both_ms(candidate, precision)
            if turn:  # the first one plans, compiles and allocates
                own.append(lap)
        if turn and output is not None:
            result = summarise(candidates, times, errors)
            settings = {"batch_size": batch_size, "seconds": seconds, "precision": precision, "compile": compile}
            write_json(output, {**made(device), **settings, "rows": result})
    print(table(summarise(candidates, times, errors)))
    print(f"{made(device)['hardware']}; {batch_size} x {seconds} s; precision {precision}; compile {compile}")


def make_candidates(batch_size: int, seconds: float, device: torch.device) -> list[Candidate]:
    """Build the candidates; the first of each part is the plain one, and all of a part have the same weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        front_end = HubertFeatureEncoder(HubertConfig()).train()
        positions = {name: HubertPositionalConvEmbedding(HubertConfig(hidden_size=w)) for name, w in WIDTHS.items()}
    front_end._requires_grad = False
    fast = copy.deepcopy(front_end)
    install(fast, "channels_last")
    waveforms_BT = (torch.randn(batch_size, round(seconds * SAMPLE_RATE), generator=generator) * 0.1).to(device)
    found = [
        Candidate("front end", "plain", front_end.to(device), waveforms_BT),
        Candidate("front end", "channels last", fast.to(device), waveforms_BT),
    ]
    for name, plain in positions.items():
        part, frames = f"positions, {name}", round(seconds * 50) - 1
        hidden_BFD = torch.randn(batch_size, frames, WIDTHS[name], generator=generator).to(device)
        found.append(Candidate(part, "plain", plain.to(device), hidden_BFD))
        found.append(Candidate(part, "windows", WindowedPositions(plain), hidden_BFD))
        found.append(Candidate(part, "transforms", TransformedPositions(plain), hidden_BFD))
    return found


def forward_ms(candidate: Candidate, precision: str) -> float:
    """Time a forward pass without gradients, in milliseconds."""
    with torch.no_grad():
        return timed(lambda: _forward(candidate, precision), candidate.inputs.device)


def both_ms(candidate: Candidate, precision: str) -> float:
    """Time a forward and backward pass, in milliseconds."""

    def step() -> None:
        _forward(candidate, precision).float().square().mean().backward()
        candidate.module.zero_grad()

    return timed(step, candidate.inputs.device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call in milliseconds; on a GPU the mean of several, whose submission hides behind the work before."""
    calls = GPU_CALLS if device.type == "cuda" else 1
    started = time_point(device)
    for _ in range(calls):
        run()
    ended = time_point(device)
    synchronize(device)
    return milliseconds(started, ended) / calls


def _forward(candidate: Candidate, precision: str) -> Tensor:
    with computing_in("bf16" if precision == "bf16" else "32", candidate.inputs.device):
        return candidate.module(candidate.inputs)


@torch.no_grad()
def error(candidate: Candidate, candidates: list[Candidate], precision: str) -> float:
    """Compute the relative L2 error of the outputs against the plain way in float32, on one utterance."""
    plain = next(other for other in candidates if other.part == candidate.part)
    one = candidate.inputs[:1]
    exact = _forward(Candidate(plain.part, plain.name, plain.module, one), "32")
    found = _forward(Candidate(candidate.part, candidate.name, candidate.module, one), precision).float()
    return float((found - exact).norm() / exact.norm())


def summarise(
    candidates: list[Candidate], times: list[list[tuple[float, float]]], errors: list[float]
) -> list[dict[str, Any]]:
    """Make a row of plain values for each way; ratios are medians over turns, above 1 if it is faster than plain."""
    rows: list[dict[str, Any]] = []
    plain: list[tuple[float, float]] = []
    for candidate, own, far in zip(candidates, times, errors, strict=True):
        plain = own if candidate.name == "plain" else plain
        row: dict[str, Any] = {"part": candidate.part, "name": candidate.name, "error": far}
        for position, kind in enumerate(("forward", "both")):
            row[f"{kind}_ms"] = median(lap[position] for lap in own)
            row[f"{kind}_ratio"] = median(a[position] / b[position] for a, b in zip(plain, own, strict=True))
        rows.append({**row, "turns": own})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| part | computed | forward, ms | against plain | forward and backward, ms | against plain | error |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = [row["part"], row["name"], f"{row['forward_ms']:.1f}", f"{row['forward_ratio']:.2f}"]
        cells += [f"{row['both_ms']:.1f}", f"{row['both_ratio']:.2f}", f"{row['error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
