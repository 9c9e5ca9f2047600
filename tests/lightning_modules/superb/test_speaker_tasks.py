"""The head, loss and errors of ASV, against computations by hand and against other libraries' curves."""

import numpy as np
import pytest
import torch
from sklearn.metrics import det_curve

from datamodules.superb.rows import Trial, Trials
from lightning_modules.superb.heads import SpeakerProbe, XVector, am_softmax_losses
from lightning_modules.superb.recipes import TASK_RECIPES, build_task
from lightning_modules.superb.tasks import Prediction, TaskInputs
from lightning_modules.superb.verification import equal_error_rate, min_dcf


def test_the_x_vector_has_the_published_size() -> None:
    assert sum(parameter.numel() for parameter in XVector(768, 1211).parameters()) == 6_730_204


def test_it_gives_cosines_in_training_and_embeddings_of_norm_one_otherwise() -> None:
    for head in (XVector(8, 5), SpeakerProbe(8, 5)):
        features_BFD = torch.randn(2, 30, 8)
        cosines_BC = head(features_BFD, [30, 20])
        assert cosines_BC.shape == (2, 5)
        assert float(cosines_BC.detach().abs().max()) <= 1
        embeddings_BD = head.eval()(features_BFD, [30, 20])
        torch.testing.assert_close(embeddings_BD.norm(dim=-1), torch.ones(2))
        assert embeddings_BD.shape[1] in (512, 128)


def test_the_statistics_of_a_shorter_item_include_one_frame_of_padding() -> None:
    """As in s3prl. Frames beyond it have no influence, and none of those before is left out."""
    head = XVector(4, 3).eval()
    features_BFD = torch.randn(1, 40, 4)
    features_BFD[:, 25:] = 0
    padded = head(torch.cat([features_BFD, torch.randn(1, 40, 4)]), [25, 40])[0]
    for frames, equal in ((26, True), (25, False), (27, False)):
        # Without padding all 14 fewer frames count.
        assert torch.allclose(padded, head(features_BFD[:, :frames], [frames])[0], atol=1e-5) == equal


def test_the_loss_is_that_of_the_formula() -> None:
    cosines_BC = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.5, 0.4]], dtype=torch.double)
    by_hand = []
    for row, wanted in zip(cosines_BC.tolist(), (0, 2), strict=True):
        powers = [np.exp(30 * (value - 0.4 * (index == wanted))) for index, value in enumerate(row)]
        by_hand.append(-np.log(powers[wanted] / sum(powers)))
    losses_B = am_softmax_losses(cosines_BC, torch.tensor([0, 2]))
    np.testing.assert_allclose(losses_B.numpy(), by_hand, rtol=1e-9)
    without = am_softmax_losses(cosines_BC, torch.tensor([0, 2]), margin=0.0)
    assert (losses_B > without).all()


def trials(seed: int, number: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    matches_N = generator.random(number) < 0.3
    return generator.normal(size=number) + 1.5 * matches_N, matches_N


@pytest.mark.parametrize("seed", range(5))
def test_the_equal_error_rate_is_where_the_curve_of_scikit_learn_crosses(seed: int) -> None:
    scores_N, matches_N = trials(seed)
    rate = equal_error_rate(scores_N, matches_N) / 100
    accepted, missed, _ = det_curve(matches_N, scores_N)
    crossing = np.abs(accepted - missed).argmin()
    assert abs(rate - (accepted[crossing] + missed[crossing]) / 2) < 0.01
    assert rate != pytest.approx(0.5, abs=0.1)


def test_the_equal_error_rate_of_sets_that_are_known() -> None:
    matches_N = np.array([True, True, False, False])
    assert equal_error_rate(np.array([4.0, 3.0, 2.0, 1.0]), matches_N) == pytest.approx(0, abs=1e-6)
    assert equal_error_rate(np.array([4.0, 2.0, 3.0, 1.0]), matches_N) == pytest.approx(50)
    assert equal_error_rate(np.array([1.0, 2.0, 3.0, 4.0]), matches_N) == pytest.approx(100, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prior", [0.01, 0.5])
def test_the_detection_cost_is_the_least_over_all_thresholds(seed: int, prior: float) -> None:
    scores_N, matches_N = trials(seed)
    costs = []
    for threshold in [*scores_N, np.inf]:
        accepted_N = scores_N >= threshold
        misses, alarms = (~accepted_N[matches_N]).mean(), accepted_N[~matches_N].mean()
        costs.append((prior * misses + (1 - prior) * alarms) / min(prior, 1 - prior))
    assert min_dcf(scores_N, matches_N, prior) == pytest.approx(min(costs))


def test_trials_of_one_kind_or_without_a_score_are_errors() -> None:
    for score in (equal_error_rate, min_dcf):
        with pytest.raises(ValueError, match="all trials are of one kind"):
            score(np.array([1.0, 2.0]), np.array([True, True]))
        with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
            score(np.array([1.0, np.nan]), np.array([True, False]))


def test_each_trial_is_scored_by_the_cosine_of_its_recordings() -> None:
    pairs = [Trial("a", "b", True), Trial("a", "c", False)]
    task = build_task("asv", TaskInputs([["anna"]], trials={"test": Trials(pairs)}))
    values = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0]}
    predictions = [Prediction(key, "anna", np.array(value, np.float32)) for key, value in values.items()]
    files = task.hypothesis_files("test", predictions)
    assert files["test_truth.txt"] == "a_b 1\na_c 0\n"
    scores = [line.split() for line in str(files["test_predict.txt"]).splitlines()]
    assert [(pair, round(float(score), 6)) for pair, score in scores] == [("a_b", 0.6), ("a_c", 0.0)]
    assert task.score(predictions, "test")["eer"] == pytest.approx(0, abs=1e-6)
    swapped = [one._replace(key={"b": "c", "c": "b"}.get(one.key, one.key)) for one in predictions]
    assert task.score(swapped, "test")["eer"] == pytest.approx(100, abs=1e-6)
    assert TASK_RECIPES["asv"].optimizer is torch.optim.AdamW


def test_a_head_that_diverged_has_no_score_and_does_not_end_a_sweep() -> None:
    trials = Trials([Trial("a", "b", True), Trial("a", "c", False)])
    task = build_task("asv", TaskInputs([["anna"]], trials={"dev": trials}))
    values = {"a": np.full(2, np.nan), "b": np.ones(2), "c": np.zeros(2)}
    scores = task.score([Prediction(key, "anna", value.astype(np.float32)) for key, value in values.items()], "dev")
    assert all(np.isnan(score) for score in scores.values())
