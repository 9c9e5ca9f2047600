from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from datamodules.phones import IGNORED, FrameLabelDataset, stack_crops
from tests.aligned_corpus import TONES, save_aligned_corpus

PHONES = ["SIL", *TONES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_aligned_corpus(tmp_path_factory.mktemp("tones"), {"train": 5, "test": 3})


def test_every_pass_is_another_permutation(root: Path) -> None:
    data = FrameLabelDataset(root, ["train", "test"], PHONES, crop_samples=4000, length=24, seed=1)
    assert len(data) == 24
    rows = [[data.crop(8 * epoch + i)[0] for i in range(8)] for epoch in range(3)]
    assert [sorted(order) for order in rows] == [list(range(8))] * 3
    assert rows[0] != rows[1] != rows[2]
    assert len(FrameLabelDataset(root, ["train"], PHONES, crop_samples=4000)) == 5


def test_items_are_a_function_of_seed_and_index(root: Path) -> None:
    one, two, other = (FrameLabelDataset(root, ["train"], PHONES, 4000, 20, seed) for seed in (1, 1, 2))
    backwards = [two.crop(i) for i in reversed(range(20))][::-1]
    assert [one.crop(i) for i in range(20)] == backwards
    assert [other.crop(i) for i in range(20)] != backwards
    assert torch.equal(one[13].waveforms, two[13].waveforms)


def test_labels_belong_to_the_crop(root: Path) -> None:
    """Each tone's frames have the tone's frequency: the labels stand where the sound is."""
    data, frequencies = (
        FrameLabelDataset(root, ["train"], PHONES, 9000, 10, seed=3),
        np.fft.rfftfreq(400, 1 / 16_000),
    )
    right, shifted, count = 0, 0, 0
    for item in range(10):
        waveform_T, labels_F = data[item]
        assert waveform_T.shape == (9000,)
        assert labels_F.shape == (27,)
        spectra = [np.abs(np.fft.rfft(waveform_T[320 * f : 320 * f + 400].numpy())) for f in range(27)]
        heard = [float(frequencies[spectrum.argmax()]) for spectrum in spectra]
        for frame, label in enumerate(labels_F.tolist()):
            if label:
                count += 1
                right += abs(heard[frame] - TONES[PHONES[label]]) < 50
                shifted += abs(heard[(frame + 5) % 27] - TONES[PHONES[label]]) < 50
    assert right > 0.95 * count > 100
    assert shifted < 0.7 * count


def test_short_utterances_are_padded_and_not_scored(root: Path) -> None:
    data = FrameLabelDataset(root, ["train"], PHONES, crop_samples=40_000)
    batch = stack_crops([data[0], data[1]])
    assert batch.waveforms.shape == (2, 40_000)
    assert batch.labels.shape == (2, 124)
    row, start = data.crop(0)
    assert start == 0
    valid = (data.num_samples[row] - 400) // 320 + 1
    assert (batch.labels[0, valid:] == IGNORED).all()
    assert (batch.labels[0, :valid] >= 0).all()
    assert not batch.waveforms[0, data.num_samples[row] :].any()


def test_unknown_phones_and_short_audio_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phones d of train are not in the inventory"):
        FrameLabelDataset(root, ["train"], ["SIL", "a", "b", "c"], 4000)


def test_audio_of_another_rate_is_converted_as_it_was_aligned(tmp_path: Path) -> None:
    root = save_aligned_corpus(tmp_path, {"train": 2})
    plain = FrameLabelDataset(root, ["train"], PHONES, 4000)
    labels, waveforms = ([plain[index][part] for index in range(len(plain))] for part in (1, 0))
    for path in map(Path, plain.paths):
        waveform_T, rate = soundfile.read(path)
        soundfile.write(path, soxr.resample(np.stack([waveform_T] * 2, axis=1), rate, 44_100), 44_100)
    other = FrameLabelDataset(root, ["train"], PHONES, 4000)
    assert other.num_samples == plain.num_samples
    for index in range(len(other)):
        assert torch.equal(other[index].labels, labels[index])
        assert (other[index].waveforms - waveforms[index]).abs().max() < 0.1
