"""Runs whose W&B service, a process of its own, is killed."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest

from callbacks import requeue
from experiments.records.loggers import ResilientWandbLogger, WandbSettings, build_loggers
from tests.experiments.records.test_loggers import Tiny, loader, make_trainer, rows
from tests.patience import PATIENCE


def wandb_logger(folder: Path, run_id: str) -> ResilientWandbLogger:
    logger = build_loggers(folder, "run", WandbSettings("offline"), run_id=run_id, config={"a": 1})[1]
    assert isinstance(logger, ResilientWandbLogger)
    return logger


def service() -> subprocess.Popen[bytes]:
    """W&B's service for this process, by W&B's own object: it would warn later if another one had waited for it."""
    children = [each for each in gc.get_objects() if type(each) is subprocess.Popen]
    (one,) = (each for each in children if "wandb-core" in str(each.args) and each.poll() is None)
    return one


def kill_service(number: int = signal.SIGKILL) -> None:
    """End the service, and wait until it has."""
    process = service()
    process.send_signal(number)
    process.wait()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the project said; W&B logs errors of its own."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("experiments.records")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("requeued", [False, True])
def test_training_goes_on_without_the_service(
    number: int, requeued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(requeue, "_announced", [True] * requeued)
    loggers = build_loggers(tmp_path, "run", WandbSettings("offline"), run_id="abc123", config={"a": 1})
    other = wandb_logger(tmp_path, "beside")
    for logger in (loggers[1], other):
        logger.log_metrics({"train/loss": 0.5}, step=0)
    kill_service(number)
    make_trainer(tmp_path, 1, loggers).fit(Tiny(), loader(), loader())  # its last call is finalize
    for _ in range(3):
        time.sleep(0.1)  # a call is sent in the background, so the first one after the end may not fail
        other.experiment.summary["a"] = 1
        other.experiment.summary.update({"b": 2})
        other.experiment.config.update({"c": 3}, allow_val_change=True)
    assert other.experiment.id == "beside"
    other.finalize("success")
    assert len(rows(tmp_path)) == 3
    said = warnings(caplog)
    assert len(said) == 2
    for run_id, warning in zip(["abc123", "beside"], said, strict=True):
        assert "W&B's service has ended" in warning
        (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}")
        assert f"`wandb sync --include-online {folder}`" in warning
    later = wandb_logger(tmp_path, "later")
    later.log_metrics({"train/loss": 0.5}, step=1)
    assert later.experiment.offline
    later.finalize("success")
    assert warnings(caplog) == said


@pytest.mark.parametrize("moment", ["between runs", "at the end of a run"])
def test_the_next_run_has_a_service_of_its_own(moment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where W&B waits for an answer it raises other errors."""
    first = wandb_logger(tmp_path, "first")
    first.log_metrics({"train/loss": 0.5}, step=1)
    if moment == "between runs":
        first.finalize("success")
        kill_service()
    else:
        service().send_signal(signal.SIGSTOP)
        Timer(1.0, kill_service).start()
        first.finalize("success")
    said = warnings(caplog)
    assert ["W&B's service has ended (" in text for text in said] == [True] * (moment != "between runs")
    assert not any("has ended ()" in text for text in said)
    second = wandb_logger(tmp_path, "second")
    second.log_metrics({"train/loss": 0.5}, step=1)
    second.finalize("success")
    assert warnings(caplog) == said
    assert len(list((tmp_path / "wandb").glob("offline-run-*-second*"))) == 1


@pytest.mark.ci
def test_the_process_ends_as_ever(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from pathlib import Path\n"
        "from tests.experiments.records.test_wandb_run import kill_service, wandb_logger\n"
        f"logger = wandb_logger(Path({str(tmp_path)!r}), 'abc123')\n"
        "logger.log_metrics({'train/loss': 0.5}, step=1)\n"
        "kill_service()\n"
        "for step in range(2, 8):\n"
        "    logger.log_metrics({'train/loss': 0.5}, step=step)\n"
        "    time.sleep(1)  # W&B's threads look every five seconds\n"
        "logger.finalize('success')\n"
        "time.sleep(6)\n"
    )
    own_service = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=own_service, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_are_raised(tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path, "abc123")
    try:
        with pytest.raises(TypeError, match="dictionary"):
            logger.experiment.log("no dictionary")
    finally:
        logger.finalize("failed")
