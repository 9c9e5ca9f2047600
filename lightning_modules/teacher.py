"""Teachers: frozen speech encoders whose hidden states a student learns to predict.

Shapes: B batch, T samples, F frames, D width. Layers count from 1: layer k is the k-th Transformer layer. Layer 0 as a
target is the input of the first one.

A teacher is chosen by ``class_path``. :class:`HuggingFaceTeacher` loads encoders of the wav2vec 2.0 kind
from the Hugging Face hub or a local folder, :class:`lightning_modules.whisper.WhisperTeacher` those of Whisper. For
another encoder write a subclass of :class:`Teacher`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.compiling import compile_in_place, compiled_parts
from lightning_modules.front_end import FrontEnd, conv_frames, copyable_front_end, noise
from lightning_modules.hidden_states import encoder_states, valid_samples
from lightning_modules.kernels import Kernels, install
from lightning_modules.lengths import before_the_end
from lightning_modules.masking import mask_states, mixture
from lightning_modules.precision import Precision, chosen_precision, computing_in, is_safe_in_bf16
from lightning_modules.taps import ends_in_layer_norm, run_tapped
from lightning_modules.teacher_loading import (
    MASK_EMBEDDING,
    load_config,
    load_extractor,
    load_model,
    resolve_normalize,
)


class TeacherTargets(NamedTuple):
    """The teacher's outputs that a student learns to predict.

    Attributes:
        output_BFD: target of the output loss.
        hidden: raw output (B, F, D) of each chosen layer, by layer number.
        features_BFC: features of the teacher's convolutions; ``None`` unless a student shares them.
    """

    output_BFD: Tensor
    hidden: dict[int, Tensor]
    features_BFC: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """All tensors, by a name for messages."""
        features = {} if self.features_BFC is None else {"convolutions": self.features_BFC}
        layers = {f"layer {layer}": hidden_BFD for layer, hidden_BFD in self.hidden.items()}
        return {**features, **layers, "output": self.output_BFD}


class Teacher(nn.Module, ABC):
    """A frozen speech encoder: (waveforms, lengths) -> hidden states.

    A subclass sets ``sample_rate``, ``num_layers``, ``hidden_size`` and ``init_args`` in ``__init__``
    (``normalize`` and ``front_end`` where the defaults are wrong), and writes ``num_frames`` and ``forward``,
    which returns the layers named by ``hidden_layers`` and ``output_layer``. It stays in eval mode even after
    ``train()``, and a call runs under ``torch.no_grad()``, because a loss cannot save tensors made under
    ``inference_mode`` for its backward pass. It may override ``prepare``, to compute differently on some device,
    ``share_front_end``, to return its features, ``settings``, if more settings determine the targets, and
    ``all_states``, if a probe should read more hidden states, and ``use_feed_forward`` and ``use_masks``, to give other
    targets.

    Attributes:
        sample_rate: sample rate of the waveforms, in Hz.
        num_layers: number of Transformer (or other) layers that can be targets.
        hidden_size: width D of the targets.
        normalize: whether the waveforms must pass :func:`normalize_waveforms` first; the caller does it.
        front_end: convolutions that a student can copy, ``None`` if there are none.
        init_args: plain values that rebuild the teacher.
        feed_forward: whether the targets are the outputs of feed-forward blocks instead of hidden states.
        takes_masks: whether ``forward`` takes masks of frames.
        gives_layer_0: whether layer 0, the input of the first layer, can be a target.
        layer_prefix: start of the names of the layers' weights. Layer k's, and no others, begin with it, k - 1 and a
            dot; ``None`` if not known.
        hidden_layers: chosen layers, ascending.
        precision_used: precision in which the targets are computed; set by :meth:`prepare`.
    """

    sample_rate: int
    num_layers: int
    hidden_size: int
    init_args: dict[str, Any]
    normalize: bool = False
    front_end: FrontEnd | None = None
    feed_forward: bool = False
    takes_masks: bool = False
    gives_layer_0: bool = False
    layer_prefix: str | None = None
    hidden_layers: tuple[int, ...] = ()
    precision_used: Precision = "32"
    _output_layer: int | None = None

    @property
    def output_layer(self) -> int:
        """Layer of the output target; the last one unless ``select_layers`` chose another."""
        return self.num_layers if self._output_layer is None else self._output_layer

    @abstractmethod
    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        """Number of frames (B,) int64 for ``num_samples_B`` samples; 0 where they are too few."""

    @abstractmethod
    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        """Targets for waveforms with ``num_samples_B`` valid samples per item; ``None`` if no item is padded."""

    def select_layers(self, hidden: Sequence[int], output: int | None = None) -> None:
        """Choose the layers that ``forward`` returns; a subclass may drop the layers above the highest one.

        Args:
            hidden: layers for the intermediate losses.
            output: layer of the output target, ``None`` for the last.

        Raises:
            InputError: the teacher does not have one of these layers.
        """
        if 0 in hidden and not self.gives_layer_0:
            raise InputError(
                f"{type(self).__name__} does not give layer 0, the input of its first layer, as a target: choose "
                f"model.objective.layers from 1 to {self.num_layers}"
            )
        for layer in [*(layer for layer in hidden if layer), *([] if output is None else [output])]:
            if not 1 <= layer <= self.num_layers:
                raise InputError(f"teacher layer {layer} is out of range: choose layers from 1 to {self.num_layers}")
        self.hidden_layers, self._output_layer = tuple(sorted(set(hidden))), output

    def all_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
        """Hidden states (B, F, D) for a probe: every layer's output, the last one's as it is in the output target.

        It replaces the choice of ``select_layers``. A subclass may put the input of the first layer in front.
        """
        self.select_layers(range(1, self.num_layers))
        targets = self(waveforms_BT, num_samples_B)
        return [*(targets.hidden[layer] for layer in self.hidden_layers), targets.output_BFD]

    @property
    def settings(self) -> dict[str, Any]:
        """Values besides weights and layers that determine the targets, by name. A cache of targets stores them."""
        # A setting that is not in older caches.
        targets = {"teacher.targets": "feed_forward"} if self.feed_forward else {}
        return {"teacher.normalize": self.normalize, "teacher.sample_rate": self.sample_rate, **targets}

    def use_feed_forward(self) -> None:
        """Make the outputs of the layers' feed-forward blocks, before the residual sum, the targets from now on.

        Raises:
            InputError: this teacher does not support it.
        """
        raise InputError(
            f"model.objective.targets=feed_forward, but {type(self).__name__} does not hand out the outputs of "
            "feed-forward blocks: set model.objective.targets=hidden"
        )

    def use_masks(self) -> None:
        """Take masks (B, F) from now on, as a third argument of ``forward``, which then runs the encoder twice.

        Targets are those of the whole input where the mask is true, and elsewhere those of the input in which the mask
        embedding replaces these frames.

        Raises:
            InputError: this teacher has no mask embedding, or one that was not trained.
        """
        raise InputError(
            f"model.objective.masked needs a teacher with a trained mask embedding ({MASK_EMBEDDING}), which this "
            f"{type(self).__name__} lacks: set model.objective.masked=none, or choose a teacher that was trained with "
            "masks, such as HuBERT"
        )

    def share_front_end(self) -> None:
        """Return the features of ``front_end`` with the targets from now on.

        Raises:
            InputError: this teacher does not support it.
        """
        raise InputError(
            f"model.student.front_end=shared, but {type(self).__name__} does not hand out the features of its "
            "convolutions: set model.student.front_end=frozen"
        )

    def prepare(self, device: torch.device) -> None:
        """Move to ``device`` and choose how to compute there. Training calls this before the first targets."""
        self.to(device)

    def spec(self) -> dict[str, Any]:
        """Plain ``class_path`` and ``init_args``, from which an equal teacher can be built."""
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": dict(self.init_args),
        }

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, because dropout, LayerDrop or masking would make the targets random."""
        return super().train(False)

    @torch.no_grad()
    def __call__(
        self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None, masked_BF: Tensor | None = None
    ) -> TeacherTargets:
        masks = () if masked_BF is None else (masked_BF,)  # a teacher without use_masks takes none
        return super().__call__(waveforms_BT, num_samples_B, *masks)


class EncoderTeacher(Teacher):
    """Base class of teachers with a Hugging Face encoder: precision, compilation, and dropping of unused layers.

    A subclass writes ``encoder`` and ``_targets``, which returns layer 0 and outputs of feed-forward blocks too, and
    compiles in ``forward``.

    Args: the same as those of :class:`HuggingFaceTeacher`.

    Raises:
        InputError: the precision is unknown.
    """

    gives_layer_0 = True
    feed_forward_output = "feed_forward"
    """Name in a layer of the module whose output is that of the feed-forward block."""

    def __init__(self, precision: Literal["auto", "32", "bf16"], compile: bool, compile_backend: str) -> None:
        super().__init__()
        if precision not in ("auto", "32", "bf16"):
            raise InputError(f"model.teacher.init_args.precision={precision!r}: choose auto, 32 or bf16")
        self._asked_precision: Literal["auto", "32", "bf16"] = precision
        self._backend = compile_backend if compile else None
        self._prepared_for: torch.device | None = None

    @property
    @abstractmethod
    def encoder(self) -> Any:
        """The module that holds ``layers``."""

    @abstractmethod
    def _targets(self, waveforms_BT: Tensor, num_samples_B: Tensor | None, precision: Precision) -> TeacherTargets:
        """The result of :meth:`forward`, computed in ``precision`` and returned in float32."""

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        return self._targets(waveforms_BT, num_samples_B, self.precision_used)

    def select_layers(self, hidden: Sequence[int], output: int | None = None) -> None:
        layers, highest = self.encoder.layers, max(*hidden, output or self.num_layers, 0)
        if len(layers) < highest <= self.num_layers:
            raise InputError(
                f"teacher layer {highest} was dropped when layer {len(layers)} became the highest target: "
                "build a new teacher"
            )
        super().select_layers(hidden, output)
        self.encoder.layers = layers[:highest]

    def use_feed_forward(self) -> None:
        if not all(hasattr(layer, self.feed_forward_output) for layer in self.encoder.layers):
            super().use_feed_forward()
        self.feed_forward = True

    def prepare(self, device: torch.device) -> None:
        super().prepare(device)
        if device == self._prepared_for:
            return
        self._prepared_for = device
        wanted, probe_BT = chosen_precision(self._asked_precision, device), noise().to(device)
        if wanted == "bf16" and not is_safe_in_bf16(lambda kind: self._targets(probe_BT, None, kind).named(), device):
            wanted = "32"
        self.precision_used = wanted


class HuggingFaceTeacher(EncoderTeacher):
    """A Hugging Face encoder with convolutions and Transformer layers.

    Known to work: HuBERT, wav2vec 2.0, WavLM, data2vec-audio and UniSpeech-SAT, of any size, with or without a head.

    Intermediate targets are the raw outputs of layers (``hidden_states[k]`` of the whole model). So is the
    output target, but encoders that end in a layer norm (``do_stable_layer_norm``) apply it to that target. For the
    last layer this gives ``last_hidden_state``. Layers above the highest target are dropped. ``final_norm`` is true for
    encoders that end in a layer norm.

    Args:
        model: hub name, or folder with ``config.json`` and weights (of the encoder, or of one with a head).
        normalize: whether waveforms get zero mean and unit variance; ``None`` follows the feature extractor.
        revision: branch, tag or commit on the hub.
        attn_implementation: ``sdpa``, ``eager``, ...; ``None`` lets Hugging Face choose.
        precision: ``32``, ``bf16`` or ``auto`` (bf16 on a GPU that supports it, float32 elsewhere). The trainer's
            precision does not apply to the teacher. Targets are returned in float32. :meth:`prepare` turns bf16 on,
            unless it would change targets by more than 2 %; then it warns and keeps float32.
        compile: compile convolutions, feature projection and each layer with ``torch.compile``; one graph serves all
            layers.
        compile_backend: backend of ``torch.compile``.
        kernels: implementation of the convolutions: ``plain``, ``channels_last`` or ``auto``, as for the student.

    Raises:
        InputError: the model cannot be found, lacks weights, or is not such an encoder.
    """

    layer_prefix = "model.encoder.layers."

    def __init__(
        self,
        model: str = "facebook/hubert-base-ls960",
        normalize: bool | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        precision: Literal["auto", "32", "bf16"] = "auto",
        compile: bool = False,
        compile_backend: str = "inductor",
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(precision, compile, compile_backend)
        self.init_args = dict(
            model=model,
            normalize=normalize,
            revision=revision,
            attn_implementation=attn_implementation,
            precision=precision,
            compile=compile,
            compile_backend=compile_backend,
            kernels=kernels,
        )
        self._shares_front_end = False
        config = load_config(model, revision)
        self.model = load_model(model, revision, attn_implementation)
        self.requires_grad_(False).eval()
        self.num_layers, self.hidden_size = len(self.model.encoder.layers), config.hidden_size
        self.final_norm = ends_in_layer_norm(self.model)
        self.front_end = copyable_front_end(self.model.feature_extractor, config)
        install(self.model.feature_extractor, kernels)
        instead = "`normalize` (16 kHz is assumed then), or "
        extractor = load_extractor(model, revision, required=normalize is None, instead=instead)
        self.sample_rate = getattr(extractor, "sampling_rate", 16000)
        self.normalize = resolve_normalize(model, normalize, extractor, config)

    @property
    def encoder(self) -> Any:
        return self.model.encoder

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return conv_frames(self.model.config, num_samples_B.to(torch.long))[-1]

    def all_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
        return encoder_states(self.model, waveforms_BT, num_samples_B)

    def share_front_end(self) -> None:
        if self.front_end is None:
            super().share_front_end()
        self._shares_front_end = True

    def use_masks(self) -> None:
        drawn = any(name.startswith(MASK_EMBEDDING) for name in self.model.drawn_weights)
        if drawn or getattr(self.model, MASK_EMBEDDING, None) is None:
            super().use_masks()
        self.model._mask_hidden_states = MethodType(mask_states, self.model)
        self.takes_masks = True

    def forward(
        self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None, masked_BF: Tensor | None = None
    ) -> TeacherTargets:
        if self._backend is not None:
            compile_in_place(compiled_parts(self.model, whole_layers=not self.feed_forward), self._backend)
        return self._targets(waveforms_BT, num_samples_B, self.precision_used, masked_BF)

    def _targets(
        self,
        waveforms_BT: Tensor,
        num_samples_B: Tensor | None,
        precision: Precision,
        masked_BF: Tensor | None = None,
    ) -> TeacherTargets:
        mask_BT = valid_samples(waveforms_BT, num_samples_B)
        with computing_in(precision, waveforms_BT.device):
            wanted = {*self.hidden_layers, self.output_layer}
            inside = self.feed_forward_output if self.feed_forward else None
            run = partial(run_tapped, self.model, waveforms_BT, mask_BT, wanted, inside)
            outputs, features_BCF, _ = run()
            if masked_BF is not None:
                outputs = mixture(masked_BF, outputs, run(masked_BF, features_BCF).outputs)
            output_BFD = outputs[self.output_layer]
            if self.final_norm and not self.feed_forward:
                output_BFD = self.model.encoder.layer_norm(output_BFD)
        hidden = {layer: outputs[layer].float() for layer in self.hidden_layers}
        features_BFC = features_BCF.float().transpose(1, 2) if self._shares_front_end else None
        return TeacherTargets(output_BFD.float(), hidden, features_BFC)


def normalize_waveforms(waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> Tensor:
    """Normalise to zero mean, unit variance over the valid samples, as ``Wav2Vec2FeatureExtractor``; padding is 0."""
    if num_samples_B is None:
        num_samples_B = torch.full((len(waveforms_BT),), waveforms_BT.shape[1])
    valid_BT = before_the_end(num_samples_B, waveforms_BT.shape[1], waveforms_BT.device)
    count_B1 = valid_BT.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = waveforms_BT.masked_fill(~valid_BT, 0).sum(1, keepdim=True) / count_B1
    centred_BT = (waveforms_BT - mean_B1).masked_fill(~valid_BT, 0)
    variance_B1 = centred_BT.square().sum(1, keepdim=True) / count_B1
    return centred_BT / (variance_B1 + 1e-7).sqrt()
