"""A run is one folder: its configs, metrics, growth log, checkpoints and summary; a resumed run stays in it."""

import logging
import os
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from datamodules.files import read_json, write_json, write_text

log = logging.getLogger(__name__)


def git_commit() -> str | None:
    """Commit of the source tree, with ``-dirty`` where it has changes.

    Outside a clone it is ``$INTERSTACK_COMMIT``, which a copy of the tree can be given; ``None`` without that.
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
        self.record: dict[str, Any] = {"name": path.name, "attempts": [], "wandb_id": None}
        if self._record_path.is_file():
            self.record = read_json(self._record_path)

    @property
    def _record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def used(self) -> bool:
        """Whether a run left something here: metrics or a checkpoint. An attempt that failed in its set-up did not.

        Only rank zero can tell: it records this run while others start.
        """
        left = (self.path / "metrics.csv").is_file() or any((self.path / "checkpoints").glob("*.ckpt"))
        return bool(self.record["attempts"]) and left and getattr(rank_zero_only, "rank", 0) == 0

    @property
    def wandb_id(self) -> str:
        """The W&B run id: made once, kept over every resume."""
        if self.record["wandb_id"] is None:
            self.record["wandb_id"] = uuid.uuid4().hex[:12]
        return str(self.record["wandb_id"])

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Those that the run is made of: the last one that began at step 0, and what resumed from it."""
        attempts = self.record["attempts"]
        fresh = [number for number, attempt in enumerate(attempts) if attempt["resumed_from"] is None]
        return attempts[fresh[-1] if fresh else 0 :]

    @property
    def commit(self) -> str | None:
        """Commit of the code that made the run; of attempts that differ all, in their order."""
        commits = [attempt.get("git_commit", self.record.get("git_commit")) for attempt in self.attempts]
        return ", ".join(dict.fromkeys(commit for commit in commits if commit)) or None

    def resolve_checkpoint(self, ckpt_path: str | None) -> str | None:
        """What ``--ckpt_path`` means for this folder.

        ``last`` is this run's newest checkpoint, or nothing where there is none yet: a job scheduler gives the same
        command on its first start.

        Raises:
            ValueError: a new run, or another run's checkpoint, in a folder that is in use; a file that is not there.
        """
        if ckpt_path == "last":
            if self.last_checkpoint.is_file():
                return str(self.last_checkpoint)
            log.warning("no checkpoint in %s yet: starting from the beginning", self.path)
            return None
        if ckpt_path is None:
            if self.used:
                raise ValueError(
                    f"{self.path} already holds a run: continue it with --ckpt_path last, or choose another --name"
                )
            return None
        if not Path(ckpt_path).is_file():
            raise ValueError(f"--ckpt_path {ckpt_path} is not a file: give a checkpoint, or `last`")
        own = Path(ckpt_path).resolve().parent == self.last_checkpoint.resolve().parent
        if self.used and not own:
            raise ValueError(
                f"{self.path} already holds another run than {ckpt_path} belongs to: choose another --name"
            )
        return ckpt_path

    def trained_checkpoint(self, ckpt_path: str | None) -> str:
        """What ``--ckpt_path`` means where a trained student is needed.

        Raises:
            ValueError: it is not given, ``last`` where there is none yet, or not a file.
        """
        path = self.last_checkpoint if ckpt_path == "last" else Path(ckpt_path or "")
        if not path.is_file():
            missing = {None: "no --ckpt_path is given", "last": f"there is no checkpoint in {self.path} yet"}
            problem = missing.get(ckpt_path, f"--ckpt_path {ckpt_path} is not a file")
            raise ValueError(f"{problem}: give a trained student's checkpoint, or `last` with the --name of its run")
        return str(path)

    def start_attempt(self, config: str, resumed_from: str | None) -> None:
        """Record one more attempt and keep its resolved configuration as ``config_N.yaml``."""
        name = f"config_{len(self.record['attempts']) + 1}.yaml"
        write_text(self.path / name, config)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        commit = git_commit()
        for attempt in self.record["attempts"]:  # one from before attempts had a commit keeps the record's
            attempt.setdefault("git_commit", self.record.get("git_commit"))
        self.record["attempts"].append(
            {"started": started, "config": name, "resumed_from": resumed_from, "git_commit": commit}
        )
        self.record |= {"git_commit": commit, "wandb_id": self.wandb_id}
        write_json(self._record_path, self.record)
