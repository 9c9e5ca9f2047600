import pytest
import torch
from torch import nn

from lightning_modules.pretraining import (
    IGNORED,
    FrameLabelModule,
    PretrainingConfig,
    initial_model,
    supervised_loss,
)

TINY = PretrainingConfig(hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, conv_channels=8)


def test_quick_start_size_is_as_documented() -> None:
    assert sum(parameter.numel() for parameter in initial_model(PretrainingConfig(), 0).parameters()) == 2_585_600
    assert PretrainingConfig().supervised_layers == [4, 8, 12]
    assert TINY.supervised_layers == [1, 2, 3]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hidden_size": 100}, "hidden_size=100 must be a multiple"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_layers": 10}, "num_layers=10 must be a multiple of 3"),
        ({"crop_seconds": 0.01}, "crop_seconds=0.01"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_sizes_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainingConfig(**setting)


def test_initialisation_is_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (initial_model(TINY, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers are left alone
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    module = FrameLabelModule(TINY, 5, steps=10, seed=1).hubert.state_dict()
    assert all(torch.equal(one[name], module[name]) for name in one)


def test_loss_leaves_padding_out() -> None:
    logits_BFC, labels_BF = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    labels_BF[1, 3:] = IGNORED
    kept = torch.cat([logits_BFC[0], logits_BFC[1, :3]])
    expected = nn.functional.cross_entropy(kept, torch.cat([labels_BF[0], labels_BF[1, :3]]))
    torch.testing.assert_close(supervised_loss([logits_BFC], labels_BF), expected)
    changed_BFC = logits_BFC.clone()
    changed_BFC[1, 3:] += torch.randn(3, 5)
    assert torch.equal(supervised_loss([changed_BFC], labels_BF), supervised_loss([logits_BFC], labels_BF))
    changed_BFC[0, 0] += torch.randn(5)
    assert not torch.equal(supervised_loss([changed_BFC], labels_BF), supervised_loss([logits_BFC], labels_BF))


def test_loss_is_the_mean_over_layers() -> None:
    first_BFC, second_BFC, labels_BF = (
        torch.randn(1, 4, 5),
        torch.randn(1, 4, 5),
        torch.tensor([[0, 1, 2, 3]]),
    )
    single = [supervised_loss([logits], labels_BF) for logits in (first_BFC, second_BFC)]
    torch.testing.assert_close(supervised_loss([first_BFC, second_BFC], labels_BF), sum(single) / 2)


def test_classifiers_read_the_supervised_layers() -> None:
    module = FrameLabelModule(TINY, 5, steps=10).eval()
    waveforms_BT = torch.randn(2, 4000)
    logits = module(waveforms_BT)
    assert [tuple(logits_BFC.shape) for logits_BFC in logits] == [(2, 12, 5)] * 3
    module.hubert.encoder.layers[1].attention.out_proj.weight.data.zero_()
    changed = [not torch.equal(a, b) for a, b in zip(logits, module(waveforms_BT), strict=True)]
    assert changed == [False, True, True]


def test_settings_are_plain_and_rebuild_the_module() -> None:
    module = FrameLabelModule(TINY, 5, steps=10, seed=3)
    twin = FrameLabelModule(**module.hparams)
    assert twin.config == TINY
    assert isinstance(module.hparams["config"], dict)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    module = FrameLabelModule(TINY, 5, steps=20)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [1e-3, 2e-3, 2e-3]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 2e-4
