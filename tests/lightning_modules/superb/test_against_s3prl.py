"""Our code against the values of s3prl's own, which ``experiments.superb.reference`` wrote."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2FeatureExtractor

from datamodules.superb.samplers import HalvedSampling
from experiments.superb.reference import inputs
from experiments.superb.reference.inputs import FRAMES, SEEDS, WIDTH
from lightning_modules.superb.ctc import collapse
from lightning_modules.superb.featurizer import Featurizer, frame_counts
from lightning_modules.superb.metrics import slot_edit_f1, slot_type_f1, slot_value_cer, slot_value_wer
from lightning_modules.superb.recipes import TASK_RECIPES
from lightning_modules.superb.tasks import Task, TaskInputs
from lightning_modules.superb.tokenizers import ARPABET, CharacterTokenizer, SlotTokenizer
from lightning_modules.superb.upstream import load_upstream

FILE = Path(__file__).parents[2] / "data" / "s3prl_reference.npz"
REFERENCE = dict(np.load(FILE))


class Utterance(NamedTuple):
    key: str
    target: str


def utterances(keys: list[str], targets: Any) -> list[Utterance]:
    return [Utterance(key, target) for key, target in zip(keys, targets, strict=True)]


INTENT_LABELS = [list(dict.fromkeys(intent[part] for intent in inputs.INTENTS)) for part in range(3)]
SPEAKERS = [f"id{10001 + index}" for index in range(1251)]
LABELS = {
    "pr": [ARPABET], "asr": [], "sf": [list(inputs.SLOT_TYPES)], "ks": [REFERENCE["ks/classes"].tolist()],
    "ic": INTENT_LABELS, "sid": [SPEAKERS],
}  # fmt: skip
ITEMS = {
    "pr": utterances(["p0", "p1", "p2"], inputs.PHONES),
    "asr": utterances(["1-2-0000", "1-2-0001", "1-2-0002"], inputs.LETTERS),
    "sf": utterances(["s0", "s1", "s2"], inputs.SLOT_TEXTS),
    "ks": utterances([f"{name.replace('/', '-')}.wav" for name in inputs.KEYWORDS], ("yes", "no", "_silence_")),
    "ic": utterances(["i0", "i1", "i2"], ["\t".join(intent) for intent in inputs.INTENTS]),
    "sid": utterances(
        [name.replace("/", "-") for name in inputs.SPEAKERS], [name.partition("/")[0] for name in inputs.SPEAKERS]
    ),
}


def task_of(name: str) -> Task:
    recipe = TASK_RECIPES[name]
    return recipe.task(recipe, TaskInputs(labels=LABELS[name]))


def head_values(name: str, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, str | bytes], dict[str, float]]:
    """Output, loss and gradient norms of the batch; prediction files and scores of the utterances one by one."""
    task, items = task_of(name), ITEMS[name]
    head = task.build_head(WIDTH)
    inputs.fill(head, seed)
    head.eval()
    features = inputs.features(SEEDS["features"], FRAMES)
    output = head(pad_sequence(features, batch_first=True), FRAMES)
    loss = task.losses(output, FRAMES, items).mean()
    loss.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in head.parameters() if parameter.grad is not None])
    predictions = []
    for feature_FD, item in zip(features, items, strict=True):
        frames = [len(feature_FD)]
        predictions += task.predict(head(feature_FD[None], frames), frames, [item])
    found = {"output": output.detach(), "loss": loss.detach(), "gradient_norms": norms}
    return found, task.hypothesis_files("test", predictions), task.score(predictions, "test")


@pytest.mark.parametrize("name", LABELS)
def test_heads(name: str) -> None:
    found, files, scores = head_values(name, SEEDS["head"])
    others, other_files, _ = head_values(name, SEEDS["head"] + 1)  # the control
    if name == "sid":
        found["output"], others["output"] = found["output"][:, ::25], others["output"][:, ::25]
    for part, value in found.items():
        expected = torch.from_numpy(REFERENCE[f"{name}/{part}"])
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=2e-5)
        assert not torch.allclose(others[part], expected, rtol=1e-3)
    start = f"{name}/file "
    expected_files = {key[len(start) :]: str(text) for key, text in REFERENCE.items() if key.startswith(start)}
    assert files == expected_files
    assert other_files != expected_files
    logged = dict(str(line).split(" ") for line in REFERENCE[f"{name}/scalars"])
    logged = {key.rpartition("-")[2].replace("acc", "accuracy"): float(value) for key, value in logged.items()}
    compared = {key: value for key, value in logged.items() if key in scores}
    assert compared.keys() >= {TASK_RECIPES[name].monitor}
    for key, value in compared.items():
        percent = 1 if name == "asr" or "edit" in key else 100
        assert scores[key] == pytest.approx(percent * value, abs=1e-4), key


@pytest.mark.parametrize("name", ["pr", "asr", "sf"])
def test_targets(name: str) -> None:
    tokenizer = task_of(name).tokenizer
    assert tokenizer is not None
    encoded = [label for item in ITEMS[name] for label in tokenizer.encode(item.target)]
    assert encoded == REFERENCE[f"{name}/targets"].tolist()
    if name != "sf":
        assert tokenizer.symbols == REFERENCE[f"{name}/symbols"].tolist()


def slot_texts(kind: str) -> tuple[list[str], list[str]]:
    """Hypotheses and references."""
    tokenizer = SlotTokenizer(inputs.SLOT_TYPES)
    encoded = [tokenizer.encode(text) for text in inputs.slot_utterances()]
    hypotheses = [
        tokenizer.decode(inputs.corrupted([label for label in labels if label > 1], kind, number))
        for number, labels in enumerate(encoded)
    ]
    return hypotheses, [tokenizer.decode(labels) for labels in encoded]


SLOT_METRICS: dict[str, Callable[[list[str], list[str]], float]] = {
    "slot_type_f1": slot_type_f1,
    "slot_value_cer": slot_value_cer,
    "slot_value_wer": slot_value_wer,
    "slot_edit_f1_full": lambda hypotheses, references: slot_edit_f1(hypotheses, references, full=True),
    "slot_edit_f1_part": lambda hypotheses, references: slot_edit_f1(hypotheses, references, full=False),
}


@pytest.mark.parametrize("kind", inputs.CORRUPTIONS)
def test_slot_metrics_of_corrupted_utterances(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hypotheses, references = slot_texts(kind)
    assert references[:5] == REFERENCE["sf/references"].tolist()
    expected = {name: float(REFERENCE[f"sf/{kind} {name}"]) for name in SLOT_METRICS}
    found = {name: metric(hypotheses, references) for name, metric in SLOT_METRICS.items()}
    assert found == pytest.approx(expected, abs=1e-3)
    if kind != "spaces":  # the control: an end mark that must not go on
        monkeypatch.setattr("lightning_modules.superb.metrics.SLOT", re.compile(r"B-(\S+) (.+?) E-\1(?!\S)"))
        strict = {name: metric(hypotheses, references) for name, metric in SLOT_METRICS.items()}
        assert all(abs(strict[name] - expected[name]) > 1e-2 for name in SLOT_METRICS)


def test_an_empty_last_line_gives_s3prl_two_classes_that_never_occur() -> None:
    assert REFERENCE["sf/classes after an empty last line"] == len(SlotTokenizer(inputs.SLOT_TYPES).symbols) + 2


def test_groups_of_asr_without_the_last_single_one() -> None:
    number, batch_size = inputs.ASR_GROUPS
    batches = HalvedSampling(5000 + np.arange(number), batch_size, seed=0).batches
    assert [len(batch) for batch in batches] == REFERENCE["asr/group sizes"].tolist()
    assert np.concatenate(batches).tolist() == REFERENCE["asr/group numbers"].tolist()


def test_decoding_of_padding_and_unknown_letters_in_asr() -> None:
    tokenizer = CharacterTokenizer()
    text = tokenizer.decode(collapse(inputs.ASR_PATH, tokenizer.blank))
    assert text == REFERENCE["asr/decoded path"]
    assert "<pad>" in text


def test_fbank() -> None:
    (states_BFD,) = load_upstream("fbank")(inputs.waves(SEEDS["waves"], inputs.FBANK_SAMPLES))
    assert states_BFD.shape == tuple(REFERENCE["fbank/shape"])
    for found, name in ((states_BFD[0, ::10], "first"), (states_BFD[1, ::3], "second")):
        expected = torch.from_numpy(REFERENCE[f"fbank/{name}"])
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
        assert not torch.allclose(found.roll(1, 0), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["post_norm", "stable"])
def test_hidden_states(kind: str, tmp_path: Path) -> None:
    model = inputs.tiny_encoder(kind == "stable")
    assert sorted(name for name, _ in model.named_parameters()) == REFERENCE[f"encoder/{kind} weights"].tolist()
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=kind == "stable").save_pretrained(tmp_path)
    waves = inputs.waves(SEEDS["encoder_waves"], inputs.ENCODER_SAMPLES)
    states = load_upstream(str(tmp_path))(waves)
    expected = [torch.from_numpy(REFERENCE[f"encoder/{kind} {index}"]) for index in range(4)]
    for state_BFD, wanted_BFD in zip(states, expected, strict=True):
        torch.testing.assert_close(state_BFD, wanted_BFD, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(states[2], expected[3], atol=1e-2)
    if kind == "stable":  # the control: transformers 5 gives the last state before the final norm
        raw_BFD = model.encoder.layers[-1](states[2])
        torch.testing.assert_close(model.encoder.layer_norm(raw_BFD)[0], expected[3][0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(raw_BFD[0], expected[3][0], atol=1e-2)


def test_weighted_sum() -> None:
    featurizer = Featurizer(3, WIDTH)
    states = [inputs.tensor(SEEDS["layers"] + layer, 2, 50, WIDTH) for layer in range(3)]
    uniform_BFD = featurizer(states).detach()
    assert featurizer.weights_L is not None
    featurizer.weights_L.data = inputs.tensor(SEEDS["layer_weights"], 3)
    summed_BFD = featurizer(states).detach()
    counts = frame_counts([16_050, 10_200], 320, 50)
    assert counts == REFERENCE["featurizer/frames"].tolist()
    for row, name in enumerate(("first", "second")):
        expected_FD = torch.from_numpy(REFERENCE[f"featurizer/{name}"])
        torch.testing.assert_close(summed_BFD[row, : counts[row]], expected_FD)
        assert not torch.allclose(uniform_BFD[row, : counts[row]], expected_FD, atol=1e-2)
