"""interstack similarity: a small run with two growths, analysed; and each measure on cases with a known answer."""

import contextlib
import copy
import json
import math
from pathlib import Path

import pytest
import soundfile
import torch
from torch import nn

from datamodules.corpus import CorpusSettings
from datamodules.packing import pack_split
from datamodules.speech_data import AudioBatch
from experiments.analysis.cka import layer_similarity
from experiments.analysis.depth_use import change, depth_use, idle_layers, layers_in_order, layers_needed
from experiments.analysis.similarity import (
    _teacher,
    as_learnt,
    choose_recordings,
    mean_over_pairs,
    read_recordings,
    read_waveforms,
    similarity,
    stage_checkpoints,
    weight_distances,
)
from experiments.report.stage_figures import depth_use_picture, exits_picture
from lightning_modules.export import export_student, load_student
from tests.helpers import make_data, make_module, make_stacking, make_trainer, save_corpus, save_teacher
from tests.processes import ended, fork_program
from tests.students import KINDS

DEPTH_USE = {"skipped": 4, "swapped": 3, "exits": 4}
"""Number of losses of a student with four layers."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with stages of 1, 2 and 4 layers; teacher and corpus lie beside it."""
    folder = tmp_path_factory.mktemp("similarity")
    teacher, corpus = save_teacher(folder / "teacher"), save_corpus(folder / "corpus", {"train": 4, "dev": 3})
    arguments = [
        *("fit", "--name", "run", "--runs_dir", str(folder), "--growth.policy", "interleaved"),
        *("--growth.layers_per_stage", "1", "--growth.stages", "[1, 2, 4]", "--model.objective.weight", "0"),
        *("--model.student.hidden_size", "16", "--model.student.intermediate_size", "24"),
        *("--model.student.num_heads", "2", "--model.student.num_layers", "4"),
        *("--model.teacher.init_args.model", str(teacher), "--data.root", str(corpus)),
        *("--data.train_splits", "[train]", "--data.val_splits", "[]", "--data.batch_size", "2"),
        *("--data.cache_dir", str(folder / "cache"), "--data.num_workers", "0", "--trainer.max_epochs", "3"),
        *("--trainer.accelerator", "cpu", "--wandb.mode", "disabled", "--log_samples", "false"),
    ]
    assert ended(fork_program(arguments, folder / "output.txt")) == 0, (folder / "output.txt").read_text()
    return folder / "run"


@pytest.mark.parametrize("targets", ["hidden", "feed_forward"])
def test_the_teacher_outputs_what_the_student_learnt(targets: str, tmp_path: Path) -> None:
    spec = {"class_path": "lightning_modules.teacher.HuggingFaceTeacher"}
    spec["init_args"] = {"model": str(save_teacher(tmp_path / "teacher"))}
    teacher = _teacher({"teacher": spec, "recipe": {"objective": {"targets": targets}}}, None)
    assert teacher is not None
    assert teacher.feed_forward == (targets == "feed_forward")
    spec["init_args"] |= {"normalize": True, "revision": "abc"}  # of the hub
    copied = _teacher({"teacher": spec}, str(save_teacher(tmp_path / "copy")))
    assert copied is not None
    assert (copied.init_args["model"], copied.normalize) == (str(tmp_path / "copy"), True)


@pytest.mark.parametrize("kind", ["layer", "standardize"])
def test_a_teachers_layer_is_compared_as_it_was_learnt(kind: str) -> None:
    """With one dimension far larger than the others, as Whisper has it."""
    student_ND = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    outlier_N1 = 500 * torch.randn(200, 1, generator=torch.Generator().manual_seed(1))
    teacher_ND = torch.cat([outlier_N1 if kind == "standardize" else outlier_N1.abs() + 50, student_ND[:, 1:]], dim=1)
    ((raw,),) = layer_similarity([student_ND], [as_learnt(teacher_ND, "none")])
    ((found,),) = layer_similarity([student_ND], [as_learnt(teacher_ND, kind)])
    assert raw < 0.1
    assert found > 0.3


@pytest.mark.ci
def test_a_run_is_analysed_stage_by_stage(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    similarity([str(run)], str(run.parent / "corpus"), str(tmp_path), utterances=2, row="interleave", seed=3)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["row"], result["seed"]) == ("interleave", 3)
    assert len(set(result["recordings"])) == 2
    stages = result["runs"][0]["stages"]
    assert [stage["depth"] for stage in stages] == [1, 2, 4]
    assert [stage["ancestry"] for stage in stages] == [[0], [0, 0], [0, 0, 0, 0]]
    last = stages[-1]
    assert result["cka"] == last["cka"]
    assert all(last[key][at][at] == pytest.approx(1) for key in ("cka", "cosine") for at in range(4))
    assert [len(row) for row in last["cka_teacher"]] == [4] * 4
    assert 0 < last["weight_distance_copies"] < 0.5  # a few steps after the growth
    assert last["others"] is None  # one first-stage layer: all are its copies
    assert {key: len(last["depth_use"][key]) for key in ("skipped", "swapped", "exits")} == DEPTH_USE
    assert {path.name for path in tmp_path.iterdir()} == {
        "result.json",
        "stages.png",
        "copies.png",
        "depth_use.png",
        "exits.png",
    }


@pytest.mark.parametrize("kind", ["joined frames", "reused maps", "own model"])
def test_students_of_other_kinds_are_analysed(kind: str, tmp_path: Path) -> None:
    teacher, corpus = save_teacher(tmp_path / "teacher"), save_corpus(tmp_path / "corpus", {"train": 4, "dev": 2})
    module = make_module(teacher, **KINDS[kind])
    stacking = make_stacking(stages=[2, 4])
    trainer = make_trainer(tmp_path, stacking, max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    similarity([str(tmp_path / "last.ckpt")], str(corpus), str(tmp_path / "analysed"), utterances=2)
    (stage,) = json.loads((tmp_path / "analysed" / "result.json").read_text())["runs"][0]["stages"]
    assert [len(row) for row in stage["cka_teacher"]] == [4] * 4
    assert 0 < stage["weight_distance_copies"] < 0.5 < stage["weight_distance_others"]
    # A layer that reuses a map cannot be run without the one that makes it.
    assert (stage["depth_use"] is None) == (kind == "reused maps")


def test_the_loss_is_that_of_training(run: Path, tmp_path: Path) -> None:
    """Output loss of the checkpoint, as `DistillationModule` computes it, on the same waveform."""

    from lightning_modules.distillation import DistillationModule

    similarity([str(run)], str(run.parent / "corpus"), str(tmp_path), utterances=1)
    found = json.loads((tmp_path / "result.json").read_text())["runs"][0]["stages"][-1]["depth_use"]["loss"]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    module = DistillationModule(**checkpoint["interstack"]["recipe"]).eval()
    module.load_state_dict(checkpoint["state_dict"])
    (waveform_T,) = read_waveforms(run.parent / "corpus", 1, 10.0)
    length = torch.tensor([len(waveform_T)])
    batch = AudioBatch(waveform_T[None], length, length)
    with torch.no_grad():
        assert found == pytest.approx(float(module.losses(batch).output), rel=1e-4)  # type: ignore[arg-type]


def test_an_export_has_no_projection_but_all_similarities(run: Path, tmp_path: Path) -> None:
    export_student(run / "checkpoints" / "last.ckpt", tmp_path / "export")
    names = [str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "export")]
    similarity(names, str(run.parent / "corpus"), str(tmp_path / "out"), utterances=1)
    checkpoint, exported = json.loads((tmp_path / "out" / "result.json").read_text())["runs"]
    assert exported["stages"][0]["depth_use"] is None
    assert exported["stages"][0]["cka_teacher"] == checkpoint["stages"][0]["cka_teacher"]
    similarity(names, str(run.parent / "corpus"), str(tmp_path / "alone"), utterances=1, teacher="none")
    assert json.loads((tmp_path / "alone" / "result.json").read_text())["cka_teacher"] is None


def test_skipping_and_swapping(run: Path) -> None:
    """A layer that returns its input costs nothing to skip; swapping two equal layers nothing; others do cost."""
    model = load_student(run / "checkpoints" / "last.ckpt").model
    layers = model.encoder.layers
    with torch.no_grad():
        for parameter in layers[2].parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    layers[1] = copy.deepcopy(layers[0])
    layers[3].forward = lambda hidden_states, *args, **kwargs: hidden_states
    waveforms = read_waveforms(run.parent / "corpus", 2, 10.0)
    use = depth_use(model, waveforms, lambda output_FD, _: output_FD.square().mean(1).sum() + output_FD[:, 0].sum())
    assert use.skipped[3] == pytest.approx(use.loss, rel=1e-6)
    assert use.swapped[0] == pytest.approx(use.loss, rel=1e-6)
    assert use.skipped[2] != pytest.approx(use.loss, rel=1e-3)
    assert use.swapped[1] != pytest.approx(use.loss, rel=1e-3)
    assert use.exits[3] == use.loss
    assert use.exits[2] == pytest.approx(use.loss, rel=1e-6)  # the last layer returns its input
    assert use.exits[1] != pytest.approx(use.loss, rel=1e-3)
    whole = [model(waveform_T[None], output_hidden_states=True).hidden_states[1][0] for waveform_T in waveforms]
    first = torch.cat(whole)
    assert use.exits[0] == pytest.approx(float((first.square().mean(1) + first[:, 0]).mean().detach()), rel=1e-5)
    assert list(model.encoder.layers) == list(layers)


def test_idle_layers_and_the_layers_needed() -> None:
    use = {"loss": 2.0, "skipped": [9.0, 2.019, 2.1, 1.9], "exits": [4.0, 3.0, 2.01, 2.0]}
    assert idle_layers(use) == [2, 4]
    assert idle_layers(use, tolerance=0.1) == [2, 3, 4]
    assert layers_needed(use) == 3
    assert layers_needed(use, tolerance=0.5) == 2
    assert layers_needed({"loss": 2.0, "skipped": [], "swapped": []}) is None
    below_0 = {"loss": -0.5, "skipped": [-0.1, -0.497, -0.51], "exits": [-0.2, -0.499, -0.5]}  # L1 less a cosine
    assert idle_layers(below_0) == [2, 3]
    assert layers_needed(below_0) == 2
    assert change(below_0["skipped"], below_0).tolist() == pytest.approx([80.0, 0.6, -2.0])


def test_results_without_exits_are_still_drawn() -> None:
    """Those of earlier versions, beside new ones."""
    pytest.importorskip("matplotlib")
    old = {"loss": 2.0, "skipped": [9.0, 2.0], "swapped": [3.0]}
    runs = [
        {"name": name, "stages": [{"depth": 2, "copies": None, "depth_use": use}]}
        for name, use in (("midas", old), ("interleave", old | {"exits": [3.0, 2.0]}), ("export", None))
    ]
    assert depth_use_picture(runs[:2]) is not None
    assert exits_picture(runs[:1]) is None
    drawn = exits_picture(runs)
    assert drawn is not None
    (axes,) = drawn.figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[50.0, 0.0]]


def test_layers_come_back_after_an_error(run: Path) -> None:
    model = load_student(run / "checkpoints" / "last.ckpt").model
    layers = list(model.encoder.layers)
    with contextlib.suppress(RuntimeError), layers_in_order(model, [3, 0]):
        assert list(model.encoder.layers) == [layers[3], layers[0]]
        raise RuntimeError
    assert list(model.encoder.layers) == layers


def test_pairs_by_ancestor() -> None:
    matrix = [[1.0, 0.9, 0.2, 0.4], [0.9, 1.0, 0.4, 0.2], [0.2, 0.4, 1.0, 0.1], [0.4, 0.2, 0.1, 1.0]]
    assert mean_over_pairs(matrix, [0, 0, 1, None], same=True) == pytest.approx(0.9)
    assert mean_over_pairs(matrix, [0, 0, 1, None], same=False) == pytest.approx((0.2 + 0.4 + 0.4 + 0.2 + 0.1) / 5)
    assert mean_over_pairs(matrix, [0, 1, 2, 3], same=True) is None
    assert mean_over_pairs(matrix, [None, None, 0, 1], same=True) is None  # two fresh layers are no copies


def test_weight_distance_is_zero_for_copies_and_large_for_others() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, other = nn.Linear(64, 64), nn.Linear(64, 64)
    distances = weight_distances([layer, copy.deepcopy(layer), other])
    assert distances[0][1] == 0
    assert distances[0][2] == pytest.approx(2**0.5, rel=0.05)
    assert math.isnan(weight_distances([layer, nn.Linear(64, 32)])[0][1])  # as in DPHuBERT
    some = [[0.0, math.nan, 0.2], [math.nan, 0.0, 0.4], [0.2, 0.4, 0.0]]
    assert mean_over_pairs(some, [0, 0, 0], same=True) == pytest.approx(0.3)


def test_the_utterances_of_a_packed_corpus_are_those_of_its_files(tmp_path: Path) -> None:
    corpus = save_corpus(tmp_path / "corpus", {"dev": 5})
    settings = CorpusSettings((str(corpus),), ("dev",))
    pack_split(settings, tmp_path / "packed", 30_000, cache_dir=str(tmp_path / "cache"))
    from_files, from_pack = (read_waveforms(tmp_path / name, 3, 0.4) for name in ("corpus", "packed"))
    assert all(torch.equal(*pair) for pair in zip(from_files, from_pack, strict=True))
    assert not torch.equal(from_files[0], from_pack[1])


@pytest.mark.parametrize(
    ("number", "expected"), [(1, "0"), (3, "036"), (5, "02468"), (10, "0123456789"), (12, "0123456789")]
)
def test_recordings_are_spread_over_the_folder_by_name(number: int, expected: str, tmp_path: Path) -> None:
    """The first ones by name would be of one speaker."""
    for speaker in range(10):
        (tmp_path / str(speaker)).mkdir()
        soundfile.write(tmp_path / str(speaker) / "a.wav", torch.zeros(800).numpy(), 16_000)
    assert "".join(Path(path).parent.name for path in choose_recordings(tmp_path, number)) == expected


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoints"):
        stage_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="holds no audio"):
        read_waveforms(tmp_path, 1, 1.0)
    with pytest.raises(ValueError, match="must be positive"):
        read_waveforms(tmp_path, 0, 1.0)
    with pytest.raises(ValueError, match="must be positive"):
        read_recordings([], 0.0)
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, torch.zeros(800).numpy(), 16_000)
    with pytest.raises(ValueError, match=r"a\.flac and .*a\.wav are one utterance twice"):
        read_waveforms(tmp_path, 2, 1.0)
