"""Measure encoders beside each other: a process for each, asked in turns, so that the machine's noise hits all alike.

Only one process computes at a time. Before that every row is started once, uncounted: a row that cannot be measured
is found early, and the files of all rows are in the system's cache when starts are timed.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import InputError
from datamodules.files import read_text
from experiments.deployment.rows import Row

log = logging.getLogger(__name__)


class Worker:
    """A process with one encoder, see `experiments.deployment.worker`.

    Args:
        row: the encoder.
        threads: threads that it computes with.
        seconds: length of its first input.
        folder: an existing folder for its log and its first output.

    Raises:
        InputError: the encoder cannot be loaded or run; the message names the row.
        RuntimeError: the process ended in another way; the message has the end of its log.
    """

    def __init__(self, row: Row, threads: int, seconds: float, folder: Path) -> None:
        self.row, self._log, self._output = row, folder / "log.txt", folder / "output.npy"
        specification = {
            "path": row.path,
            "format": row.format,
            "precision": row.precision,
            "threads": threads,
            "seconds": seconds,
            "output": str(self._output),
            "spawned": time.monotonic(),
        }
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.deployment.worker", json.dumps(specification)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
            )
        self.first = self._reply()
        self.output_BFD: NDArray[np.float32] = np.load(self._output)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Get the reply to a request; an empty one asks for the size of the weights."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": self._end(), "foreseen": False}
        if "error" in reply:
            self.close()
            raise (InputError if reply["foreseen"] else RuntimeError)(f"row {self.row.label!r}: {reply['error']}")
        return reply

    def _end(self) -> str:
        status = self._process.wait()
        return f"its process ended with status {status} (-9: too little memory?): {read_text(self._log)[-2000:]}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def working(row: Row, threads: int, seconds: float) -> Iterator[Worker]:
    """Yield a worker, and end it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(row, threads, seconds, Path(folder))
        try:
            yield worker
        finally:
            worker.close()


def describe(rows: Sequence[Row], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Start every row once, and collect what does not depend on threads and time.

    Returns:
        For each row ``parameters``, ``weights_mb``, ``computes``, and ``difference``, the relative L2 distance of its
        output from that of the float32 row of the same name; ``None`` if there is no such row.
    """
    found, outputs = [], []
    for row in rows:
        with working(row, threads, seconds) as worker:
            parameters = worker.first["parameters"] or row.parameters
            size = worker.ask()["weights_bytes"] / 1e6
            found.append({"parameters": parameters, "weights_mb": size, "computes": worker.first["computes"]})
            outputs.append(worker.output_BFD)
        log.info("%s: loads and runs", row.label)
    for row, facts, output_BFD in zip(rows, found, outputs, strict=True):
        same = [
            other
            for one, other in zip(rows, outputs, strict=True)
            if (one.name, one.precision) == (row.name, "float32")
        ]
        facts["difference"] = float(np.linalg.norm(output_BFD - same[0]) / np.linalg.norm(same[0])) if same else None
    return found


def measure(rows: Sequence[Row], threads: int, seconds: Sequence[float], batch_size: int, rounds: int) -> list[Any]:
    """Start every row, then time all inputs of all rows in ``rounds`` turns, after one that is not counted.

    The uncounted turn goes from the shortest input to the longest, first with one utterance and then with a batch. The
    peak of memory is read after the last of each, so that it has met no larger input.

    Returns:
        For each row ``start`` (seconds), ``libraries_mb``, ``memory`` and ``runs``, in plain values.
    """
    inputs = [(batch, length) for batch in dict.fromkeys((1, batch_size)) for length in sorted(seconds)]
    with ExitStack() as stack:
        workers = [stack.enter_context(working(row, threads, inputs[0][1])) for row in rows]
        laps: list[dict[tuple[int, float], list[float]]] = [{each: [] for each in inputs} for _ in rows]
        peaks: list[dict[int, dict[str, Any]]] = [{} for _ in rows]
        for turn in range(rounds + 1):
            began = time.monotonic()
            order = list(zip(workers, laps, peaks, strict=True))
            for batch, length in inputs:
                for worker, own, peak in order if turn % 2 else reversed(order):
                    reply = worker.ask(batch=batch, seconds=length)
                    if turn:
                        own[batch, length].append(median(reply["laps"]))
                    else:
                        peak[batch] = {"peak_mb": reply.get("peak_mb"), "now_mb": reply.get("now_mb")}
            log.info("%d threads, turn %d of %d: %.0f s", threads, turn, rounds, time.monotonic() - began)
        return [
            {
                "start": worker.first["start"],
                "libraries_mb": worker.first["libraries_mb"],
                "memory": [{"batch": batch, "seconds": inputs[-1][1], **found} for batch, found in peak.items()],
                "runs": [summarised(batch, length, times) for (batch, length), times in own.items()],
            }
            for worker, own, peak in zip(workers, laps, peaks, strict=True)
        ]


def summarised(batch: int, seconds: float, laps: Sequence[float]) -> dict[str, Any]:
    """Summarise the turns of one input; the real-time factor is seconds of computing per second of audio."""
    first, _, third = quantiles(laps, method="inclusive") if len(laps) > 1 else (laps[0],) * 3
    return {
        "batch": batch,
        "seconds": seconds,
        "median_ms": 1000 * median(laps),
        "quartiles_ms": [1000 * first, 1000 * third],
        "real_time_factor": median(laps) / (batch * seconds),
        "turns_ms": [1000 * lap for lap in laps],
    }
