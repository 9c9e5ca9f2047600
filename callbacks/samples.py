"""SampleSpectrograms: writes spectrograms of a few training items to the run's folder."""

import importlib.util
import logging
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from datamodules.files import replacing
from datamodules.speech_data import speech_data

log = logging.getLogger(__name__)

FRAME_SECONDS, HOP_SECONDS, MEL_BANDS = 0.025, 0.010, 80


class SampleSpectrograms(Callback):
    """Write log-mel spectrograms of a few training items to ``RUN/samples/ROW.png`` and to W&B, once per run.

    Acts: before training starts, on rank zero. It does nothing in a resumed run, whose folder has them already,
    and if the data module has no example batch. It draws no random numbers. Without matplotlib (the ``report``
    extra) it only logs a line.

    Args:
        num_items: largest number of items.
    """

    def __init__(self, num_items: int = 4) -> None:
        self.num_items = num_items

    # Not in on_train_start, because importing librosa takes seconds and training time is already measured there.
    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "samples"
        datamodule = speech_data(trainer)
        if datamodule is None or any(folder.glob("*.png")):
            return
        if importlib.util.find_spec("matplotlib") is None:
            log.info("no sample spectrograms: matplotlib is missing (pip install 'interstack[report]')")
            return
        if (batch := datamodule.example_batch(self.num_items)) is None:
            return
        paths, captions = [], []
        rows = range(len(batch.num_samples)) if batch.index is None else batch.index.tolist()
        for item, row in enumerate(rows):
            assert batch.waveforms is not None  # an example batch has audio
            samples_T = batch.waveforms[item, : int(batch.num_samples[item])].numpy()
            captions.append(f"row {row}, {len(samples_T) / datamodule.sample_rate:.1f} s")
            paths.append(folder / f"{row:06d}.png")
            draw(log_mel(samples_T, datamodule.sample_rate), captions[-1], paths[-1])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                images = [str(path) for path in paths]
                logger.log_image("samples/log_mel", images, step=trainer.global_step, caption=captions)


def log_mel(samples_T: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """Log-mel spectrogram (80, frames), 100 frames per second, in dB from -80 to 0 at its loudest point."""
    import librosa

    power = librosa.feature.melspectrogram(
        y=samples_T,
        sr=sample_rate,
        n_fft=round(FRAME_SECONDS * sample_rate),
        hop_length=round(HOP_SECONDS * sample_rate),
        n_mels=MEL_BANDS,
    )
    return librosa.power_to_db(power, ref=np.max)


def draw(spectrogram_MF: NDArray[np.float32], title: str, path: Path) -> None:
    """Write one spectrogram (mel bands, frames) as a PNG file, atomically."""
    from matplotlib.figure import Figure  # not pyplot, which uses a display and global state

    num_bands, num_frames = spectrogram_MF.shape
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    extent = (0, num_frames * HOP_SECONDS, 0, num_bands)
    image = axes.imshow(spectrogram_MF, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    axes.set(title=title, xlabel="seconds", ylabel="mel band")
    figure.colorbar(image, label="dB")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
