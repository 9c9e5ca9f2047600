"""Hidden states of whole utterances, kept in memory or on disk, since nothing below them changes.

Each utterance is computed alone, without the padding of a batch, which changes what encoders with group norm over time
give (a deviation from s3prl in training), and is kept in half precision: a little more than 1 MB for a second of audio
with HuBERT Base. Numbers that are to be compared with s3prl's are made without.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from datamodules.files import write_bytes
from lightning_modules.checkpoint_files import damage, serialised
from lightning_modules.superb.upstream import Upstream


class FeatureCache:
    """Hidden states by the waveform's content, so that gain or a changed file can never give another's.

    Args:
        upstream: whose states these are; on disk they lie in a folder named by its digest and the precision.
        folder: where they are kept; ``None``: in memory.
        precision: the trainer's, in which the upstream computes.

    Attributes:
        hits, misses: utterances that were there, and that were not.
    """

    def __init__(self, upstream: Upstream, folder: Path | None = None, precision: str = "32-true") -> None:
        self.upstream = upstream
        self.folder = folder / f"{upstream.digest()}_{precision}" if folder else None
        self.hits = self.misses = 0
        self._memory: dict[str, Tensor] = {}

    def states(self, waveform_T: Tensor, keep: bool = True) -> list[Tensor]:
        """Hidden states (F, D) of one utterance; ``keep=False``: one that will not come again, such as a crop."""
        name = hashlib.sha1(waveform_T.cpu().contiguous().numpy().tobytes()).hexdigest() if keep else ""
        states_LFD = self._read(name) if keep else None
        if states_LFD is None:
            self.misses += 1
            states_LFD = torch.cat(self.upstream([waveform_T])).half()  # the first time is like every other
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
        if not path.is_file() or damage(path) is not None:  # then it is computed anew
            return None
        return torch.load(path, weights_only=True)

    def _write(self, name: str, states_LFD: Tensor) -> None:
        if self.folder is None:
            self._memory[name] = states_LFD
            return
        write_bytes(self._path(name), serialised(states_LFD))
