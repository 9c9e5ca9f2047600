"""``python -m experiments.deployment.worker SPECIFICATION``: an encoder in a process of its own, asked for runs.

The specification is a line of JSON. The first reply has the times from the start of the process to the first output.
Then every request, a line of JSON on the standard input, gets one line as reply, until the input ends. Only what a
format needs is imported: an ONNX file runs without torch.

Shapes: B batch, T samples, F frames, D width, S hidden states.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import InputError, is_foreseen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLE_RATE = 16_000
LEAST_SECONDS = 0.2
"""A request repeats its run until so much time is filled, and the reply has the time of each run."""


class TorchEncoder:
    """Any encoder of `lightning_modules.superb.upstream` by torch; only its last hidden state is computed."""

    computes = "last hidden state"

    def __init__(self, path: str, precision: str, threads: int) -> None:
        import torch
        import transformers

        from lightning_modules.superb.upstream import TeacherUpstream, load_upstream
        from lightning_modules.teacher import EncoderTeacher, normalize_waveforms

        transformers.utils.logging.disable_progress_bar()
        self.imported, self.libraries_mb = time.monotonic(), memory().get("peak_mb")
        torch.set_num_threads(threads)
        self.torch, self.normalize_waveforms = torch, normalize_waveforms
        upstream = load_upstream(path)
        assert isinstance(upstream, TeacherUpstream)
        self.teacher: Any = upstream.teacher
        self.parameters: int | None = sum(parameter.numel() for parameter in self.teacher.parameters())
        if precision == "float32":
            return
        if not isinstance(self.teacher, EncoderTeacher):
            raise InputError(f"{type(self.teacher).__name__} can be measured in float32 only: leave out {precision}")
        if precision == "bfloat16":
            self.teacher.model.to(torch.bfloat16)
            self.teacher.precision_used = "bf16"
        elif isinstance(self.teacher.model, transformers.WavLMModel):
            raise InputError(
                "torch cannot quantise WavLM, whose attention reads the weights of its linear layers: export it with "
                "--format onnx --quantize int8 and measure that folder"
            )
        else:
            from torch.ao.quantization import quantize_dynamic

            self.teacher.model = quantize_dynamic(self.teacher.model, {torch.nn.Linear}, torch.qint8)

    def __call__(self, waveforms_BT: "NDArray[np.float32]") -> "NDArray[np.float32]":
        with self.torch.inference_mode():
            inputs_BT = self.torch.from_numpy(waveforms_BT)
            if self.teacher.normalize:
                inputs_BT = self.normalize_waveforms(inputs_BT)
            return self.teacher(inputs_BT).output_BFD.numpy()

    def weights_bytes(self) -> int:
        """Size of a file of the weights in this precision."""
        size = ByteCounter()
        self.torch.save(self.teacher.state_dict(), size)  # type: ignore[arg-type]
        return size.count


class ByteCounter:
    """A file that counts what is written to it and keeps nothing."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, content: Any) -> int:
        self.count += len(content)
        return len(content)

    def flush(self) -> None:
        """There is nothing to flush."""


class OnnxEncoder:
    """``model.onnx`` of a folder by onnxruntime, on the CPU.

    Its inputs are ``waveforms`` (B, T) float32 and ``num_samples`` (B,) int64. Its output is ``last_hidden_state``
    (B, F, D), or ``hidden_states`` (S, B, F, D), which are all computed then.

    Raises:
        InputError: the file cannot be read, or has other inputs or outputs.
    """

    parameters: int | None = None

    def __init__(self, path: str, precision: str, threads: int) -> None:
        import numpy as np
        import onnxruntime

        self.imported, self.libraries_mb = time.monotonic(), memory().get("peak_mb")
        self.numpy, self.file = np, Path(path) / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            self.session = onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has many types, all of its own
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{self.file} is no ONNX file that onnxruntime can read: {reason}") from error
        inputs, outputs = (
            [each.name for each in found] for found in (self.session.get_inputs(), self.session.get_outputs())
        )
        known = [name for name in ("last_hidden_state", "hidden_states") if name in outputs]
        if sorted(inputs) != ["num_samples", "waveforms"] or not known:
            raise InputError(
                f"{self.file} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}: the inputs must be "
                "waveforms and num_samples, and an output last_hidden_state or hidden_states"
            )
        self.output = known[0]
        self.computes = "last hidden state" if known[0] == "last_hidden_state" else "all hidden states"

    def __call__(self, waveforms_BT: "NDArray[np.float32]") -> "NDArray[np.float32]":
        batch, length = waveforms_BT.shape
        inputs = {"waveforms": waveforms_BT, "num_samples": self.numpy.full(batch, length, self.numpy.int64)}
        (found,) = self.session.run([self.output], inputs)
        return found if self.output == "last_hidden_state" else found[-1]

    def weights_bytes(self) -> int:
        """Size of the file, with those beside it that hold its weights."""
        return sum(file.stat().st_size for file in self.file.parent.glob(f"{self.file.name}*"))


def noise(batch: int, seconds: float) -> "NDArray[np.float32]":
    """Noise (B, T), the same in every process."""
    import numpy as np

    samples = round(seconds * SAMPLE_RATE)
    return np.float32(0.1) * np.random.default_rng(0).standard_normal((batch, samples), dtype=np.float32)


def run(encoder: Any, batch: int, seconds: float) -> dict[str, Any]:
    """Time runs of one input until ``LEAST_SECONDS`` are filled; reply with the seconds of each, and the memory."""
    waveforms_BT = noise(batch, seconds)
    laps: list[float] = []
    while sum(laps) < LEAST_SECONDS:
        began = time.perf_counter()
        encoder(waveforms_BT)
        laps.append(time.perf_counter() - began)
    return {"laps": laps, **memory()}


def memory() -> dict[str, float | None]:
    """Peak and present resident memory of this process in MB; ``None`` without ``/proc``."""
    from experiments.bench.memory import resident_megabytes

    known = Path("/proc/self/status").exists()
    return {"peak_mb": resident_megabytes("VmHWM"), "now_mb": resident_megabytes("VmRSS")} if known else {}


def start(specification: dict[str, Any], began: float) -> tuple[Any, dict[str, Any]]:
    """Load the encoder and compute its first output, which is saved; return it and the first reply."""
    kind = OnnxEncoder if specification["format"] == "ONNX" else TorchEncoder
    encoder: Any = kind(specification["path"], specification["precision"], specification["threads"])
    loaded = time.monotonic()
    output_BFD = encoder(noise(1, specification["seconds"]))
    done = time.monotonic()
    import numpy as np

    np.save(specification["output"], output_BFD)
    spawned = specification["spawned"]
    times = {
        "interpreter": began - spawned,
        "imports": encoder.imported - began,
        "load": loaded - encoder.imported,
        "first_run": done - loaded,
        "total": done - spawned,
    }
    facts = {name: getattr(encoder, name) for name in ("parameters", "computes", "libraries_mb")}
    return encoder, {"start": times, **facts}


def serve(specification: dict[str, Any], requests: Iterable[str], began: float) -> Iterable[dict[str, Any]]:
    """Yield the first reply and one for each request: of a run, or of the size of the weights (an empty request)."""
    encoder, first = start(specification, began)
    yield first
    for line in requests:
        request = json.loads(line)
        yield run(encoder, **request) if request else {"weights_bytes": encoder.weights_bytes()}


def main() -> int:
    began = time.monotonic()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    try:
        for reply in serve(json.loads(sys.argv[1]), sys.stdin, began):
            print(json.dumps(reply), file=replies, flush=True)
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        print(json.dumps({"error": f"{kind}{error}", "foreseen": is_foreseen(error)}), file=replies, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
