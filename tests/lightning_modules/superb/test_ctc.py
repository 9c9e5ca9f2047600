import itertools

import pytest
import torch

from lightning_modules.superb.ctc import collapse, ctc_losses, is_feasible


def naive_loss(scores_FC: torch.Tensor, target: list[int], blank: int) -> float:
    """Minus the log of the summed probability of every path that reads as the target."""
    paths = itertools.product(range(scores_FC.shape[1]), repeat=len(scores_FC))
    readings = [path for path in paths if [c for c, _ in itertools.groupby(path) if c != blank] == target]
    return -float(torch.stack([sum(scores_FC[f, c] for f, c in enumerate(path)) for path in readings]).logsumexp(0))


def test_losses_are_those_of_all_paths_over_the_targets_length() -> None:
    logits_BFC = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    losses_B = ctc_losses(logits_BFC, [4, 3], [[1, 2], [2, 2]], blank=0)
    scores_BFC = logits_BFC.log_softmax(-1)
    expected = [naive_loss(scores_BFC[0], [1, 2], 0) / 2, naive_loss(scores_BFC[1, :3], [2, 2], 0) / 2]
    torch.testing.assert_close(losses_B, torch.tensor(expected))


def test_a_target_that_does_not_fit_has_no_loss() -> None:
    assert is_feasible([1, 2, 2], 4)
    assert not is_feasible([1, 2, 2], 3)
    logits_BFC = torch.randn(2, 3, 3, requires_grad=True)
    losses_B = ctc_losses(logits_BFC, [3, 3], [[1, 2, 2], [1, 2]], blank=0)
    losses_B.sum().backward()
    assert losses_B[0] == 0 < losses_B[1]
    assert logits_BFC.grad is not None
    assert not logits_BFC.grad[0].any()


@pytest.mark.parametrize(
    ("labels", "fixed", "legacy"),
    [
        ([], [], []),
        ([1, 1, 2, 2, 2, 3], [1, 2, 3], [1, 2, 3]),
        ([0, 5, 0, 5, 5, 0], [5, 5], [5]),  # a doubled phone, which legacy decoding loses
        ([2, 0, 0, 2, 2, 0, 1, 2], [2, 2, 1, 2], [2, 1, 2]),
    ],
)
def test_fixed_and_legacy_decoding(labels: list[int], fixed: list[int], legacy: list[int]) -> None:
    assert collapse(labels, 0) == fixed
    assert collapse(labels, 0, "legacy") == legacy


def test_legacy_decoding_drops_the_end_with_the_blank() -> None:
    assert collapse([5, 1, 5, 0, 5, 1], 0, "legacy", eos=1) == [5]
    assert collapse([5, 1, 5, 0, 5, 1], 0, "fixed", eos=1) == [5, 1, 5, 5, 1]
