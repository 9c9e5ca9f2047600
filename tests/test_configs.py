"""Every shipped YAML runs through the command line: shrunk, through its growths, with checkpoints and a resume."""

import json
from pathlib import Path

import pytest
import torch

from experiments.training.fit import CONFIGS, DistillationCLI
from tests.helpers import save_corpus, save_teacher, save_whisper
from tests.holding import NOTE_BEGINNING, beginnings
from tests.students import POSITIONS, THIN

# Sizes only; everything that makes a recipe what it is comes from its file.
SHRUNK = [
    *("--model.student.hidden_size", "16", "--model.student.intermediate_size", "24", "--model.student.num_heads", "2"),
    *("--data.train_splits", "[train]", "--data.val_splits", "[dev]", "--data.batch_size", "4"),
    *("--data.batches_per_epoch", "2", "--data.num_workers", "0", "--trainer.max_epochs", "4"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--log_samples", "false", "--checkpoint.every_n_steps", "1"),
    *("--wandb.mode", "disabled"),
]
DRAWN = ("fithubert", "maskhubert", "armhubert", "armhubert_s")
GROWS = {
    **{key: [12] for key in ("full", "full_l2l", "quickstart", "whisper_base", "whisper_tiny")},
    "interleave_equal whisper_tiny": [4, 8, 12],
    **{key: [12] for key in ("half_12layer", "dphubert_objective", "usad_objective", "equal_budget", *DRAWN)},
    "distilhubert": [2],
    "one_3layer": [3],
}
NAMES = sorted([*(path.stem for path in CONFIGS.glob("*.yaml")), "interleave_equal whisper_tiny"])
# A policy of each kind, both schedules and objectives, and a Whisper. Runs that do not grow are resumed in
# tests/callbacks/test_resume.py, with every kind of student.
RESUMED = ("gradstack_equal", "gradstack_l2l_prop1", "midas_prop1", "interleave_equal", "interleave_equal_whisper")
CASES = [(name, name in RESUMED) for name in NAMES]
CASES += [pytest.param(name, True, marks=pytest.mark.slow) for name in NAMES if name not in RESUMED]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of as many layers as the real ones; the configs whose names end in ``whisper`` mean base."""
    folder = tmp_path_factory.mktemp("teachers")
    base = save_whisper(folder / "base", layers=6)
    tiny = save_whisper(folder / "tiny", layers=4)
    hubert = save_teacher(folder / "hubert", layers=12, **POSITIONS)
    return {"hubert": hubert, "whisper": base, "base": base, "tiny": tiny}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_corpus(tmp_path_factory.mktemp("corpus"), {"train": 8, "dev": 2})


def test_there_is_a_config_for_each_row_of_the_paper() -> None:
    rows = {"full", "full_l2l"} | {
        f"{policy}_{schedule}"
        for policy in ("interleave", "midas", "gradstack", "gradstack_l2l")
        for schedule in ("equal", "prop1")
    }
    assert rows <= {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.ci
@pytest.mark.parametrize(("config", "resumes"), CASES)
def test_config_trains_grows_and_resumes_exactly(
    config: str, resumes: bool, teachers: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = [word for name in config.split() for word in ("--config", name)]
    arguments = ["fit", *names, *SHRUNK, "--runs_dir", str(tmp_path / "runs"), "--data.root", str(corpus)]
    kind = config.rpartition("_")[2] if "whisper" in config else "hubert"
    arguments += ["--model.teacher.init_args.model", str(teachers[kind])]
    arguments += [] if kind == "hubert" else ["--model.student.conv_channels", "8"]
    arguments += ["--model.student.conv_layers", json.dumps(THIN)] if config in DRAWN else []
    DistillationCLI(arguments)
    run = tmp_path / "runs" / config.split()[-1]
    stages = GROWS.get(config, [3, 6, 9, 12])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["depth"]) == (8, stages[-1])
    if len(stages) > 1:
        events = json.loads((run / "growth.json").read_text())
        assert [event["depth"] for event in events] == stages[1:]
        assert stages[0] < summary["mean_depth"] < stages[-1]
        assert [len(plan.split()) for plan in summary["plans"].split(" | ")] == stages[1:]
        assert [None if i == "*" else int(i) for i in summary["ancestry"].split()] == events[-1]["ancestry"]
    else:
        assert summary["mean_depth"] == stages[-1]
    for depth in stages:
        assert (run / "checkpoints" / f"stage_{depth}.ckpt").is_file()
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    if not resumes:
        return

    early = run / "checkpoints" / f"stage_{stages[0]}.ckpt" if len(stages) > 1 else sorted(run.glob("*/step=*"))[0]
    DistillationCLI([*arguments, "--ckpt_path", str(early), NOTE_BEGINNING])
    assert beginnings(run) == [torch.load(early, weights_only=True)["global_step"]] != [0]
    second = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in first["state_dict"].items():
        assert (
            value == second["state_dict"][name]
            if isinstance(value, dict)
            else torch.equal(value, second["state_dict"][name])
        )
    assert (run / "config_2.yaml").is_file()
