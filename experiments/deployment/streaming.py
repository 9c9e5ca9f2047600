"""``interstack streaming``: compare the hidden states of a stream with those of whole utterances.

    interstack streaming --upstream students/first --root /data/LibriSpeech/dev-clean --output analyses/streaming

Every combination of hop, left context and look-ahead is measured. With ``--head`` a trained head of ``interstack
superb`` is scored on streamed states too.

Shapes: T samples, F frames, D width, S hidden states.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_bytes, write_json, write_text
from experiments.analysis.similarity import read_waveforms
from experiments.bench.made import made, training_device
from experiments.deployment.heads import load_head
from experiments.deployment.streaming_report import context_picture, report_text
from lightning_modules.deployment.streaming import StreamedUpstream, StreamSettings
from lightning_modules.superb.upstream import Upstream, load_upstream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """Difference between two sets of hidden states, for each state; state 0 is the input of the first layer.

    Attributes:
        relative_l2: norm of the difference over the norm of the second, both over all frames.
        cosine: mean over frames of the cosine.
    """

    relative_l2: list[float]
    cosine: list[float]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> "Difference":
        """Measure over utterances, each a pair of S hidden states (F, D)."""
        rows = [[_sums(*states) for states in zip(found, wanted, strict=True)] for found, wanted in pairs]
        errors_S, norms_S, cosines_S, frames_S = torch.tensor(rows, dtype=torch.double).sum(0).unbind(1)
        return cls((errors_S / norms_S).sqrt().tolist(), (cosines_S / frames_S).tolist())


def _sums(found_FD: Tensor, wanted_FD: Tensor) -> list[float]:
    found_FD, wanted_FD = found_FD.double(), wanted_FD.double()
    cosine_F = torch.cosine_similarity(found_FD, wanted_FD, dim=-1)
    squares = (found_FD - wanted_FD).square().sum(), wanted_FD.square().sum()
    return [*map(float, squares), float(cosine_F.sum()), len(cosine_F)]


def streaming(
    upstream: str,
    root: str,
    output: str,
    hop: list[float] = [0.32],  # noqa: B006 (never mutated)
    left_context: list[float] = [0.64, 1.28, 2.56, 5.12],  # noqa: B006
    look_ahead: list[float] = [0.0, 0.32, 1.28],  # noqa: B006
    utterances: int = 12,
    max_seconds: float = 20.0,
    normalize: bool | None = None,
    head: str | None = None,
    retrain: bool = False,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
) -> None:
    """Compare hidden states of a stream with those of whole utterances; write result.json, report.md and a picture.

    Args:
        upstream: encoder with convolutions over waveforms: exported student, training checkpoint, Hugging Face name or
            folder, or the path of a class, as for `interstack superb`.
        root: folder with audio files below it; ``utterances`` of them, evenly spaced by name, are used.
        output: folder for the results.
        hop: seconds that one call makes final, a multiple of 0.02; one or several.
        left_context: seconds before the hop that are computed again; one or several.
        look_ahead: seconds after the hop that must be heard first; one or several.
        utterances: number of audio files to use.
        max_seconds: seconds of each file to use, from its start.
        normalize: give waveforms zero mean and unit variance; default: the encoder's own setting.
        head: result folder of `interstack superb` (with config.json and best.ckpt), whose head is scored on its test
            sets with streamed states.
        retrain: also train a head like it on the streamed states of every setting.
        accelerator: device to compute on.
    """
    if retrain and head is None:
        raise InputError("--retrain true trains heads like that of --head: give --head")
    encoder = load_upstream(upstream, normalize)
    frame_seconds = encoder.rate / SAMPLE_RATE
    grid = [StreamSettings.from_seconds(*sizes, frame_seconds) for sizes in product(hop, left_context, look_ahead)]
    if not grid:
        raise InputError("hop, left_context and look_ahead need at least one value each")
    streams = [StreamedUpstream(encoder, settings) for settings in grid]
    trained = None if head is None else load_head(Path(head), encoder, accelerator)
    device = training_device(accelerator)
    encoder.to(device)
    waveforms = [waveform_T.to(device) for waveform_T in read_waveforms(Path(root), utterances, max_seconds)]
    waveforms = [waveform_T for waveform_T in waveforms if encoder.num_frames(len(waveform_T))]
    if not waveforms:
        raise InputError(f"the utterances below {root} are shorter than a frame: give longer ones")
    whole = [_states(encoder, waveform_T) for waveform_T in waveforms]
    result: dict[str, Any] = {
        "upstream": upstream,
        "root": root,
        "seconds": sum(map(len, waveforms)) / SAMPLE_RATE,
        "utterances": len(waveforms),
        "frame_seconds": frame_seconds,
        "mean_state": asdict(Difference.of((_means(states), states) for states in whole)),
        **made(device),
    }
    if trained is not None:
        result["head"] = {
            "folder": str(trained.folder),
            "task": trained.settings.task,
            "preset": trained.settings.preset,
            "metric": trained.metric,
            "whole": trained.scores(encoder),
        }
    rows: list[dict[str, Any]] = []
    for stream in streams:
        row = _sizes(stream, [len(states[0]) for states in whole])
        pairs = ((_states(stream, wave_T), states) for wave_T, states in zip(waveforms, whole, strict=True))
        row |= asdict(Difference.of(pairs))
        if trained is not None:
            row["scores"] = trained.scores(stream)
            if retrain:
                name = "_".join(f"{key}{frames}" for key, frames in asdict(stream.settings).items())
                row["retrained"] = trained.retrained_scores(stream, Path(output) / "heads" / name)
        rows.append(row)
        log.info("measured %d of %d settings", len(rows), len(streams))
    result["settings"] = rows
    write_json(Path(output) / "result.json", result)
    write_text(Path(output) / "report.md", report_text(result))
    _draw(result, Path(output))
    print(report_text(result))


def _states(upstream: Upstream, waveform_T: Tensor) -> list[Tensor]:
    return [state_BFD[0] for state_BFD in upstream([waveform_T])]


def _means(states: Sequence[Tensor]) -> list[Tensor]:
    """The mean frame of an utterance in place of every frame: what a difference looks like that leaves no content."""
    return [state_FD.mean(0, keepdim=True).expand_as(state_FD) for state_FD in states]


def _sizes(stream: StreamedUpstream, frames: Sequence[int]) -> dict[str, Any]:
    """Sizes in frames, latency, and frames computed per frame in a long stream and in utterances of these lengths."""
    settings = stream.settings
    return {
        **asdict(settings),
        "latency_ms": 1000 * stream.latency_seconds,
        "compute_factor": settings.compute_factor,
        "compute_factor_here": sum(map(settings.frames_computed, frames)) / sum(frames),
    }


def _draw(result: dict[str, Any], output: Path) -> None:
    """Write the picture if matplotlib is installed; the numbers do not need it."""
    try:
        picture = context_picture(result)
    except InputError as error:
        log.warning("no picture: %s", error)
        return
    if picture is not None:
        write_bytes(output / f"{picture.name}.png", picture.png())
