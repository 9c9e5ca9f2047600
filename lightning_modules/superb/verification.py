"""Errors of speaker verification. Shapes: N trials."""

import numpy as np

from datamodules.errors import InputError


def equal_error_rate(scores_N: np.ndarray, matches_N: np.ndarray) -> float:
    """Rate in percent at which false acceptances equal false rejections, on the ROC curve between its points.

    Args:
        scores_N: scores (N,), higher for one speaker.
        matches_N: whether both recordings (N,) have one speaker.

    Raises:
        InputError: all trials are of one kind, or a score is not finite.
    """
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq
    from sklearn.metrics import roc_curve

    _require_scores(scores_N, matches_N)
    accepted, hit, _ = roc_curve(matches_N, scores_N)
    hits_at = interp1d(accepted, hit)
    return 100 * float(brentq(lambda rate: 1 - rate - hits_at(rate), 0.0, 1.0))


def min_dcf(
    scores_N: np.ndarray,
    matches_N: np.ndarray,
    prior: float = 0.01,
    miss_cost: float = 1.0,
    false_alarm_cost: float = 1.0,
) -> float:
    """Least detection cost over all thresholds, as a part of the cost of the better constant decision (NIST SRE).

    Args:
        scores_N: scores (N,), higher for one speaker.
        matches_N: whether both recordings (N,) have one speaker.
        prior: probability of a trial with one speaker.
        miss_cost: cost of a false rejection.
        false_alarm_cost: cost of a false acceptance.

    Raises:
        InputError: all trials are of one kind, or a score is not finite.
    """
    from sklearn.metrics import det_curve

    _require_scores(scores_N, matches_N)
    false_alarms, misses, _ = det_curve(matches_N, scores_N)
    # The curve leaves out the ends, where everything or nothing is accepted.
    costs = miss_cost * prior * misses + false_alarm_cost * (1 - prior) * false_alarms
    constant = min(miss_cost * prior, false_alarm_cost * (1 - prior))
    return float(min(costs.min(), constant) / constant)


def _require_scores(scores_N: np.ndarray, matches_N: np.ndarray) -> None:
    if not 0 < matches_N.sum() < len(matches_N):
        raise InputError("all trials are of one kind: errors need pairs of one speaker and of two")
    if not np.isfinite(scores_N).all():
        raise InputError(f"{(~np.isfinite(scores_N)).sum()} of {len(scores_N)} scores are not finite")
