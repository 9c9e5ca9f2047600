"""Masks of frames, the mixture of targets that masked distillation learns, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, HubertConfig

from datamodules.loading import AudioBatch
from lightning_modules.distillation import DistillationModule
from lightning_modules.masking import FrameMasks, draw_mask
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import make_data, make_module, make_trainer, save_corpus, save_teacher, save_whisper
from tests.lightning_modules.teachers import (
    FAMILIES,
    PADDED,
    STABLE_FAMILIES,
    TINY,
    far,
    padded_waveforms,
    save_model,
    waveforms,
)
from tests.own_data import MyData

SPANS = {"mask_time_prob": 0.8, "mask_time_length": 3}


# -- spans ------------------------------------------------------------------------------------------------------------


class Scripted:
    """A generator that gives the numbers that it is told."""

    def __init__(self, lengths: list[int], places: list[list[float]]) -> None:
        self.lengths, self.places = lengths, places

    def random(self, shape: tuple[int, int] | None = None) -> Any:
        return 0.5 if shape is None else np.array(self.places)

    def integers(self, low: int, high: int, number: int, endpoint: bool) -> np.ndarray:
        assert (low, high, number, endpoint) == (0, 6, len(self.lengths), True)
        return np.array(self.lengths)


def frames_of(num_frames: int, share: float, lengths: list[int], places: list[list[float]]) -> list[int]:
    generator: Any = Scripted(lengths, places)
    return np.flatnonzero(draw_mask(generator, num_frames, share, 3)).tolist()


def test_spans_by_hand() -> None:
    # 0.3 x 20 / 3 + 0.5 = 2.5: two spans. The span of 5 comes first, at int(0.5 x (20 - 5)) = 7 to 11. It leaves the
    # gaps (0, 7) and (13, 20); 0.9 of 14 is in the second, where the span of 3 begins at 13 + int(0.25 x 4) = 14.
    assert frames_of(20, 0.3, [3, 5], [[0.0, 0.5], [0.9, 0.25]]) == [7, 8, 9, 10, 11, 14, 15, 16]
    # 0.4 of 14 is in the first gap, from which one frame before frame 7 stays visible: int(0.99 x 4) = 3 to 5.
    assert frames_of(20, 0.3, [3, 5], [[0.0, 0.5], [0.4, 0.99]]) == [3, 4, 5, 7, 8, 9, 10, 11]
    # Neither gap of 3 and 4 frames has room for a span of 4 and a visible frame, so it is left out.
    assert frames_of(12, 0.3, [4, 4], [[0.0, 0.5], [0.4, 0.5]]) == [4, 5, 6, 7]
    assert frames_of(12, 0.3, [0, 0], [[0.0, 0.0], [0.0, 0.0]]) == [0, 1, 2]  # never only empty spans


def runs(mask_F: np.ndarray) -> list[int]:
    """Lengths of the masked runs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask_F, [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_the_published_settings_mask_four_fifths() -> None:
    masks = [draw_mask(np.random.default_rng(seed), 749, 0.8, 10) for seed in range(100)]
    lengths = [length for mask_F in masks for length in runs(mask_F)]
    # fairseq's function gave 0.788 masked frames and 55.1 spans of 10.72 frames on average, over 2,000 utterances.
    assert np.mean(masks) == pytest.approx(0.788, abs=0.02)
    assert len(lengths) / 100 == pytest.approx(55.1, abs=2)
    assert np.mean(lengths) == pytest.approx(10.72, abs=0.4)
    assert max(lengths) == 20  # two spans would touch and make a longer run if no frame were kept between them
    assert not any(mask_F.all() for mask_F in masks)


@pytest.mark.parametrize("num_frames", range(30))
def test_short_utterances(num_frames: int) -> None:
    for seed in range(20):
        mask_F = draw_mask(np.random.default_rng(seed), num_frames, 0.8, 10)
        assert mask_F.shape == (num_frames,)
        assert not num_frames or not mask_F.all()


# -- masks of batches -------------------------------------------------------------------------------------------------


def batch_of(segments: list[int] | None, frames: list[int]) -> tuple[AudioBatch, Tensor]:
    lengths_B = torch.tensor([400 + 320 * (number - 1) for number in frames])
    batch = AudioBatch(torch.zeros(len(frames), int(lengths_B.max())), lengths_B)
    return batch._replace(segments=None if segments is None else torch.tensor(segments)), torch.tensor(frames)


@pytest.mark.parametrize("kind", ["drawn", "fixed"])
def test_a_mask_depends_on_its_segment_alone(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = FrameMasks(kind, 0.8, 3, seed=5)
    both_BF = masks.of(*batch_of([7, 3], [40, 25]), 40, epoch=2)
    assert both_BF.dtype == torch.bool
    assert both_BF.shape == (2, 40)
    assert both_BF[0].any()
    assert both_BF[1].any()
    assert not both_BF[1, 25:].any()  # only valid frames
    alone_BF = masks.of(*batch_of([3], [25]), 25, epoch=2)
    assert torch.equal(alone_BF[0], both_BF[1, :25])
    assert not torch.equal(masks.of(*batch_of([4], [25]), 25, epoch=2), alone_BF)
    assert torch.equal(masks.of(*batch_of([3], [25]), 25, epoch=3), alone_BF) == (kind == "fixed")
    assert not torch.equal(FrameMasks(kind, 0.8, 3, seed=6).of(*batch_of([3], [25]), 25, epoch=2), alone_BF)


def test_without_numbers_of_segments_masks_follow_torch_s_seed() -> None:
    masks, found = FrameMasks("drawn", 0.8, 3, seed=5), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(masks.of(*batch_of(None, [25, 25]), 25, epoch=0))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])
    with pytest.raises(ValueError, match=r"masked=fixed needs batches with the numbers of their segments"):
        FrameMasks("fixed", 0.8, 3, seed=5).of(*batch_of(None, [25]), 25, epoch=0)


# -- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_mixture_of_two_passes(family: str, padded: bool, folders: dict[str, Path]) -> None:
    waves_BT, lengths_B = (padded_waveforms(), PADDED) if padded else (waveforms(), None)
    attention_BT = (torch.arange(8000) < PADDED[:, None]).long() if padded else None
    mask_BF = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    if padded:
        mask_BF[1, 15:] = False
    whole = AutoModel.from_pretrained(folders[family]).eval()
    whole.config.apply_spec_augment = True
    with torch.no_grad():
        passes = [
            whole(waves_BT, attention_mask=attention_BT, mask_time_indices=indices, output_hidden_states=True)
            for indices in (None, mask_BF)
        ]
    states = [[*each.hidden_states[:-1], each.last_hidden_state] for each in passes]
    teacher = HuggingFaceTeacher(str(folders[family]))
    teacher.model.config.apply_spec_augment = False  # as some models are saved
    teacher.use_masks()
    teacher.select_layers([0, 2], None)
    targets = teacher(waves_BT, lengths_B, mask_BF)
    for found_BFD, layer in ((targets.hidden[0], 0), (targets.hidden[2], 2), (targets.output_BFD, len(states[0]) - 1)):
        for item in range(2):
            for frame in range(24 if not padded or item == 0 else 15):
                expected_D = states[0 if mask_BF[item, frame] else 1][layer][item, frame]
                torch.testing.assert_close(found_BFD[item, frame], expected_D, atol=1e-5, rtol=1e-4)
        assert all(far(found_BFD[:, :15], each[layer][:, :15], 1e-3) for each in states)  # neither pass alone
    assert family not in STABLE_FAMILIES or teacher.final_norm
    torch.testing.assert_close(teacher(waves_BT, lengths_B).output_BFD, states[0][-1])


def test_features_are_computed_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, calls = HuggingFaceTeacher(str(folders["hubert"])), []
    teacher.use_masks()
    teacher.share_front_end()
    extractor = teacher.model.feature_extractor
    extractor.register_forward_hook(lambda *_: calls.append(1))
    mask_BF = torch.zeros(2, 24, dtype=torch.bool)
    mask_BF[:, 3:9] = True
    features_BFC = teacher(waveforms(), None, mask_BF).features_BFC
    assert calls == [1]
    assert torch.equal(features_BFC, teacher(waveforms()).features_BFC)
    assert teacher.model.feature_extractor is extractor


@pytest.mark.ci
def test_a_compiled_teacher_gives_the_same_mixture(folders: dict[str, Path]) -> None:
    mask_BF = torch.zeros(2, 24, dtype=torch.bool)
    mask_BF[:, 3:9] = True
    found = []
    for settings in ({}, {"compile": True, "compile_backend": "aot_eager"}):
        teacher = HuggingFaceTeacher(str(folders["hubert"]), **settings)
        teacher.use_masks()
        found.append(teacher(waveforms(), None, mask_BF).output_BFD)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


# -- a module ---------------------------------------------------------------------------------------------------------


def masked_module(folder: Path, kind: str = "drawn", **student: Any) -> DistillationModule:
    return make_module(folder, dropout=0.0, objective={"masked": kind}, **(SPANS | student))


@pytest.mark.ci
@pytest.mark.parametrize("student", [{}, {"compile": True, "compile_backend": "aot_eager"}, {"front_end": "shared"}])
def test_student_and_teacher_are_masked_alike_in_training_only(student: dict[str, Any], tmp_path: Path) -> None:
    module = masked_module(save_teacher(tmp_path / "teacher"), **student)
    batch = AudioBatch(waveforms(), torch.tensor([8000, 8000]), torch.tensor([8000, 8000]), segments=torch.arange(2))
    mask_BF = module.mask_of(batch)
    assert mask_BF is not None
    assert mask_BF.any()
    with torch.no_grad():
        hidden_states = module.student(batch.waveforms, mask_BF=mask_BF)
        targets = module.teacher(batch.waveforms, None, mask_BF)
        by_hand = module.objective(hidden_states, targets, range(4), None, 48.0).total
        assert module.losses(batch).total == pytest.approx(float(by_hand), rel=1e-5)
        module.eval()
        plain = module.objective(
            module.student(batch.waveforms), module.teacher(batch.waveforms), range(4), None, 48.0
        ).total
        assert module.losses(batch).total == pytest.approx(float(plain), rel=1e-5)
        assert far(hidden_states[0], module.student(batch.waveforms)[0], 0.01)
    assert abs(float(plain - by_hand)) > 1e-3


def lacking(folder: Path, name: str) -> Path:
    """The checkpoint in ``folder`` without one of its weights."""
    model = AutoModel.from_pretrained(folder)
    weights = {key: value for key, value in model.state_dict().items() if key != name}
    model.save_pretrained(folder, state_dict=weights)
    return folder


def without_embedding(folder: Path) -> Path:
    config = HubertConfig(**TINY, num_conv_pos_embeddings=16, mask_time_prob=0.0, mask_feature_prob=0.0)
    save_model(folder, config)
    save_teacher(folder / "other")
    (folder / "other" / "preprocessor_config.json").rename(folder / "preprocessor_config.json")
    return folder


@pytest.mark.parametrize("kind", ["whisper", "saved without", "lost"])
def test_a_teacher_without_a_trained_mask_embedding_is_refused(kind: str, tmp_path: Path) -> None:
    make = {
        "whisper": lambda: save_whisper(tmp_path / "t"),
        "saved without": lambda: without_embedding(tmp_path / "t"),
        "lost": lambda: lacking(save_teacher(tmp_path / "t"), "masked_spec_embed"),
    }
    folder = make[kind]()
    make_module(folder)  # without masks it is a teacher
    with pytest.raises(ValueError, match=r"model\.objective\.masked needs a teacher with a trained mask embedding"):
        masked_module(folder)


@pytest.mark.parametrize("student", [{}, {"mask_time_prob": 0.5, "mask_time_length": 0}])
def test_masks_need_the_student_s_settings(student: dict[str, Any], tmp_path: Path) -> None:
    teacher = HuggingFaceTeacher(str(save_teacher(tmp_path / "teacher")))
    settings = StudentConfig(16, 24, 2, 4, **student), ObjectiveConfig(layers=[], masked="drawn")
    with pytest.raises(ValueError, match=r"masked=drawn masks the student's input, .* both must be positive"):
        DistillationModule(teacher, *settings)


def test_data_of_one_s_own_can_draw_masks_and_not_fix_them(tmp_path: Path) -> None:
    teacher, corpus = save_teacher(tmp_path / "teacher"), save_corpus(tmp_path / "corpus", {"train": 10})
    trainer = make_trainer(tmp_path / "run", max_epochs=1)
    trainer.fit(masked_module(teacher), datamodule=MyData(str(corpus), batch_size=3))
    assert trainer.callback_metrics["train/loss"].isfinite()
    with pytest.raises(ValueError, match=r"masked=fixed needs batches with the numbers of their segments"):
        make_trainer(tmp_path / "run", max_epochs=1).fit(
            masked_module(teacher, "fixed"), datamodule=MyData(str(corpus), batch_size=3)
        )


def test_masks_that_change_cannot_be_read_from_a_cache(tmp_path: Path) -> None:
    teacher, corpus = save_teacher(tmp_path / "teacher"), save_corpus(tmp_path / "corpus", {"train": 8, "dev": 2})
    data = make_data(corpus, tmp_path / "cache", crop="fixed", targets=str(tmp_path / "targets"))
    with pytest.raises(ValueError, match=r"cannot be cached with model\.objective\.masked=drawn"):
        make_trainer(tmp_path / "run").fit(masked_module(teacher), datamodule=data)
