"""Batches as a trainer gets them: audio, gain, crops, resume at the trainer's step."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from datamodules.audio import BadAudioError, read_audio
from datamodules.superb.datamodule import SuperbBatch, SuperbDataModule
from datamodules.superb.registry import SOURCES, SuperbData
from datamodules.superb.rows import Row
from tests.datamodules.superb import corpora


def target_length(row: Row) -> int:
    return len(row.target)


def make(task: str, root: Path, **more: Any) -> SuperbDataModule:
    data = SuperbData(str(root), num_workers=0, cache_dir=str(root.parent / "cache"))
    module = SuperbDataModule(task, data, target_length, **more)
    module.setup()
    return module


def test_recipes_are_those_of_the_benchmark() -> None:
    recipes = {task: source.recipe for task, source in SOURCES.items() if task != "frames"}
    found = {task: (r.batch_size, r.accumulate, r.eval_batch_size) for task, r in recipes.items()}
    assert found == {
        "pr": (16, 2, 1),
        "asr": (32, 1, 1),
        "sf": (32, 1, 1),
        "ks": (32, 1, 32),
        "ic": (32, 1, 32),
        "sid": (8, 4, 1),
        "er": (4, 8, 4),
        "qbe": (1, 1, 1),
        "asv": (10, 5, 1),
        "sd": (8, 4, 1),
    }


def test_keywords_have_gain_and_a_new_second_of_silence_each_time(tmp_path: Path) -> None:
    module = make("ks", corpora.speech_commands(tmp_path))
    batches = list(itertools.islice(module.train_dataloader(), 3))
    assert [len(batch.rows) for batch in batches] == [32] * 3
    items = [item for batch in batches for item in zip(batch.rows, batch.waveforms, batch.whole, strict=True)]
    silence = [wave for row, wave, _ in items if row.target == "_silence_"]
    assert {len(wave) for wave in silence} == {16_000}
    assert len({tuple(wave[:5].tolist()) for wave in silence}) == len(silence) > 5
    row, wave, whole = next(item for item in items if item[0].target != "_silence_")
    assert whole
    torch.testing.assert_close(wave, torch.from_numpy(read_audio(row.path)) * 10 ** (-3 / 20))
    assert not any(whole for row, _, whole in items if row.target == "_silence_")
    corpus = module.corpus
    words = [[row for row in rows if row.target != "_silence_"] for rows in (corpus.train, corpus.dev)]
    assert min(map(len, words)) < min(len(corpus.train), len(corpus.dev))
    assert module.whole_utterances() == (words[0], words[1] + corpus.tests["test"])


def test_dev_of_keywords_is_one_balanced_draw_and_test_natural(tmp_path: Path) -> None:
    module = make("ks", corpora.speech_commands(tmp_path))
    other = make("ks", tmp_path, seed=1)  # the control
    loader = module.val_dataloader()
    passes = [list(one) for one in (loader, loader, module.val_dataloader(), other.val_dataloader())]
    first, *again, control = ([row.key for batch in one for row in batch.rows] for one in passes)
    assert again == [first, first]
    assert first != control
    assert len(first) == len(module.corpus.dev)
    silence = [
        torch.stack([wave for batch in one for row, wave in zip(batch.rows, batch.waveforms, strict=True)
                     if row.target == "_silence_"])
        for one in passes
    ]  # fmt: skip
    assert silence[0].shape[1] == 16_000
    assert len(silence[0].unique(dim=0)) > 2, "crops of the two recordings differ"
    assert torch.equal(silence[0], silence[1])
    assert torch.equal(silence[0], silence[2])
    assert silence[0].shape != silence[3].shape or not torch.equal(silence[0], silence[3])
    (test,) = module.test_dataloader()
    assert [row for batch in test for row in batch.rows] == module.corpus.tests["test"]


def test_speakers_are_cropped_in_training_only(tmp_path: Path) -> None:
    recipe = replace(SOURCES["sid"].recipe, train_max_samples=12_000, batch_size=6)
    module = make("sid", corpora.voxceleb1(tmp_path), recipe=recipe)
    batch = next(iter(module.train_dataloader()))
    assert sorted(map(len, batch.waveforms)) == [9600] * 3 + [12_000] * 3
    assert (max(batch.num_samples), len(batch.num_samples)) == (12_000, 6)
    assert [row.num_samples == len(wave) for row, wave in zip(batch.rows, batch.waveforms, strict=True)] == batch.whole
    evaluated = [wave for batch in module.val_dataloader() for wave in batch.waveforms]
    assert [len(wave) for wave in evaluated] == [row.num_samples for row in module.corpus.dev]
    train, others = module.whole_utterances()
    assert {row.num_samples for row in train} == {9600}
    assert set(others) == set(module.corpus.dev) | {row for rows in module.corpus.tests.values() for row in rows}
    assert len(set(others)) == len(others)


def test_whole_utterances_are_decoded_once_within_a_limit(tmp_path: Path) -> None:
    root, recipe = corpora.voxceleb1(tmp_path), replace(SOURCES["sid"].recipe, train_max_samples=None)

    def second_pass(keep_bytes: int) -> tuple[list[SuperbBatch], SuperbDataModule]:
        module = make("sid", root, recipe=recipe, keep_bytes=keep_bytes)
        return list(itertools.islice(module.train_dataloader(), 4)), module

    plain, nothing_kept = second_pass(0)
    kept, module = second_pass(2**20)
    assert all(torch.equal(a, b) for one, two in zip(plain, kept, strict=True) for a, b in waves(one, two))
    some = second_pass(4 * max(row.num_samples for row in module.corpus.train))[1]
    number = [len(each.train_set._kept) for each in (nothing_kept, some, module)]
    assert number == [0, 1, len(module.corpus.train)]
    for row in module.corpus.train:
        Path(row.path).unlink()
    assert len(next(iter(module.train_dataloader())).waveforms) == len(plain[0].waveforms)
    with pytest.raises(BadAudioError, match="does not exist"):
        next(iter(some.train_dataloader()))


def waves(one: SuperbBatch, two: SuperbBatch) -> list[tuple[Tensor, Tensor]]:
    return list(zip(one.waveforms, two.waveforms, strict=True))


@pytest.mark.parametrize(("change", "message"), [(np.nan, "holds NaN at "), (9700.0, "has a peak of 9700 where")])
def test_numbers_that_are_no_samples_stop_a_task(change: float, message: str, tmp_path: Path) -> None:
    root = corpora.voxceleb1(tmp_path)
    module = SuperbDataModule("sid", SuperbData(str(root), num_workers=0))
    module.setup()
    path = next(iter(module.val_dataloader())).rows[0].path  # sound before
    samples_T, rate = soundfile.read(path, dtype="float32")
    samples_T[100] = change
    soundfile.write(path, samples_T, rate, subtype="FLOAT")
    with pytest.raises(BadAudioError, match=rf"^{path}: {message}"):
        next(iter(module.val_dataloader()))


def test_stereo_is_bad_audio_unless_it_may_be_converted(tmp_path: Path) -> None:
    root = corpora.voxceleb1(tmp_path)
    path = root / "wav" / "id10001" / "video2" / "00001.wav"
    left_T, rate = soundfile.read(path, dtype="float32")
    soundfile.write(path, np.stack([left_T, np.zeros_like(left_T)], 1), rate, subtype="FLOAT")
    with pytest.raises(BadAudioError, match=r"00001\.wav: has 2 channels; set resample: true"):
        make("sid", root)
    module = SuperbDataModule("sid", SuperbData(str(root), num_workers=0, resample=True))
    module.setup()
    first = next(iter(module.val_dataloader()))
    assert first.rows[0].path == str(path)
    torch.testing.assert_close(first.waveforms[0], torch.from_numpy(left_T) / 2)


def test_window_sampling_needs_target_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task pr sorts its utterances by target length"):
        SuperbDataModule("pr", SuperbData(str(tmp_path)))
    with pytest.raises(ValueError, match="no task 'mood'; choose one of pr, ks"):
        SuperbDataModule("mood", SuperbData(str(tmp_path)))


class Recorder(L.LightningModule):
    """Writes down what it is given; one parameter, so that there are optimizer steps to count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: SuperbBatch) -> Tensor:
        self.seen.append([f"{row.key} {len(wave)} {wave[:3]}" for row, wave in zip(*batch[1::-1], strict=True)])
        return self.weight * torch.cat(batch.waveforms).mean()

    def validation_step(self, batch: SuperbBatch) -> None:
        assert len(batch.rows) == 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(root: Path, steps: int, workers: int = 0, ckpt_path: Path | None = None) -> tuple[Recorder, L.Trainer]:
    data = SuperbData(str(root), num_workers=workers)
    module = Recorder()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recipe = replace(SOURCES["sid"].recipe, batch_size=4, train_max_samples=8_000)
    trainer.fit(module, SuperbDataModule("sid", data, recipe=recipe), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_trainer_sees_the_rest_of_the_stream(workers: int, tmp_path: Path) -> None:
    root = corpora.voxceleb1(tmp_path)
    whole, _ = train(root, 7)
    assert len(whole.seen) == 14
    first, trainer = train(root, 3, workers)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = train(root, 7, workers, tmp_path / "a.ckpt")
    assert first.seen + second.seen == whole.seen
    assert whole.seen[:8] != second.seen
