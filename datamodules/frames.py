"""The arithmetic of frames: windows of samples, one every hop."""

from typing import TypeVar

from torch import Tensor

WINDOW, HOP = 400, 320
"""Samples in a frame's window (25 ms) and from frame to frame (20 ms) in HuBERT-like front ends at 16 kHz.

Frame f covers samples [HOP f, HOP f + WINDOW).
"""
Length = TypeVar("Length", int, Tensor)


def count_windows(length: Length, window: int = WINDOW, hop: int = HOP) -> Length:
    """Number of whole windows in ``length`` samples, one every ``hop``; 0 where the length is less than a window."""
    windows = (length - window) // hop + 1
    return windows * (windows > 0)
