"""``interstack superb`` on folders in the published layouts; what is asserted comes from the files that it writes."""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from datamodules.files import read_json
from experiments.cli import run
from experiments.superb import command, running
from experiments.superb.checkpoint import TaskCheckpoint
from experiments.superb.results import overall
from lightning_modules.superb import heads
from lightning_modules.superb.classification_tasks import ClassificationTask
from lightning_modules.superb.recipes import TASK_RECIPES, build_task
from lightning_modules.superb.task_module import TaskModule
from lightning_modules.superb.tasks import TaskInputs
from tests.datamodules.superb import corpora
from tests.helpers import save_teacher

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "pr": corpora.librispeech,
    "asr": corpora.librispeech,
    "sf": corpora.snips,
    "ks": corpora.speech_commands,
    "ic": corpora.fluent,
    "sid": corpora.voxceleb1,
    "asv": corpora.voxceleb1_trials,
    "sd": corpora.librimix,
}
"""Layouts of the tasks that train one head; ER is in test_folds.py and QbE in test_queries.py."""
# Label lists of the published sizes; a task's own labels are among them.
IC_LABELS = [
    ["activate", "deactivate", "increase", *(f"action{n}" for n in range(3))],
    ["lights", "music", "volume", *(f"object{n}" for n in range(11))],
    ["kitchen", "none", "bedroom", "washroom"],
]
DECODES = ("_fixed", "_legacy")
LABELS = {
    "sf": [["playlist", "artist", *(f"slot{n}" for n in range(37))]],
    "ic": IC_LABELS,
    "sid": [[f"id{10001 + n}" for n in range(1251)]],
}
PARAMETERS = {
    "pr": 215_882,
    "asr": 42_828_832,
    "sf": 42_986_605,
    "ks": 199_948,
    "ic": 203_032,
    "sid": 518_371,
    "asv": 6_111_708,
    "sd": 2_626_562,
}
HYPOTHESES = {
    "pr": "test-hyp.ark",
    "asr": "test-clean-noLM-hyp.ark",
    "sf": "test-hyp.ark",
    "ks": "test_predict.txt",
    "ic": "test_predict.csv",
    "sid": "test_predict.txt",
    "asv": "test_predict.txt",
    "sd": "scoring/predictions/test-0.h5",
}
# As s3prl writes them: utterance and text, or the file's name and its labels.
FIRST_TRUTH = {
    "pr": "12-7-0000 HH AH0 L OW1",
    "asr": "12-7-0000 HELLO",
    "sf": "Brian-snips-test-0 PLAY SOME B-playlist JAZZ E-playlist BY B-artist MILES DAVIS E-artist",
    "ks": "yes-00000000_nohash_0.wav yes",
    "ic": "test-0,activate,lights,kitchen",
    "sid": "id10001-video3-00001 id10001",
    "asv": "id10270-video1-00001_id10270-video1-00002 1",
}


def superb(task: str, upstream: str | Path, root: Path, output: Path, *more: str) -> dict[str, Any]:
    """The result that a call of the program writes; the last run's where it writes several."""
    arguments = ["superb", "--task", task, "--upstream", str(upstream), "--data.root", str(root)]
    arguments += ["--output", str(output), "--data.num_workers", "0", "--data.cache_dir", str(output / "cache")]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.progress_bar", "false", "--wandb.mode", "disabled"]
    if task == "pr":
        output.mkdir(parents=True, exist_ok=True)
        arguments += ["--data.lexicon", str(corpora.lexicon(output / "lexicon.txt"))]
    run([*arguments, *more])
    results = sorted(output.glob("*/*/result.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(results[-1].read_text())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of HuBERT Base's width and depth, with little else."""
    folder = tmp_path_factory.mktemp("wide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"intermediate_size": 8, "num_attention_heads": 2, "conv_dim": [8] * 7}
        convolution = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        HubertModel(HubertConfig(**sizes, **convolution)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", LAYOUTS)
def test_heads_have_the_published_sizes(task: str) -> None:
    labels = LABELS.get(task, [["yes", *(f"word{n}" for n in range(11))]] if task == "ks" else [["a", "b", "c"]])
    inputs = TaskInputs(labels=labels, lexicon=() if task == "pr" else None)
    with torch.device("meta"):
        head = build_task(task, inputs).build_head(768)
    assert sum(parameter.numel() for parameter in head.parameters()) == PARAMETERS[task]


@pytest.mark.ci
@pytest.mark.parametrize("task", LAYOUTS)
def test_every_task_runs_on_its_published_layout(
    task: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ASR and SF with small LSTMs, since theirs take seconds."""
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    more = ["--data.labels", json.dumps(LABELS[task])] if task in LABELS else []
    root = LAYOUTS[task](tmp_path / "corpus")
    result = superb(task, wide, root, tmp_path / "out", "--updates", "1", *more)
    if task not in ("asr", "sf"):
        assert result["trainable_parameters"] == PARAMETERS[task] + 13
    assert (result["hidden_states"], result["width"], result["updates"], result["best_step"]) == (13, 768, 1, 1)
    assert result["batch_size"] == {"asr": 16, "asv": 50}.get(task, 32)
    assert sum(result["layer_weights"]) == pytest.approx(1, abs=1e-5)
    assert result["test"] == next(iter(result["tests"].values()))
    assert result["config"]["task"] == task
    assert result["commit"]
    folder = tmp_path / "out" / task / f"lr{result['lr']:g}_seed1337"
    assert (folder / HYPOTHESES[task]).is_file()
    if task in FIRST_TRUTH:
        lines = (folder / HYPOTHESES[task]).read_text().splitlines()
        assert len(lines) == next(iter(result["utterances"][name] for name in result["tests"]))  # ASV's has four trials
        truth = folder / HYPOTHESES[task].replace("hyp", "ref").replace("predict", "truth")
        assert FIRST_TRUTH[task] in truth.read_text().splitlines()
    best = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in best} == {"featurizer", "head"}


@pytest.mark.parametrize("task", ["pr", "ks", "sid", "sf", "er", "asv", "sd"])
def test_a_table_gives_a_result_for_every_test_set(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    teacher = save_teacher(tmp_path / "teacher", layers=2)
    seconds = 2.2 if task == "asv" else 0.6  # ASV takes two seconds of speech or more
    root = corpora.table(tmp_path / "corpus", seconds=seconds)
    result = superb(task, teacher, root, tmp_path / "out", "--updates", "1")
    assert list(result["tests"]) == ["test", "other"]
    if task == "sf":
        further = {"slot_value_wer", "slot_edit_f1_full", "slot_edit_f1_part", "wer", "cer"}
        reported = {f"{name}{decode}" for name in ("slot_type_f1", "slot_value_cer") for decode in ("", *DECODES)}
        assert result["test"].keys() == result["dev"].keys() == reported | further
    assert result["hidden_states"] == len(result["layer_weights"]) == 3


@pytest.mark.ci
def test_all_tasks_run_in_one_call_from_one_folder_of_corpora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    root = tmp_path / "corpora"
    for build in dict.fromkeys([*LAYOUTS.values(), corpora.iemocap, corpora.quesst14]):
        build(root)
    more = ["--updates", "1", "--data.lexicon", str(corpora.lexicon(tmp_path / "lexicon.txt"))]
    superb("all", "fbank", root, tmp_path / "out", *more)
    results = {path.parent.parent.name: read_json(path) for path in (tmp_path / "out").glob("*/*/result.json")}
    printed = capsys.readouterr().out
    rows = [re.match(r"[│┃]\s*(\w+)\s*[│┃]", line) for line in printed.splitlines()]
    order = [row[1] for row in rows if row and row[1] in (*results, "overall")]
    assert order == ["pr", "ks", "ic", "sid", "er", "asr", "qbe", "sf", "asv", "sd", "overall"]  # as on the leaderboard
    mean = overall(list(results.values()))
    assert mean is not None
    assert f"{mean:.2f}" in printed.splitlines()[-2]
    assert overall([result for task, result in results.items() if task != "sd"]) is None
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_overall_score_is_that_of_the_papers() -> None:
    """HuBERT Base's published row, whose published score is 80.80."""
    row = {"pr": {"per": 5.41}, "asr": {"wer": 6.42}, "ks": {"accuracy": 96.30}, "qbe": {"mtwv": 7.36}}
    row |= {"sid": {"accuracy": 81.42}, "asv": {"eer": 5.11}, "sd": {"der": 5.88}, "ic": {"accuracy": 98.34}}
    row |= {"sf": {"slot_type_f1": 88.53, "slot_value_cer": 25.20}, "er": {"accuracy": 64.92}}
    results = [{"task": task, "preset": "superb", "test": test} for task, test in row.items()]
    assert overall(results) == pytest.approx(80.80, abs=0.005)
    assert overall([result | {"preset": "probe"} for result in results]) is None


def test_a_missing_corpus_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Fluent Speech Commands is not there"):
        superb("ic", "fbank", tmp_path, tmp_path / "out")


def test_asr_trains_on_sixteen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    sizes = []
    forward = heads.BiLSTM.forward

    def spy(self: heads.BiLSTM, features: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        sizes.append((self.training, len(features)))
        return forward(self, features, num_frames)

    monkeypatch.setattr(heads.BiLSTM, "forward", spy)
    root = corpora.librispeech(tmp_path / "corpus", train=64)
    result = superb("asr", "fbank", root, tmp_path / "out", "--updates", "2")
    assert result["batch_size"] == 16
    assert {size for training, size in sizes if training} == {16}
    assert {size for training, size in sizes if not training} == {1}


@pytest.mark.parametrize("task", ["ks", "ic", "sid"])
def test_fbank_with_cmvn_makes_mean_pool_heads_constant(task: str, tmp_path: Path) -> None:
    root = LAYOUTS[task](tmp_path / "corpus")
    result = superb(task, "fbank", root, tmp_path / "out", "--updates", "4", "--lr", "1e-2")
    (file,) = (tmp_path / "out" / task).glob(f"*/{HYPOTHESES[task]}")
    separator = "," if task == "ic" else " "
    lines = file.read_text().splitlines()
    assert len({line.partition(separator)[2] for line in lines}) == 1
    right = result["test"]["accuracy"] * len(lines) / 100
    assert right == pytest.approx(round(right), abs=1e-3)
    assert result["layer_weights"] == [1.0]  # one hidden state is used as it is


@pytest.mark.ci
def test_an_encoder_that_hears_is_not_constant(tmp_path: Path) -> None:
    """The control of the test above."""
    root = corpora.speech_commands(tmp_path / "corpus")
    superb("ks", save_teacher(tmp_path / "teacher"), root, tmp_path / "out", "--updates", "60", "--lr", "1e-2")
    (file,) = (tmp_path / "out" / "ks").glob("*/test_predict.txt")
    assert len({line.partition(" ")[2] for line in file.read_text().splitlines()}) > 1


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_test_batch_end"])
def test_sigterm_is_no_success(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study would look for the result, and find none. By itself Lightning's exception means status 0."""
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    monkeypatch.setattr(TaskCheckpoint, hook, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    teacher, root = save_teacher(tmp_path / "teacher"), corpora.librispeech(tmp_path / "corpus")
    with pytest.raises(SystemExit) as stop:
        superb("asr", teacher, root, tmp_path / "out", "--updates", "6", "--eval_every", "3")
    assert stop.value.code == 143
    assert not list(tmp_path.glob("out/asr/*/result.json"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout and SpecAugment; a finished run is kept."""
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    teacher, root = save_teacher(tmp_path / "teacher"), corpora.librispeech(tmp_path / "corpus")
    more = ["--updates", "6", "--eval_every", "4", "--save_every", "3", "--lr", "1e-2"]
    whole = superb("asr", teacher, root, tmp_path / "whole", *more)
    save = TaskCheckpoint._save
    saved: list[int] = []

    def kill_after_the_first(self: TaskCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        saved.append(trainer.global_step)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(TaskCheckpoint, "_save", kill_after_the_first)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        superb("asr", teacher, root, tmp_path / "killed", *more)
    assert saved == [3]
    (last,) = (tmp_path / "killed").glob("asr/*/last.ckpt")
    content = last.read_bytes()
    last.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged \(.*\): delete it to begin this run again"):
        superb("asr", teacher, root, tmp_path / "killed", *more)
    last.write_bytes(content)
    resumed = superb("asr", teacher, root, tmp_path / "killed", *more)
    assert saved == [3, 4, 6]
    one, two = (
        torch.load(next((tmp_path / name).glob("asr/*/last.ckpt")), weights_only=False)["state_dict"]
        for name in ("whole", "killed")
    )
    assert all(torch.equal(one[key], value) for key, value in two.items())
    assert resumed["layer_weights"] == whole["layer_weights"]
    assert resumed["test"] == whole["test"]
    assert superb("asr", teacher, root, tmp_path / "killed", *more) == resumed
    with pytest.raises(ValueError, match=r"holds a run with other settings \(updates: 6 there, 7 now"):
        superb("asr", teacher, root, tmp_path / "killed", *more, "--updates", "7")


def test_the_sweep_chooses_on_dev(tmp_path: Path) -> None:
    root = corpora.table(tmp_path / "corpus")
    superb("sid", "fbank", root, tmp_path / "out", "--updates", "2", "--lr_sweep", "--lr_grid", "[0.1, 0.01]")
    choice = json.loads((tmp_path / "out" / "sid" / "chosen_seed1337.json").read_text())
    assert choice["dev"].keys() == {"0.1", "0.01"}
    assert choice["dev"][str(choice["chosen_lr"])] == max(choice["dev"].values())
    assert len(list((tmp_path / "out" / "sid").glob("*/result.json"))) == 2
    copy = json.loads((tmp_path / "out" / "result.json").read_text())
    assert copy["lr"] == copy["lr_sweep"]["chosen_lr"] == choice["chosen_lr"]
    assert copy["metrics"] == copy["test"]


def test_a_rate_that_diverges_is_out_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = ClassificationTask.losses

    def bursting(self: ClassificationTask, output: torch.Tensor, *rest: Any) -> torch.Tensor:
        return losses(self, output, *rest) * (float("nan") if rate[0] == 0.1 else 1)

    one, rate = command._one, [0.0]

    def with_rate(settings: Any, *rest: Any) -> dict[str, Any]:
        rate[0] = settings.lr
        return one(settings, *rest)

    monkeypatch.setattr(command, "_one", with_rate)
    monkeypatch.setattr(ClassificationTask, "losses", bursting)
    monkeypatch.setattr(running, "MOST_SKIPPED_UPDATES", 2)
    root, sweep = corpora.table(tmp_path / "corpus"), ["--updates", "2", "--lr_sweep", "--lr_grid"]
    assert superb("sid", "fbank", root, tmp_path / "out", *sweep, "[0.1, 0.01]")["lr"] == 0.01
    choice = json.loads((tmp_path / "out" / "sid" / "chosen_seed1337.json").read_text())
    assert (choice["chosen_lr"], choice["dev"]["0.1"]) == (0.01, None)
    with pytest.raises(ValueError, match=r"every learning rate of the grid \[0.1\] diverged on sid"):
        superb("sid", "fbank", root, tmp_path / "none", *sweep, "[0.1]")


def test_a_cache_on_disk_is_filled_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, root = save_teacher(tmp_path / "teacher"), corpora.speech_commands(tmp_path / "corpus")
    more = ["--updates", "4", "--lr", "1e-2", "--feature_cache", str(tmp_path / "cache")]
    first = superb("ks", teacher, root, tmp_path / "one", *more)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*/*.pt")}
    second = superb("ks", teacher, root, tmp_path / "two", *more)
    assert first["feature_cache"] == "disk"
    assert files
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*/*")}
    assert first["layer_weights"] == second["layer_weights"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    more[-1] = str(tmp_path / "full")
    with pytest.raises(ValueError, match=r"full/\w+_32-true has room for 0\.0 GB"):
        superb("ks", teacher, root, tmp_path / "three", *more)


def test_a_call_whose_numbers_would_differ_gets_no_other_runs_result(tmp_path: Path) -> None:
    root, out = corpora.table(tmp_path / "corpus"), tmp_path / "out"
    precision, cache = ["--trainer.precision", "bf16-mixed"], ["--feature_cache", str(tmp_path / "cache")]
    first = superb("sid", "fbank", root, out, "--updates", "1")
    with pytest.raises(ValueError, match=r"other settings \(trainer.precision: 32-true there, bf16-mixed now\)"):
        superb("sid", "fbank", root, out, "--updates", "1", *precision)
    with pytest.raises(ValueError, match=r"other settings \(feature_cache: False there, True now\)"):
        superb("sid", "fbank", root, out, "--updates", "1", *cache)
    same = ["--data.cache_dir", str(tmp_path / "elsewhere"), "--data.num_workers", "1", "--trainer.log_every_n_steps"]
    assert superb("sid", "fbank", root, out, "--updates", "1", *same, "7") == first
    for name, more in (("full", []), ("half", precision)):
        superb("sid", "fbank", root, tmp_path / name, "--updates", "1", *cache, *more)
    assert {path.name.partition("_")[2] for path in (tmp_path / "cache").iterdir()} == {"32-true", "bf16-mixed"}


def test_wandb_gets_samples_and_layer_weights(tmp_path: Path) -> None:
    root = corpora.table(tmp_path / "corpus")
    teacher = save_teacher(tmp_path / "teacher")
    superb("sid", teacher, root, tmp_path / "out", "--updates", "1", "--wandb.mode", "offline")
    tables = {path.name.split("_0_")[0]: path for path in (tmp_path / "out").rglob("*.table.json")}
    assert tables.keys() == {"samples", "layer_weights_table"}
    samples = json.loads(tables["samples"].read_text())
    assert samples["columns"] == ["utterance", "hypothesis", "reference"]
    assert [row[2] for row in samples["data"]] == ["tone0", "tone1", "tone2"]
    assert len(json.loads(tables["layer_weights_table"].read_text())["data"]) == 5


def test_optimizer_and_clipping_are_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, Any]] = []
    cudnn = torch.backends.cudnn

    def spy(self: TaskModule, optimizer: Any, gradient_clip_val: Any, **rest: Any) -> None:
        seen.append((isinstance(optimizer, AdamW), gradient_clip_val))
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)

    monkeypatch.setattr(TaskModule, "configure_gradient_clipping", spy)
    root = corpora.table(tmp_path / "corpus")
    superb("sid", "fbank", root, tmp_path / "superb", "--updates", "1")
    recipe = replace(TASK_RECIPES["sid"], clip_norm=1000.0, optimizer=AdamW)
    monkeypatch.setitem(TASK_RECIPES, "sid", recipe)
    superb("sid", "fbank", root, tmp_path / "other", "--updates", "1")
    assert seen == [(False, 1.0), (True, 1000.0)]
    assert not cudnn.deterministic  # what was set before


def test_updates_whose_gradient_is_no_number_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = ClassificationTask.losses, []

    def poisoned(self: ClassificationTask, output: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(1)
        return losses(self, output, *rest) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(ClassificationTask, "losses", poisoned)
    teacher, root = save_teacher(tmp_path / "teacher"), corpora.speech_commands(tmp_path / "corpus")
    result = superb("ks", teacher, root, tmp_path / "out", "--updates", "3")
    assert (result["skipped_updates"], result["updates"], len(calls)) == (1, 3, 3)
    assert all(weight == weight for weight in result["layer_weights"])
