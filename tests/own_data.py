"""A data module of a user's own with all that is optional."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from datamodules.speech_data import AudioBatch, SpeechDataModule, audio_batch


class Recordings(Sequence[Tensor]):
    """Waveforms of files, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: Any) -> Any:
        return torch.from_numpy(soundfile.read(self.files[place], dtype="float32")[0])


class MyData(SpeechDataModule):
    """Audio files of 16 kHz below a folder; the first ``val_files`` are for validation.

    Args:
        root: folder of the files.
        batch_size: utterances per optimizer step, over all processes and accumulation steps.
        val_files: number of files to validate on.
        seed: random seed of the order; ``--seed_everything`` sets it.
    """

    def __init__(self, root: str, batch_size: int = 8, val_files: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        files = sorted(Path(root).rglob("*.flac"))
        self.train, self.val = Recordings(files[val_files:]), Recordings(files[:val_files])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.batch_size)

    def train_dataloader(self) -> Any:
        return self.loader(self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> Any:
        return self.loader(self.val, self.batch_size)

    # From here on all is optional.

    def example_batch(self, num_items: int) -> AudioBatch:
        return audio_batch([self.train[place] for place in range(min(num_items, len(self.train)))])

    def fingerprint(self) -> dict[str, Any]:
        names = [path.name for path in self.train.files]
        return super().fingerprint() | {"files": names, "batch_size": self.batch_size, "seed": self.seed}
