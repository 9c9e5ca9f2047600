"""``interstack export --head``: files that say what the task module says, cards that run, folders that are refused."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

from datamodules.audio import read_audio
from datamodules.files import read_json, write_json
from experiments.cli import run
from experiments.superb.checkpoint import BEST, load_best
from experiments.superb.options import RunSettings
from experiments.superb.preparation import prepare
from experiments.superb.running import build_module
from lightning_modules.deployment.onnx_file import MODEL_FILE, session
from lightning_modules.export import load_student
from lightning_modules.superb import heads
from lightning_modules.superb.task_module import TaskModule
from lightning_modules.superb.tokenizers import joined
from lightning_modules.superb.upstream import load_upstream
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb
from tests.lightning_modules.test_export import checkpoint_of, save, tiny_hubert

Result = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _small_lstms() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "LSTM_WIDTH", 8)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its exported folder, and corpora."""
    folder = tmp_path_factory.mktemp("home")
    checkpoint = save(folder, checkpoint_of(tiny_hubert(3), normalize=True), "student.ckpt")
    export(checkpoint, folder / "student")
    corpora.librispeech(folder / "corpora", evaluation=3)
    corpora.fluent(folder / "corpora")
    corpora.voxceleb1(folder / "corpora")
    return folder


def export(checkpoint: Path, output: Path, *more: str) -> Path:
    run(["export", "--checkpoint", str(checkpoint), "--output", str(output), *more])
    return output


def head_of(home: Path, task: str, upstream: Path, *more: str) -> Path:
    """The folder of a trained head, whose weights then get noise and a bias with which its results differ."""
    updates = ["--updates", "1", "--eval_every", "1", *more]
    folder = Path(superb(task, upstream, home / "corpora", home / task, *updates)["config"]["output"])
    best = torch.load(folder / BEST, weights_only=True)
    generator = torch.Generator().manual_seed(8)
    for key, value in best["state_dict"].items():
        if key.startswith("head."):
            value += torch.randn(value.shape, generator=generator)
    torch.save(best, folder / BEST)
    module, utterances = module_of(folder, upstream)
    bias_C = best["state_dict"]["head.linear.bias"]
    logits = torch.cat([said(module, waveform_T)[0].reshape(-1, len(bias_C)) for waveform_T in utterances.values()])
    bias_C -= logits.mean(0)
    torch.save(best, folder / BEST)
    return folder


@pytest.fixture(scope="module")
def asr(home: Path) -> Path:
    return head_of(home, "asr", home / "student.ckpt")


@pytest.fixture(scope="module")
def ic(home: Path) -> Path:
    """Trained on the exported folder."""
    return head_of(home, "ic", home / "student")


@pytest.fixture(scope="module")
def sid(home: Path) -> Path:
    return head_of(home, "sid", home / "student.ckpt")


def module_of(folder: Path, upstream: Path) -> tuple[TaskModule, dict[str, Tensor]]:
    """The module that training left, and the test utterances."""
    settings = RunSettings.from_plain(read_json(folder / "config.json"))
    encoder = load_upstream(str(upstream))
    prepared = prepare(settings, encoder.rate)
    module = build_module(settings, encoder, prepared).eval()
    load_best(folder, module)
    rows = next(iter(prepared.corpus.tests.values()))
    return module, {row.key: torch.from_numpy(read_audio(row.path)) for row in rows}


def said(module: TaskModule, waveform_T: Tensor) -> tuple[Tensor, str]:
    """Logits and text of the module for one utterance."""
    items: Any = [SimpleNamespace(key="one", target="")]
    batch: Any = SimpleNamespace(waveforms=[waveform_T], num_samples=[len(waveform_T)], rows=items, whole=[True])
    with torch.no_grad():
        output, num_frames = module(batch)
    (prediction,) = module.task.predict(output, num_frames, items)
    if module.task.tokenizer is not None:
        return output[0], module.task.texts(prediction)[0]
    task: Any = module.task
    return output[0], " ".join(task._names(prediction))


def onnx_results(folder: Path, waveforms: list[Tensor]) -> dict[str, Any]:
    opened = session(folder / MODEL_FILE, threads=1)
    waveforms_BT = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    inputs = {"waveforms": waveforms_BT.numpy(), "num_samples": torch.tensor([len(one) for one in waveforms]).numpy()}
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(None, inputs), strict=True))


def text_of(results: dict[str, Any], item: int = 0) -> str:
    return joined(results["symbols"][item]) if "symbols" in results else " ".join(results["labels"][item])


def assert_same_as_module(output: Path, head: Path, upstream: Path) -> None:
    """Every test utterance, alone and several at once."""
    module, utterances = module_of(head, upstream)
    wanted = [said(module, waveform_T) for waveform_T in utterances.values()]
    for waveform_T, (logits, text) in zip(utterances.values(), wanted, strict=True):
        found = onnx_results(output, [waveform_T])
        torch.testing.assert_close(torch.from_numpy(found["logits"][0]), logits, rtol=1e-4, atol=1e-4)
        assert text_of(found) == text
    assert len({text for _, text in wanted} - {""}) > 1, "a head that hears nothing would pass"
    alike = [next(iter(utterances.values()))] * 3
    found = onnx_results(output, alike)
    assert [text_of(found, item) for item in range(3)] == [wanted[0][1]] * 3


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **known: Any) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    exec(code, known)
    return capsys.readouterr().out


@pytest.mark.ci
def test_text(home: Path, asr: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The BiLSTM of ASR, on utterances of several lengths."""
    output = export(home / "student.ckpt", home / "asr-onnx", "--format", "onnx", "--head", str(asr))
    assert_same_as_module(output, asr, home / "student.ckpt")
    found = onnx_results(output, [torch.randn(16_000), torch.randn(400), torch.randn(7_000)])
    assert found["num_frames"].tolist() == [49, 1, 21]
    assert set(found["symbols"][1, 1:]) == {""}
    assert re.fullmatch(r"[A-Z'|<>/a-z ]+\n", run_card(output, monkeypatch, capsys))
    assert "pipeline_tag: automatic-speech-recognition" in (output / "README.md").read_text()
    classes = read_json(output / "labels.json")
    assert (classes["symbols"][4], classes["pieces"][4], classes["blank"]) == ("|", " ", 0)
    with pytest.raises(ValueError, match="returns logits of a head"):
        load_upstream(str(output))


@pytest.mark.slow  # test_text exports another head; test_pipeline_of_transformers has the labels of one of this kind
def test_labels(home: Path, ic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The head was trained on the exported folder, and the file is made from the checkpoint."""
    output = export(home / "student.ckpt", home / "ic-onnx", "--format", "onnx", "--head", str(ic))
    assert_same_as_module(output, ic, home / "student")
    lists = read_json(output / "labels.json")["labels"]
    words = run_card(output, monkeypatch, capsys).split()
    assert [word in names for word, names in zip(words, lists, strict=True)] == [True] * 3
    described = read_json(output / "interstack.json")["onnx"]
    assert described["outputs"]["labels"] == ["batch", "label lists"]
    assert described["head"]["task"] == "ic"


@pytest.mark.slow  # tests/lightning_modules/deployment/test_onnx_export.py has int8 files
def test_int8(home: Path, sid: Path) -> None:
    more = "--format", "onnx", "--quantize", "int8", "--head", str(sid)
    output = export(home / "student.ckpt", home / "sid-int8", *more)
    module, utterances = module_of(sid, home / "student.ckpt")
    for waveform_T in utterances.values():
        found, (logits, _) = onnx_results(output, [waveform_T]), said(module, waveform_T)
        error = (torch.from_numpy(found["logits"][0]) - logits).norm() / logits.norm()
        assert 1e-5 < error < 0.5
        assert list(found["labels"][0]) == [module.task.labels[0][int(found["logits"][0].argmax())]]  # type: ignore[attr-defined]
    assert 1e-5 < read_json(output / "interstack.json")["onnx"]["checked"]["relative_error"] < 0.2


def test_pipeline_of_transformers(home: Path, sid: Path) -> None:
    output = export(home / "student.ckpt", home / "sid-hf", "--head", str(sid))
    module, utterances = module_of(sid, home / "student.ckpt")
    classify = pipeline("audio-classification", model=str(output))
    names = set()
    for waveform_T in utterances.values():
        logits, label = said(module, waveform_T)
        found = classify(waveform_T.numpy())
        names.add(found[0]["label"])
        assert found[0]["label"] == label
        wanted = logits.softmax(-1).sort(descending=True).values
        torch.testing.assert_close(torch.tensor([one["score"] for one in found]), wanted, rtol=1e-4, atol=1e-5)
    assert len(names) > 1
    assert "pipeline_tag: audio-classification" in (output / "README.md").read_text()
    assert load_upstream(str(output)).digest() == load_upstream(str(home / "student")).digest()  # the same encoder
    again, student = load_student(output), load_student(home / "student.ckpt")
    assert again.meta == student.meta  # an export of this folder has no head by itself
    for one, other in zip(again.model.parameters(), student.model.parameters(), strict=True):
        assert one.equal(other)


def test_heads_without_a_class_of_transformers(home: Path, asr: Path) -> None:
    with pytest.raises(ValueError, match=r"no class of transformers has the head .* \(task asr, preset superb\)"):
        export(home / "student.ckpt", home / "none", "--head", str(asr))


def test_a_head_of_other_weights_than_half_precision_has_is_refused(home: Path, sid: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was trained on an encoder with other weights or settings"):
        export(home / "student.ckpt", tmp_path / "none", "--head", str(sid), "--dtype", "float16")
    assert not (tmp_path / "none").exists()


def test_a_head_of_several_lists_behind_half_precision_runs_as_its_card_says(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpora").symlink_to(home / "corpora")
    ic = head_of(tmp_path, "ic", export(home / "student.ckpt", tmp_path / "half", "--dtype", "float16"))
    output = export(home / "student.ckpt", tmp_path / "ic-half", "--head", str(ic), "--dtype", "float16")
    waveform = 0.1 * torch.randn(16_000).numpy()
    words = run_card(output, monkeypatch, capsys, waveform=waveform).split()
    lists = read_json(ic / "labels.json")["labels"]
    assert [word in names for word, names in zip(words, lists, strict=True)] == [True] * 3


def test_refusals(home: Path, sid: Path, tmp_path: Path) -> None:
    def refused(message: str, *more: str, head: Path = sid, checkpoint: str = "student.ckpt") -> None:
        with pytest.raises(ValueError, match=message):
            export(home / checkpoint, tmp_path / "none", "--format", "onnx", "--head", str(head), *more)
        assert not (tmp_path / "none").exists()

    refused("--states and --head exclude each other", "--states", "all")
    refused("reads 4 hidden states of width 16, but the encoder has 3 of width 16: a cut", "--layers", "2")
    save(home, checkpoint_of(tiny_hubert(3), normalize=False), "other.ckpt")
    refused("was trained on an encoder with other weights or settings", checkpoint="other.ckpt")
    for folder in (tmp_path, sid.parent, sid.parent.parent):
        refused("is no run of `interstack superb`: give the folder with config.json", head=folder)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("result.json", "is not finished: run the same `interstack superb` again, which continues it"),
        ("labels.json", "has no labels.json: run the same `interstack superb` again, which adds it"),
        ("best.ckpt", "has lost its best.ckpt"),
    ],
)
def test_incomplete_runs(lost: str, message: str, home: Path, sid: Path, tmp_path: Path) -> None:
    for file in sid.iterdir():
        if file.name != lost:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=message):
        export(home / "student.ckpt", tmp_path / "none", "--head", str(tmp_path))


def test_damaged_and_undeployable_runs(home: Path, sid: Path, tmp_path: Path) -> None:
    for file in sid.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_json(tmp_path / "labels.json", {"labels": [["one", "two"]]})
    with pytest.raises(ValueError, match=r"best.ckpt in .* does not fit its labels.json"):
        export(home / "student.ckpt", tmp_path / "none", "--head", str(tmp_path))
    write_json(tmp_path / "config.json", read_json(sid / "config.json") | {"task": "asv"})
    with pytest.raises(ValueError, match="a head of task asv has no export: give one of pr, ks, ic, sid, er, asr, sf"):
        export(home / "student.ckpt", tmp_path / "none", "--head", str(tmp_path))
