"""``interstack convert``: a published student's folder in every command that takes a student."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.errors import InputError
from experiments.cli import run
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData
from lightning_modules.export import load_student
from lightning_modules.published.convert import read_settings
from lightning_modules.superb.upstream import LoadedEncoder, load_upstream
from tests.aligned_corpus import save_aligned_corpus
from tests.conftest import REPOSITORY
from tests.patience import PATIENCE
from tests.published_files import TINY, save_published, settings
from tests.test_readme import interstack_commands

FILES = {"README.md", "config.json", "interstack.json", "model.safetensors", "preprocessor_config.json"}
READER = """
import sys
for package in ("lightning_modules", "datamodules", "callbacks", "experiments"):
    sys.modules[package] = None  # importing it is an error
import torch
from transformers import AutoFeatureExtractor, AutoModel
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1])
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
waveforms = [item.numpy() for item in torch.load(sys.argv[2])]
inputs = extractor(waveforms, sampling_rate=16000, padding=True, return_tensors="pt")
with torch.no_grad():
    torch.save(list(model(**inputs, output_hidden_states=True).hidden_states), sys.argv[3])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all layouts, and their folders."""
    folder = tmp_path_factory.mktemp("published")
    for layout in TINY:
        save_published(layout, folder / f"{layout}.ckpt")
        run(["convert", str(folder / f"{layout}.ckpt"), "--output", str(folder / layout)])
    return folder


def waveforms() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, generator=generator) for length in (12_000, 9_000)]


@pytest.mark.parametrize("layout", TINY)
def test_the_folder_is_an_upstream_with_the_published_states(layout: str, folders: Path) -> None:
    student, weights = TINY[layout], save_published(layout, folders / "again.ckpt")[1]
    upstream = load_upstream(str(folders / layout))
    states = upstream(waveforms())
    wanted = student.states(weights, torch.nn.utils.rnn.pad_sequence(waveforms(), batch_first=True), (12_000, 9_000))
    assert upstream.num_states == len(states) == len(student.heads) + (student.state_width is None)
    assert upstream.width == (student.state_width or student.width)
    assert [upstream.num_frames(12_000), upstream.rate] == [37, 320]
    for item, owns in enumerate(wanted):
        for state_BFD, own_FD in zip(states, owns[-len(states) :], strict=True):
            torch.testing.assert_close(state_BFD[item, : len(own_FD)], own_FD, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(state_BFD[1 - item, : len(own_FD)], own_FD, atol=1e-2)


@pytest.mark.parametrize("layout", TINY)
def test_files_and_card(layout: str, folders: Path) -> None:
    folder = folders / layout
    own = set() if layout == "DistilHuBERT" else {"compact_hubert.py"}
    assert {file.name for file in folder.iterdir()} == FILES | own
    extractor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (extractor["do_normalize"], extractor["sampling_rate"]) == (False, 16_000)
    meta = json.loads((folder / "interstack.json").read_text())
    assert meta["converted"]["layout"] == layout
    card = (folder / "README.md").read_text()
    assert f"{layout} with {len(TINY[layout].heads)} layers (" in card
    assert f"`{layout}.ckpt`" in card
    heads, inner = ("[2, 0, 1]", "[10, 6, 0]") if layout == "DPHuBERT" else (2, 10)
    assert f"| Width, feed-forward, heads | 8, {inner}, {heads} |" in card
    assert meta["converted"]["sha256"] in card
    assert ("AutoModel.from_pretrained" in card) == bool(own)
    assert all(part in card for name in ("left_out", "remarks") for part in meta["converted"][name])
    assert not any(word in card.lower() for word in ("license", "licence", "growth", "trained with interstack"))


@pytest.mark.ci
def test_a_process_without_this_project_computes_the_same(folders: Path, tmp_path: Path) -> None:
    torch.save(waveforms(), tmp_path / "waveforms.pt")
    paths = [str(folders / "ARMHuBERT"), str(tmp_path / "waveforms.pt"), str(tmp_path / "states.pt")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER, *paths]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "states.pt")
    assert len(found) == 4
    for one, other in zip(found, load_upstream(str(folders / "ARMHuBERT"))(waveforms()), strict=True):
        torch.testing.assert_close(one[0], other[0])
        torch.testing.assert_close(one[1, :27], other[1, :27])


def test_says_what_it_converted(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="experiments.deployment.convert"):
        run(["convert", str(folders / "FitHuBERT.ckpt"), "--output", str(tmp_path / "student")])
    count = load_student(tmp_path / "student").model.num_parameters()
    assert caplog.messages == [
        "left out: upsampler (a transposed convolution that is never called)",
        f"converted FitHuBERT, 4 layers, {count} parameters to {tmp_path / 'student'}",
    ]


def test_settings_of_a_yaml_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file without settings; the assumed 12 heads do not divide a width of 8, those of the YAML file do."""
    save_published("FitHuBERT", tmp_path / "whole.ckpt")
    state_dict = torch.load(tmp_path / "whole.ckpt", weights_only=False)["state_dict"]
    torch.save({"state_dict": state_dict}, tmp_path / "bare.ckpt")
    command = ["convert", str(tmp_path / "bare.ckpt"), "--output", str(tmp_path / "student")]
    with pytest.raises(InputError, match=r"bare\.ckpt: 12 attention heads, as published, do not divide its width 8"):
        run(command)
    (tmp_path / "student.yaml").write_text(yaml.safe_dump({"distiller": settings(TINY["FitHuBERT"])}))
    run([*command, "--config", str(tmp_path / "student.yaml")])
    assert load_student(tmp_path / "student").model.config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distiller: [", r"student\.yaml is not YAML: "),
        ("model: 3", r"student\.yaml has no section `distiller`: give the configuration that the checkpoint came with"),
        ("- 3", "has no section `distiller`"),
    ],
)
def test_refuses_other_yaml_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "student.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "student.yaml")


def test_what_is_there_is_kept(folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    command = ["convert", str(folders / "MaskHuBERT.ckpt"), "--output", str(output)]
    run(command)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"is not empty: give another one, or set overwrite=true"):
        run(["convert", str(folders / "DPHuBERT.ckpt"), "--output", str(output)])
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((folders / "DPHuBERT.ckpt").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged\.ckpt is damaged"):
        run(["convert", str(damaged), "--output", str(output), "--overwrite"])
    assert (output / "model.safetensors").read_bytes() == before
    run(["convert", str(folders / "DPHuBERT.ckpt"), "--output", str(output), "--overwrite"])
    assert json.loads((output / "interstack.json").read_text())["converted"]["layout"] == "DPHuBERT"
    assert {path.name for path in tmp_path.iterdir()} == {"student", "damaged.ckpt"}


def test_a_probe_scores_it(folders: Path, tmp_path: Path) -> None:
    root = save_aligned_corpus(tmp_path / "tones", {"train": 4, "test": 3})
    data = TaskData(str(root), train_splits=["train"], dev_splits=["test"], test_splits=["test"], num_workers=0)
    result = superb_probe(str(folders / "ARMHuBERT"), data, str(tmp_path / "superb"), task="frames", updates=20)
    assert (result["hidden_states"], result["width"]) == (4, 6)
    assert 0 < result["test"]["accuracy"] <= 100


@pytest.mark.slow  # processes that import torch
def test_latency_times_it(folders: Path, tmp_path: Path) -> None:
    models = {"pruned": str(folders / "DPHuBERT"), "joined": str(folders / "FitHuBERT")}
    sizes = ["--seconds", "[0.5]", "--batch_size", "2", "--threads", "[1]", "--rounds", "1"]
    run(["latency", "--models", json.dumps(models), "--output", str(tmp_path / "out"), *sizes])
    rows = json.loads((tmp_path / "out" / "latency.json").read_text())["rows"]
    assert [row["parameters"] for row in rows] == [
        load_student(folders / layout).model.num_parameters() for layout in ("DPHuBERT", "FitHuBERT")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "states", "number"), [("ARMHuBERT", "all", 4), ("FitHuBERT", "last", 1)])
def test_an_onnx_file_has_all_states_or_the_last_alone(
    layout: str, states: str, number: int, folders: Path, tmp_path: Path
) -> None:
    """As in the docs, where SUPERB's heads see FitHuBERT's last state alone."""
    own = load_upstream(str(folders / layout))(waveforms())
    options = ["--output", str(tmp_path / "onnx"), "--format", "onnx", "--states", states]
    run(["export", "--checkpoint", str(folders / layout), *options])
    upstream = load_upstream(str(tmp_path / "onnx"))
    found = upstream(waveforms())
    assert upstream.num_states == len(found) == number
    for one, other in zip(found, own[-number:], strict=True):
        torch.testing.assert_close(one[0], other[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one[1, :27], other[1, :27], atol=1e-4, rtol=1e-4)


def test_exporting_it_again_in_half_precision(folders: Path, tmp_path: Path) -> None:
    run(["export", "--checkpoint", str(folders / "DPHuBERT"), "--output", str(tmp_path / "half"), "--dtype", "float16"])
    assert "## Conversion" in (tmp_path / "half" / "README.md").read_text()
    student: Any = load_student(tmp_path / "half")
    assert LoadedEncoder(student.model, student.meta["normalize"]).hidden_size == 8


@pytest.mark.parametrize(
    "line", [line for line in interstack_commands([REPOSITORY / "docs" / "published.md"]) if " convert " in line]
)
def test_documented_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)[1:]
    layout = {"students/" + name.lower(): name for name in TINY}[arguments[arguments.index("--output") + 1]]
    save_published(layout, Path(arguments[1]))
    Path(f"{layout}-960h.yaml").write_text(yaml.safe_dump({"distiller": settings(TINY[layout])}))
    run(arguments)
    assert load_student(Path("students") / layout.lower()).meta["converted"]["layout"] == layout
