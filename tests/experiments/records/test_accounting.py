"""FLOPs by formula against torch's counter, and a run's costs from its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Data2VecAudioConfig, Data2VecAudioModel, HubertConfig, HubertModel
from transformers.models.hubert.modeling_hubert import HubertPositionalConvEmbedding

from datamodules.cached_records import CachedRecords, RecordLayout
from datamodules.loading import AudioBatch
from experiments.records.accounting import (
    Growth,
    conv_frames,
    embedding_flops,
    front_end_flops,
    layer_flops,
    measured,
    run_flops,
    step_cost,
    teacher_flops,
)
from experiments.training.fit import DistillationCLI
from lightning_modules.compact_hubert import CompactHubertConfig, CompactHubertModel
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.positions import FourierPositions
from lightning_modules.student_config import StudentConfig
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import make_module, save_corpus, save_teacher, save_whisper
from tests.students import KINDS, POSITIONS
from tests.test_configs import SHRUNK

UNTIL_GROWTH = ("until growth", "grown", "grown, features")
FRONT_ENDS = {"features": "frozen", **dict.fromkeys(UNTIL_GROWTH, "trained_until_growth")}

NUM_SAMPLES = 16_123


@pytest.fixture(autouse=True)
def convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the operations of convolutions, not those of the transforms that may take their place."""
    monkeypatch.setattr(FourierPositions, "forward", HubertPositionalConvEmbedding.forward)


def counted(model: torch.nn.Module, depth: int) -> tuple[int, int]:
    config = model.config
    frames = conv_frames(config, NUM_SAMPLES)[-1]
    formula = sum(front_end_flops(config, NUM_SAMPLES)) + embedding_flops(config, frames)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, NUM_SAMPLES))
    return formula + depth * layer_flops(config, frames), counter.get_total_flops()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48},
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 100},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": [12] * 7},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_conv_pos_embeddings": 15},
    ],
)
def test_forward_flops_are_those_that_torch_counts(sizes: dict[str, object]) -> None:
    config = HubertConfig(**({"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4} | sizes))
    formula, torch_counts = counted(HubertModel(config).eval(), config.num_hidden_layers)
    assert formula == torch_counts


@pytest.mark.parametrize(
    "sizes",
    [
        {"time_reduction": 2},
        {"attention_reuse": "map", "state_width": 24},
        {"layer_heads": [2, 0, 3, 1], "layer_head_width": 8, "layer_intermediate_sizes": [10, 0, 48, 3]},
    ],
)
def test_a_compact_model_costs_what_torch_counts(sizes: dict[str, Any]) -> None:
    common = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    config = CompactHubertConfig(**common, conv_dim=[8] * 7, num_conv_pos_embedding_groups=4, **sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        CompactHubertModel(config).eval()(torch.zeros(1, NUM_SAMPLES), output_hidden_states=True)
    assert teacher_flops(config, NUM_SAMPLES, 4) == counter.get_total_flops()


@pytest.mark.parametrize("taps", [4, 5])
def test_the_several_positional_convolutions_of_data2vec_are_counted(taps: int) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": [8] * 7}
    config = Data2VecAudioConfig(**sizes, num_conv_pos_embedding_groups=4, conv_pos_kernel_size=taps)
    formula, torch_counts = counted(Data2VecAudioModel(config).eval(), 2)
    assert formula == torch_counts


def test_a_layer_too_many_would_be_noticed() -> None:
    config = HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, conv_dim=[8] * 7)
    formula, torch_counts = counted(HubertModel(config).eval(), 3)
    assert formula > torch_counts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_whisper_teacher_costs_what_torch_counts(layers: int, padded: bool, tmp_path: Path) -> None:
    whisper = WhisperTeacher(str(save_whisper(tmp_path)), pad_to_30_seconds=padded)
    whisper.select_layers([1], layers)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        whisper(torch.zeros(1, NUM_SAMPLES))
    formula = [teacher_flops(whisper.model.config, NUM_SAMPLES, count, padded) for count in (layers, layers + 1)]
    assert formula[0] == counter.get_total_flops() < formula[1]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("front_end", ["trained", "frozen", "shared", "narrow", "whisper", "features", *UNTIL_GROWTH])
@pytest.mark.parametrize("intermediate", ["l2l", "prediction", "none"])
def test_a_training_step_costs_what_torch_counts(
    intermediate: str, front_end: str, cached: bool, tmp_path: Path
) -> None:
    save = save_whisper if front_end == "whisper" else save_teacher
    teacher = save(tmp_path / "teacher", layers=3)
    objective = {"intermediate": intermediate, "layers": [1, 2]}
    narrow = {"front_end_init": "random", "conv_channels": 5}
    settings = narrow if front_end in ("narrow", "whisper") else {"front_end": FRONT_ENDS.get(front_end, front_end)}
    module = make_module(teacher, num_layers=3, objective=objective, **settings)
    lengths_B = torch.full((2,), NUM_SAMPLES)
    batch = AudioBatch(torch.randn(2, NUM_SAMPLES), lengths_B, lengths_B, torch.arange(2))
    student, losses = (module.hparams[name] for name in ("student", "objective"))
    config = AutoConfig.from_pretrained(teacher)
    known = front_end in ("features", "grown, features")
    cost = step_cost(config, StudentConfig(**student), ObjectiveConfig(**losses), NUM_SAMPLES, cached, features=known)
    if front_end in UNTIL_GROWTH[1:]:
        module.student.grow(range(3))
    targets = module.targets(batch)._replace(features_BFC=None) if cached else None
    if known:
        frames = int(module.student.num_frames(lengths_B)[0])
        features = CachedRecords(torch.zeros(2, 10_000, dtype=torch.uint8), RecordLayout(0, 0, "none", 8), frames)
        batch = batch._replace(features=features)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.losses(batch, targets=targets).total.backward()
    hubert = module.student.hubert.config
    frames = conv_frames(hubert, NUM_SAMPLES)[-1]
    positional = embedding_flops(hubert, frames) - 2 * frames * hubert.conv_dim[-1] * hubert.hidden_size
    # torch 2.11 counts the weight gradient of a grouped convolution as if it had one group.
    surplus = 2 * (hubert.num_conv_pos_embedding_groups - 1) * positional
    first_stage = cost.first_stage if front_end == UNTIL_GROWTH[0] else 0
    assert 2 * (cost.at(3) + first_stage) == counter.get_total_flops() - surplus


@pytest.mark.parametrize(("head", "depth"), [("linear", 4), ("mlp", 4), ("linear", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind_of_student_costs_what_torch_counts(
    kind: str, head: str, depth: int, tmp_path: Path
) -> None:
    """At depth 2 of 4 the student learns teacher layer 2 alone, beside the output."""
    teacher = save_teacher(tmp_path / "teacher", layers=4, **POSITIONS)
    objective = {"intermediate": "l2l", "layers": [0, 1, 2, 3], "head": head, "unmatched": "skip"}
    module = make_module(teacher, num_layers=4, objective=objective, **KINDS[kind])
    module.student.start_at(depth)
    module.train_matched()
    lengths_B = torch.full((2,), NUM_SAMPLES)
    batch = AudioBatch(torch.randn(2, NUM_SAMPLES), lengths_B, lengths_B, torch.arange(2))
    student, losses = (module.hparams[name] for name in ("student", "objective"))
    config = AutoConfig.from_pretrained(teacher)
    cost = step_cost(config, StudentConfig(**student), ObjectiveConfig(**losses), NUM_SAMPLES, cached=True)
    targets = module.targets(batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.losses(batch, targets=targets).total.backward()
    hubert = module.student.hubert.config
    frames = conv_frames(hubert, NUM_SAMPLES)[-1]
    projected = hubert.conv_dim[-1] * hubert.hidden_size if getattr(hubert, "feature_projection", True) else 0
    positional = embedding_flops(hubert, frames) - 2 * frames * projected
    surplus = 2 * (hubert.num_conv_pos_embedding_groups - 1) * positional
    assert 2 * cost.at(depth) == counter.get_total_flops() - surplus


def test_the_papers_step_costs_35_gflop_per_second_of_audio() -> None:
    cost = step_cost(HubertConfig(), StudentConfig(), ObjectiveConfig(), 32_000)
    assert cost.at(12) / 2 == pytest.approx(35e9, rel=0.05)
    assert 12 * cost.per_layer / 2 == pytest.approx(6.4e9, rel=0.05)


def test_flops_add_up_over_the_stages() -> None:
    growth = Growth.of({"policy": "interleaved", "schedule": "prop-1"}, num_layers=12, max_epochs=10)
    assert (growth.stages, growth.epochs, growth.mean_depth) == ((3, 6, 9, 12), [1, 2, 3, 4], 9.0)
    cost = step_cost(HubertConfig(), StudentConfig(), ObjectiveConfig(), 160_000)
    by_stage = run_flops(cost, growth.stages, growth.epochs)
    assert by_stage[-1] == pytest.approx(10 * cost.at(9.0))
    assert by_stage[0] == cost.at(3)
    middle = step_cost(HubertConfig(), StudentConfig(front_end="trained_until_growth"), ObjectiveConfig(), 160_000)
    frozen = step_cost(HubertConfig(), StudentConfig(front_end="frozen"), ObjectiveConfig(), 160_000)
    stages = (run_flops(each, growth.stages, growth.epochs) for each in (cost, middle, frozen))
    trained, until_growth, never = (np.diff(each, prepend=0) for each in stages)
    assert until_growth.tolist() == pytest.approx([trained[0], *never[1:]])


@pytest.mark.ci
def test_a_grown_run_costs_less_than_a_full_one_by_the_difference_of_their_depths(tmp_path: Path) -> None:
    teacher, corpus = save_teacher(tmp_path / "teacher", layers=12), save_corpus(tmp_path, {"train": 8, "dev": 2})
    inputs = ["--data.root", str(corpus), "--model.teacher.init_args.model", str(teacher)]
    inputs += ["--data.cache_dir", str(tmp_path / "cache"), "--trainer.log_every_n_steps", "1"]
    costs, student = {}, {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    for config, growth in (("full_l2l", {}), ("interleave_equal", {"policy": "interleaved"})):
        DistillationCLI(["fit", "--config", config, *SHRUNK, *inputs, "--runs_dir", str(tmp_path / "runs")])
        settings = {"model": {"student": student}, "data": {"batch_size": 4}, "growth": growth}
        run = tmp_path / "runs" / config
        costs[config] = measured(run, HubertConfig.from_pretrained(teacher), settings)
        summary = json.loads((run / "summary.json").read_text())
        assert costs[config]["train_seconds"] == summary["train_seconds"]
        assert 0 < costs[config]["student_seconds"] < summary["train_seconds"]
        assert costs[config]["peak_memory_bytes"] > 1e8
        assert {"val_layer_4", "val_layer_8"} <= costs[config].keys()
    full, grown = costs["full_l2l"], costs["interleave_equal"]
    assert (full["mean_depth"], grown["mean_depth"]) == (12, 7.5)
    assert len(grown["flops_by_stage"]) == 4
    samples = round(full["audio_seconds"] * 16_000 / 32)
    cost = step_cost(HubertConfig.from_pretrained(teacher), StudentConfig(**student), ObjectiveConfig(), samples)
    settings["data"]["targets"] = "where the targets of a run with a cache lie"
    cached = measured(run, HubertConfig.from_pretrained(teacher), settings)
    assert grown["flops"] - cached["flops"] == pytest.approx(cost.teacher * 32, rel=0.1)
    saved = cost.per_layer * 4.5 * 32  # layers fewer on average, utterances
    assert full["flops"] - grown["flops"] == pytest.approx(saved, rel=0.1)
    by_seconds = {**settings, "data": {"batch_size": None, "batch_seconds": 9.0, "targets": None}}
    assert measured(run, HubertConfig.from_pretrained(teacher), by_seconds)["flops"] == grown["flops"]


def test_an_unfinished_run_has_no_cost(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finished"):
        measured(tmp_path, HubertConfig(), {})
