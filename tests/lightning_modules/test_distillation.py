"""DistillationModule: what is in a checkpoint, what reaches the teacher, and shares of a global batch."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.speech_data import AudioBatch
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.optimisation import OptimizerConfig
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher, Teacher, TeacherTargets
from tests.helpers import make_data, make_module, make_trainer, save_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_corpus(tmp_path_factory.mktemp("corpus"), {"train": 8, "dev": 3})


def make_batch(lengths: list[int], rows: slice = slice(None)) -> AudioBatch:
    torch.manual_seed(0)
    num_samples = torch.tensor(lengths)
    waveforms = torch.randn(len(lengths), max(lengths))
    waveforms[torch.arange(max(lengths)) >= num_samples.unsqueeze(1)] = 0
    return AudioBatch(waveforms[rows], num_samples[rows], num_samples)


@pytest.mark.parametrize("lengths", [[8000] * 4, [8000, 4000, 6000, 2000]])
def test_shares_of_a_global_batch_add_up(teacher: Path, lengths: list[int]) -> None:
    module = make_module(teacher, dropout=0.0).train()
    whole = module.losses(make_batch(lengths)).total
    shares = [module.losses(make_batch(lengths, rows), scale=2.0).total for rows in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(sum(shares) / 2, whole, atol=1e-6)


def test_the_gradient_of_shares_is_that_of_the_whole(teacher: Path) -> None:
    lengths = [8000, 4000, 6000, 2000]
    module = make_module(teacher, dropout=0.0).train()
    module.losses(make_batch(lengths)).total.backward()
    whole = [p.grad.clone() for p in module.student.parameters()]
    module.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        module.losses(make_batch(lengths, rows)).total.backward()
    for a, b in zip(module.student.parameters(), whole, strict=True):
        assert torch.allclose(a.grad, b, atol=1e-6)


def test_a_share_that_does_not_count_has_no_loss_and_no_gradient(teacher: Path) -> None:
    """And every parameter has a gradient, for which DDP waits."""
    module = make_module(teacher, dropout=0.0).train()
    share = make_batch([8000, 4000], slice(1, 2))
    module.losses(share, scale=3.0).total.backward()
    counted = [p.grad for p in module.student.parameters() if p.grad is not None]
    assert any(bool(grad.any()) for grad in counted)
    module.zero_grad(set_to_none=True)
    terms = module.losses(share._replace(counts=False), scale=3.0)
    terms.total.backward()
    grads = [p.grad for p in module.student.parameters() if p.grad is not None]
    assert len(grads) == len(counted)
    assert not any(bool(grad.any()) for grad in grads)
    assert all(float(value) == 0 for value in terms.named().values())


def test_teacher_is_outside_the_module(teacher: Path) -> None:
    module = make_module(teacher)
    inside = {id(p) for p in module.parameters()} | {id(m) for m in module.modules()}
    assert not inside & {id(p) for p in module.teacher.parameters()}
    assert id(module.teacher) not in inside
    module.train()
    assert not module.teacher.training
    module.losses(make_batch([8000])).total.backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    assert all(p.grad is not None for p in module.parameters())


def test_training_leaves_the_teacher_as_it_was(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    module = make_module(teacher)
    theirs = {p.data_ptr() for p in module.teacher.parameters()}
    assert not theirs & {p.data_ptr() for p in module.parameters()}  # a copied front end is a copy
    before = [p.clone() for p in module.teacher.parameters()]
    front_end = module.student.hubert.feature_extractor.conv_layers[1].conv.weight.clone()
    make_trainer(tmp_path, max_epochs=1).fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    assert all(torch.equal(a, b) for a, b in zip(module.teacher.parameters(), before, strict=True))
    assert not torch.equal(module.student.hubert.feature_extractor.conv_layers[1].conv.weight, front_end)  # control


def test_checkpoint_is_plain_and_rebuilds_the_module(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    module = make_module(teacher)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    assert checkpoint["hyper_parameters"]["student"]["hidden_size"] == 16
    meta = checkpoint["interstack"]
    assert meta["student_config"]["num_hidden_layers"] == 4
    assert meta["normalize"] is False
    assert meta["teacher"]["init_args"]["model"] == str(teacher)
    assert meta["metrics"]["val/loss"] > 0
    again = DistillationModule.load_from_checkpoint(path)
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.save(module.hparams, io.BytesIO())
    fresh = make_module(teacher, seed=1)  # control: another seed is another student
    assert not torch.equal(next(fresh.student.parameters()), next(again.student.parameters())) or any(
        not torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True)
    )


def test_dataclasses_and_dicts_are_the_same_settings(teacher: Path) -> None:
    made = HuggingFaceTeacher(str(teacher))
    objective = {"intermediate": "none"}
    one = DistillationModule(made, StudentConfig(16, 24, 2, 2), ObjectiveConfig(**objective), OptimizerConfig())
    two = DistillationModule(
        made.spec(), {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_layers": 2}, objective, {}
    )
    assert one.hparams == two.hparams
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


class Filterbank(Teacher):
    """A teacher that is not from Hugging Face: two strided averages of the waveform's magnitude."""

    def __init__(self, hop: int = 320, sample_rate: int = 16_000) -> None:
        super().__init__()
        self.hop, self.sample_rate = hop, sample_rate
        self.num_layers, self.hidden_size = 3, 5
        self.init_args = {"hop": hop, "sample_rate": sample_rate}
        self.mix = torch.nn.Linear(80, 5)
        self.requires_grad_(False)

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return (num_samples_B - 80) // self.hop

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        frames = int(self.num_frames(torch.tensor(waveforms_BT.shape[1])))
        cut = waveforms_BT.unfold(1, 80, self.hop)[:, :frames]
        layers = {k: self.mix(cut.abs()) * k for k in (1, 2, 3)}
        return TeacherTargets(layers[self.output_layer], {k: layers[k] for k in self.hidden_layers})


def make_filterbank(**settings: Any) -> DistillationModule:
    student = StudentConfig(16, 24, 2, 3, front_end_init="random")
    return DistillationModule(Filterbank(**settings), student, ObjectiveConfig())


def test_distils_an_encoder_that_is_not_from_hugging_face(corpus: Path, tmp_path: Path) -> None:
    module = make_filterbank()
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    assert trainer.callback_metrics["val/layer_1"] > 0
    assert trainer.callback_metrics["val/layer_2"] > 0


def test_another_frame_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="one per 320 samples"):
        make_filterbank(hop=160)


def test_a_longer_window_of_the_same_hop_is_refused(teacher: Path) -> None:
    """It has a frame less at half of all lengths only, so that a run would end at the first batch of such a length."""
    layers = [[8, 10, 5], *[[8, 3, 2]] * 4, [8, 2, 2], [8, 3, 2]]
    with pytest.raises(ValueError, match="each of the same 400"):
        make_module(teacher, front_end_init="random", conv_layers=layers)
    make_module(teacher, front_end_init="random", conv_layers=[*layers[:-1], [8, 2, 2]])  # control


def test_another_sample_rate_is_refused(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"data.sample_rate=16000 Hz, but the teacher was trained on 8000 Hz"):
        trainer.fit(make_filterbank(sample_rate=8000), datamodule=make_data(corpus, tmp_path / "cache"))


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_bounds_gradients_with_every_implementation(
    algorithm: str, implementation: str, precision: str, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    bounded = []

    class Norm(DistillationModule):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
            bounded.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))

    made = make_module(teacher, optimizer={"implementation": implementation})
    module = Norm(**{k: made.hparams[k] for k in ("teacher", "student", "objective", "optimizer")})
    limit = {"norm": 0.01, "value": 0.0001}[algorithm]
    clipping = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    trainer = make_trainer(tmp_path, max_epochs=1, precision=precision, **clipping)
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    assert bounded
    assert 0.99 * limit < max(bounded) <= 1.01 * limit


def test_steps_come_from_the_data_module_or_a_setting(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    module = make_module(teacher)
    trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, limit_train_batches=3)
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    assert module.steps_per_epoch() == 2  # 3 of 4 micro-batches, the odd one steps alone
    assert trainer.global_step == 4
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(ValueError, match=r"model.total_steps"):
        make_trainer(tmp_path, max_epochs=1).fit(make_module(teacher), loader, loader)
