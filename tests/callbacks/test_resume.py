"""A resumed run is the uninterrupted one, bit for bit, from every checkpoint and in two hops.

Compared are the loss, the rows and the learning rate of every micro-batch, and every checkpoint written after the
resume as a whole: parameters, optimizer state, scheduler, loops, loader, callbacks.
"""

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.checkpointing import RunCheckpoint
from datamodules.loading import ResumableLoader
from lightning_modules import optimisation
from lightning_modules.distillation import DistillationModule
from lightning_modules.optimisation import ParameterGroups, rebind
from tests.ddp.launch import REPOSITORY, environment
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE
from tests.resuming import (
    Recorder,
    Scenario,
    checkpoints,
    differences,
    file_differences,
    fit,
    hop_problems,
    resume_problems,
)
from tests.students import KINDS, POSITIONS

# Each pair of values of two settings is in one of these, with one process or with two.
PAIRS = [
    Scenario(0, 1, "none", None, "32-true"),
    Scenario(2, 2, "epoch", 2, "bf16-mixed"),
    Scenario(0, 2, "mid", None, "bf16-mixed", odd_tail=True),
    Scenario(2, 1, "mid", 2, "32-true"),
]
OBJECTIVES = [Scenario(objective="skip"), Scenario(objective="masked")]
PAIRS_OF_TWO_PROCESSES = [
    Scenario(0, 1, "mid", objective="skip"),
    Scenario(2, 2, "mid", None, "32-true", odd_tail=True),
    Scenario(0, 1, "epoch", 2, "bf16-mixed"),
]
PRODUCT = [
    Scenario(workers, accumulate, validation, virtual, precision, odd_tail=tail)
    for workers, (accumulate, tail), validation, virtual, precision in itertools.product(
        (0, 2), ((1, False), (2, False), (2, True)), ("none", "mid"), (None, 2), ("32-true", "bf16-mixed")
    )
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> tuple[Path, Recorder]:
    """An uninterrupted run without special settings."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, fit(folder, inputs, Scenario())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher", **POSITIONS)
    save_corpus(folder / "corpus", {"train": 24, "dev": 4})
    return folder


def named(scenario: Scenario) -> str:
    values = (value for value in asdict(scenario).values() if value is not None)
    return "-".join(map(str, values))


@pytest.mark.ci
@pytest.mark.parametrize(
    "scenario",
    [PAIRS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in [*PAIRS[1:], *OBJECTIVES])],
    ids=named,
)
def test_every_checkpoint_resumes_bit_for_bit(scenario: Scenario, tmp_path: Path, inputs: Path) -> None:
    assert hop_problems(tmp_path, inputs, scenario, second_hops=3) == []


FEW = [PAIRS[1], *OBJECTIVES, *(Scenario(student=kind) for kind in KINDS if kind != "hubert")]


@pytest.mark.ci
@pytest.mark.parametrize("scenario", FEW, ids=named)
def test_two_checkpoints_of_every_kind_of_run_resume_bit_for_bit(
    scenario: Scenario, tmp_path: Path, inputs: Path
) -> None:
    fit(tmp_path / "whole", inputs, scenario)
    for step in (5, 6):  # in mid-epoch, and where it grows
        fit(tmp_path / f"{step}", inputs, scenario, checkpoints(tmp_path / "whole")[step - 1])
        pairs = zip(checkpoints(tmp_path / "whole")[step:], checkpoints(tmp_path / f"{step}"), strict=True)
        assert [text for whole, resumed in pairs for text in file_differences(whole, resumed)] == []


@pytest.mark.ci
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resume_loses_no_validation(accumulate: int, tmp_path: Path, inputs: Path) -> None:
    scenario = Scenario(accumulate=accumulate, validation="mid")
    reference = fit(tmp_path / "whole", inputs, scenario)
    start = checkpoints(tmp_path / "whole")[3]  # in mid-epoch
    run = fit(tmp_path / "resumed", inputs, scenario, start)
    assert resume_problems(tmp_path / "whole", reference, tmp_path / "resumed", run, start) == []
    assert len(run.validations) > 4


@pytest.mark.slow
@pytest.mark.parametrize("scenario", PRODUCT, ids=named)
def test_every_checkpoint_resumes_bit_for_bit_under_all_settings(
    scenario: Scenario, tmp_path: Path, inputs: Path
) -> None:
    assert hop_problems(tmp_path, inputs, scenario, second_hops=6) == []


@pytest.mark.slow
def test_every_pair_of_hops_resumes_bit_for_bit(tmp_path: Path, inputs: Path) -> None:
    assert hop_problems(tmp_path, inputs, Scenario(0, 2, "mid", odd_tail=True)) == []


def in_two_processes(scenarios: list[Scenario], second_hops: int | None, folder: Path, inputs: Path) -> list[str]:
    """What went wrong on either rank; all scenarios share one launch."""
    specs = {named(s): {"scenario": asdict(s), "second_hops": second_hops} for s in scenarios}
    (folder / "specs.json").write_text(json.dumps(specs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.resuming", str(folder), str(inputs), str(folder / "specs.json")]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), start_new_session=True, stdout=output, stderr=output
        )
        try:
            code = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun's workers have sessions of their own: it ends them
            process.wait()
            raise
    assert code == 0, (folder / "output.txt").read_text()[-6000:]
    found = [json.loads((folder / f"problems_{rank}.json").read_text()) for rank in range(2)]
    assert [set(problems) for problems in found] == [set(specs)] * 2
    return [text for problems in found for texts in problems.values() for text in texts]


@pytest.mark.slow
def test_every_checkpoint_of_two_processes_resumes_bit_for_bit(tmp_path: Path, inputs: Path) -> None:
    assert in_two_processes(PAIRS_OF_TWO_PROCESSES, 2, tmp_path, inputs) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_every_checkpoint_of_two_processes_resumes_bit_for_bit_under_all_settings(
    part: int, tmp_path: Path, inputs: Path
) -> None:
    assert in_two_processes(PRODUCT[part::12], 4, tmp_path, inputs) == []


def steps_of(run: Recorder, accumulate: int) -> list[tuple[list[int], float, float]]:
    """Rows, loss (Lightning divides it by accumulation) and learning rate of each optimizer step."""
    windows = [run.batches[at : at + accumulate] for at in range(0, len(run.batches), accumulate)]
    return [(sorted(row for b in w for row in b[3]), sum(b[2] for b in w), w[-1][4]) for w in windows]


CHANGES = [(step, before, after) for step in (5, 6) for before, after in ((1, 2), (2, 1), (4, 2))]
FAST_CHANGES = ((5, 1, 2), (6, 2, 1), (5, 4, 2))  # each change, and each step


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [pytest.param(*change, marks=() if change in FAST_CHANGES else pytest.mark.slow) for change in CHANGES],
)
def test_accumulation_may_change_at_any_checkpoint(
    step: int, before: int, after: int, tmp_path: Path, inputs: Path
) -> None:
    """As it does where it is derived from a number of devices that has changed."""
    whole = fit(tmp_path / "whole", inputs, Scenario(accumulate=before, dropout=0.0))
    start = checkpoints(tmp_path / "whole")[step - 1]
    run = fit(tmp_path / "resumed", inputs, Scenario(accumulate=after, dropout=0.0), start)
    expected, found = steps_of(whole, before)[step:], steps_of(run, after)
    assert [s[0] for s in found] == [s[0] for s in expected]
    assert [s[2] for s in found] == [s[2] for s in expected]
    assert [s[1] for s in found] == pytest.approx([s[1] for s in expected], abs=1e-5)
    assert [p.name for p in checkpoints(tmp_path / "resumed")] == [p.name for p in checkpoints(tmp_path / "whole")][
        step:
    ]
    again = fit(
        tmp_path / "again", inputs, Scenario(accumulate=before, dropout=0.0), checkpoints(tmp_path / "resumed")[1]
    )
    assert [s[0] for s in steps_of(again, before)] == [s[0] for s in expected[2:]]


def test_control_a_position_that_is_not_restated(
    tmp_path: Path, inputs: Path, plain: tuple[Path, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.checkpointing.rescale_progress", lambda *_: None)
    with pytest.raises(ValueError, match=r"written in mid-epoch with trainer\.accumulate_grad_batches=1"):
        fit(tmp_path / "resumed", inputs, Scenario(accumulate=2), checkpoints(plain[0])[4])


# -- the comparison, and each mechanism taken away ----------------------------------------------------------------


def test_checkpoints_are_compared_whole(plain: tuple[Path, Recorder]) -> None:
    last = checkpoints(plain[0])[-1]
    assert file_differences(last, last) == []
    whole = torch.load(last, weights_only=True)
    for change in (
        lambda c: (
            c["state_dict"]["student.hubert.encoder.layers.3.attention.q_proj.weight"].view(torch.int32)[0, 0].add_(1)
        ),
        lambda c: c["optimizer_states"][0]["state"][5]["exp_avg"].view(torch.int32).flatten()[0].add_(1),
        lambda c: c["optimizer_states"][0]["param_groups"][1].update(lr=1e-9),
        lambda c: c["lr_schedulers"][0].update(last_epoch=11),
        lambda c: c["interstack"].pop("fingerprint"),
        lambda c: c["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].update(yielded=2),
    ):
        changed = torch.load(last, weights_only=True)
        change(changed)
        assert len(list(differences(whole, changed))) == 1


def resumed(
    folder: Path, inputs: Path, step: int, plain: tuple[Path, Recorder] | None = None
) -> tuple[Recorder, Recorder, float]:
    """A whole run (``plain``, if it is none of its own), the one resumed at ``step``, and how far their losses are
    apart at most."""
    place, whole = plain or (folder / "whole", fit(folder / "whole", inputs, Scenario()))
    run = fit(folder / "resumed", inputs, Scenario(), checkpoints(place)[step - 1])
    pairs = zip(whole.batches[step:], run.batches, strict=True)
    return whole, run, max(abs(a[2] - b[2]) for a, b in pairs)


@pytest.mark.parametrize("step", [5, 6])
def test_nothing_is_apart_with_all_mechanisms(
    step: int, tmp_path: Path, inputs: Path, plain: tuple[Path, Recorder]
) -> None:
    assert resumed(tmp_path, inputs, step, plain)[2] == 0


def test_control_randomness_that_is_not_reseeded(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistillationModule, "on_train_batch_start", lambda *_: None)
    assert resumed(tmp_path, inputs, 6)[2] > 1e-4


def test_control_data_that_start_anew(
    tmp_path: Path, inputs: Path, plain: tuple[Path, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResumableLoader, "load_state_dict", lambda *_: None)
    whole, run, gap = resumed(tmp_path, inputs, 5, plain)
    assert run.batches[0][3] == whole.batches[3][3] != whole.batches[5][3]
    assert gap > 1e-3


def layers_reversed(groups: ParameterGroups) -> ParameterGroups:
    """Same parameters, same shapes at each place, but the layers' in another order than ``named_parameters``."""

    def swap(names: dict[str, Any]) -> list[tuple[str, Any]]:
        numbers = [int(match[1]) for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))]
        other = {
            name: re.sub(r"\.layers\.(\d+)\.", lambda m: f".layers.{max(numbers) - int(m[1])}.", name) for name in names
        }
        return [(name, names[name]) for name in other.values()]

    return [{**group, "params": swap(dict(group["params"]))} for group in groups]


def test_control_optimizer_state_in_another_order(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched: Callable[..., None] = lambda optimizer, groups: rebind(optimizer, layers_reversed(groups))  # noqa: E731
    monkeypatch.setattr("callbacks.stacking.rebind", patched)
    with pytest.raises(ValueError, match=r"belongs to other parameters .*only their order"):
        resumed(tmp_path / "guarded", inputs, 8)
    monkeypatch.setattr(optimisation, "_check_names", lambda *_: None)
    assert resumed(tmp_path / "silent", inputs, 8)[2] > 1e-4


def test_control_checkpoints_at_an_epochs_last_batch(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's trap: such a file resumes well, but those written after that resume replay data."""
    monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", lambda self, trainer, *_: self._save(trainer) and None)
    monkeypatch.setattr(RunCheckpoint, "on_train_epoch_end", lambda *_: None)
    whole = fit(tmp_path / "whole", inputs, Scenario())
    once = fit(tmp_path / "once", inputs, Scenario(), checkpoints(tmp_path / "whole")[2])
    again = tmp_path / "once" / "checkpoints" / checkpoints(tmp_path / "whole")[3].name
    twice = fit(tmp_path / "twice", inputs, Scenario(), again)
    assert once.batches == whole.batches[3:]
    assert len(twice.batches) > len(whole.batches[4:])
