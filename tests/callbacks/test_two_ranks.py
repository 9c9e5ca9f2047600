"""Faults that reach one of two ranks: both must do the same, and none may wait for the other for ever."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from callbacks.requeue import EXIT_SIGTERM
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_both_ranks_skip_stop_and_fail_together(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    save_corpus(tmp_path / "corpus", {"train": 12, "dev": 4})
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [*LAUNCH, "-m", "tests.callbacks.two_ranks", str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))

    assert first["skip"] == second["skip"] != first["whole"]
    assert first["finite"]
    assert first["skipped"] == second["skipped"] == [0, 1]

    assert (first["code"], second["code"]) == (EXIT_SIGTERM, 0)
    assert first["step"] == 4
    assert first["resumed"] == second["resumed"] == first["whole"]

    assert (first["asked"], second["asked"]) == ([EXIT_SIGTERM, 4], [0, 4])
    assert first["asked_resumed"] == second["asked_resumed"] == first["whole"]

    assert first["error"] == second["error"]
    assert "(No space left on device); there is none from before" in first["error"]
