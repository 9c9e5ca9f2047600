"""The search of QbE, held against dtw-python and its value against the definition."""

from xml.etree import ElementTree

import dtw as dtw_python
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from datamodules.superb.rows import Trial, Trials
from lightning_modules.superb import spoken_term
from lightning_modules.superb.spoken_term import BETA, maximum_term_weighted_value, search, stdlist


def by_dtw_python(query_QD: np.ndarray, document_FD: np.ndarray) -> float:
    """The score as s3prl computes it."""
    distances_QF = np.exp(cdist(query_QD, document_FD, "cosine")) - 1
    least, most = distances_QF.min(1, keepdims=True), distances_QF.max(1, keepdims=True)
    found = dtw_python.dtw(
        x=(distances_QF - least) / np.maximum(most - least, 1e-9),
        step_pattern="asymmetric",
        open_begin=True,
        open_end=True,
    )
    return -found.normalizedDistance


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_dtw_python(seed: int) -> None:
    """Among the documents is one that is shorter than the queries."""
    generator = np.random.default_rng(seed)
    queries = [generator.normal(size=(frames, 6)).astype(np.float32) for frames in (9, 15)]
    documents = [generator.normal(size=(frames, 6)).astype(np.float32) for frames in (40, 5, 23)]
    frames = np.concatenate([*queries, *documents])
    mean, deviation = frames.mean(0), frames.std(0, ddof=1)
    expected = [
        [by_dtw_python((query - mean) / deviation, (document - mean) / deviation) for document in documents]
        for query in queries
    ]
    expected_KN = (expected - np.mean(expected, 1, keepdims=True)) / np.std(expected, 1, keepdims=True)
    before = [part.copy() for part in (*queries, *documents)]
    np.testing.assert_allclose(search(queries, documents), expected_KN, atol=1e-4)
    # They are normalised in a copy.
    assert all(np.array_equal(one, other) for one, other in zip(before, (*queries, *documents), strict=True))
    other_KN = search(queries, [documents[0][::-1], *documents[1:]])
    assert np.abs(other_KN - expected_KN).max() > 1e-2


def test_a_query_of_four_frames_scores_nothing() -> None:
    generator = np.random.default_rng(0)
    documents = [generator.normal(size=(30, 4)).astype(np.float32) for _ in range(3)]
    queries = [documents[1][5:9], documents[1][5:15]]
    short_N, long_N = search(queries, documents)
    assert short_N.tolist() == [0, 0, 0]
    assert long_N.argmax() == 1


@pytest.mark.ci
def test_several_processes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    queries = [generator.normal(size=(8, 4)).astype(np.float32) for _ in range(4)]
    documents = [generator.normal(size=(20, 4)).astype(np.float32) for _ in range(5)]
    alone_KN = search(queries, documents)
    monkeypatch.setattr(spoken_term, "FEWEST_PAIRS_PER_JOB", 5)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    np.testing.assert_array_equal(search(queries, documents), alone_KN)


def by_definition(scores: dict[tuple[str, str], float], trials: Trials) -> float:
    """The value of every threshold, one after the other."""
    queries = sorted({pair.first for pair in trials.pairs})
    values = [0.0]
    for threshold in scores.values():
        costs = []
        for query in queries:
            pairs = [pair for pair in trials.pairs if pair.first == query]
            if not any(pair.matches for pair in pairs):
                continue
            yes = {pair: scores[pair.first, pair.second] >= threshold for pair in pairs}
            right = [pair for pair in pairs if pair.matches]
            wrong = max(trials.documents, len(pairs)) - len(right)
            misses = sum(not yes[pair] for pair in right) / len(right)
            alarms = sum(yes[pair] for pair in pairs if not pair.matches) / wrong
            costs.append(misses + BETA * alarms)
        number = max(trials.queries, len(costs))
        values.append(1 - (sum(costs) + number - len(costs)) / number)
    return 100 * max(values)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("queries", "documents"), [(0, 0), (20, 100)])
def test_the_value_is_that_of_the_definition(seed: int, queries: int, documents: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = [Trial(f"q{q}", f"d{d}", bool(generator.random() < 0.2 and q != 3)) for q in range(5) for d in range(12)]
    # Rounded scores have ties.
    scores = {(p.first, p.second): round(float(generator.normal() + 3 * p.matches), 1) for p in pairs}
    trials = Trials(pairs, queries, documents)
    assert maximum_term_weighted_value(scores, trials) == pytest.approx(by_definition(scores, trials))


def test_known_values() -> None:
    pairs = [Trial("q", "right", True), Trial("q", "wrong", False)]
    assert pytest.approx(12.49) == BETA
    assert maximum_term_weighted_value({("q", "right"): 2.0, ("q", "wrong"): 1.0}, Trials(pairs)) == 100
    assert maximum_term_weighted_value({("q", "right"): 1.0, ("q", "wrong"): 2.0}, Trials(pairs)) == 0
    # One of four queries was searched for, the others count as missed.
    assert maximum_term_weighted_value({("q", "right"): 2.0, ("q", "wrong"): 1.0}, Trials(pairs, 4, 10)) == 25
    assert maximum_term_weighted_value({("q", "wrong"): 1.0}, Trials(pairs[1:])) == 0


def test_the_list_has_every_pair() -> None:
    pairs = [Trial("q", "a", True), Trial("q", "b", False), Trial("r", "a", False)]
    text = stdlist({("q", "a"): 2.00004, ("q", "b"): -0.5, ("r", "a"): 2.5}, Trials(pairs))
    assert text.startswith("<?xml version='1.0' encoding='UTF-8'?>\n<stdlist ")
    root = ElementTree.fromstring(text.encode())
    assert [terms.attrib["termid"] for terms in root] == ["q", "r"]
    assert [(term.attrib["file"], term.attrib["score"], term.attrib["decision"]) for term in root.iter("term")] == [
        ("a", "2.0000", "YES"),
        ("b", "-0.5000", "NO"),
        ("a", "2.5000", "YES"),
    ]
