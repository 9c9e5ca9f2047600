"""Hidden states of a stream, computed hop by hop with a bounded look-back.

An encoder of the HuBERT layout hears a whole utterance at once. Here it is called once for every hop, on the chunk
[left context | hop | look-ahead], and the frames of the hop are kept. The frames are those of the whole utterance in
number and position; their values differ, for three reasons:

* Attention, and the positional convolution (128 frames wide in HuBERT: 64 before and 63 after a frame), see nothing
  beyond the chunk.
* Group norm over time, in the first convolution of HuBERT Base and most students, takes its statistics from the chunk.
* Waveforms that get normalised (``Teacher.normalize``) get the mean and variance of all samples heard so far. The whole
  utterance's are not known yet. Those of the chunk alone would amplify a pause to the loudness of speech.

An encoder was trained on whole utterances, in both directions. Nothing here teaches it to do without the future.

Shapes: B batch, T samples, F frames, D width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.frames import HOP, WINDOW, count_windows
from lightning_modules.deployment.onnx_encoder import OnnxEncoder
from lightning_modules.superb.upstream import TeacherUpstream, Upstream
from lightning_modules.whisper import WhisperTeacher


@dataclass(frozen=True)
class StreamSettings:
    """Sizes of a chunk in frames.

    Args:
        hop: frames that one call makes final.
        left_context: frames before the hop that are computed again.
        look_ahead: frames after the hop that must be heard first.

    Raises:
        InputError: the hop has no frame, or a context is negative.
    """

    hop: int
    left_context: int
    look_ahead: int = 0

    def __post_init__(self) -> None:
        if self.hop < 1:
            raise InputError(f"hop is {self.hop} frames: give at least one")
        for name in ("left_context", "look_ahead"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)} frames: give 0 or more")

    @classmethod
    def from_seconds(
        cls, hop: float, left_context: float, look_ahead: float = 0.0, frame_seconds: float = HOP / SAMPLE_RATE
    ) -> "StreamSettings":
        """Convert seconds to frames.

        Raises:
            InputError: a number is negative, or is not a whole number of frames, such as a hop below one.
        """
        given = {"hop": hop, "left_context": left_context, "look_ahead": look_ahead}
        return cls(**{name: _whole_frames(name, seconds, frame_seconds) for name, seconds in given.items()})

    @property
    def compute_factor(self) -> float:
        """Frames that are computed for each frame of a long stream. Attention costs less than this factor says."""
        return (self.left_context + self.hop + self.look_ahead) / self.hop

    def latency_samples(self, rate: int = HOP, window: int = WINDOW) -> int:
        """Samples from the first one of a hop to the last one that the hop needs; computing time comes on top.

        It is hop plus look-ahead, plus what the window of the last frame (``window``) has beyond its ``rate``. This is
        the wait of the hop's first frame. Its last frame waits for the look-ahead and its own window.
        """
        return (self.hop + self.look_ahead - 1) * rate + window

    def first_needed(self, frame: int) -> int:
        """First frame of the chunk whose hop begins with ``frame``."""
        return max(0, frame - self.left_context)

    def frames_computed(self, num_frames: int) -> int:
        """Frames that are computed for an utterance of ``num_frames``; chunks end at its beginning and its end."""
        hops = range(0, num_frames, self.hop)
        return sum(min(num_frames, at + self.hop + self.look_ahead) - self.first_needed(at) for at in hops)


def _whole_frames(name: str, seconds: float, frame_seconds: float) -> int:
    frames, least = seconds / frame_seconds, 1 if name == "hop" else 0
    if not least - 1e-6 <= frames < float("inf") or abs(frames - round(frames)) > 1e-6:
        raise InputError(
            f"{name}={seconds:g} s: give a multiple of {frame_seconds:g} s, the time of a frame, of at least "
            f"{least * frame_seconds:g} s"
        )
    return round(frames)


class StreamedUpstream(Upstream):
    """An upstream whose hidden states are those of a stream, for heads, probes and :meth:`stream`.

    Utterances of a batch are streamed one by one, and a frame beyond an utterance's own is 0.

    Args:
        upstream: the encoder; it computes in the precision of the caller.
        settings: sizes of a chunk.

    Raises:
        InputError: the encoder is not one that can be computed in chunks: Whisper, ``fbank``, or one whose frames are
            not windows of samples.
    """

    def __init__(self, upstream: Upstream, settings: StreamSettings) -> None:
        super().__init__()
        self.upstream, self.settings = _streamable(upstream), settings
        self.name, self.rate = upstream.name, upstream.rate
        self.num_states, self.width = upstream.num_states, upstream.width
        self.window = self.upstream.window
        _require_windows(self.upstream)

    @property
    def latency_seconds(self) -> float:
        """See :meth:`StreamSettings.latency_samples`."""
        return self.settings.latency_samples(self.rate, self.window) / SAMPLE_RATE

    def num_frames(self, num_samples: int) -> int:
        return self.upstream.num_frames(num_samples)

    def samples_before(self, frame: int) -> int:
        """Number of samples, from the beginning, on which the frames before ``frame`` depend."""
        return self.rate * (frame - 1) + self.window

    def stream(self) -> "Stream":
        """A new stream, at its beginning."""
        return Stream(self)

    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        utterances = [self._utterance(waveform_T) for waveform_T in waveforms]
        states = [pad_sequence(list(layer), batch_first=True) for layer in zip(*utterances, strict=True)]
        missing = max(0, self.num_frames(longest or 0) - states[0].shape[1])
        return [nn.functional.pad(state_BFD, (0, 0, 0, missing)) for state_BFD in states]

    def _utterance(self, waveform_T: Tensor) -> list[Tensor]:
        stream = self.stream()
        return [torch.cat(parts) for parts in zip(stream.push(waveform_T), stream.finish(), strict=True)]

    def digest(self) -> str:
        """Digest of the encoder and of the settings."""
        return f"{self.upstream.digest()}-{'-'.join(map(str, asdict(self.settings).values()))}"


def _streamable(upstream: Upstream) -> TeacherUpstream:
    if not isinstance(upstream, TeacherUpstream):
        raise InputError(f"{upstream.name!r} normalises over the utterance and has no layers: stream a speech encoder")
    if isinstance(upstream.teacher, WhisperTeacher):
        raise InputError(
            f"{upstream.name!r} is a Whisper encoder, whose positions are absolute and begin with its window of 30 s: "
            "it cannot be streamed; give an encoder with convolutions over waveforms, such as a student"
        )
    if isinstance(upstream.teacher, OnnxEncoder) and not upstream.teacher.is_streamable:
        raise InputError(
            f"the ONNX file in {upstream.name!r} normalises each waveform itself, or has positions that end: it cannot "
            "be streamed; give the checkpoint that it was made of"
        )
    return upstream


def _require_windows(upstream: TeacherUpstream) -> None:
    """Refuse an encoder whose frames are not windows of samples."""
    lengths, window = torch.arange(2 * SAMPLE_RATE), upstream.window
    counted = upstream.teacher.num_frames(lengths)
    if window < upstream.rate or not torch.equal(counted, count_windows(lengths, window, upstream.rate)):
        raise InputError(
            f"the frames of {upstream.name!r} are not whole windows of samples, one every {upstream.rate}, so that it "
            "is not known which samples a frame needs: it cannot be streamed"
        )


class Stream:
    """A stream of samples that becomes frames; it keeps no more samples than its look-back needs.

    Hops begin at frames 0, hop, 2 hop, ..., whatever the sizes of the pieces that are pushed.

    Args:
        encoder: the encoder and the sizes of a chunk.
    """

    def __init__(self, encoder: StreamedUpstream) -> None:
        self._encoder = encoder
        self._kept_T = torch.zeros(0)
        self._first_kept = self._frame = 0  # number of the first sample in memory, and of the first frame not final
        self._count, self._sum, self._squares = 0, 0.0, 0.0  # of the samples that chunks have reached
        self._finished = False

    @property
    def num_kept(self) -> int:
        """Samples in memory; after a call fewer than those of a chunk."""
        return len(self._kept_T)

    @torch.no_grad()
    def push(self, samples_T: Tensor) -> list[Tensor]:
        """Hear new samples (T,), of any number; returns every hidden state (F, D) of the frames that became final.

        Raises:
            ValueError: the stream is finished.
        """
        if self._finished:
            raise ValueError("the stream is finished: begin a new one")
        self._kept_T = torch.cat([self._kept_T.to(samples_T), samples_T])
        available, settings = self._encoder.num_frames(self._first_kept + len(self._kept_T)), self._encoder.settings
        hops = []
        while (end := self._frame + settings.hop + settings.look_ahead) <= available:
            hops.append(self._hop(end, self._encoder.samples_before(end)))
        self._kept_T = self._kept_T.clone()  # not a view that keeps all samples in memory
        return self._joined(hops)

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """End the stream; returns every hidden state (F, D) of the remaining frames."""
        self._finished = True
        total = self._first_kept + len(self._kept_T)
        frames, settings = self._encoder.num_frames(total), self._encoder.settings
        hops = []
        while self._frame < frames:
            end = min(self._frame + settings.hop + settings.look_ahead, frames)
            # The last samples belong to no frame's window, but a whole utterance's norms do count them.
            hops.append(self._hop(end, total if end == frames else self._encoder.samples_before(end)))
        self._kept_T = self._kept_T[:0].clone()
        return self._joined(hops)

    def _hop(self, end: int, stop: int) -> list[Tensor]:
        """States of the next hop, from a chunk of the frames before ``end`` and the samples before ``stop``."""
        encoder, first = self._encoder, self._encoder.settings.first_needed(self._frame)
        chunk_T = self._normalised(self._samples(encoder.rate * first, stop), stop)
        done = min(self._frame + encoder.settings.hop, end)
        states = encoder.upstream.teacher.all_states(chunk_T[None])
        # A copy, because a view would keep the states of the whole chunk in memory.
        own = [state_BFD[0, self._frame - first : done - first].float().clone() for state_BFD in states]
        self._frame, needed = done, encoder.rate * encoder.settings.first_needed(done)
        self._kept_T, self._first_kept = self._samples(needed, self._first_kept + len(self._kept_T)), needed
        return own

    def _samples(self, start: int, stop: int) -> Tensor:
        return self._kept_T[start - self._first_kept : stop - self._first_kept]

    def _normalised(self, chunk_T: Tensor, stop: int) -> Tensor:
        """The chunk with the statistics of all samples before ``stop``, if the encoder's waveforms get normalised."""
        if not self._encoder.upstream.teacher.normalize:
            return chunk_T
        new_T = self._samples(self._count, stop).double()
        self._count, self._sum = stop, self._sum + float(new_T.sum())
        self._squares += float(new_T.square().sum())
        mean = self._sum / stop
        return (chunk_T - mean) / (max(0.0, self._squares / stop - mean**2) + 1e-7) ** 0.5

    def _joined(self, hops: list[list[Tensor]]) -> list[Tensor]:
        if not hops:
            return [self._kept_T.new_zeros(0, self._encoder.width).float() for _ in range(self._encoder.num_states)]
        return [torch.cat(parts) for parts in zip(*hops, strict=True)]
