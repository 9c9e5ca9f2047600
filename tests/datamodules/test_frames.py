"""The arithmetic of frames, of numbers and of tensors."""

import torch

from datamodules.frames import count_windows
from lightning_modules.front_end import conv_frames
from tests.lightning_modules.teachers import FAMILIES

LENGTHS = [*range(1500), 16_000, 16_080, 16_400, 32_000, 33_000]


def test_one_window_counts_the_frames_of_hubert_s_convolutions() -> None:
    config = FAMILIES["hubert"]()
    found = [count_windows(length) for length in LENGTHS]
    assert found == [conv_frames(config, length)[-1] for length in LENGTHS]
    assert found != [round(length / 320) for length in LENGTHS]


def test_tensors_are_counted_as_numbers_are() -> None:
    config, lengths_N = FAMILIES["hubert"](), torch.tensor(LENGTHS)
    assert count_windows(lengths_N, hop=160).tolist() == [count_windows(length, hop=160) for length in LENGTHS]
    layers_LN = torch.stack(conv_frames(config, lengths_N))
    assert layers_LN.dtype == torch.long
    assert layers_LN.T.tolist() == [conv_frames(config, length) for length in LENGTHS]


def test_what_is_shorter_than_a_window_has_no_frame() -> None:
    assert [count_windows(length) for length in (0, 399, 400, 719, 720)] == [0, 0, 1, 1, 2]
