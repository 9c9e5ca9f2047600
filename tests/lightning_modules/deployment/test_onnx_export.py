"""ONNX files: the states of the encoder that they were made of, and folders that need only onnxruntime and NumPy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel

from datamodules.audio import read_audio
from lightning_modules.deployment.encoder import deployed
from lightning_modules.deployment.onnx_export import card, check, export_onnx, load_encoder
from lightning_modules.deployment.onnx_file import MODEL_FILE, TOLERANCE, difference, run, session, write_onnx
from lightning_modules.deployment.streaming import StreamedUpstream, StreamSettings
from lightning_modules.export import load_student
from lightning_modules.precision import relative_error
from lightning_modules.superb.upstream import LoadedEncoder, load_upstream
from tests.helpers import POLICY_STAGES, make_data, make_module, make_trainer, save_corpus, save_teacher, save_whisper
from tests.lightning_modules.deployment.test_encoder import states_of
from tests.lightning_modules.teachers import FAMILIES
from tests.lightning_modules.test_export import checkpoint_of, save, tiny_hubert
from tests.patience import PATIENCE
from tests.students import KINDS, POSITIONS
from tests.tiny_run import fit

pytestmark = pytest.mark.ci  # an export takes ten seconds and more

BATCHES = {"alone": [12_345], "shortest": [400], "padded": [30_000, 17_000, 401], "whole": [16_000, 16_000]}


def batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    noise_BT = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(3))
    return 0.1 * noise_BT, torch.tensor(lengths)


def assert_equals_pytorch(folder: Path, encoder: str, batches: list[tuple[Tensor, Tensor]]) -> None:
    """All frames of all items, beside the states on which heads are trained; another encoder's are far."""
    _, teacher = load_encoder(encoder)
    opened = session(folder / MODEL_FILE, threads=1)
    for waveforms_BT, num_samples_B in batches:
        found, num_frames = run(opened, waveforms_BT, num_samples_B)
        wanted = torch.stack(states_of(teacher, waveforms_BT, num_samples_B))
        wanted = wanted if found.ndim == 4 else wanted[-1]
        assert num_frames.tolist() == teacher.num_frames(num_samples_B).tolist()
        for item, frames in enumerate(num_frames.tolist()):
            pair = found[..., item, :frames, :], wanted[..., item, :frames, :]
            assert difference(*pair) < TOLERANCE
            assert difference(pair[0], pair[1].flip(-1)) > 100 * TOLERANCE  # the check can fail


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"), checkpoint_of(tiny_hubert(3), normalize=True))


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    export_onnx(str(checkpoint), checkpoint.parent / "student", states="all")
    return checkpoint.parent / "student"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 file of the first two layers of a student of width 32."""
    home = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    hubert = HubertModel(HubertConfig(**sizes, conv_dim=(16,) * 7, num_conv_pos_embedding_groups=2)).eval()
    checkpoint = save(home, checkpoint_of(hubert))
    export_onnx(str(checkpoint), home / "student", quantize="int8", layers=2)
    return home


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_student(lengths: list[int], folder: Path, checkpoint: Path) -> None:
    assert_equals_pytorch(folder, str(checkpoint), [batch(lengths)])


def test_student_on_real_speech(folder: Path, checkpoint: Path, real_data: Path) -> None:
    files = sorted((real_data / "LibriSpeech").rglob("*.flac"))[:3]
    assert files
    spoken = [torch.from_numpy(read_audio(str(file), 16_000)) for file in files]
    padded_BT = torch.nn.utils.rnn.pad_sequence(spoken, batch_first=True)
    alone = [(waveform_T[None], torch.tensor([len(waveform_T)])) for waveform_T in spoken]
    lengths = torch.tensor([len(waveform_T) for waveform_T in spoken])
    assert_equals_pytorch(folder, str(checkpoint), [*alone, (padded_BT, lengths)])


@pytest.mark.slow  # whatever the policy, a student is a model like that of test_student
@pytest.mark.parametrize("policy", POLICY_STAGES)
def test_students_of_every_policy(policy: str, inputs: Path, tmp_path: Path) -> None:
    stages = f"[{','.join(map(str, POLICY_STAGES[policy]))}]"
    fit(inputs, "--name", f"onnx-{policy}", "--growth.policy", policy, "--growth.stages", stages)
    run_folder = str(inputs / "runs" / f"onnx-{policy}")
    described = export_onnx(run_folder, tmp_path / "student", states="all")
    assert described["layers"] == 4
    assert_equals_pytorch(tmp_path / "student", run_folder, [batch(lengths) for lengths in BATCHES.values()])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "joined frames" else pytest.mark.slow) for kind in KINDS]
)
def test_students_of_every_kind(kind: str, tmp_path: Path) -> None:
    module = make_module(save_teacher(tmp_path / "teacher", **POSITIONS), 2, **KINDS[kind])
    trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    data = make_data(save_corpus(tmp_path / "corpus", {"train": 2, "dev": 1}), tmp_path / "cache", batch_size=2)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_onnx(str(tmp_path / "last.ckpt"), tmp_path / "student", states="all")
    batches = [batch(lengths) for lengths in BATCHES.values()]
    assert_equals_pytorch(tmp_path / "student", str(tmp_path / "last.ckpt"), batches)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.slow  # test_encoder.py has the same graphs before they are written
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    export_onnx(str(folders[family]), tmp_path / "encoder", states="all")
    assert_equals_pytorch(tmp_path / "encoder", str(folders[family]), [batch(one) for one in BATCHES.values()])


@pytest.mark.slow  # as are the other teachers above
def test_whisper(tmp_path: Path) -> None:
    teacher = save_whisper(tmp_path / "whisper")
    described = export_onnx(str(teacher), tmp_path / "encoder")
    assert (described["shortest_samples"], described["longest_samples"]) == (400, 100 * 320)
    assert_equals_pytorch(tmp_path / "encoder", str(teacher), [batch(one) for one in BATCHES.values()])
    text = (tmp_path / "encoder" / "README.md").read_text()
    assert f"The speech encoder `{teacher}` as an ONNX file" in text
    assert "at least 400 samples and at most 32000." in text


def test_long_utterances_of_whisper_are_computed_in_parts_as_in_pytorch(tmp_path: Path) -> None:
    teacher = save_whisper(tmp_path / "whisper")  # of 2 s at most
    export_onnx(str(teacher), tmp_path / "encoder", states="all")
    spoken = [waveform_T[:length] for length, waveform_T in zip((75_000, 30_000), batch([75_000] * 2)[0], strict=True)]
    found, wanted = load_upstream(str(tmp_path / "encoder"))(spoken), load_upstream(str(teacher))(spoken)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all()
        for item, frames in enumerate((234, 93)):
            assert difference(one[item, :frames], other[item, :frames]) < TOLERANCE


def test_numbers_that_are_not_finite_and_files_that_are_too_large_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hubert = tiny_hubert(3)
    with torch.no_grad():
        hubert.encoder.layers[1].feed_forward.output_dense.bias[0] = float("nan")
    broken = save(tmp_path, checkpoint_of(hubert), "broken.ckpt")
    with pytest.raises(ValueError, match="returns numbers that are not finite on noise"):
        export_onnx(str(broken), tmp_path / "student")
    monkeypatch.setattr("lightning_modules.deployment.onnx_export.MOST_IN_ONE_FILE", 1000)
    with pytest.raises(ValueError, match="--quantize int8 takes encoders of 1e-06 GB"):
        export_onnx(str(checkpoint), tmp_path / "student", quantize="int8")
    assert not (tmp_path / "student").exists()


def test_int8(small: Path) -> None:
    """The file is about a quarter as large, and its states are near those of the first two layers."""
    described = json.loads((small / "student" / "interstack.json").read_text())["onnx"]
    assert (described["precision"], described["layers"]) == ("int8", 2)
    student, teacher = load_encoder(str(small / "last.ckpt"), layers=2)
    assert student is not None
    waveforms_BT, num_samples_B = batch(BATCHES["padded"])
    (found, _), wanted = run(session(small / "student" / MODEL_FILE), waveforms_BT, num_samples_B), deployed(teacher)
    error = relative_error(found, wanted(waveforms_BT, num_samples_B)[0])
    assert 1e-5 < error < 0.1  # not exact, or nothing was quantised
    assert 0 < described["checked"]["relative_error"] < 0.1
    import onnx

    kinds = [node.op_type for node in onnx.load(small / "student" / MODEL_FILE).graph.node]
    assert kinds.count("MatMulInteger") == 1 + 2 * 6  # the feature projection, and six linear layers in a layer
    assert "ConvInteger" not in kinds


def test_the_check_finds_another_model(checkpoint: Path, folder: Path) -> None:
    other = LoadedEncoder(tiny_hubert(3, seed=1), normalize=True)
    _, own = load_encoder(str(checkpoint))
    assert check(deployed(own, "all"), folder / MODEL_FILE)["difference"] < TOLERANCE
    assert check(deployed(other, "all"), folder / MODEL_FILE)["difference"] > 100 * TOLERANCE


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "lightning_modules", "soundfile", "scipy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_the_lines_of_the_readme_need_only_onnxruntime_and_numpy(folder: Path, small: Path) -> None:
    for place, shape in ((folder, "(4, 1, 49, 16) [49]"), (small / "student", "(1, 49, 32) [49]")):
        lines = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)[0]
        assert len(lines.splitlines()) <= 10
        command = [sys.executable, "-c", WITHOUT + lines]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=place.parent)
        assert ran.stdout.strip() == shape, ran.stderr


def test_a_folder_is_an_upstream_of_superb(folder: Path, checkpoint: Path, small: Path) -> None:
    """It gives the states of the student that it was made of, alone and in padded batches."""
    spoken = [waveforms_T[:length] for length, waveforms_T in zip((9000, 5000), batch([9000, 9000])[0], strict=True)]
    own, original = load_upstream(str(folder)), load_upstream(str(checkpoint))
    assert (own.rate, own.num_states, own.width) == (original.rate, original.num_states, original.width)
    for one, other in zip(own(spoken), original(spoken), strict=True):
        assert difference(one, other) < TOLERANCE
        assert difference(one, other.flip(-1)) > 100 * TOLERANCE
    for length in (0, 399, 400, 719, 720, 16_000):
        assert own.num_frames(length) == original.num_frames(length)
    assert load_upstream(str(small / "student")).num_states == 1
    assert own.digest() == load_upstream(str(folder)).digest() != load_upstream(str(small / "student")).digest()
    settings = StreamSettings(hop=10, left_context=1000, look_ahead=1000)
    with pytest.raises(ValueError, match="normalises each waveform itself, or has positions that end"):
        StreamedUpstream(own, settings)
    whole = load_upstream(str(small / "student"))
    assert difference(StreamedUpstream(whole, settings)(spoken[:1])[0], whole(spoken[:1])[0]) < TOLERANCE
    with pytest.raises(ValueError, match="normalises waveforms itself where it must: leave out --normalize"):
        load_upstream(str(folder), normalize=True)


def test_only_what_export_wrote_is_an_upstream(folder: Path, tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"holds model\.onnx, but no interstack\.json that describes it"):
        load_upstream(str(tmp_path))
    described = json.loads((folder / "interstack.json").read_text())
    (tmp_path / "interstack.json").write_text(json.dumps(described))
    (tmp_path / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.onnx is damaged"):
        load_upstream(str(tmp_path))


def test_card_and_description(folder: Path, checkpoint: Path) -> None:
    described = json.loads((folder / "interstack.json").read_text())
    assert described["growth_settings"]["policy"] == "interleave"
    assert described["onnx"]["parameters"] == tiny_hubert(3).num_parameters()
    assert list(described["onnx"]["outputs"]) == ["hidden_states", "num_frames"]
    text = (folder / "README.md").read_text()
    for part in ("library_name: onnx", "| Growth policy | interleave |", "the file normalises it", "opset 20"):
        assert part in text
    assert "from transformers" not in text
    student = load_student(checkpoint)
    assert card(student, "x", folder.name, described["onnx"]) == text


def test_an_onnx_folder_is_no_checkpoint(folder: Path) -> None:
    for load in (load_student, load_encoder):
        with pytest.raises(ValueError, match="holds an ONNX file: give the checkpoint that it was made of"):
            load(str(folder))


def test_refusals_write_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    for settings, message in (
        ({"opset": 17}, "opset=17: choose from 18, the oldest that torch's exporter writes"),
        ({"opset": 999}, "opset=999: choose from 18"),
        ({"layers": 4}, "layers=4, but the encoder has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(str(checkpoint), output, **settings)
    for name, message in (
        ("fbank", "fbank has no weights"),
        (str(tmp_path), "holds no Hugging Face model"),
        ("no.ckpt", "there is no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(name, output)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs the package onnxruntime: pip install 'interstack\[onnx\]'"):
        export_onnx(str(checkpoint), output)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="needs the package onnx:"):
        write_onnx(torch.nn.Identity(), tmp_path / "x.onnx", ["x"])
    assert list(tmp_path.iterdir()) == []
