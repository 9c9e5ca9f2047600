import torch

from lightning_modules.superb.specaug import random_masks, spec_augment, time_warp


def test_masks_have_the_widths_and_places_of_the_benchmark() -> None:
    torch.manual_seed(0)
    masks = random_masks(4000, 300, 1, 40)
    widths = masks.sum(1)
    assert (int(widths.min()), int(widths.max())) == (0, 39)
    assert abs(float(widths.float().mean()) - 19.5) < 1
    assert random_masks(3, 10, 4, 50).shape == (3, 10)  # wider than what there is


def test_a_warp_keeps_length_and_order() -> None:
    torch.manual_seed(0)
    ramp_FD = torch.arange(60.0)[:, None].expand(60, 8)
    for _ in range(20):
        warped_FD = time_warp(ramp_FD)
        assert warped_FD.shape == (60, 8)
        assert float((warped_FD - ramp_FD).abs().max()) < 8
    assert torch.equal(time_warp(ramp_FD[:10]), ramp_FD[:10])


def test_masked_places_are_zero_and_the_rest_is_warped_only() -> None:
    torch.manual_seed(1)
    features_BFD = torch.ones(3, 100, 200)
    augmented_BFD = spec_augment(features_BFD, [100, 60, 8])
    assert augmented_BFD.shape == features_BFD.shape
    zero = augmented_BFD == 0
    assert 0 < float(zero.float().mean()) < 0.9
    torch.testing.assert_close(augmented_BFD[~zero], torch.ones(int((~zero).sum())), atol=1e-4, rtol=0)
    torch.manual_seed(1)
    assert torch.equal(spec_augment(features_BFD, [100, 60, 8]), augmented_BFD)
