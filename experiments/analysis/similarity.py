"""``interstack similarity``: compare a student's layers, over the stages of its run and with its teacher's layers.

    interstack similarity runs/first --root /data/LibriSpeech/dev-clean --output analyses/first

Measured for every checkpoint: linear CKA and cosine between the student's layers, CKA with the teacher's layers, and
the mean similarity of copies of one first-stage layer and of other pairs. Training checkpoints also give the output
loss without a layer, with two swapped, and after the first N layers; an exported folder has no projection to the
teacher's width.

Tensor names carry shape suffixes: T samples, L layers, F frames, D features.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HubertModel

from datamodules.audio import AUDIO_SUFFIXES, SAMPLE_RATE, read_audio, usable_samples
from datamodules.corpus import audio_below, refuse_twins
from datamodules.errors import InputError
from datamodules.files import write_bytes, write_json
from datamodules.packed import unpacked_path
from experiments.analysis.cka import layer_similarity
from experiments.analysis.depth_use import TOLERANCE, depth_use, idle_layers, layers_needed
from experiments.report.stage_figures import copies_picture, depth_use_picture, exits_picture, stages_picture
from lightning_modules.export import load_student
from lightning_modules.growth.layers import layer_group
from lightning_modules.hidden_states import encoder_states
from lightning_modules.objective import ObjectiveConfig, ProjectedDistance, get_distance
from lightning_modules.target_normalization import TargetNormalizer, TargetStatistics
from lightning_modules.teacher import Teacher, TeacherTargets, normalize_waveforms
from lightning_modules.teacher_building import build_teacher, found_at

log = logging.getLogger(__name__)

OUTPUT_PROJECTION = "objective.output_projection."
NORMALIZER = "objective.normalizer."


@dataclass(frozen=True)
class Stage:
    """Measurements of one checkpoint; matrices have the student's layers as rows, layer 1 first.

    Attributes:
        checkpoint: file name or folder name.
        depth: number of layers.
        ancestry: for each layer the first-stage layer that it descends from, 0-based, None for a fresh one.
        cka, cosine: similarity between the student's layers.
        cka_teacher: CKA of student layers (rows) and teacher layers (columns), normalised as the targets were.
        copies, others: mean CKA over pairs of layers with the same ancestor, and with different ones.
        weight_distance_copies, weight_distance_others: relative distance of their weights, ``|a - b|`` over
            ``sqrt(|a| |b|)``: 0 for a fresh copy, about 1.4 for unrelated layers.
        depth_use: losses of `experiments.analysis.depth_use.DepthUse`, or None.
    """

    checkpoint: str
    depth: int
    ancestry: list[int | None]
    cka: list[list[float]]
    cosine: list[list[float]]
    cka_teacher: list[list[float]] | None
    copies: float | None
    others: float | None
    weight_distance_copies: float | None
    weight_distance_others: float | None
    depth_use: dict[str, Any] | None


def similarity(
    checkpoints: list[str],
    root: str,
    output: str,
    utterances: int = 12,
    max_seconds: float = 10.0,
    teacher: str | None = None,
    row: str | None = None,
    seed: int | None = None,
) -> None:
    """Compare the layers of students; write ``result.json`` and pictures.

    Args:
        checkpoints: run folders (all their stages), checkpoints, or exported folders.
        root: folder with audio files below it; ``utterances`` of them, evenly spaced by name, are used.
        output: folder for the results.
        utterances: number of audio files to use.
        max_seconds: seconds of each file to use, from its start.
        teacher: Hugging Face name or folder; default: the one named in each checkpoint; "none" for no teacher.
        row: row of a study, copied into the result.
        seed: seed of a study's row, copied into the result.
    """
    paths = {name: stage_checkpoints(Path(name)) for name in checkpoints}
    recordings = choose_recordings(Path(root), utterances)
    waveforms = read_recordings(recordings, max_seconds)
    runs: list[dict[str, Any]] = [
        {"name": Path(name).name, "stages": [asdict(stage) for stage in analyse_all(found, waveforms, teacher)]}
        for name, found in paths.items()
    ]
    last = runs[-1]["stages"][-1]
    head = {"row": row, "seed": seed} if row is not None else {}
    result = head | {key: last[key] for key in ("cka", "cosine", "cka_teacher")} | {"runs": runs}
    result["recordings"] = [Path(unpacked_path(path)).stem for path in recordings]
    write_json(Path(output) / "result.json", result)
    _draw(runs, Path(output))
    for run in runs:
        for stage in run["stages"]:
            log.info("%s", _line(run["name"], stage))
    log.info("wrote %s", Path(output) / "result.json")


def stage_checkpoints(path: Path) -> list[Path]:
    """List the checkpoints of a run folder, one per stage and the deepest last; any other path is returned alone.

    Raises:
        InputError: the run folder has no checkpoints.
    """
    if path.is_file() or (path / "interstack.json").is_file():
        return [path]
    folder = path / "checkpoints"
    found = sorted(folder.glob("stage_*.ckpt"), key=lambda file: int(file.stem.removeprefix("stage_")))
    if (folder / "last.ckpt").is_file():
        depth = load_student(folder / "last.ckpt").model.config.num_hidden_layers
        found = [file for file in found if file.stem != f"stage_{depth}"] + [folder / "last.ckpt"]
    if not found:
        raise InputError(f"{path} holds no checkpoints/*.ckpt: give a run folder, a checkpoint or an exported folder")
    return found


def choose_recordings(root: Path, utterances: int) -> list[str]:
    """Choose audio files below ``root``, evenly spaced by name, so that they are of many speakers.

    Raises:
        InputError: there is no audio below ``root``, or the number is not positive.
    """
    if utterances < 1:
        raise InputError(f"utterances={utterances} must be positive")
    files = sorted(audio_below(str(root)), key=lambda path: Path(unpacked_path(path)))
    if not files:
        raise InputError(f"root {root} holds no audio ({', '.join(AUDIO_SUFFIXES)}): give a folder with some below it")
    refuse_twins(files)
    number = min(utterances, len(files))
    return [files[place * len(files) // number] for place in range(number)]


def read_recordings(paths: Sequence[str], max_seconds: float) -> list[Tensor]:
    """Read the start of each file, (T,) float32 at 16 kHz.

    Raises:
        InputError: the number of seconds is not positive.
    """
    if max_seconds <= 0:
        raise InputError(f"max_seconds={max_seconds} must be positive")
    longest = int(max_seconds * SAMPLE_RATE)
    lengths = [min(usable_samples(path, SAMPLE_RATE, resample=True), longest) for path in paths]
    return [
        torch.from_numpy(read_audio(path, SAMPLE_RATE, stop=length, resample=True))
        for path, length in zip(paths, lengths, strict=True)
    ]


def read_waveforms(root: Path, utterances: int, max_seconds: float) -> list[Tensor]:
    """Read recordings below ``root``; arguments and errors as of `choose_recordings` and `read_recordings`."""
    return read_recordings(choose_recordings(root, utterances), max_seconds)


def analyse_all(paths: Sequence[Path], waveforms: Sequence[Tensor], teacher: str | None) -> list[Stage]:
    """Analyse each checkpoint, with one teacher for all."""
    meta = load_student(paths[-1]).meta
    model = _teacher(meta, teacher)
    prepared = _prepare(waveforms, meta["normalize"])
    targets = [_all_layers(model, waveform_T) for waveform_T in prepared] if model is not None else None
    return [_analyse(path, prepared, targets) for path in paths]


def _teacher(meta: dict[str, Any], name: str | None) -> Teacher | None:
    if name == "none":
        return None
    spec = meta["teacher"] if name is None else found_at(meta["teacher"], name)
    model, objective = build_teacher(spec), meta.get("recipe", {}).get("objective", {})
    if objective.get("targets") == "feed_forward":
        model.use_feed_forward()
    output = objective.get("output_layer")
    model.select_layers(range(1, (output or model.num_layers) + 1), output)
    return model


def _prepare(waveforms: Sequence[Tensor], normalize: bool) -> list[Tensor]:
    return [normalize_waveforms(waveform_T[None])[0] if normalize else waveform_T for waveform_T in waveforms]


def _all_layers(teacher: Teacher, waveform_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute the target of the output loss (F, D) and every layer's own output (F, D), as hidden targets are.

    The last layer's is before the norm in which some encoders end; the output target is after it.
    """
    targets = teacher(waveform_T[None])
    return targets.output_BFD[0], [targets.hidden[layer][0] for layer in sorted(targets.hidden)]


@torch.no_grad()
def _analyse(path: Path, waveforms: Sequence[Tensor], targets: list[tuple[Tensor, list[Tensor]]] | None) -> Stage:
    student = load_student(path)
    # HuBERT's first hidden state is the input of layer 1, not a layer's output; some published students lack it.
    depth = len(student.model.encoder.layers)
    states = [torch.cat(encoder_states(student.model, waveform_T[None])[-depth:]) for waveform_T in waveforms]
    layers = list(torch.cat(states, dim=1))
    cka = layer_similarity(layers)
    ancestry = list(student.meta.get("ancestry") or range(len(layers)))
    distances = weight_distances(student.model.encoder.layers)
    teacher_layers = None
    if targets is not None:
        kind = student.meta.get("recipe", {}).get("objective", {}).get("normalize_targets", "none")
        joined = [torch.cat(layer) for layer in zip(*(hidden for _, hidden in targets), strict=True)]
        teacher_layers = [as_learnt(layer_ND, kind) for layer_ND in joined]
    return Stage(
        checkpoint=path.name,
        depth=len(layers),
        ancestry=ancestry,
        cka=cka,
        cosine=layer_similarity(layers, measure="cosine"),
        cka_teacher=None if teacher_layers is None else layer_similarity(layers, teacher_layers),
        copies=mean_over_pairs(cka, ancestry, same=True),
        others=mean_over_pairs(cka, ancestry, same=False),
        weight_distance_copies=mean_over_pairs(distances, ancestry, same=True),
        weight_distance_others=mean_over_pairs(distances, ancestry, same=False),
        depth_use=_depth_use(path, student.model, student.meta, waveforms, targets),
    )


def as_learnt(layer_ND: Tensor, kind: str) -> Tensor:
    """Normalise a teacher's layer (frames, D) as the student's targets were.

    CKA weighs dimensions by their variance: one dimension would dominate a raw layer of Whisper. ``standardize`` uses
    the statistics of these frames, since a checkpoint keeps those of the learnt layers only.
    """
    if kind == "layer":
        return nn.functional.layer_norm(layer_ND, layer_ND.shape[-1:])
    if kind == "standardize":
        return (layer_ND - layer_ND.mean(0)) / (layer_ND.std(0) + 1e-6)
    return layer_ND


def mean_over_pairs(matrix: list[list[float]], ancestry: Sequence[int | None], same: bool) -> float | None:
    """Mean over pairs of different layers with the same ancestor, or with different ones; None without such a pair.

    Fresh layers have no ancestor, so they are no copies.
    """
    pairs = [
        matrix[i][j]
        for i, j in combinations(range(len(matrix)), 2)
        if (ancestry[i] is not None and ancestry[i] == ancestry[j]) == same and math.isfinite(matrix[i][j])
    ]
    return sum(pairs) / len(pairs) if pairs else None


def weight_distances(layers: Iterable[nn.Module]) -> list[list[float]]:
    """Relative distance between the weight matrices of every two layers, ``|a - b| / sqrt(|a| |b|)``.

    Vectors (biases, norms) are left out: they start equal in all layers, copies or not. So are matrices that only one
    of the two layers has, or that have other sizes; without any the distance is NaN.
    """
    matrices = [
        {name: p.detach().double().flatten() for name, p in layer.named_parameters() if p.ndim > 1} for layer in layers
    ]
    return [[_relative_distance(a, b) for b in matrices] for a in matrices]


def _relative_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    if not shared:
        return math.nan
    a, b = (torch.cat([weights[name] for name in shared]) for weights in (one, other))
    return float((a - b).norm()) / math.sqrt(float(a.norm()) * float(b.norm()))


def _depth_use(
    path: Path,
    model: HubertModel,
    meta: dict[str, Any],
    waveforms: Sequence[Tensor],
    targets: list[tuple[Tensor, list[Tensor]]] | None,
) -> dict[str, Any] | None:
    if targets is None or path.is_dir():
        return None
    if (own := meta["recipe"]["objective"].get("loss")) is not None:
        log.warning("%s: use of depth is not measured, since the run has a loss of its own (%s)", path, own)
        return None
    if layer_group(model) > 1:
        log.warning("%s: use of depth is not measured, since its layers share attention maps in groups", path)
        return None
    loss = _output_loss(path, ObjectiveConfig(**meta["recipe"]["objective"]), [output for output, _ in targets])
    return asdict(depth_use(model, waveforms, loss))


def _output_loss(path: Path, objective: ObjectiveConfig, outputs: Sequence[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Build the student's training distance, with its own projection, summed over frames."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    weights = {
        name.removeprefix(OUTPUT_PROJECTION): state[name] for name in state if name.startswith(OUTPUT_PROJECTION)
    }
    teacher_width, student_width = weights["weight"].shape
    project = ProjectedDistance(student_width, teacher_width, get_distance(objective.distance), objective.head)
    project.load_state_dict(weights)
    normalizer = TargetNormalizer(objective.normalize_targets, [], teacher_width)
    if normalizer.kind == "standardize":
        mean_SD, deviation_SD = (state[f"{NORMALIZER}{name}"] for name in TargetStatistics._fields)
        normalizer.use(TargetStatistics(mean_SD[:1], deviation_SD[:1]))  # the statistics of the output come first
    targets = [normalizer(TeacherTargets(output_FD[None], {})).output_BFD for output_FD in outputs]

    @torch.no_grad()
    def loss(output_FD: Tensor, number: int) -> Tensor:
        return project(output_FD[None], targets[number], None)

    return loss


def _draw(runs: list[dict[str, Any]], output: Path) -> None:
    """Write the pictures if matplotlib is installed; the numbers do not need it."""
    try:
        pictures = [stages_picture(runs), copies_picture(runs), depth_use_picture(runs), exits_picture(runs)]
    except InputError as error:
        log.warning("no pictures: %s", error)
        return
    for picture in pictures:
        if picture is not None:
            write_bytes(output / f"{picture.name}.png", picture.png())


def _line(name: str, stage: dict[str, Any]) -> str:
    parts = [f"{name} {stage['checkpoint']}: {stage['depth']} layers"]
    for key, pairs in (("copies", "copies"), ("others", "other pairs")):
        if stage[key] is not None:
            parts.append(f"mean CKA of {pairs} {stage[key]:.3f}")
    if (use := stage["depth_use"]) is not None:
        parts.append(f"output loss {use['loss']:.4f}")
        parts.append(f"least used layer {min(range(stage['depth']), key=lambda at: use['skipped'][at]) + 1}")
        idle = ", ".join(map(str, idle_layers(use))) or "none"
        parts.append(f"within {TOLERANCE:.0%} of it: without any one of the layers {idle}")
        parts.append(f"after the first {layers_needed(use)}")
    return "; ".join(parts)
