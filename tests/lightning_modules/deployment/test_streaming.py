"""Streamed hidden states: as many frames as the whole utterance, equal to its own where nothing is cut off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from lightning_modules.deployment.streaming import StreamedUpstream, StreamSettings
from lightning_modules.superb.upstream import TeacherUpstream, Upstream, load_upstream
from lightning_modules.teacher import HuggingFaceTeacher, Teacher, TeacherTargets
from tests.helpers import save_teacher, save_whisper
from tests.lightning_modules.teachers import FAMILIES, far

SECONDS = 3
WHOLE = StreamSettings(hop=1000, left_context=1000, look_ahead=1000)
UNEVEN = StreamSettings(hop=7, left_context=20, look_ahead=5)


@pytest.fixture(scope="module")
def waveform_T() -> Tensor:
    """Three seconds of noise with an offset, whose loudness rises."""
    noise_T = torch.randn(SECONDS * SAMPLE_RATE + 123, generator=torch.Generator().manual_seed(3))
    return noise_T * torch.linspace(0.05, 0.5, len(noise_T)) + 0.1


def upstream_of(folder: Path, normalize: bool | None = None) -> TeacherUpstream:
    return TeacherUpstream(HuggingFaceTeacher(str(folder), normalize), "tiny")


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative distance among the hidden states."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalize", [False, True])
def test_with_the_whole_utterance_as_context_states_are_its_own(
    family: str, normalize: bool, folders: dict[str, Path], waveform_T: Tensor
) -> None:
    upstream = upstream_of(folders[family], normalize)
    whole = upstream([waveform_T])
    assert distance(StreamedUpstream(upstream, WHOLE)([waveform_T]), whole) < 1e-5
    cut = StreamedUpstream(upstream, UNEVEN)([waveform_T])
    assert [state_BFD.shape for state_BFD in cut] == [state_BFD.shape for state_BFD in whole]
    assert distance(cut, whole) > 0.01  # control


def test_hops_that_hear_everything_have_the_states_of_the_whole(tmp_path: Path, waveform_T: Tensor) -> None:
    """Many hops, each of which waits for the end: frames are in their places."""
    upstream = upstream_of(save_teacher(tmp_path))
    frames = upstream.num_frames(len(waveform_T))
    streamed = StreamedUpstream(upstream, StreamSettings(11, frames, frames))
    assert distance(streamed([waveform_T]), upstream([waveform_T])) < 1e-5


@pytest.mark.parametrize("normalize", [False, True])
def test_the_sizes_of_the_pieces_do_not_matter(tmp_path: Path, normalize: bool, waveform_T: Tensor) -> None:
    streamed = StreamedUpstream(upstream_of(save_teacher(tmp_path), normalize), UNEVEN)
    at_once = [state_BFD[0] for state_BFD in streamed([waveform_T])]
    for size in (100, 3000, 9999):
        stream = streamed.stream()
        parts = [stream.push(piece_T) for piece_T in waveform_T.split(size)]
        final = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        for state_FD, wanted_FD in zip(final, at_once, strict=True):
            torch.testing.assert_close(state_FD, wanted_FD[: len(state_FD)], rtol=0, atol=0)
        assert len(final[0]) > 30
        assert final[0].shape[0] % UNEVEN.hop == 0
        assert len(final[0]) + len(stream.finish()[0]) == streamed.num_frames(len(waveform_T))


def test_a_frame_comes_when_the_latency_has_passed(tmp_path: Path, waveform_T: Tensor) -> None:
    streamed = StreamedUpstream(upstream_of(save_teacher(tmp_path)), UNEVEN)
    stream, latency = streamed.stream(), UNEVEN.latency_samples()
    assert latency == (7 + 5) * 320 + 80 == round(streamed.latency_seconds * SAMPLE_RATE)
    assert len(stream.push(waveform_T[: latency - 1])[0]) == 0
    assert len(stream.push(waveform_T[latency - 1 : latency])[0]) == 7
    assert len(stream.push(waveform_T[latency : latency + 7 * 320 - 1])[0]) == 0
    assert len(stream.push(waveform_T[latency + 7 * 320 - 1 : latency + 7 * 320])[0]) == 7


def test_a_frame_depends_on_its_chunk_alone(tmp_path: Path, waveform_T: Tensor) -> None:
    """The hop of frames 28 to 34 sees frames 8 to 39; a sample outside of them changes nothing."""
    streamed = StreamedUpstream(upstream_of(save_teacher(tmp_path)), UNEVEN)
    hop = slice(28, 35)
    before = [state_BFD[0, hop] for state_BFD in streamed([waveform_T])]
    first, last = 8 * 320, 39 * 320 + 399
    for place, same in ((first - 1, True), (first, False), (last, False), (last + 1, True)):
        other_T = waveform_T.clone()
        other_T[place] += 5.0
        after = [state_BFD[0, hop] for state_BFD in streamed([other_T])]
        assert all(map(torch.equal, after, before)) == same, place


def test_only_statistics_reach_over_the_contexts_of_the_positional_convolution(
    folders: dict[str, Path], waveform_T: Tensor
) -> None:
    """The first state is exact with the convolution's 16 frames as context, but for group norm, and normalisation."""

    def error(family: str, normalize: bool = False, **changed: int) -> float:
        upstream = upstream_of(folders[family], normalize)
        cut = StreamSettings(**{"hop": 10, "left_context": 8, "look_ahead": 7} | changed)
        return distance(StreamedUpstream(upstream, cut)([waveform_T])[:1], upstream([waveform_T])[:1])

    assert error("hubert_large") < 1e-5  # layer norm
    assert error("hubert_large", left_context=7) > 1e-4
    assert error("hubert_large", look_ahead=6) > 1e-4
    assert error("hubert_large", normalize=True) > 1e-3
    assert error("hubert") > 1e-3  # group norm


def test_memory_is_bounded_by_the_look_back(tmp_path: Path) -> None:
    streamed = StreamedUpstream(upstream_of(save_teacher(tmp_path), normalize=True), UNEVEN)
    stream, chunk = streamed.stream(), (20 + 7 + 5) * 320 + 80
    generator, kept, frames = torch.Generator().manual_seed(0), [], 0
    for _ in range(20):
        states = stream.push(torch.randn(8000, generator=generator))
        frames += len(states[0])
        kept.append(stream.num_kept)
        assert stream._kept_T.untyped_storage().nbytes() == 4 * stream.num_kept
        assert all(state_FD.untyped_storage().nbytes() == 4 * state_FD.numel() for state_FD in states)
    assert frames > 450
    assert 20 * 320 < max(kept[2:]) < chunk


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 719, 720, 5000])
def test_short_streams_have_the_frames_of_short_utterances(tmp_path: Path, num_samples: int) -> None:
    streamed = StreamedUpstream(upstream_of(save_teacher(tmp_path)), UNEVEN)
    stream = streamed.stream()
    found = [len(stream.push(torch.randn(num_samples))[0]), len(stream.finish()[0])]
    assert sum(found) == streamed.num_frames(num_samples)
    with pytest.raises(ValueError, match="the stream is finished: begin a new one"):
        stream.push(torch.zeros(1))


def test_frames_computed_are_those_of_every_chunk(tmp_path: Path, waveform_T: Tensor) -> None:
    seen: list[int] = []

    class Counting(HuggingFaceTeacher):
        def all_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
            seen.append(int(self.num_frames(torch.tensor(waveforms_BT.shape[1]))))
            return super().all_states(waveforms_BT, num_samples_B)

    streamed = StreamedUpstream(TeacherUpstream(Counting(str(save_teacher(tmp_path))), "counting"), UNEVEN)
    seen.clear()
    frames = streamed([waveform_T])[0].shape[1]
    assert sum(seen) == UNEVEN.frames_computed(frames)
    assert max(seen) == 32
    # The chunks of a long stream have their whole context, those at its ends have less.
    assert UNEVEN.frames_computed(frames) < UNEVEN.compute_factor * frames
    assert UNEVEN.frames_computed(100_000) / 100_000 == pytest.approx(UNEVEN.compute_factor, rel=1e-3)


def test_a_batch_is_padded_with_zeros(tmp_path: Path, waveform_T: Tensor) -> None:
    streamed = StreamedUpstream(upstream_of(save_teacher(tmp_path)), UNEVEN)
    pair, alone = [waveform_T[:9000], waveform_T.flip(0)], streamed([waveform_T[:9000]])
    for state_BFD, alone_BFD in zip(streamed(pair, longest=60_000), alone, strict=True):
        assert state_BFD.shape[1] == streamed.num_frames(60_000)
        frames = alone_BFD.shape[1]
        assert torch.equal(state_BFD[:1, :frames], alone_BFD)
        assert not state_BFD[0, frames:].any()
        assert far(state_BFD[1, :frames], alone_BFD[0])


def test_the_digest_is_of_encoder_and_settings(tmp_path: Path) -> None:
    upstreams = [upstream_of(save_teacher(tmp_path / str(layers), layers=layers)) for layers in (2, 3)]
    sizes = (UNEVEN, StreamSettings(7, 20, 6), StreamSettings(7, 5, 20))
    digests = {StreamedUpstream(upstream, size).digest() for upstream in upstreams for size in sizes}
    assert len(digests | {upstream.digest() for upstream in upstreams}) == 8


def test_seconds_become_frames() -> None:
    assert StreamSettings.from_seconds(0.32, 2.56, 0.06) == StreamSettings(16, 128, 3)
    assert StreamSettings.from_seconds(0.32, 0.0) == StreamSettings(16, 0, 0)
    assert StreamSettings(10, 8, 7).compute_factor == 2.5


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ((0.0, 1.0, 0.0), r"hop=0 s: give a multiple of 0.02 s, the time of a frame, of at least 0.02 s"),
        ((0.01, 1.0, 0.0), r"hop=0.01 s: give a multiple of 0.02 s, the time of a frame, of at least 0.02 s"),
        ((0.05, 1.0, 0.0), r"hop=0.05 s: give a multiple of 0.02 s"),
        ((0.1, -1.0, 0.0), r"left_context=-1 s: give a multiple of 0.02 s, the time of a frame, of at least 0 s"),
        ((0.1, 1.0, float("inf")), r"look_ahead=inf s: give a multiple"),
        ((float("nan"), 1.0, 0.0), r"hop=nan s: give a multiple"),
    ],
)
def test_seconds_that_are_no_frames_are_refused(seconds: tuple[float, float, float], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        StreamSettings.from_seconds(*seconds)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ((0, 1, 1), "hop is 0 frames: give at least one"),
        ((1, -1, 1), "left_context is -1 frames: give 0 or more"),
        ((1, 1, -2), "look_ahead is -2 frames: give 0 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(frames: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        StreamSettings(*frames)


class Centred(Teacher):
    """Frames around multiples of 320 samples, as of a padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size, self.init_args = SAMPLE_RATE, 1, 4, {}

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return num_samples_B // 320 + 1

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        return TeacherTargets(torch.zeros(1, int(self.num_frames(torch.tensor(waveforms_BT.shape[1]))), 4), {})


def test_encoders_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    whisper: Any = load_upstream(str(save_whisper(tmp_path)))
    refused: list[tuple[Upstream, str]] = [
        (whisper, r"is a Whisper encoder, whose positions are absolute"),
        (load_upstream("fbank"), r"'fbank' normalises over the utterance"),
        (TeacherUpstream(Centred(), "centred"), r"the frames of 'centred' are not whole windows of samples"),
    ]
    for upstream, message in refused:
        with pytest.raises(InputError, match=message):
            StreamedUpstream(upstream, UNEVEN)
