"""``interstack cache-targets`` and the runs that read what it wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.batching import cut
from datamodules.librispeech import LibriSpeechDataModule
from experiments.cli import run
from experiments.studies.plan import Plan
from experiments.studies.study import load_study, row_settings
from lightning_modules.teacher import HuggingFaceTeacher, TeacherTargets
from tests.cached_runs import SaveAt, data_of, distance, equal, fit_options, options, rounded, train
from tests.datamodules.corpora import write_audio
from tests.helpers import make_data, make_module, make_stacking, make_trainer, save_corpus, save_teacher


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus and the caches of it: ``bf16``, ``int8``; each row alone, as :func:`rounded` asks."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 12, "dev": 3})
    for dtype in ("bf16", "int8"):
        run(["cache-targets", *options(folder), "--output", str(folder / dtype), "--dtype", dtype])
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_run_from_the_cache_is_the_run_on_the_fly(dtype: str, home: Path, tmp_path: Path) -> None:
    """Bit for bit, through three growths, where the teacher's word is rounded as the cache has it."""
    cached, validation = train(
        make_module(home / "teacher"), data_of(home, targets=str(home / dtype), num_workers=1), tmp_path / "cached"
    )
    module = make_module(home / "teacher")
    module.targets = rounded(module, dtype)  # type: ignore[method-assign, assignment]
    reference, _ = train(module, data_of(home), tmp_path / "rounded")
    assert equal(cached, reference)
    exact, unrounded = train(make_module(home / "teacher"), data_of(home), tmp_path / "exact")
    assert not equal(cached, exact)
    elsewhere, other = train(make_module(home / "teacher"), data_of(home, segment_seed=1), tmp_path / "elsewhere")
    # What is lost by rounding is a small part of what other segments change; validation reads rounded targets too.
    assert distance(exact, cached) < 0.1 * distance(exact, elsewhere)
    assert abs(validation - unrounded) < 0.1 * abs(other - unrounded)


def test_the_teacher_is_asked_neither_in_training_nor_in_its_validation(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    forward = HuggingFaceTeacher.forward

    def counted(self: HuggingFaceTeacher, waveforms_BT: Tensor, *more: Any) -> TeacherTargets:
        asked.append(len(waveforms_BT))
        return forward(self, waveforms_BT, *more)

    monkeypatch.setattr(HuggingFaceTeacher, "forward", counted)
    module, data = make_module(home / "teacher"), data_of(home, targets=str(home / "bf16"))
    make_trainer(tmp_path, make_stacking()).fit(module, datamodule=data)  # measures the loss at three growths
    assert asked == []
    make_trainer(tmp_path).validate(module, datamodule=data_of(home, targets=str(home / "bf16")), verbose=False)
    assert asked == [3]


def test_a_resumed_run_continues_exactly(home: Path, tmp_path: Path) -> None:
    def cached(seed: int = 0) -> LibriSpeechDataModule:
        return data_of(home, targets=str(home / "int8"), seed=seed)

    saver = SaveAt(5, tmp_path / "5.ckpt")
    whole, _ = train(make_module(home / "teacher"), cached(), tmp_path / "whole", saver)
    resumed, _ = train(make_module(home / "teacher"), cached(), tmp_path / "resumed", resume=tmp_path / "5.ckpt")
    assert equal(whole, resumed)
    with pytest.raises(ValueError, match=r"data\.targets was int8, is not set"):
        train(make_module(home / "teacher"), data_of(home), tmp_path / "other", resume=tmp_path / "5.ckpt")
    reseeded, _ = train(make_module(home / "teacher"), cached(seed=1), tmp_path / "reseeded")  # reads the same cache
    assert not equal(whole, reseeded)


def test_every_rank_reads_the_targets_of_its_own_rows(home: Path) -> None:
    data = data_of(home, targets=str(home / "bf16"))
    data.prepare_data()
    make_trainer(home / "unused").fit(make_module(home / "teacher"), datamodule=data)
    dataset, segments = data.train_dataloader().dataset, data.segments()
    rows = np.flatnonzero(segments.num_samples == np.median(segments.num_samples))
    whole = dataset[segments.resolve(rows, 0)]
    assert whole.cached is not None
    for part in range(2):
        share = dataset[cut(segments.resolve(rows, 0), part, 2)]
        assert share.cached is not None
        assert torch.equal(share.cached.data, whole.cached.data[part::2])


def changed_teacher(home: Path, folder: Path) -> Path:
    teacher = HuggingFaceTeacher(str(home / "teacher"))
    with torch.no_grad():
        teacher.model.encoder.layers[1].attention.q_proj.bias[3] += 1e-3
    teacher.model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text((home / "teacher" / "preprocessor_config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("teacher", r"teacher\.output_weights was \w+, is \w+; teacher\.layer_2_weights was \w+, is \w+\. Use"),
        ("normalize", r"teacher\.normalize was False, is True\."),
        ("layers", r"teacher\.layer_3_weights is not in it\. Use the settings that made it, or make another with"),
        ("segment_seed", r"data\.segment_seed was 0, is 1; data\.segments was \w+, is \w+\."),
        ("batch_size", r"data\.batch_size was 4, is 6\."),
        ("corpus", r"data\.rows was 12, is 13; data\.row_hash was"),
    ],
)
def test_another_teacher_or_other_segments_are_refused_by_name(
    what: str, message: str, home: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {what: {"segment_seed": 1, "batch_size": 6}[what]} if "_" in what else {}
    teacher = changed_teacher(home, tmp_path / "teacher") if what == "teacher" else home / "teacher"
    if what == "corpus":
        save_corpus(tmp_path / "corpus", {"train": 12, "dev": 3})
        write_audio(tmp_path / "corpus" / "train" / "7" / "7" / "7-7-0001.flac", 9000)
        settings["root"] = tmp_path / "corpus"
    data = make_data(
        settings.pop("root", home / "corpus"), home / "manifests", crop="fixed", targets=str(home / "bf16"), **settings
    )
    module = make_module(teacher, objective={"layers": [2, 3]} if what == "layers" else None)
    module.teacher.normalize = what == "normalize"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, datamodule=data)


def test_a_cache_of_more_layers_serves_a_run_of_fewer(home: Path, tmp_path: Path) -> None:
    module = make_module(home / "teacher", objective={"weight": 0.0})
    assert module.teacher.hidden_layers == ()
    make_trainer(tmp_path, max_epochs=1).fit(module, datamodule=data_of(home, targets=str(home / "bf16")))


def test_targets_need_fixed_segments_and_a_module_that_takes_them(home: Path) -> None:
    with pytest.raises(ValueError, match=r"need data\.crop=fixed and data\.length=crop \(not random and crop\)"):
        data_of(home, targets=str(home / "bf16"), crop="random")
    with pytest.raises(ValueError, match=r"\(not fixed and pad\)"):
        data_of(home, targets=str(home / "bf16"), length="pad")
    data = data_of(home, targets=str(home / "bf16"))
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match=r"data\.targets is set, but this module trains without"):
        data.train_dataloader()


def test_the_command_tells_sizes_first_and_errors_last(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["cache-targets", *options(home), "--output", str(tmp_path / "cache"), "--dtype", "int8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("layer 4 (output) and 2, width 16")
    frames = int(lines[1].split()[4])
    data = data_of(home)
    data.prepare_data()
    data.setup()
    assert frames == int(
        make_module(home / "teacher").teacher.num_frames(torch.tensor(data.segments().num_samples)).sum()
    )
    assert lines[2].startswith("reading: 2 kB per audio second, so 0.017 GB/s at 9,000 audio seconds per second")
    assert lines[3].endswith("GB free")
    assert "relative L2 error of rounding: output 0." in lines[4]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.targets")) == frames * 2 * (16 + 4)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    run(["cache-targets", *options(home), "--output", str(tmp_path / "cache"), "--dtype", "int8"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("is finished, and every file has its checksum")
    with pytest.raises(ValueError, match=r"second has room for 0\.0 GB, the targets need"):
        run(["cache-targets", *options(home), "--output", str(tmp_path / "second")])
    assert capsys.readouterr().out.splitlines()[1].startswith("12 segments, 0.00 h")  # told before it was refused
    with pytest.raises(ValueError, match=r"dtype int8 instead of bf16: set overwrite"):
        run(["cache-targets", *options(home), "--output", str(tmp_path / "cache")])
    with pytest.raises(ValueError, match=r"need data\.crop=fixed"):
        run(["cache-targets", *options(home), "--data.crop", "random", "--output", str(tmp_path / "third")])


@pytest.mark.ci
def test_students_that_are_trained_together_read_one_cache(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l2l.yaml").write_text("model: {objective: {weight: 0.5}}\n")
    (tmp_path / "output.yaml").write_text("model: {objective: {weight: 0.0}}\n")
    rest = [
        *fit_options(home),
        "--data.targets",
        str(home / "bf16"),
        "--trainer.max_epochs",
        "1",
        "--trainer.devices",
        "1",
    ]
    run(["fit-together", "--configs", "l2l.yaml,output.yaml", *rest])
    for name in ("l2l", "output"):
        run(["fit", "--config", f"{name}.yaml", *rest, "--name", f"{name}_alone"])
    together, alone = (
        [torch.load(f"runs/{name}{suffix}/checkpoints/last.ckpt", weights_only=True) for name in ("l2l", "output")]
        for suffix in ("", "_alone")
    )
    for one, other in zip(together, alone, strict=True):
        weights = {key: value for key, value in one["state_dict"].items() if isinstance(value, Tensor)}
        assert all(torch.equal(value, other["state_dict"][key]) for key, value in weights.items())
    keys = [set(checkpoint["state_dict"]) for checkpoint in together]
    assert keys[0] != keys[1]


def test_a_study_reads_a_cache_by_its_overrides(tmp_path: Path) -> None:
    own = tmp_path / "cached.yaml"
    own.write_text("base: table1\noverrides: {data.crop: fixed, data.targets: /data/targets}\n")
    study = load_study(str(own))
    for seed in (0, 1):
        for row in study.rows:
            data = row_settings(study, row, seed)["data"]
            assert (data["crop"], data["targets"]) == ("fixed", "/data/targets")
    assert len(Plan(study).jobs) == len(Plan(load_study("table1")).jobs)


def test_fit_takes_the_cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    growth = ["--growth.policy", "interleaved", "--growth.stages", "[2, 4]", "--trainer.max_epochs", "2"]
    run(["fit", *fit_options(home), *growth, "--data.targets", str(home / "int8")])
    checkpoint = torch.load(tmp_path / "runs/run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["interstack"]["data"]["targets"] == "int8"
    assert len(checkpoint["interstack"]["growth"]) == 1
