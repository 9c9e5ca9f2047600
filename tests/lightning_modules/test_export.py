"""Export: the folder reloads to identical hidden states, says what it is, and is never half-written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from lightning_modules.export import CHECKPOINT_FORMAT, Dtype, export_student, load_student
from lightning_modules.model_card import model_card

FILES = {"README.md", "config.json", "interstack.json", "model.safetensors", "preprocessor_config.json"}
GROWTH = {
    "epoch": 2,
    "step": 1234,
    "policy": "interleave",
    "plan": [0, 0, None],
    "ancestry": [0, 0, None],
    "depth_before": 1,
    "depth": 3,
}


def tiny_hubert(depth: int, seed: int = 0) -> HubertModel:
    torch.manual_seed(seed)
    config = HubertConfig(
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        initializer_range=0.3,  # larger than usual, so that each layer matters
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    return HubertModel(config).eval()


def checkpoint_of(hubert: HubertModel, **meta: Any) -> dict[str, Any]:
    """A training checkpoint as the distillation module writes it."""
    weights = {f"student.hubert.{key}": value for key, value in hubert.state_dict().items()}
    others = {"objective.heads.4.weight": torch.zeros(2), "student._extra_state": {"ancestry": [0]}}
    return {
        "state_dict": weights | others,
        "optimizer_states": [],
        "interstack": {
            "format": CHECKPOINT_FORMAT,
            "student_config": json.loads(json.dumps(hubert.config.to_dict())),
            "normalize": False,
            "sample_rate": 16000,
            "teacher": {
                "class_path": "lightning_modules.teacher.HuggingFaceTeacher",
                "init_args": {"model": "facebook/hubert-base-ls960"},
            },
            "recipe": {"optimizer": {"lr": 0.0005}, "seed": 7},
            "ancestry": list(range(len(hubert.encoder.layers))),
            "originals": list(range(len(hubert.encoder.layers))),
            "growth": [GROWTH],
            "growth_settings": {"policy": "interleave", "schedule": "prop-1", "stages": [1, 3]},
            "data": {"splits": ["train-clean-100"], "rows": 42},
            "metrics": {"val/loss": 0.123456789},
            "versions": {"torch": "2.11.0"},
        }
        | meta,
    }


def save(tmp_path: Path, checkpoint: Any, name: str = "last.ckpt") -> Path:
    torch.save(checkpoint, tmp_path / name)
    return tmp_path / name


def hidden_states(model: Any, inputs: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(model(**inputs, output_hidden_states=True).hidden_states)


def waveforms() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(0.3 + 0.1 * torch.randn(length, generator=generator)).numpy() for length in (8000, 5000)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("depth", [3, 12])
def test_round_trip(depth: int, normalize: bool, tmp_path: Path) -> None:
    hubert = tiny_hubert(depth)
    path = save(tmp_path, checkpoint_of(hubert, normalize=normalize))
    export_student(path, tmp_path / "out" / "student")
    folder = tmp_path / "out" / "student"
    assert {file.name for file in folder.iterdir()} == FILES
    assert [file.name for file in folder.parent.iterdir()] == ["student"], "nothing temporary is left"

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert (extractor.do_normalize, extractor.return_attention_mask) == (normalize, True)
    assert extractor.sampling_rate == 16000
    inputs = extractor(waveforms(), sampling_rate=16000, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).tolist() == [8000, 5000]
    raw = bool((inputs["input_values"][0] == torch.from_numpy(waveforms()[0])).all())
    assert raw == (not normalize)

    expected = hidden_states(hubert, inputs)
    other = hidden_states(tiny_hubert(depth, seed=1), inputs)
    for reloaded in (HubertModel.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert reloaded.config.num_hidden_layers == depth
        assert reloaded.num_parameters() == hubert.num_parameters()
        found = hidden_states(reloaded.eval(), inputs)
        assert len(found) == depth + 1
        for left, right, wrong in zip(found, expected, other, strict=True):
            assert torch.equal(left, right)
            assert not torch.allclose(left, wrong, atol=1e-2)


@pytest.mark.parametrize("depth", [3, 12])
def test_load_student_from_checkpoint_and_from_folder(depth: int, tmp_path: Path) -> None:
    hubert = tiny_hubert(depth)
    path = save(tmp_path, checkpoint_of(hubert))
    first = export_student(path, tmp_path / "student")
    second = load_student(tmp_path / "student")
    assert first.meta == second.meta == torch.load(path, weights_only=True)["interstack"]
    for student in (first, second, load_student(str(path))):
        assert not student.model.training
        weights = student.model.state_dict()
        assert weights.keys() == hubert.state_dict().keys()
        assert all(torch.equal(weights[key], value) for key, value in hubert.state_dict().items())
    again = export_student(tmp_path / "student", tmp_path / "again")
    assert again.meta == first.meta


def test_bfloat16_checkpoint_loads_in_float32(tmp_path: Path) -> None:
    path = save(tmp_path, checkpoint_of(tiny_hubert(3).to(torch.bfloat16)))
    assert {value.dtype for value in load_student(path).model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_weights(dtype: Dtype, tmp_path: Path) -> None:
    """The lines of the card work with them, and a reader of this package gets float32."""
    hubert = tiny_hubert(3)
    export_student(save(tmp_path, checkpoint_of(hubert)), tmp_path / "half", dtype=dtype)
    export_student(save(tmp_path, checkpoint_of(hubert)), tmp_path / "single")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "single")]
    assert sizes[0] < 0.75 * sizes[1]  # of a tiny model the header is a large part
    card = (tmp_path / "half" / "README.md").read_text()
    assert f"| Type of the weights | {dtype} |" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"half"', repr(str(tmp_path / "half")))
    found: dict[str, Any] = {"waveform": waveforms()[0]}
    exec(code, found)
    wanted = hidden_states(hubert, {"input_values": torch.from_numpy(waveforms()[0])[None]})
    assert found["hidden_states"][-1].dtype == getattr(torch, dtype)
    torch.testing.assert_close(found["hidden_states"][-1].float(), wanted[-1], atol=0.1, rtol=0.1)
    weights = load_student(tmp_path / "half").model.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    for key, value in hubert.state_dict().items():
        assert torch.equal(weights[key], value.to(getattr(torch, dtype)).float())


def test_cut_to_its_first_layers(tmp_path: Path) -> None:
    hubert = tiny_hubert(4)
    path = save(tmp_path, checkpoint_of(hubert))
    cut = export_student(path, tmp_path / "cut", layers=2)
    inputs = {"input_values": torch.from_numpy(waveforms()[0])[None]}
    whole, found = hidden_states(hubert, inputs), hidden_states(HubertModel.from_pretrained(tmp_path / "cut"), inputs)
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=False))
    assert not torch.allclose(whole[2], whole[3], atol=1e-2)
    assert (cut.meta["ancestry"], cut.meta["cut_from"], "originals" in cut.meta) == ([0, 1], 4, False)
    assert "these are the first 2 layers of a student of 4." in (tmp_path / "cut" / "README.md").read_text()
    again = export_student(tmp_path / "cut", tmp_path / "again", layers=1)
    assert (again.model.config.num_hidden_layers, again.meta["cut_from"]) == (1, 4)
    for layers in (0, 5):
        with pytest.raises(ValueError, match=f"layers={layers}, but the encoder has 4: choose from 1 to 4"):
            export_student(path, tmp_path / "refused", layers=layers)
    assert not (tmp_path / "refused").exists()


def test_run_folder_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save(tmp_path / "run" / "checkpoints", checkpoint_of(tiny_hubert(3)))
    export_student(tmp_path / "run", tmp_path / "student")
    assert load_student(tmp_path / "student").meta == load_student(tmp_path / "run").meta


class TestModelCard:
    def card(self, tmp_path: Path, **meta: Any) -> str:
        return model_card(*load_student(save(tmp_path, checkpoint_of(tiny_hubert(3), **meta))), "my-student")

    def test_front_matter(self, tmp_path: Path) -> None:
        _, front_matter, body = self.card(tmp_path).split("---\n", 2)
        values = yaml.safe_load(front_matter)
        assert values["library_name"] == "transformers"
        assert values["pipeline_tag"] == "feature-extraction"
        assert "interstack" in values["tags"]
        assert "license" not in values
        assert body.lstrip().startswith("# my-student")

    def test_says_what_the_run_was(self, tmp_path: Path) -> None:
        card = self.card(tmp_path)
        for text in (
            "| Teacher | `facebook/hubert-base-ls960` |",
            "| Layers | 3 |",
            f"| Parameters | {tiny_hubert(3).num_parameters():,} |",
            "| Waveform | as it is, not normalised |",
            "| Growth policy | interleave |",
            "| Schedule | prop-1 |",
            "| 2 | 1234 | interleave | 1 -> 3 | 0 0 - | 0 0 - |",
            "| val/loss | 0.123456789 |",
            '"lr": 0.0005',
            '"rows": 42',
            '"torch": "2.11.0"',
            'HubertModel.from_pretrained("my-student")',
            "sampling_rate=16000",
            "Fast Speech Foundation Model Distillation Using Interleaved\nStacking",
            "arXiv 2606.11766",
        ):
            assert text in card, text
        assert "{" not in card.split("## Use")[0], "an unfilled placeholder"

    def test_run_without_growth(self, tmp_path: Path) -> None:
        card = self.card(
            tmp_path,
            growth=[],
            growth_settings=None,
            metrics={},
            normalize=True,
            teacher={"class_path": "my.Net", "init_args": {}},
        )
        assert "| Growth policy | none |" in card
        assert "The student did not grow" in card
        assert "| Waveform | zero mean and unit variance |" in card
        assert "distilled from `my.Net`" in card

    def test_policy_comes_from_the_events_where_no_settings_are_kept(self, tmp_path: Path) -> None:
        assert "| Growth policy | interleave |" in self.card(tmp_path, growth_settings=None)


class TestOutput:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save(tmp_path, checkpoint_of(tiny_hubert(3)))

    def fail_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Wav2Vec2FeatureExtractor, "save_pretrained", refuse)

    def test_failure_leaves_nothing(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_late(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            export_student(path, tmp_path / "student")
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_failure_keeps_the_earlier_export(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        export_student(path, tmp_path / "student")
        before = {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()}
        newer = save(tmp_path, checkpoint_of(tiny_hubert(4)), "newer.ckpt")
        with monkeypatch.context() as patch:
            self.fail_late(patch)
            with pytest.raises(KeyboardInterrupt):
                export_student(newer, tmp_path / "student", overwrite=True)
        assert {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()} == before
        export_student(newer, tmp_path / "student", overwrite=True)
        assert load_student(tmp_path / "student").model.config.num_hidden_layers == 4
        assert {file.name for file in tmp_path.iterdir()} == {path.name, newer.name, "student"}

    def test_failed_replacement_puts_the_earlier_export_back(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        export_student(path, tmp_path / "student")
        replace = os.replace

        def second_fails(source: Path, target: Path) -> None:
            if Path(source).name == "new":
                raise OSError("disk is gone")
            replace(source, target)

        monkeypatch.setattr("os.replace", second_fails)
        with pytest.raises(OSError, match="disk is gone"):
            export_student(path, tmp_path / "student", overwrite=True)
        assert {file.name for file in (tmp_path / "student").iterdir()} == FILES
        assert {file.name for file in tmp_path.iterdir()} == {path.name, "student"}

    def test_used_folder_is_refused(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        export_student(path, tmp_path / "empty")
        with pytest.raises(ValueError, match="is not empty: give another one, or set overwrite=true"):
            export_student(path, tmp_path / "empty")
        with pytest.raises(ValueError, match="is a file"):
            export_student(path, path)

    def test_overwrite_spares_what_is_no_export(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.tex").write_text("precious")
        with pytest.raises(ValueError, match="is not an earlier export"):
            export_student(path, tmp_path / "thesis", overwrite=True)
        assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"

    def test_relative_output(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        export_student(path, "student")
        assert {file.name for file in (tmp_path / "student").iterdir()} == FILES


class TestErrors:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"there is no checkpoint '.*absent.ckpt'"):
            load_student(tmp_path / "absent.ckpt")

    def test_folder_that_is_no_export(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds no interstack\.json"):
            load_student(tmp_path)

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "text.ckpt").write_text("not a checkpoint")
        with pytest.raises(ValueError, match=r"text.ckpt is damaged"):
            load_student(tmp_path / "text.ckpt")
        for foreign in ({"state_dict": {}}, [1, 2]):
            with pytest.raises(ValueError, match="has no 'interstack' entry"):
                load_student(save(tmp_path, foreign))

    def test_damaged_file(self, tmp_path: Path) -> None:
        path = save(tmp_path, checkpoint_of(tiny_hubert(3)))
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ValueError, match="is damaged"):
            load_student(path)

    def test_unsafe_pickle_is_not_run(self, tmp_path: Path) -> None:
        path = save(tmp_path, checkpoint_of(tiny_hubert(3)) | {"callbacks": Path("plain values only")})
        with pytest.raises(ValueError, match="is not an interstack checkpoint"):
            load_student(path)

    def test_newer_format(self, tmp_path: Path) -> None:
        path = save(tmp_path, checkpoint_of(tiny_hubert(3), format=CHECKPOINT_FORMAT + 1))
        with pytest.raises(ValueError, match="has format 2, but this interstack reads up to 1: install a newer"):
            load_student(path)
        with pytest.raises(ValueError, match="its format is None"):
            load_student(save(tmp_path, checkpoint_of(tiny_hubert(3), format=None)))

    def test_incomplete_meta(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(tiny_hubert(3))
        del checkpoint["interstack"]["normalize"]
        with pytest.raises(ValueError, match=r"the interstack entry of .* lacks normalize"):
            load_student(save(tmp_path, checkpoint))

    def test_weights_of_another_depth(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(tiny_hubert(3))
        checkpoint["interstack"]["student_config"]["num_hidden_layers"] = 2
        with pytest.raises(ValueError, match=r"disagree: .*encoder\.layers\.2") as error:
            load_student(save(tmp_path, checkpoint))
        assert "\n" not in str(error.value)
