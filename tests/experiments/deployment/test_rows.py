"""What a user names becomes folders from which a worker loads."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel

from datamodules.errors import InputError
from experiments.deployment.rows import find_rows
from lightning_modules.export import load_student
from tests.experiments.deployment.tiny_onnx import save_onnx
from tests.helpers import make_data, make_module, make_trainer, save_corpus, save_teacher, save_whisper


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run, at its place in a run folder."""
    place = tmp_path_factory.mktemp("run")
    teacher, corpus = save_teacher(place / "teacher"), save_corpus(place / "corpus", {"train": 4, "dev": 2})
    trainer = make_trainer(place, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(teacher, num_layers=2), make_data(corpus, place / "cache"))
    path = place / "run" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_folders_are_used_as_they_are(tmp_path: Path) -> None:
    teacher, whisper = save_teacher(tmp_path / "teacher"), save_whisper(tmp_path / "whisper")
    rows = find_rows([str(teacher), str(whisper)], ["float32", "int8"], tmp_path)
    assert [(row.name, row.precision) for row in rows] == [
        (name, precision) for name in ("teacher", "whisper") for precision in ("float32", "int8")
    ]
    assert [row.path for row in rows[::2]] == [str(teacher), str(whisper)]
    assert [row.config.model_type for row in rows[::2]] == ["hubert", "whisper"]
    assert not any(row.random_weights for row in rows)


def test_checkpoint_and_run_folder_are_exported(checkpoint: Path, tmp_path: Path) -> None:
    models = {"file": str(checkpoint), "run": str(checkpoint.parent.parent)}
    file, run = find_rows(models, ["float32"], tmp_path)
    own = load_student(checkpoint).model.state_dict()
    for row in (file, run):
        exported = HubertModel.from_pretrained(row.path).state_dict()
        assert all(torch.equal(exported[name], value) for name, value in own.items())
        assert row.source == models[row.name]
    assert file.path != run.path


def test_random_weights_of_sizes_and_of_a_configuration(tmp_path: Path) -> None:
    HubertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "config")
    models = {"sizes": "random:2x64x4", "config": f"random:{tmp_path / 'config'}"}
    sizes, config = find_rows(models, ["float32"], tmp_path)
    assert sizes.random_weights
    assert config.random_weights
    drawn = HubertModel.from_pretrained(sizes.path)
    assert [drawn.config.num_hidden_layers, drawn.config.hidden_size, drawn.config.num_attention_heads] == [2, 64, 4]
    assert drawn.config.intermediate_size == 256
    assert HubertModel.from_pretrained(config.path).config.hidden_size == 32


def test_onnx_folder_has_one_row_of_its_own_precision(tmp_path: Path) -> None:
    student = HubertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).to_dict()
    folder = save_onnx(tmp_path / "quick", {"student_config": student, "onnx": {"precision": "int8", "parameters": 7}})
    (row,) = find_rows([str(folder)], ["float32", "bfloat16"], tmp_path)
    assert (row.format, row.precision, row.label) == ("ONNX", "int8", "quick, ONNX int8")
    assert (row.config.hidden_size, row.parameters) == (32, 7)
    (bare,) = find_rows([str(save_onnx(tmp_path / "bare"))], ["float32"], tmp_path)
    assert (bare.precision, bare.config) == ("unknown", None)


@pytest.mark.parametrize(
    ("models", "precisions", "says"),
    [
        (["random:1x32x2"], ["float16"], "'float16' is none of float32, bfloat16, int8"),
        (["random:1x32x2"], [], "must each have one entry"),
        (["a/x", "b/x"], ["float32"], "a/x and b/x are both named x: give names"),
        ({"a": "random:1x40x2"}, ["float32"], "random:1x40x2: the width must be a multiple of the heads and of 16"),
        ({"a": "EMPTY"}, ["float32"], "model 'a': .*holds no config.json, model.onnx or checkpoints/last.ckpt"),
        ({"a": "EMPTY/no.ckpt"}, ["float32"], "there is no checkpoint"),
        ({"a": "./no/such/place"}, ["float32"], "'./no/such/place'|'no/such/place'"),
    ],
)  # fmt: skip
def test_refused(models: list[str] | dict[str, str], precisions: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    if isinstance(models, dict):
        models = {name: source.replace("EMPTY", str(tmp_path / "empty")) for name, source in models.items()}
    with pytest.raises(InputError, match=says) as error:
        find_rows(models, precisions, tmp_path)
    assert "\n" not in str(error.value)


def test_onnx_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_onnx(tmp_path / "quick")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs the package onnxruntime: pip install 'interstack\[onnx\]'"):
        find_rows([str(folder)], ["float32"], tmp_path)
