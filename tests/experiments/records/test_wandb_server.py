"""W&B runs against a stand-in server that answers, is slow, fails or drops connections, and what is uploaded later."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.callbacks import Callback

from callbacks import requeue
from datamodules.errors import InputError
from experiments.records import loggers
from experiments.records.loggers import ResilientWandbLogger, WandbSettings, build_loggers
from experiments.records.reading import read_metrics
from lightning_modules.distillation import DistillationModule
from tests.experiments.records.test_loggers import Tiny, loader, make_trainer
from tests.tiny_run import fit
from tests.wandb_server import ReceivedRun, WandbServer

pytestmark = pytest.mark.timeout(600)  # a wait without a limit is the fault that these tests are about
NUM_STEPS = 20
SHORT = 4.0  # seconds, where a server does not answer


def logger_of(folder: Path, **changes: Any) -> ResilientWandbLogger:
    settings = WandbSettings("online", init_timeout_seconds=60, finish_timeout_seconds=60)
    logger = build_loggers(folder, "run", replace(settings, **changes), run_id="abc123", config={"a": 1})[1]
    assert isinstance(logger, ResilientWandbLogger)
    return logger


def log_steps(logger: ResilientWandbLogger, first: int = 1, last: int = NUM_STEPS) -> None:
    for step in range(first, last + 1):
        logger.log_metrics({"train/loss": 1 / step}, step=step)


def steps(run: ReceivedRun) -> list[int]:
    return [row["trainer/global_step"] for row in run.history]


def sync(folder: Path, *options: str) -> None:
    """Upload all runs below ``folder/wandb`` as the warning says."""
    runs = [str(path) for path in (folder / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink()]
    assert runs
    command = [sys.executable, "-m", "wandb", "sync", *options, *runs]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("fault", ["none", "slow"])
def test_a_server_that_answers_gets_every_row(fault: str, tmp_path: Path, server: WandbServer) -> None:
    server.fault, server.delay = fault, 0.3  # type: ignore[assignment]
    logger = logger_of(tmp_path)
    make_trainer(tmp_path, 1, [logger]).fit(Tiny(), loader(), loader())
    run = server.runs["abc123"]
    assert [row["trainer/global_step"] for row in run.history if "train/loss" in row] == [0, 1]
    assert (run.exit_code, run.display_name, run.preempting) == (0, "run", False)
    assert run.config["a"]["value"] == 1


class Refusing(Callback):
    """Refuses every checkpoint, as a guard does that finds other settings."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        raise InputError("other settings")


def test_a_refused_resume_leaves_the_runs_configuration(tmp_path: Path, server: WandbServer) -> None:
    trainer = make_trainer(tmp_path, 1, [logger_of(tmp_path)])
    trainer.fit(Tiny(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = build_loggers(tmp_path, "run", WandbSettings("online"), run_id="abc123", config={"a": 2})[1]
    resumed = make_trainer(tmp_path, 2, [other])
    resumed.callbacks.append(Refusing())  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="other settings"):
        resumed.fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert server.runs["abc123"].config["a"]["value"] == 1
    accepted = build_loggers(tmp_path, "run", WandbSettings("online"), run_id="abc123", config={"a": 3})[1]
    make_trainer(tmp_path, 2, [accepted]).fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert server.runs["abc123"].config["a"]["value"] == 3  # control


@pytest.mark.parametrize(
    ("status", "requeued", "code"), [("success", False, 0), ("failed", False, 1), ("failed", True, 143)]
)
def test_the_exit_code_follows_from_the_status_and_a_requeue_is_no_failure(
    status: str, requeued: bool, code: int, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "_announced", [True] * requeued)
    logger = logger_of(tmp_path)
    log_steps(logger, last=1)
    logger.finalize(status)
    run = server.runs["abc123"]
    assert (run.exit_code, run.preempting) == (code, requeued)  # which W&B shows as preempted


def test_a_requeue_ends_the_run_before_slurm_ends_its_service(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "_announced", [])
    monkeypatch.setattr(requeue, "seconds_left", lambda job: 60.0)
    monkeypatch.setattr(requeue, "TRIES", 0)  # without SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    logger = logger_of(tmp_path)
    log_steps(logger)
    assert len(requeue._before) == 1
    requeue.requeue()
    run = server.runs["abc123"]
    assert (run.exit_code, run.preempting) == (143, True)
    assert steps(run) == list(range(1, NUM_STEPS + 1))
    assert requeue._before == []


@pytest.mark.ci
@pytest.mark.parametrize("fault", [pytest.param("error", marks=pytest.mark.slow), "drop"])
def test_a_server_lost_before_the_end_gets_the_rows_later(
    fault: str, tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logger_of(tmp_path, finish_timeout_seconds=SHORT)
    log_steps(logger, last=NUM_STEPS // 2)
    server.fault = fault  # type: ignore[assignment]
    log_steps(logger, first=NUM_STEPS // 2 + 1)
    logger.finalize("success")
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    (folder,) = (tmp_path / "wandb").glob("run-*-abc123")
    assert len(warnings) == 1
    assert f"`wandb sync --include-online {folder}`" in warnings[0]
    server.fault = "none"
    run = server.runs["abc123"]
    before = steps(run)  # nothing, unless the test ran so long that W&B had sent rows, which it then sends again
    assert len(before) <= NUM_STEPS // 2
    assert run.exit_code is None
    sync(tmp_path, "--include-online")
    assert (steps(run), run.exit_code) == ([*before, *range(1, NUM_STEPS + 1)], 0)


@pytest.mark.ci
def test_a_server_that_comes_back_gets_every_row(tmp_path: Path, server: WandbServer) -> None:
    logger = logger_of(tmp_path)
    log_steps(logger, last=1)
    server.fault, server.faulty = "drop", 3
    log_steps(logger, first=2)
    logger.finalize("success")
    assert server.faulty < 0  # all three requests were dropped
    assert steps(server.runs["abc123"]) == list(range(1, NUM_STEPS + 1))
    assert server.runs["abc123"].exit_code == 0


@pytest.mark.ci
def test_only_the_first_of_several_runs_waits_for_a_lost_server(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "SERVICE_SECONDS", 1.0)
    first = logger_of(tmp_path / "first", finish_timeout_seconds=SHORT)
    second = logger_of(tmp_path / "second", id="second", finish_timeout_seconds=10000)
    for each in (first, second):
        log_steps(each)
    server.fault = "drop"
    for each in (first, second):  # the second would wait for hours
        each.finalize("success")
    later = logger_of(tmp_path / "later", id="later")
    log_steps(later, last=1)
    assert later.experiment.offline
    later.finalize("success")
    wandb.teardown()  # as at the end of a process; the second run's service would go on trying
    server.fault = "none"
    before = steps(server.runs["second"])  # as above
    sync(tmp_path / "second", "--include-online")
    assert steps(server.runs["second"]) == [*before, *range(1, NUM_STEPS + 1)]


@pytest.mark.slow  # 15 s, in which W&B gives up
def test_a_run_that_cannot_start_leaves_one_that_has_started_alone(tmp_path: Path, server: WandbServer) -> None:
    first = logger_of(tmp_path / "first")
    log_steps(first, last=1)
    server.fault = "drop"
    settings = WandbSettings("online", init_timeout_seconds=2, finish_timeout_seconds=60)
    second = build_loggers(tmp_path / "second", "second", settings, run_id="def456")[1]
    second.log_metrics({"train/loss": 0.5}, step=1)
    server.fault = "none"
    log_steps(first, first=2)
    for logger in (first, second):
        logger.finalize("success")
    assert steps(server.runs["abc123"]) == list(range(1, NUM_STEPS + 1))
    assert not list((tmp_path / "second" / "wandb").glob("run-*"))
    sync(tmp_path / "second")
    assert steps(server.runs["def456-offline"]) == [1]


def run_apart(folder: Path, server: WandbServer, settings: str, end: str, fault: str) -> str:
    """Log one row in a process of its own, which meets the fault before its end; return its stderr."""
    script = (
        "import logging, sys; from pathlib import Path; logging.basicConfig();"
        "from experiments.records.loggers import WandbSettings, build_loggers;"
        f"settings = WandbSettings('online', {settings});"
        "logger = build_loggers(Path(sys.argv[1]), 'run', settings, run_id='abc123')[1];"
        f"logger.log_metrics({{'train/loss': 0.5}}, step=1); print(flush=True); input(); {end}"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        server.fault = fault  # type: ignore[assignment]
        _, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    return str(errors)


@pytest.mark.slow
def test_a_shorter_limit_ends_the_wait_and_the_process(tmp_path: Path, server: WandbServer) -> None:
    errors = run_apart(tmp_path, server, "finish_timeout_seconds=10000", "logger.finish(0, 2.0)", "drop")
    assert "still uploading" in errors


@pytest.mark.slow
@pytest.mark.parametrize("reporting", ["", "true"])
def test_a_server_that_fails_from_the_start_means_offline(
    reporting: str, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without W&B's reports of its own errors, which cannot be sent either, unless the user wants them."""
    if reporting:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", reporting)
    server.fault = "error"
    errors = run_apart(tmp_path, server, "init_timeout_seconds=2", "logger.finalize('success')", "error")
    assert "W&B could not start online" in errors
    assert ("opentelemetry" in errors) == bool(reporting)
    assert not list((tmp_path / "wandb").glob("run-*"))
    server.fault = "none"
    sync(tmp_path)
    assert steps(server.runs["abc123"]) == [1]


def test_an_offline_run_is_synced_whole(tmp_path: Path, server: WandbServer) -> None:
    logger = logger_of(tmp_path, mode="offline")
    log_steps(logger)
    logger.finalize("success")
    assert not server.runs
    sync(tmp_path)
    run = server.runs["abc123"]
    assert (steps(run), run.exit_code, run.display_name) == (list(range(1, NUM_STEPS + 1)), 0, "run")


def test_a_resumed_run_goes_on_in_its_run_and_the_last_value_of_a_step_counts(
    tmp_path: Path, server: WandbServer
) -> None:
    for first in (1, 11):  # killed after step 20, and continued from a checkpoint of step 10
        logger = logger_of(tmp_path)
        log_steps(logger, first)
        logger.finalize("success")
    assert list(server.runs) == ["abc123"]
    assert steps(server.runs["abc123"]) == [*range(1, 21), *range(11, 21)]


ONLINE = ["--wandb.mode", "online", "--name"]


def test_a_command_that_trains_nothing_leaves_the_run_as_it_was(inputs: Path, server: WandbServer) -> None:
    name = "left"
    fit(inputs, *ONLINE, name)
    (run,) = server.runs.values()
    before = (run.exit_code, len(run.history), run.summary)
    assert before[0] == 0
    fit(inputs, *ONLINE, name, "--ckpt_path", "last")  # which finds it finished
    with pytest.raises(InputError, match="weight_decay"):
        fit(inputs, *ONLINE, name, "--ckpt_path", "last", "--model.optimizer.weight_decay", "0.5")
    assert (run.exit_code, len(run.history), run.summary) == before
    folder = inputs / "runs" / name
    assert len(list((folder / "wandb").glob("run-*"))) == 1
    (folder / "summary.json").unlink()  # as if killed between the last checkpoint and its summary
    run.summary = {}
    fit(inputs, *ONLINE, name, "--ckpt_path", "last")
    assert run.summary["val_output"] == pytest.approx(before[2]["val_output"])


def test_a_run_that_fails_before_its_first_row_is_shown_as_failed(
    inputs: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DistillationModule, "training_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(inputs, *ONLINE, "failing")
    (run,) = server.runs.values()
    assert (run.exit_code, run.display_name) == (1, "failing")


def test_every_panel_shows_something_that_a_run_sent(inputs: Path, server: WandbServer) -> None:
    from experiments.dashboards.specification import study_specification
    from experiments.superb.results import OVERALL

    fit(inputs, "--wandb.mode", "online", "--wandb.group", "table1_mini", "--trainer.log_every_n_steps", "1")
    (run,) = server.runs.values()
    assert run.group == "table1_mini"
    sections = study_specification("table1_mini")["sections"]
    shown = {
        name
        for section in sections
        for each in section["panels"]
        for name in [each.get("x"), *each.get("metrics", [each.get("y")])]
        for name in (name if isinstance(name, list) else [name])
        if name is not None
    }
    scores = {f"{prefix}test.{name}" for prefix in ("", "probe_") for names in OVERALL.values() for name in names}
    assert shown - scores <= run.keys
    assert "trainer/global_step" in shown
    for panel in (panel for section in sections for panel in section["panels"] if panel["kind"] == "line"):
        for name in panel["y"]:
            assert any({panel["x"], name} <= row.keys() for row in run.history), panel["title"]
    assert run.config["growth"]["value"]["policy"] == "interleaved"  # as it was set, and what follows from it
    assert run.config["growth_stages"]["value"] == [1, 2, 3, 4]
    assert "val/output" in shown - scores  # or nothing was compared
    table = read_metrics(inputs / "runs" / "run" / "metrics.csv")
    for name in ("train/output", "val/output", "growth/depth"):  # both loggers have the same steps
        sent = {row["trainer/global_step"]: row[name] for row in run.history if name in row}
        assert sent == pytest.approx(dict(zip(table[name].steps, table[name].values, strict=True)))
