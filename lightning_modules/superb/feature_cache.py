"""A cache of the hidden states of whole utterances, in memory or on disk. The frozen upstream never changes them.

Each utterance is computed alone, without the padding of a batch. Padding changes the output of encoders with group norm
over time, so this deviates from s3prl in training. The states are kept in half precision, a little more than 1 MB per
second of audio with HuBERT Base. Results that are compared with s3prl's are made without the cache.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from datamodules.errors import InputError
from datamodules.files import write_bytes
from datamodules.shards import free_bytes
from lightning_modules.checkpoint_files import damage, serialised
from lightning_modules.superb.upstream import Upstream


class FeatureCache:
    """Hidden states by a hash of the waveform, so that another gain or a changed file never gets wrong states.

    Args:
        upstream: the encoder that computes the states; the folder on disk is named by its digest and the precision.
        folder: parent folder of the cache; ``None``: the cache is in memory.
        precision: the trainer's precision, in which the upstream computes.

    Attributes:
        hits, misses: numbers of utterances that were in the cache, and that were not.
    """

    def __init__(self, upstream: Upstream, folder: Path | None = None, precision: str = "32-true") -> None:
        self.upstream = upstream
        self.folder = folder / f"{upstream.digest()}_{precision}" if folder else None
        self.hits = self.misses = 0
        self._memory: dict[str, Tensor] = {}

    def require_room(self, lengths: Iterable[int]) -> None:
        """Refuse a disk without room for the states of whole utterances of these lengths in samples.

        What the folder has already counts as room, since it may be the states of the same utterances.

        Raises:
            InputError: the disk has less room.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        frames = sum(map(self.upstream.num_frames, lengths))
        needed = frames * self.upstream.num_states * self.upstream.width * torch.half.itemsize
        if (free := free_bytes(self.folder, "*/*.pt")) < needed:
            raise InputError(
                f"{self.folder} has room for {free / 1e9:.1f} GB, the hidden states of the task's utterances need "
                f"{needed / 1e9:.1f} GB: choose another folder, or leave out --feature_cache"
            )

    def states(self, waveform_T: Tensor, keep: bool = True) -> list[Tensor]:
        """Hidden states (F, D) of one utterance; ``keep=False`` does not store them, as for a random crop."""
        name = hashlib.sha1(waveform_T.cpu().contiguous().numpy().tobytes()).hexdigest() if keep else ""
        states_LFD = self._read(name) if keep else None
        if states_LFD is None:
            self.misses += 1
            states_LFD = torch.cat(self.upstream([waveform_T])).half()  # half, as from the cache
            if keep:
                self._write(name, states_LFD.cpu())
        else:
            self.hits += 1
        return list(states_LFD.to(waveform_T.device).float())

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.pt"

    def _read(self, name: str) -> Tensor | None:
        if self.folder is None:
            return self._memory.get(name)
        path = self._path(name)
        if not path.is_file() or damage(path) is not None:  # then the states are computed anew
            return None
        return torch.load(path, weights_only=True)

    def _write(self, name: str, states_LFD: Tensor) -> None:
        if self.folder is None:
            self._memory[name] = states_LFD
            return
        write_bytes(self._path(name), serialised(states_LFD))
