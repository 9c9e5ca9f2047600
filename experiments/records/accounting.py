"""Cost of a run: floating-point operations by formula, seconds and memory from its folder.

FLOPs count matrix products and convolutions, two per multiply-add. Norms, softmax and activations are left out, as in
``torch.utils.flop_counter``, against which the tests check every term. A backward pass costs twice its forward pass;
for the first convolution it costs the same, since there is no gradient to the waveform. A frozen front end has no
backward pass, a shared one costs nothing while the teacher runs in training, and none is run if its features are read
from a cache (making one is not counted). A convolution counts the same when it is computed by transforms. Seconds are
those of ``callbacks.throughput``, without validation, checkpoints and the start of the process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.stacking import StackingCallback
from callbacks.summary_record import Summary
from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import read_json
from datamodules.frames import count_windows
from datamodules.librispeech import LibriSpeechDataModule
from experiments.records.reading import RunLog, read_run
from experiments.training.defaults import default_of
from lightning_modules.compact_hubert import PAIR
from lightning_modules.front_end import CONV_FIELDS, FrontEnd, conv_frames, feat_extract_norm
from lightning_modules.growth.policies import default_stages
from lightning_modules.growth.schedules import mean_depth, stage_lengths
from lightning_modules.objective import ObjectiveConfig, intermediate_layers
from lightning_modules.student_config import StudentConfig, hubert_config
from lightning_modules.teacher_loading import WHISPER
from lightning_modules.whisper import HOP, WINDOW


def front_end_flops(config: Any, num_samples: int) -> list[int]:
    """Compute forward FLOPs of each convolution on one utterance."""
    inputs = [1, *config.conv_dim[:-1]]
    shapes = zip(conv_frames(config, num_samples), inputs, config.conv_dim, config.conv_kernel, strict=True)
    return [2 * frames * before * after * kernel for frames, before, after, kernel in shapes]


def embedding_flops(config: Any, frames: int) -> int:
    """Compute forward FLOPs between the convolutions and the first layer: projection and positional convolution."""
    width = config.hidden_size
    projected = config.conv_dim[-1] * width if getattr(config, "feature_projection", True) else 0
    convolutions, taps = 1, config.num_conv_pos_embeddings
    if hasattr(config, "conv_pos_kernel_size"):  # data2vec-audio has several
        convolutions, taps = taps, config.conv_pos_kernel_size
    positional = convolutions * width * taps // config.num_conv_pos_embedding_groups
    made = frames + (taps % 2 == 0)  # an even kernel makes one extra frame, which is cut off again
    return 2 * frames * projected + 2 * made * width * positional


def layer_flops(config: Any, frames: int, number: int = 0) -> int:
    """Compute forward FLOPs of Transformer layer ``number`` (from 0) on an utterance of ``frames`` inside it."""
    width, attended, inner = config.hidden_size, config.hidden_size, _inner_width(config)
    if (heads := getattr(config, "layer_heads", None)) is not None:
        attended = heads[number] * config.layer_head_width
    if (inner_widths := getattr(config, "layer_intermediate_sizes", None)) is not None:
        inner = inner_widths[number]
    # A layer that reuses a map has values and outputs, but no queries and keys, and one product of frames by frames.
    reuses = getattr(config, "attention_reuse", "none") != "none" and number % PAIR
    share = 1 if reuses else 2
    return share * (4 * frames * width * attended + 2 * frames * frames * attended) + 4 * frames * width * inner


def stack_flops(config: Any, frames: int, layers: int) -> int:
    """Compute forward FLOPs of the first ``layers`` layers and their hidden states on one utterance of ``frames``.

    Frames that are joined before the first layer cost a convolution there, and another for each layer's hidden state.
    """
    width, joined = config.hidden_size, getattr(config, "time_reduction", 1)
    inside = -(-frames // joined)
    total = sum(layer_flops(config, inside, number) for number in range(layers))
    if joined > 1:
        total += (1 + layers) * 2 * inside * joined * width * width
    return total + layers * 2 * frames * width * (getattr(config, "state_width", None) or 0)


def _inner_width(config: Any) -> int:
    return config.encoder_ffn_dim if config.model_type == WHISPER else config.intermediate_size


def teacher_flops(config: Any, num_samples: int, layers: int, padded: bool = False) -> int:
    """Compute forward FLOPs of a teacher's front end and first ``layers`` layers on one utterance.

    Args:
        config: Hugging Face configuration, of the wav2vec 2.0 kind or of Whisper.
        num_samples: length of the utterance in samples.
        layers: number of layers that are run.
        padded: whether Whisper gets the utterance padded with silence to 30 s.
    """
    if config.model_type == WHISPER:
        frames = config.max_source_positions if padded else count_windows(num_samples, WINDOW, HOP)
        bins, width = config.num_mel_bins, config.hidden_size
        # Mel bins from 201 values of the spectrum, and two kernels of 3; the first half has two frames of 10 ms each.
        below = 2 * 2 * frames * bins * (WINDOW // 2 + 1) + 3 * (2 * 2 * frames * bins * width + 2 * frames * width**2)
    else:
        frames = conv_frames(config, num_samples)[-1]
        below = sum(front_end_flops(config, num_samples)) + embedding_flops(config, frames)
    return below + stack_flops(config, frames, layers)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one utterance in one training step.

    Attributes:
        teacher: cost of the teacher.
        student_fixed: cost of the student without its layers, with the heads of the losses that every depth has.
        per_layer: cost of each student layer; the mean of a pair of layers that share an attention map.
        per_head: cost of the head of a loss.
        spacings: for each loss that some depths leave out (``unmatched: skip``), the number whose multiples are the
            depths that have it.
        first_stage: further cost in the first stage, of a front end that is trained until the first growth.
    """

    teacher: int
    student_fixed: int
    per_layer: int
    per_head: int
    spacings: tuple[int, ...] = ()
    first_stage: int = 0

    def at(self, depth: float) -> float:
        """Sum a step's FLOPs at that student depth."""
        heads = sum(depth % spacing == 0 for spacing in self.spacings)
        return self.teacher + self.student_fixed + self.per_layer * depth + self.per_head * heads


def step_cost(
    teacher: Any,
    student: StudentConfig,
    objective: ObjectiveConfig,
    num_samples: int,
    cached: bool = False,
    padded: bool = False,
    features: bool = False,
) -> StepCost:
    """Compute the cost of one utterance of ``num_samples`` samples.

    Args:
        teacher: Hugging Face configuration of the teacher.
        student: sizes of the student.
        objective: decides how many teacher layers are run, and the heads of the losses.
        num_samples: length after cropping.
        cached: targets are read from a cache, so the teacher is not run.
        padded: the teacher is a Whisper that gets every utterance padded to 30 s.
        features: the features of a frozen front end are read from a cache too.
    """
    own = student_layout(student, teacher)
    targets = intermediate_layers(objective, teacher.num_hidden_layers)
    frames = conv_frames(own, num_samples)[-1]
    output_layer = objective.output_layer or teacher.num_hidden_layers
    highest = max([*targets, output_layer])
    asked = 0 if cached else teacher_flops(teacher, num_samples, highest, padded)
    if asked and objective.masked != "none":  # a second time above the convolutions, with masks
        asked += asked - sum(front_end_flops(teacher, num_samples))
    convolutions = front_end_flops(own, num_samples)
    trained, frozen = 3 * sum(convolutions) - convolutions[0], 0 if features else sum(convolutions)
    kinds = {"trained": trained, "frozen": frozen, "shared": frozen * cached, "trained_until_growth": frozen}
    fixed = kinds[student.front_end] + 3 * embedding_flops(own, frames)
    per_head = 6 * frames * own.hidden_size * (teacher.hidden_size + (objective.head == "mlp") * own.hidden_size)
    skips = (objective.intermediate, objective.unmatched) == ("l2l", "skip")
    spacings = tuple(output_layer // gcd(layer, output_layer) for layer in targets) if skips else ()
    fixed += per_head * (1 + len(targets) - len(spacings)) + 3 * stack_flops(own, frames, 0)
    first_stage = trained - frozen if student.front_end == "trained_until_growth" else 0
    # A student with reused attention maps has pairs of layers; the layers of any other are alike.
    per_layer = 3 * (stack_flops(own, frames, PAIR) - stack_flops(own, frames, 0)) // PAIR
    return StepCost(asked, fixed, per_layer, per_head, spacings, first_stage)


def student_layout(student: StudentConfig, teacher: Any) -> Any:
    """The Hugging Face configuration of a student with this teacher, whose convolutions it may copy."""
    if student.front_end_init != "teacher":
        return hubert_config(student, None)
    layout = {name: getattr(teacher, name) for name in CONV_FIELDS}
    return hubert_config(student, FrontEnd(layout | {"feat_extract_norm": feat_extract_norm(teacher)}, {}))


def hears_30_seconds(model: Mapping[str, Any]) -> bool:
    """Whether the teacher of a ``model`` section is a Whisper that gets every utterance padded with silence to 30 s."""
    settings = model.get("teacher", {}).get("init_args") or {}
    return bool(settings.get("pad_to_30_seconds", False))


@dataclass(frozen=True)
class Growth:
    """Depth and number of epochs of each stage."""

    stages: Sequence[int]
    epochs: Sequence[int]

    @classmethod
    def of(cls, settings: Mapping[str, Any], num_layers: int, max_epochs: int) -> "Growth":
        """Read the ``growth`` section of a configuration; refuses the settings that the callback would refuse."""
        policy = settings.get("policy", "none")
        if policy == "none":
            return cls((num_layers,), (max_epochs,))
        each = settings.get("layers_per_stage", default_of(StackingCallback, "layers_per_stage"))
        stages = settings.get("stages") or default_stages(policy, num_layers, each)
        return cls(tuple(stages), stage_lengths(settings.get("schedule", "equal"), len(stages), max_epochs))

    @property
    def mean_depth(self) -> float:
        return mean_depth(self.stages, self.epochs)


def run_flops(cost: StepCost, depths: Sequence[int], utterances: Sequence[float]) -> list[float]:
    """Compute cumulative FLOPs at the end of each stage, from its depth and its number of utterances."""
    stages = [float(cost.at(depth) * seen) for depth, seen in zip(depths, utterances, strict=True)]
    stages[0] += cost.first_stage * utterances[0]
    return list(accumulate(stages))


def measured(run: Path, teacher: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the cost of a finished run from its folder.

    Args:
        run: run folder of ``interstack fit``.
        teacher: Hugging Face configuration of the run's teacher.
        settings: configuration of the run (``model``, ``data``, ``growth``, ``trainer`` sections).

    Raises:
        InputError: the run is not finished.
    """
    if not (run / "summary.json").is_file():
        raise InputError(f"{run} has no summary.json: the run is not finished")
    log, summary = read_run(run), Summary.from_plain(read_json(run / "summary.json"))
    if summary.audio_seconds is None or summary.steps is None or summary.epochs is None:
        raise InputError(f"{run / 'summary.json'} lacks audio_seconds, steps or epochs: the run's cost is not known")
    model = settings.get("model", {})
    student, objective = StudentConfig(**model.get("student", {})), ObjectiveConfig(**model.get("objective", {}))
    depths, audio = _audio_by_stage(log, summary.steps, summary.audio_seconds)
    batch_size = settings.get("data", {}).get("batch_size") or default_of(LibriSpeechDataModule, "batch_size")
    utterances = summary.utterances or summary.steps * batch_size  # older versions did not count them
    num_samples = round(summary.audio_seconds * SAMPLE_RATE / utterances)
    cached = settings.get("data", {}).get("targets") is not None
    cost = step_cost(teacher, student, objective, num_samples, cached, hears_30_seconds(model), summary.cached_features)
    by_stage = run_flops(cost, depths, [seconds * SAMPLE_RATE / num_samples for seconds in audio])
    growth = Growth.of(settings.get("growth", {}), student.num_layers, summary.epochs)
    return {
        "train_seconds": summary.train_seconds,
        "student_seconds": _student_seconds(log),
        "flops": by_stage[-1],
        "flops_by_stage": by_stage,
        "audio_seconds": summary.audio_seconds,
        "steps": summary.steps,
        "peak_memory_bytes": round(max(log.series("perf/memory_gb").values, default=0.0) * 1e9),
        "final_loss": summary.train_loss,
        **({} if log.val_output is None else {"val_output": log.val_output}),  # a run may have no validation
        **_losses_of_layers(log),
        "mean_depth": growth.mean_depth,
        "parameters": summary.parameters,
        "hardware": summary.hardware,
        "students": summary.students,
    }


def _losses_of_layers(log: RunLog) -> dict[str, float]:
    """Collect ``val_layer_K`` for each teacher layer K of the intermediate loss, from the last validation."""
    names = [name for name in log.metrics if name.startswith("val/layer_")]
    return {name.replace("/", "_"): float(log.series(name).values[-1]) for name in names}


def _audio_by_stage(log: RunLog, num_steps: int, audio_seconds: float) -> tuple[list[int], list[float]]:
    """List the depths and the seconds of audio at each, interpolated between logged rows."""
    starts, depths = zip(*log.depth_profile(), strict=True)
    clock = log.series("perf/audio_seconds")
    steps, seconds = [0, *clock.steps, num_steps], [0.0, *clock.values, audio_seconds]
    return list(depths), np.diff(np.interp([*starts, num_steps], steps, seconds)).tolist()


def _student_seconds(log: RunLog) -> float:
    """Sum forward, losses, backward and update of the student: the part of a step that growth can make cheaper."""
    student, update = log.series("perf/student_ms"), log.series("perf/optimizer_ms")
    spans = np.diff(student.steps, prepend=0)
    return float((spans * (student.values + update.values)).sum() / 1000)
