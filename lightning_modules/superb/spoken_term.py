"""Search of spoken queries in documents by subsequence DTW, and its value.

Shapes: F frames, D width, Q frames of a query, N documents, K queries.
"""

import os
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

from datamodules.superb.rows import Trials

FEWEST_FRAMES = 5
"""Frames of the shortest query that is searched for."""
YES_ABOVE = 2.0
"""Score in deviations above which a document is said to hold the query."""
STEPS = np.array([[1, 0], [1, 1], [1, 2]], dtype=np.uint32)
"""A frame of the query each, and 0, 1 or 2 frames of the document (the asymmetric pattern)."""
LEAST = 1e-9
PRIOR, MISS_COST, FALSE_ALARM_COST = 0.0008, 100.0, 1.0
BETA = FALSE_ALARM_COST * (1 - PRIOR) / (MISS_COST * PRIOR)
"""Weight of false alarms in QUESST 2014, 12.49."""
FEWEST_PAIRS_PER_JOB = 2000
"""Pairs below which another process costs more than it saves."""


def search(queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]) -> np.ndarray:
    """Scores (K, N) of every query in every document, in deviations from the query's mean over documents.

    As in s3prl, each dimension of the features is normalised over all frames of queries and documents first. Queries
    of less than five frames score 0 everywhere.

    Args:
        queries: features (Q, D) of each query.
        documents: features (F, D) of each document.
    """
    from joblib import Parallel, delayed

    ends_K, ends_N = (np.cumsum([len(part) for part in parts]) for parts in (queries, documents))
    directions_FD = _directions(np.concatenate([*queries, *documents]))
    # One array of all documents, because joblib maps large arrays into the memory of its processes.
    *queries, documents_FD = np.split(directions_FD, ends_K)
    jobs = min(os.cpu_count() or 1, max(1, len(queries) * len(documents) // FEWEST_PAIRS_PER_JOB))
    found = Parallel(n_jobs=jobs)(delayed(query_scores)(query, documents_FD, ends_N) for query in queries)
    scores_KN = np.stack(found)
    centred_KN = scores_KN - scores_KN.mean(1, keepdims=True)
    return centred_KN / np.maximum(scores_KN.std(1, keepdims=True), LEAST)


def query_scores(query_QD: np.ndarray, documents_FD: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """Score (N,) of a query in each document, minus the cost of the best path per frame of the query.

    A path begins and ends anywhere in the document. The cost of a pair of frames is exp(cosine distance) - 1, scaled to
    0 to 1 over the document's frames.

    Args:
        query_QD: features (Q, D) of norm 1.
        documents_FD: features of norm 1 of all documents, one after the other.
        ends_N: first frame after each document.
    """
    if len(query_QD) < FEWEST_FRAMES:
        return np.zeros(len(ends_N))
    parts = np.split(documents_FD, ends_N[:-1])
    return np.array([-_cost(query_QD.astype(np.float64), part_FD) for part_FD in parts])


def _cost(query_QD: np.ndarray, document_FD: np.ndarray) -> float:
    from librosa.sequence import dtw

    distances_QF = np.expm1(1 - query_QD @ document_FD.astype(np.float64).T)
    least_Q1, most_Q1 = distances_QF.min(1, keepdims=True), distances_QF.max(1, keepdims=True)
    distances_QF = (distances_QF - least_Q1) / np.maximum(most_Q1 - least_Q1, LEAST)
    costs_QF = dtw(C=distances_QF, step_sizes_sigma=STEPS, weights_add=np.zeros(3), weights_mul=np.ones(3),
                   subseq=True, backtrack=False)  # fmt: skip
    return float(costs_QF[-1].min()) / len(query_QD)


def _directions(features_FD: np.ndarray) -> np.ndarray:
    """The features with mean 0 and deviation 1 in each dimension, then norm 1 in each frame.

    They are changed in place, because those of QUESST take gigabytes.
    """
    features_FD -= features_FD.mean(0, dtype=np.float64).astype(np.float32)
    squares_D = np.einsum("fd,fd->d", features_FD, features_FD, dtype=np.float64)
    features_FD /= np.maximum(np.sqrt(squares_D / max(1, len(features_FD) - 1)), LEAST).astype(np.float32)
    norms_F = np.sqrt(np.einsum("fd,fd->f", features_FD, features_FD))
    features_FD /= np.maximum(norms_F, LEAST)[:, None]
    return features_FD


def maximum_term_weighted_value(scores: Mapping[tuple[str, str], float], trials: Trials) -> float:
    """MTWV in percent: the highest term weighted value over all thresholds, by its definition for QUESST 2014.

    For a threshold it is 1 minus the mean over queries of the share of misses plus 12.49 times the share of false
    alarms. Queries that match no document are left out. Queries of the whole ground truth that are not among the trials
    count as missed everywhere, as in the published numbers, where only the English ones are searched for. A threshold
    above all scores has the value 0, so MTWV is not negative. Published numbers come from the data set's own scorer (a
    Java program), which was not run beside this.

    Args:
        scores: score of each pair of query and document.
        trials: the pairs, and numbers of the whole ground truth.
    """
    by_query: dict[str, list[tuple[float, bool]]] = {}
    for query, document, matches in trials.pairs:
        by_query.setdefault(query, []).append((scores[query, document], matches))
    searched = [pairs for pairs in by_query.values() if any(matches for _, matches in pairs)]
    number = max(trials.queries, len(searched))
    changes: list[tuple[float, float]] = []  # of the value, as the threshold falls below each score
    for pairs in searched:
        right = sum(matches for _, matches in pairs)
        wrong = max(trials.documents, len(pairs)) - right
        changes += [(score, 1 / right if matches else -BETA / wrong) for score, matches in pairs]
    if not changes:
        return 0.0
    changes.sort(reverse=True)
    scores_P, steps_P = np.array(changes).T
    last_of_score_P = np.append(np.diff(scores_P) != 0, True)  # pairs of one score are accepted together
    return 100 * max(0.0, float(steps_P.cumsum()[last_of_score_P].max()) / number)


def stdlist(scores: Mapping[tuple[str, str], float], trials: Trials) -> str:
    """Scores in the form of ``benchmark.stdlist.xml``, which QUESST's scorer and the leaderboard read."""
    root = ElementTree.Element(
        "stdlist",
        termlist_filename="benchmark.stdlist.xml",
        indexing_time="1.00",
        language="english",
        index_size="1",
        system_id="benchmark",
    )
    lists: dict[str, ElementTree.Element] = {}
    for query, document, _ in trials.pairs:
        if query not in lists:
            lists[query] = ElementTree.SubElement(
                root, "detected_termlist", termid=query, term_search_time="1.0", oov_term_count="1"
            )
        score = scores[query, document]
        ElementTree.SubElement(
            lists[query],
            "term",
            file=document,
            channel="1",
            tbeg="0.000",
            dur="0.00",
            score=f"{score:.4f}",
            decision="YES" if score > YES_ABOVE else "NO",
        )
    ElementTree.indent(root)
    return f"<?xml version='1.0' encoding='UTF-8'?>\n{ElementTree.tostring(root, encoding='unicode')}\n"
