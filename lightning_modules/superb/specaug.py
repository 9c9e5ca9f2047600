"""SpecAugment on features for SUPERB's ASR and SF: time warp, four feature masks, two time masks.

Shapes: B batch, F frames, D width. Random numbers come from torch's own generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WARP_WINDOW = 5
FEATURE_MASKS, WIDEST_FEATURE_MASK = 4, 50
TIME_MASKS, WIDEST_TIME_MASK = 2, 40


def spec_augment(features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
    """Warp and mask features; frames beyond ``num_frames`` are masked but not warped."""
    warped_BFD = torch.stack(
        [
            torch.cat([time_warp(item_FD[:frames]), item_FD[frames:]])
            for item_FD, frames in zip(features_BFD, num_frames, strict=True)
        ]
    )
    batch, frames, width = warped_BFD.shape
    masked_BD = random_masks(batch, width, FEATURE_MASKS, WIDEST_FEATURE_MASK).to(features_BFD.device)
    masked_BF = random_masks(batch, frames, TIME_MASKS, WIDEST_TIME_MASK).to(features_BFD.device)
    return warped_BFD.masked_fill(masked_BD[:, None, :] | masked_BF[:, :, None], 0.0)


def time_warp(features_FD: Tensor, window: int = WARP_WINDOW) -> Tensor:
    """Move a random frame by up to ``window`` frames and resize both sides (bicubic). Short items do not change."""
    frames = len(features_FD)
    if frames <= 2 * window:
        return features_FD
    centre = _integer(window, frames - window)
    moved = _integer(centre - window, centre + window) + 1
    return torch.cat([_resized(features_FD[:centre], moved), _resized(features_FD[centre:], frames - moved)])


def _resized(features_FD: Tensor, frames: int) -> Tensor:
    size = (frames, features_FD.shape[1])
    return nn.functional.interpolate(features_FD[None, None], size, mode="bicubic", align_corners=False)[0, 0]


def random_masks(batch: int, size: int, count: int, widest: int) -> Tensor:
    """Boolean (B, size): ``count`` masks of width 0 to ``widest - 1`` per item, starting where the widest one fits."""
    widths_BC1 = torch.randint(widest, (batch, count, 1))
    starts_BC1 = torch.randint(max(1, size - int(widths_BC1.max())), (batch, count, 1))
    positions = torch.arange(size)
    return ((positions >= starts_BC1) & (positions < starts_BC1 + widths_BC1)).any(1)


def _integer(low: int, high: int) -> int:
    """Draw an integer uniformly from [low, high)."""
    return int(torch.randint(low, high, ()))
