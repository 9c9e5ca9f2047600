"""An exported ONNX folder as an encoder, so that what was exported can be scored and timed as its original is.

Shapes: B batch, T samples, F frames, S hidden states, D width.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.errors import InputError
from datamodules.files import read_json
from datamodules.frames import HOP, count_windows
from lightning_modules.deployment.onnx_file import MODEL_FILE, run, session
from lightning_modules.export import META_FILE
from lightning_modules.teacher import Teacher, TeacherTargets
from lightning_modules.whisper import states_in_parts

STATES = ("hidden_states", "last_hidden_state")


def is_onnx_folder(path: Path) -> bool:
    """Whether a folder holds an ONNX file under the name that ``interstack export`` gives it."""
    return (path / MODEL_FILE).is_file()


class OnnxEncoder(Teacher):
    """The encoder in a folder of ``interstack export --format onnx``, run by onnxruntime on the CPU.

    It has all hidden states or the last one alone, whichever the file returns.

    Args:
        folder: the exported folder.
        threads: threads that onnxruntime uses; ``None``: as many as torch.

    Raises:
        InputError: the folder was not written by ``interstack export``, or its file returns no hidden states.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        super().__init__()
        path = Path(folder)
        described = read_json(path / META_FILE).get("onnx") if (path / META_FILE).is_file() else None
        if described is None:
            raise InputError(
                f"{str(path)!r} holds {MODEL_FILE}, but no {META_FILE} that describes it: give a folder of "
                "`interstack export --format onnx`"
            )
        self.outputs = list(described["outputs"])
        if self.outputs[0] not in STATES:
            raise InputError(
                f"the ONNX file in {str(path)!r} returns {self.outputs[0]} of a head: export the encoder without --head"
            )
        self.described: dict[str, Any] = described
        self.sample_rate, self.hidden_size, self.num_layers = (
            described[name] for name in ("sample_rate", "width", "layers")
        )
        self.init_args = {}  # not the folder, since features are identified by the file
        self._sha256 = hashlib.sha256((path / MODEL_FILE).read_bytes()).hexdigest()
        self._session = session(path / MODEL_FILE, threads or torch.get_num_threads())

    @property
    def is_streamable(self) -> bool:
        """Whether a chunk of an utterance can be given as if it were one: no normalisation, no limited positions."""
        return not self.described["normalizes_waveforms"] and self.described["longest_samples"] is None

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"onnx": self._sha256}

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        window, hop = (self.described[name] for name in ("shortest_samples", "samples_per_frame"))
        return count_windows(num_samples_B.to(torch.long), window, hop)

    def all_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
        """Hidden states (B, F, D) on the device of the waveforms; of Whisper, in parts of 30 s as in PyTorch."""
        if num_samples_B is None:
            num_samples_B = torch.full((len(waveforms_BT),), waveforms_BT.shape[1])
        inputs = waveforms_BT.float().cpu(), num_samples_B.cpu()
        longest, least = self.described["longest_samples"], self.described["shortest_samples"]
        if longest is None:
            states = self._states(*inputs)
        else:
            states = states_in_parts(self._states, *inputs, longest // HOP, least)
        return [state_BFD.to(waveforms_BT.device) for state_BFD in states]

    def _states(self, waveforms_BT: Tensor, num_samples_B: Tensor) -> list[Tensor]:
        states = run(self._session, waveforms_BT.contiguous(), num_samples_B)[0]
        return list(states) if self.outputs[0] == STATES[0] else [states]

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        states = self.all_states(waveforms_BT, num_samples_B)
        if len(states) == 1 and self.hidden_layers:
            raise InputError("this ONNX file returns the last hidden state only: export it with --states all")
        return TeacherTargets(states[-1], {layer: states[layer] for layer in self.hidden_layers})
