"""The folder of a run: configs, metrics, growth log, checkpoints and summary; a resumed run stays in it."""

import contextlib
import logging
import os
import re
import subprocess
import traceback
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only

from datamodules.errors import InputError
from datamodules.files import FolderLock, clear_temporaries, read_json, write_json, write_text
from lightning_modules.checkpoint_files import damage, global_step, newest_sound, require_sound

log = logging.getLogger(__name__)


def git_commit() -> str | None:
    """Find the commit of the source tree, with ``-dirty`` if it has changes.

    Outside a clone it is ``$INTERSTACK_COMMIT``, which can be set for a copy of the tree, else ``None``.
    """
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("INTERSTACK_COMMIT")
    return result.stdout.strip() or None


class RunFolder:
    """``RUNS_DIR/NAME`` and the record of its attempts, ``run.json``.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None
        self.record = self._read()

    def _read(self) -> dict[str, Any]:
        if not self._record_path.is_file():
            return {"name": self.path.name, "attempts": [], "wandb_id": None}
        remedy = "restore it, or move it away: the run goes on without it, as a new one on W&B"
        return cast(dict[str, Any], read_json(self._record_path, remedy))

    @property
    def _record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def checkpoints(self) -> list[Path]:
        """All checkpoints that the run can continue from."""
        return list((self.path / "checkpoints").glob("*.ckpt"))

    @property
    def used(self) -> bool:
        """Whether a run has written metrics, a checkpoint or a summary here.

        An attempt that failed in its set-up has written none of them. Only on rank zero can this be true, because rank
        zero may already write this run while the other ranks start.
        """
        left = any((self.path / name).is_file() for name in ("metrics.csv", "summary.json")) or self.checkpoints
        return bool(left) and is_rank_zero()

    def hold(self) -> None:
        """Lock the folder for this process, on rank zero, and remove the incomplete files of a killed process.

        Raises:
            InputError: another command is working in this folder.
        """
        if is_rank_zero():
            self._lock = FolderLock(self.path, "run.lock", "wait for it, or choose another --name")
            clear_temporaries(self.path)
            self.record = self._read()

    @property
    def wandb_id(self) -> str:
        """The W&B run id, made once, or set, and kept over every resume."""
        if self.record["wandb_id"] is None:
            self.record["wandb_id"] = uuid.uuid4().hex[:12]
        return str(self.record["wandb_id"])

    @wandb_id.setter
    def wandb_id(self, run_id: str) -> None:
        self.record["wandb_id"] = run_id

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Attempts that make up the run: the last one that began at step 0, and those that resumed from it."""
        attempts = self.record["attempts"]
        fresh = [number for number, attempt in enumerate(attempts) if attempt["resumed_from"] is None]
        return attempts[fresh[-1] if fresh else 0 :]

    @property
    def commit(self) -> str | None:
        """Commit of the code that made the run; if the attempts differ, all commits in order."""
        commits = [attempt.get("git_commit", self.record.get("git_commit")) for attempt in self.attempts]
        return ", ".join(dict.fromkeys(commit for commit in commits if commit)) or None

    def resolve_checkpoint(self, ckpt_path: str | None) -> str | None:
        """Resolve ``--ckpt_path`` for this folder.

        ``last`` is this run's newest checkpoint, or none if there is none yet, because a job scheduler uses the same
        command for the first start.

        Raises:
            InputError: the folder is in use and this is a new run or another run's checkpoint, or the file is missing
                or damaged.
        """
        if ckpt_path == "last":
            return self._last()
        if ckpt_path is None:
            if self.used:
                raise InputError(
                    f"{self.path} already holds a run: continue it with --ckpt_path last, or choose another --name"
                )
            return None
        path = Path(ckpt_path)
        if not path.is_file():
            raise InputError(f"--ckpt_path {ckpt_path} is not a file: give a checkpoint, or `last`")
        known = [*self.checkpoints, *(self.path / "checkpoints").glob("abandoned_*/*.ckpt")]
        own = path.resolve() in [checkpoint.resolve() for checkpoint in known]
        if self.used and not own:
            raise InputError(
                f"{self.path} already holds another run than {ckpt_path} belongs to: choose another --name"
            )
        if problem := damage(path):
            raise InputError(f"{path} is damaged ({problem}): {self._way_on() if own else 'copy it again'}")
        return ckpt_path

    def _last(self) -> str | None:
        last = self.last_checkpoint
        if last.is_file():
            if problem := damage(last):
                raise InputError(f"{last} is damaged ({problem}): {self._way_on()}")
            return str(last)
        if not self.checkpoints:
            log.warning("no checkpoint in %s yet: starting from the beginning", self.path)
            return None
        if (found := newest_sound(self.checkpoints)) is None:
            raise InputError(f"{last} is missing: {self._way_on()}")
        log.warning("%s is missing: going on from %s, the newest that is whole", last, found)
        return str(found)

    def _way_on(self) -> str:
        """Say what to do if a checkpoint of this run is lost."""
        if (found := newest_sound(self.checkpoints)) is None:
            return f"no other checkpoint of {self.path} is whole; choose another --name to start anew"
        return f"go on from the newest that is whole (step {global_step(found)}) with --ckpt_path {found}"

    def trained_checkpoint(self, ckpt_path: str | None) -> str:
        """Resolve ``--ckpt_path`` for a command that needs a trained student.

        Raises:
            InputError: the path is not given, is not a file, is damaged, or is ``last`` without a checkpoint yet.
        """
        path = self.last_checkpoint if ckpt_path == "last" else Path(ckpt_path or "")
        if not path.is_file():
            missing = {None: "no --ckpt_path is given", "last": f"there is no checkpoint in {self.path} yet"}
            problem = missing.get(ckpt_path, f"--ckpt_path {ckpt_path} is not a file")
            raise InputError(f"{problem}: give a trained student's checkpoint, or `last` with the --name of its run")
        require_sound(path, self._way_on() if path in self.checkpoints else "")
        return str(path)

    def start_attempt(self, config: str, resumed_from: str | None) -> None:
        """Record one more attempt and keep its resolved configuration as ``config_N.yaml``."""
        kept = [re.fullmatch(r"config_(\d+)\.yaml", path.name) for path in self.path.glob("config_*.yaml")]
        numbers = [int(match[1]) for match in kept if match]  # more than in the record if the record was lost
        name = f"config_{max(numbers, default=0) + 1}.yaml"
        write_text(self.path / name, config)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        commit = git_commit()
        for attempt in self.record["attempts"]:  # attempts of old versions have no commit and keep the record's
            attempt.setdefault("git_commit", self.record.get("git_commit"))
        self.record["attempts"].append(
            {"started": started, "config": name, "resumed_from": resumed_from, "git_commit": commit}
        )
        self.record |= {"git_commit": commit, "wandb_id": self.wandb_id}
        write_json(self._record_path, self.record)

    def withdraw_attempt(self) -> None:
        """Forget the attempt that was recorded last, unless it is the only one: it trained nothing."""
        if len(self.record["attempts"]) < 2:
            return
        attempt = self.record["attempts"].pop()
        self.record["git_commit"] = self.record["attempts"][-1]["git_commit"]
        (self.path / attempt["config"]).unlink(missing_ok=True)
        write_json(self._record_path, self.record)

    def note_error(self, error: BaseException) -> None:
        """Add the traceback to ``errors.log``: the terminal shows one line of a foreseen error, and may be gone."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError), (self.path / "errors.log").open("a", encoding="utf-8") as log_file:
            log_file.write(f"# {when}, process {os.getpid()}\n{''.join(traceback.format_exception(error))}\n")


def is_rank_zero() -> bool:
    """Whether this process is the first of its run, also before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0
