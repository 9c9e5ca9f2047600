"""Heads behind their encoder: readings that equal the tasks' own, items as if alone, encoders that do not fit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import HubertConfig, HubertForSequenceClassification, HubertModel

from lightning_modules.deployment.classifier import classifier, usage
from lightning_modules.deployment.encoder import deployed
from lightning_modules.deployment.head import DeployedHead, TrainedHead, reading_of
from lightning_modules.superb import heads
from lightning_modules.superb.featurizer import States
from lightning_modules.superb.recipes import build_task
from lightning_modules.superb.task_module import TaskModule, TaskOptimisation
from lightning_modules.superb.tasks import ProbeStart, TaskInputs
from lightning_modules.superb.tokenizers import joined
from lightning_modules.superb.upstream import LoadedEncoder, TeacherUpstream
from tests.lightning_modules.test_export import tiny_hubert

INPUTS = {
    "pr": TaskInputs(lexicon=()),
    "asr": TaskInputs(),
    "sf": TaskInputs([["artist", "playlist"]]),
    "ks": TaskInputs([["yes", "no", "up"]]),
    "ic": TaskInputs([["on", "off"], ["lights", "music", "none"], ["kitchen", "none"]]),
    "frames": TaskInputs([["SIL", "a", "b"]]),
}
PROBES = ("frames", "ks")
"""Tasks that are probes here."""


def encoder(**settings: Any) -> LoadedEncoder:
    """An encoder whose convolutions are normalised over channels, so that items of a batch do not see its padding."""
    config = tiny_hubert(2).config.to_dict() | {"feat_extract_norm": "layer"} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LoadedEncoder(HubertModel(HubertConfig.from_dict(config)).eval(), normalize=True)


def trained_module(task: str, teacher: LoadedEncoder, states: States = "all") -> TaskModule:
    """A task's module with weights so large that neighbouring frames differ in their best class."""
    probe = ProbeStart(10, 3) if task in PROBES else None
    upstream = TeacherUpstream(teacher, "tiny")
    module = TaskModule(
        upstream, build_task(task, INPUTS[task]), TaskOptimisation(0.1), probe=probe, states=states
    ).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(6)
        for parameter in [*module.head.parameters(), *module.featurizer.parameters()]:
            parameter.copy_(torch.randn_like(parameter))
        if probe:
            module.featurizer.mean_LD.normal_()
            module.featurizer.scale_LD.uniform_(0.5, 1.5)
    return module


def trained_head(task: str, module: TaskModule) -> TrainedHead:
    parts = module.task, module.featurizer, module.head
    digest, width = module.upstream.digest(), module.upstream.width
    return TrainedHead("runs/head", task, "probe" if task in PROBES else "superb", *parts, width, digest, {})


def texts(task: Any, logits: Tensor, num_frames: list[int]) -> list[str]:
    """What the task itself reads in logits."""
    items = [SimpleNamespace(key=str(number), target="") for number in range(len(logits))]
    predictions = task.predict(logits, num_frames, items)
    if task.tokenizer is not None:
        return [task.texts(prediction)[0] for prediction in predictions]
    if task.recipe.task.__name__ == "FrameTask":
        return [" ".join(task.phones[number] for number in one.values) for one in predictions]
    return [" ".join(task._names(prediction)) for prediction in predictions]


def read(task: Any, logits: Tensor, num_frames: list[int]) -> list[str]:
    """What the deployed graph makes of logits, put together as the model card says."""
    reading = reading_of(task)
    rows = reading.numbers(logits, torch.tensor(num_frames)).tolist()
    pieces = [[reading.texts[number] for number in row] for row in rows]
    return [joined(row) if reading.result == "symbols" else " ".join(filter(None, row)) for row in pieces]


@pytest.mark.parametrize("task", INPUTS)
def test_results_are_those_of_the_task(task: str) -> None:
    built, num_frames = build_task(task, INPUTS[task]), [60, 1, 33]
    generator = torch.Generator().manual_seed(2)
    reading = reading_of(built)
    logits = torch.randn(3, 60, len(reading.texts) - (reading.result == "phones"), generator=generator)
    # Every other frame repeats its neighbour, and classes that the reading drops are frequent.
    logits = logits.repeat_interleave(2, 1)[:, :60]
    logits[..., :3] += 1.0
    logits = logits[:, 0] if reading.result == "labels" else logits
    wanted = texts(built, logits, num_frames)
    assert read(built, logits, num_frames) == wanted
    assert len(set(wanted)) > 1
    assert read(built, logits.roll(1, -1), num_frames) != wanted


@pytest.mark.parametrize("task", ["pr", "sf"])
def test_text_is_not_that_of_the_legacy_decoding(task: str) -> None:
    legacy = build_task(task, TaskInputs(INPUTS[task].labels, INPUTS[task].lexicon, decode="legacy"))
    classes = len(INPUTS[task].labels[0]) * 2 + 31 if task == "sf" else 74
    logits = torch.nn.functional.one_hot(torch.tensor([[5, 0, 5, 5, 1, 5]]), classes).float()
    assert read(build_task(task, INPUTS[task]), logits, [6]) != texts(legacy, logits, [6])


@pytest.mark.parametrize(
    ("task", "states"), [*((task, "all") for task in INPUTS), *((task, "last") for task in PROBES)]
)
@torch.no_grad()
def test_each_item_of_a_padded_batch_is_what_the_task_module_gives_it_alone(
    task: str, states: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "LSTM_WIDTH", 8)
    module = trained_module(task, encoder(), states)
    graph = DeployedHead(deployed(module.upstream.teacher, "all"), trained_head(task, module))
    generator = torch.Generator().manual_seed(4)
    waveforms = [torch.randn(length, generator=generator) for length in (9_000, 16_000, 5_000)]
    waveforms_BT = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True, padding_value=7.0)
    logits, num_frames, _ = graph(waveforms_BT, torch.tensor([len(one) for one in waveforms]))
    for item, waveform_T in enumerate(waveforms):
        batch = SimpleNamespace(waveforms=[waveform_T], num_samples=[len(waveform_T)], rows=[], whole=[True])
        wanted, frames = module(batch)
        found = logits[item][: frames[0]] if wanted.ndim == 3 else logits[item]
        assert num_frames[item] == frames[0]
        torch.testing.assert_close(found, wanted[0], rtol=1e-4, atol=1e-4)
        assert (found - wanted[0].roll(1, -1)).abs().max() > 1e-2


def test_an_encoder_that_the_head_was_not_trained_on_is_an_error() -> None:
    module = trained_module("ks", encoder())
    head = trained_head("ks", module)
    head.require_fit(encoder())
    with pytest.raises(ValueError, match="reads 3 hidden states of width 16, but the encoder has 2 of width 16"):
        head.require_fit(encoder(num_hidden_layers=1))
    with pytest.raises(ValueError, match="trained on an encoder with other weights or settings"):
        head.require_fit(encoder(layer_norm_eps=1e-3))
    other = encoder()
    other.model.encoder.layers[1].attention.q_proj.bias.data += 1e-3
    with pytest.raises(ValueError, match="trained on an encoder with other weights or settings"):
        head.require_fit(other)


@pytest.mark.parametrize("states", ["all", "last"])
@torch.no_grad()
def test_transformers_gives_the_logits_of_a_classifier(states: States) -> None:
    module = trained_module("ic", encoder(), states)
    model = classifier(module.upstream.teacher.model, trained_head("ic", module))
    assert isinstance(model, HubertForSequenceClassification)
    assert [model.config.id2label[number] for number in (1, 2, 4, 6)] == ["off", "lights", "none", "none"]
    waveform_T = torch.randn(9_000, generator=torch.Generator().manual_seed(4))
    upstream = module.upstream
    upstream.teacher.normalize = False
    wanted, _ = module(SimpleNamespace(waveforms=[waveform_T], num_samples=[9_000], rows=[], whole=[True]))
    found = model(waveform_T[None]).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    (model.layer_weights if states == "all" else model.projector.weight).data.zero_()
    assert (model(waveform_T[None]).logits - wanted).abs().max() > 1e-2
    assert "logits.split([2, 3, 2])" in usage(trained_head("ic", module), "folder")


@pytest.mark.parametrize("task", ["pr", "asr", "frames", "ks"])
def test_heads_that_transformers_does_not_have(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for frames and, as the probe of KS, those of standardised hidden states."""
    monkeypatch.setattr(heads, "LSTM_WIDTH", 8)
    module = trained_module(task, encoder())
    with pytest.raises(ValueError, match=rf"no class of transformers has the head in 'runs/head' \(task {task}, "):
        classifier(module.upstream.teacher.model, trained_head(task, module))
