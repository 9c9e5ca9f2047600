"""``interstack pack``: write a corpus as 16-bit samples in a few large files."""

from pathlib import Path
from typing import Literal

from datamodules.corpus import TRAIN_SPLITS_960H, CorpusSettings
from datamodules.errors import InputError
from datamodules.packing import pack_split


def pack(
    root: str | list[str],
    output: str,
    splits: list[str] | None = None,
    sample_rate: int = 16000,
    shard_megabytes: int = 1024,
    on_bad_audio: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    cache_dir: str | None = None,
) -> None:
    """Pack splits of a corpus; train with ``--data.root OUTPUT``. Batches are the same, bit for bit.

    The same call continues an interrupted one; a finished pack is checked against its checksums and kept.

    Args:
        root: folder that holds the splits, or its parent; several may be given.
        output: the folder that gets one folder per split; 115 MB per hour of audio at 16 kHz.
        splits: splits to pack; default: LibriSpeech's three train splits and dev-clean.
        sample_rate: sample rate of the files in Hz; files with another rate are bad audio.
        shard_megabytes: maximum size of a file in MB; a longer utterance gets a file of its own.
        on_bad_audio: error stops at the first unusable file; skip leaves out files whose header shows the fault.
        overwrite: replace a pack of another corpus or other settings.
        cache_dir: folder for manifests, as ``data.cache_dir``.
    """
    if shard_megabytes < 1:
        raise InputError(f"shard_megabytes is {shard_megabytes}; it must be positive")
    roots = (root,) if isinstance(root, str) else tuple(root)
    for split in splits or [*TRAIN_SPLITS_960H, "dev-clean"]:
        settings = CorpusSettings(roots, (split,), sample_rate, min_samples=1, on_bad_audio=on_bad_audio)
        totals = pack_split(settings, Path(output), shard_megabytes * 10**6, overwrite, cache_dir)
        print(
            f"{Path(output) / split}: {totals.utterances} utterances, {totals.seconds / 3600:.2f} h, "
            f"{totals.num_bytes / 1e9:.2f} GB in {totals.shards} files; {totals.skipped} bad files left out"
        )
