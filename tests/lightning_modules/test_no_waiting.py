"""Nothing in a step makes the host wait for the device, shown without one.

Reading a value of a tensor on the ``meta`` device raises, and a copy to it that blocks is refused below.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.cached_records import CachedRecords, RecordLayout, aligned
from datamodules.loading import AudioBatch
from lightning_modules.distillation import DistillationModule
from lightning_modules.teacher import normalize_waveforms
from tests.helpers import make_data, make_module, save_corpus, save_whisper
from tests.lightning_modules.test_distillation import make_batch

META = torch.device("meta")


class RefuseBlockingCopies(TorchDispatchMode):
    """A copy from the host waits unless it is told not to."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            target = kwargs.get("device")
            if target is not None and torch.device(target) == META != args[0].device:
                raise RuntimeError("a copy to the device that blocks")
        return function(*args, **kwargs)


def on_meta(folder: Path, **settings: Any) -> DistillationModule:
    module = make_module(folder, **settings).train().to(META)
    module.teacher.to(META)
    return module


def step(module: DistillationModule, batch: AudioBatch) -> Tensor:
    with RefuseBlockingCopies():
        terms = module.losses(batch, scale=2.0)
        terms.total.backward()
        return terms.named()["loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"front_end": "frozen"},
        {"front_end": "shared"},
        {"teacher_settings": {"normalize": True}},
        {"objective": {"intermediate": "l2l", "distance": "l1_cosine"}},
        {"objective": {"intermediate": "l2l", "masked": "drawn"}, "mask_time_prob": 0.5, "mask_time_length": 3},
    ],
)
def test_losses_and_backward_read_nothing(settings: dict[str, Any], teacher: Path) -> None:
    batch = make_batch([8000, 8000])
    assert step(on_meta(teacher, **settings), batch._replace(waveforms=batch.waveforms.to(META))).device == META


def test_a_whisper_is_not_waited_for_with_padding_either(tmp_path: Path) -> None:
    module = on_meta(save_whisper(tmp_path))
    with RefuseBlockingCopies():
        targets = module.teacher(torch.zeros(2, 8000, device=META), torch.tensor([8000, 5000]))
    assert targets.output_BFD.device == META
    batch = make_batch([8000, 8000])
    assert step(module, batch._replace(waveforms=batch.waveforms.to(META))).device == META


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_cached_targets_are_sent_and_used_without_waiting(dtype: str, teacher: Path) -> None:
    batch, module = make_batch([8000, 8000]), on_meta(teacher)
    frames = int(module.teacher.num_frames(batch.num_samples)[0])
    with RefuseBlockingCopies():
        layout = RecordLayout(2, module.teacher.hidden_size, dtype)
        data_BR = torch.zeros(2, aligned(layout.num_bytes(frames)), dtype=torch.uint8)
        records = CachedRecords(data_BR, layout, frames).to(META)
    cached = AudioBatch(batch.waveforms.to(META), batch.num_samples, batch.num_samples, torch.arange(2), records)
    assert step(module, cached).device == META


@pytest.mark.parametrize("name", ["num_samples", "global_num_samples"])
def test_control_lengths_on_the_device_are_read(name: str, teacher: Path) -> None:
    batch = make_batch([8000, 8000])._replace(waveforms=torch.zeros(2, 8000, device=META))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(on_meta(teacher), batch._replace(**{name: batch.num_samples.to(META)}))


def test_lengths_of_a_padded_batch_are_sent_without_waiting() -> None:
    waveforms_BT, lengths = torch.zeros(2, 8000, device=META), torch.tensor([8000, 5000])
    with RefuseBlockingCopies():
        assert normalize_waveforms(waveforms_BT, lengths).device == META
        with pytest.raises(RuntimeError, match="that blocks"):  # control
            lengths.to(META)


def test_only_waveforms_move_to_the_device(tmp_path: Path) -> None:
    save_corpus(tmp_path / "corpus", {"train": 4, "dev": 3})
    data = make_data(tmp_path / "corpus", tmp_path / "cache")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, META, 0)
    assert moved.waveforms.device == META
    assert {lengths.device.type for lengths in (moved.num_samples, moved.global_num_samples)} == {"cpu"}
