"""ER, ASV, SD and QbE against the values of s3prl's own code, which ``experiments.superb.reference`` wrote."""

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.superb.librimix import Segment, chunks, speech_of, text_of
from datamodules.superb.rows import Row, Trial, Trials
from datamodules.superb.trials import DOCUMENT, QUERY, every_pair
from experiments.superb.reference import inputs
from experiments.superb.reference.inputs import SEEDS, WIDTH
from lightning_modules.superb.diarization import find_segments, frame_accuracy, permutation_losses, speaker_labels
from lightning_modules.superb.heads import XVECTOR_CONTEXTS, XVector
from lightning_modules.superb.recipes import TASK_RECIPES
from lightning_modules.superb.spoken_term import query_scores, search
from lightning_modules.superb.tasks import Prediction, Task, TaskInputs
from lightning_modules.superb.verification import equal_error_rate

FILE = Path(__file__).parents[2] / "data" / "s3prl_reference.npz"
REFERENCE = dict(np.load(FILE))


class Utterance(NamedTuple):
    key: str
    target: str


def reference(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def task_of(name: str, more: TaskInputs) -> Task:
    recipe = TASK_RECIPES[name]
    return recipe.task(recipe, more)


def norms(module: nn.Module) -> Tensor:
    return torch.stack([parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None])


def assert_only(found: Tensor, other: Tensor, name: str) -> None:
    """``found`` is the reference, and ``other``, the control, is not."""
    torch.testing.assert_close(found.detach(), reference(name).to(found), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(other.detach(), reference(name).to(other), rtol=1e-3, atol=1e-5)


def emotions(seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, str | bytes]]:
    classes = REFERENCE["er/classes"].tolist()
    task = task_of("er", TaskInputs([classes], fold="fold5"))
    items = [
        Utterance(name, classes[target])
        for name, target in zip(REFERENCE["er/names"].tolist(), inputs.EMOTIONS, strict=True)
    ]
    head = task.build_head(WIDTH)
    inputs.fill(head, seed)
    features = inputs.features(SEEDS["features"], inputs.FRAMES)
    output = head(pad_sequence(features, batch_first=True), inputs.FRAMES)
    loss = task.losses(output, inputs.FRAMES, items).mean()
    loss.backward()
    files = task.hypothesis_files("test", task.predict(output, inputs.FRAMES, items))
    return output, loss, norms(head), files


def test_emotions() -> None:
    found, other = emotions(SEEDS["head"]), emotions(SEEDS["head"] + 1)
    for index, name in enumerate(("output", "loss", "gradient_norms")):
        assert_only(found[index], other[index], f"er/{name}")  # type: ignore[arg-type]
    for kind in ("predict", "truth"):
        name = f"test_fold5_{kind}.txt"
        assert found[3][name] == str(REFERENCE[f"er/file {name}"])


@pytest.mark.parametrize("fold", range(1, 6))
def test_the_split_of_each_fold(fold: int) -> None:
    """Train and dev of the published sizes are a permutation at seed 0, cut at 80 %."""
    train, dev, _ = REFERENCE[f"er/fold{fold} sizes"].tolist()
    order = torch.randperm(train + dev, generator=torch.Generator().manual_seed(0)).tolist()
    assert int(0.8 * (train + dev)) == train
    assert order[:8] == REFERENCE[f"er/fold{fold} train indices"].tolist()
    assert order[train : train + 8] == REFERENCE[f"er/fold{fold} dev indices"].tolist()


def x_vector(seed: int) -> XVector:
    """A head with s3prl's weights, whose layers over time are linear layers on neighbouring frames."""
    head = XVector(WIDTH, inputs.ASV_SPEAKERS)
    kernels = {2 + 2 * layer: kernel for layer, (kernel, _) in enumerate(XVECTOR_CONTEXTS)}
    with torch.no_grad():
        for index, parameter in enumerate(head.parameters()):
            if index not in kernels:
                parameter.copy_((3 / parameter.shape[-1]) ** 0.5 * inputs.tensor(100 * seed + index, *parameter.shape))
                continue
            out, width, kernel = parameter.shape
            flat = (3 / (kernel * width)) ** 0.5 * inputs.tensor(100 * seed + index, out, kernel * width)
            parameter.copy_(flat.view(out, kernel, width).transpose(1, 2))
    return head


def speakers(seed: int) -> dict[str, Tensor]:
    """Loss and gradients of a padded batch, and embeddings of the batch and of each item alone."""
    task = task_of("asv", TaskInputs([[f"s{number}" for number in range(inputs.ASV_SPEAKERS)]]))
    items = [Utterance("", f"s{target}") for target in inputs.ASV_TARGETS]
    head, frames = x_vector(seed), list(inputs.ASV_FRAMES)
    utterances = inputs.features(SEEDS["asv"], inputs.ASV_FRAMES)
    features_BFD = pad_sequence(utterances, batch_first=True)
    loss = task.losses(head(features_BFD, frames), frames, items).mean()
    loss.backward()
    head.eval()
    with torch.no_grad():
        alone = torch.cat([head(one[None], [len(one)]) for one in utterances])
        return {
            "loss": loss.detach(),
            "gradient_norms": norms(head),
            "embeddings": head(features_BFD, frames),
            "embeddings alone": alone,
        }


def test_speakers() -> None:
    found, other = speakers(SEEDS["head"]), speakers(SEEDS["head"] + 1)
    for name, value in found.items():
        assert_only(value, other[name], f"asv/{name}")
    assert not torch.allclose(found["embeddings"], found["embeddings alone"], atol=1e-4)  # padding has its effect


def test_trials() -> None:
    names = [f"id1027{index}-video-0000{index}" for index in range(3)]
    pairs = [Trial(names[one], names[two], bool(label)) for label, one, two in inputs.TRIALS]
    task = task_of("asv", TaskInputs([["s"]], trials={"test": Trials(pairs)}))
    embeddings = REFERENCE["asv/embeddings alone"]
    predictions = [Prediction(name, "s", row) for name, row in zip(names, embeddings, strict=True)]
    found = [line.split() for line in str(task.hypothesis_files("test", predictions)["test_predict.txt"]).splitlines()]
    expected = [line.split() for line in str(REFERENCE["asv/file test_predict.txt"]).splitlines()]
    assert [pair for pair, _ in found] == [pair for pair, _ in expected]
    for (_, score), (_, wanted) in zip(found, expected, strict=True):
        assert float(score) == pytest.approx(float(wanted), abs=1e-5)
    labels = inputs.shares(SEEDS["eer"], inputs.EER_TRIALS) < 0.5
    scores = inputs.noise(SEEDS["eer"] + 1, inputs.EER_TRIALS) + 0.5 * labels
    assert equal_error_rate(scores, labels) == pytest.approx(100 * float(REFERENCE["asv/EER"]), abs=1e-5)
    assert equal_error_rate(scores[::-1], labels) != pytest.approx(100 * float(REFERENCE["asv/EER"]), abs=1)


SPEECH = [Segment(*segment) for segment in inputs.SD_SEGMENTS]


def chunk_labels(speech: list[Segment], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr("datamodules.superb.librimix.CHUNK_FRAMES", inputs.SD_CHUNK)
    rows = list(chunks(Row("r", "", 0, text_of(speech)), inputs.SD_SECONDS, inputs.SD_HOP))
    places = [(row.start // inputs.SD_HOP, row.num_samples // inputs.SD_HOP) for row in rows]
    assert speech_of(rows[0].target) == speech
    return [torch.from_numpy(speaker_labels(speech, first, frames, inputs.SD_HOP)) for first, frames in places]


def test_labels_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = chunk_labels(SPEECH, monkeypatch)
    assert [len(chunk) for chunk in labels] == [50, 50, 30]
    for index, chunk in enumerate(labels):
        np.testing.assert_array_equal(chunk, REFERENCE[f"sd/labels {index}"])
    np.testing.assert_array_equal(torch.cat(labels), REFERENCE["sd/labels of test"])
    later = [segment._replace(end=segment.end + 0.02) for segment in SPEECH[:3]] + SPEECH[3:]
    moved = torch.cat(chunk_labels(later, monkeypatch))
    assert not np.array_equal(moved, REFERENCE["sd/labels of test"])


def test_diarization(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("sd", TaskInputs())
    labels = chunk_labels(SPEECH, monkeypatch)
    samples = [inputs.SD_HOP * len(chunk) for chunk in labels]
    features_BFD = pad_sequence(inputs.features(SEEDS["sd"], inputs.SD_FRAMES), batch_first=True)
    matched_BFD, frames = task.features(features_BFD, list(inputs.SD_FRAMES), samples, max(samples))
    torch.testing.assert_close(matched_BFD, reference("sd/matched"))

    def values(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        head = task.build_head(WIDTH)
        inputs.fill(head, seed)
        output = head(matched_BFD, frames)
        losses_B = permutation_losses(output, pad_sequence(labels, batch_first=True), frames)
        loss = losses_B.sum() / sum(map(task.weight, samples))
        loss.backward()
        return output, loss, norms(head)

    found, other = values(SEEDS["head"]), values(SEEDS["head"] + 1)
    for name, value, control in zip(("output", "loss", "gradient_norms"), found, other, strict=True):
        assert_only(value, control, f"sd/{name}")
    accuracies = []
    for index, (feature_FD, chunk) in enumerate(
        zip(inputs.features(SEEDS["sd"], inputs.SD_FRAMES), labels, strict=True)
    ):
        alone_BFD, _ = task.features(feature_FD[None], [len(feature_FD)], [samples[index]], samples[index])
        head = task.build_head(WIDTH)
        inputs.fill(head, SEEDS["head"])
        accuracies.append(frame_accuracy(head(alone_BFD, [len(chunk)])[0].detach().numpy(), chunk.numpy()))
    np.testing.assert_allclose(accuracies, REFERENCE["sd/accuracy alone"], atol=1e-6)


@pytest.mark.parametrize(("threshold", "median"), inputs.SD_GRID)
def test_segments_of_probabilities(threshold: float, median: int) -> None:
    probabilities = inputs.shares(SEEDS["probabilities"], inputs.SD_PROBABILITIES, 2).astype(np.float32)
    lines = [line.split() for line in str(REFERENCE[f"sd/rttm {threshold} {median}"]).splitlines()]
    expected = [(line[7][-1], float(line[3]), float(line[4])) for line in lines]
    found = find_segments(probabilities, threshold, median, inputs.SD_HOP)
    assert [(one.speaker, one.start, round(one.end - one.start, 2)) for one in found] == expected
    control = find_segments(probabilities, threshold - 0.05, median, inputs.SD_HOP)
    assert [(one.speaker, one.start, round(one.end - one.start, 2)) for one in control] != expected


def test_queries() -> None:
    lengths = (*inputs.QBE_QUERIES, *inputs.QBE_DOCUMENTS)
    utterances = [(3 * one + 1).numpy() for one in inputs.features(SEEDS["qbe"], lengths)]
    queries, documents = utterances[: len(inputs.QBE_QUERIES)], utterances[len(inputs.QBE_QUERIES) :]
    directions = [(one - REFERENCE["qbe/mean"]) / REFERENCE["qbe/std"] for one in (queries[0], queries[2], *documents)]
    directions = [one / np.linalg.norm(one, axis=-1, keepdims=True) for one in directions]
    ends = np.cumsum(inputs.QBE_DOCUMENTS)
    for query, expected in zip(directions[:2], REFERENCE["qbe/scores"], strict=True):
        np.testing.assert_allclose(query_scores(query, np.concatenate(directions[2:]), ends), expected, atol=1e-5)
    rows = [Row(f"q{number}", "", 1, QUERY) for number in range(len(queries))]
    rows += [Row(f"d{number}", "", 1, DOCUMENT) for number in range(len(documents))]
    trials = Trials(every_pair(rows, {("q0", "d0")}))
    task = task_of("qbe", TaskInputs(trials={"test": trials}))
    predictions = [Prediction(row.key, row.target, one) for row, one in zip(rows, utterances, strict=True)]
    task.score(predictions, "test")
    expected_lists = terms(str(REFERENCE["qbe/file benchmark.stdlist.xml"]))
    assert terms(str(task.hypothesis_files("test", predictions)["benchmark.stdlist.xml"])) == expected_lists
    backwards = [row[::-1] for row in utterances]
    assert not np.allclose(search(backwards[:3], utterances[3:]), search(queries, documents), atol=1e-2)


def terms(text: str) -> dict[str, list[dict[str, str]]]:
    """Attributes of the terms of each query."""
    return {query.attrib["termid"]: [term.attrib for term in query] for query in ElementTree.fromstring(text.encode())}
