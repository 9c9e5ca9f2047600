"""Hugging Face encoders as teachers: configuration, weights and feature extractor, each known to be what it should."""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from datamodules.errors import InputError
from lightning_modules.damage import damage_of, naming_damage
from lightning_modules.front_end import CONV_FIELDS, feat_extract_norm

logger = logging.getLogger(__name__)

# fairseq trained this model on raw audio (task.normalize=false), whatever the extractor file on the hub says.
# Group norm hides most of a gain, not of quiet audio (outputs change by 0.06 % at scale 0.1, 42 % at 0.003).
RAW_AUDIO_MODELS = frozenset({"facebook/hubert-base-ls960"})
# Weights that a checkpoint may lack: they play no part in the hidden states of an encoder in eval mode.
UNUSED_WEIGHTS = ("masked_spec_embed", "adapter.")
ADVICE = "choose a speech encoder such as HuBERT, wav2vec 2.0, WavLM or data2vec-audio"
WHISPER = "whisper"
"""``model_type`` of the models that another class of teacher serves."""
EXTRACTOR_FILE = "preprocessor_config.json"
EXTRACTOR_FILES = (EXTRACTOR_FILE, "processor_config.json")  # either may hold the extractor


def read_config(model: str, revision: str | None) -> Any:
    """The model's configuration, of whatever kind it is."""
    with naming_damage(model):
        try:
            return AutoConfig.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as error:
            raise InputError(_not_found(model, error)) from error


def load_config(model: str, revision: str | None) -> Any:
    """The model's configuration, known to have convolutions over waveforms."""
    config = read_config(model, revision)
    if config.model_type == WHISPER:
        raise InputError(
            f"teacher model {model!r} is a Whisper model: set model.teacher=lightning_modules.whisper.WhisperTeacher"
        )
    if not all(hasattr(config, name) for name in CONV_FIELDS):
        raise InputError(f"teacher model {model!r} ({config.model_type}) has no convolutions over waveforms: {ADVICE}")
    return config


def _not_found(model: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    if Path(model).is_dir():
        return f"teacher folder {model!r} holds no Hugging Face model with config.json and weights: {reason}"
    return (
        f"teacher model {model!r} is neither a local folder nor downloadable (offline, or no such name): set "
        f"model.teacher.init_args.model to a folder that holds its config.json and model.safetensors ({reason})"
    )


def load_weights(
    model_class: Any, model: str, revision: str | None, attn_implementation: str | None, **kwargs: Any
) -> Any:
    """A ``model_class`` in float32, every weight of it read from the checkpoint; ``kwargs`` go to Hugging Face."""
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    # Loading draws numbers; a student's must not depend on them.
    with naming_damage(model), torch.random.fork_rng(devices=[]):
        try:
            loaded, info = model_class.from_pretrained(
                model, revision=revision, dtype=torch.float32, output_loading_info=True, **kwargs
            )
        except OSError as error:
            raise InputError(_not_found(model, error)) from error
    # Hugging Face draws missing weights at random and only logs it; such a teacher teaches noise.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(UNUSED_WEIGHTS))
    if missing:
        raise InputError(
            f"teacher model {model!r} lacks {len(missing)} weights of {type(loaded).__name__}, the first is "
            f"{missing[0]!r}: its config.json does not fit its weights"
        )
    return loaded


def load_model(model: str, revision: str | None, attn_implementation: str | None) -> Any:
    """The bare encoder of the wav2vec 2.0 kind."""
    encoder = load_weights(AutoModel, model, revision, attn_implementation)
    if not hasattr(encoder, "feature_extractor") or not hasattr(getattr(encoder, "encoder", None), "layers"):
        raise InputError(
            f"teacher {model!r} ({type(encoder).__name__}) has no feature_extractor or no encoder.layers: {ADVICE}"
        )
    if getattr(encoder, "adapter", None) is not None:
        encoder.adapter = None  # shortens the frames of last_hidden_state for a decoder; no layer's output
    return encoder


def load_extractor(model: str, revision: str | None, required: bool = True, instead: str = "") -> Any:
    """The model's feature extractor, ``None`` where it has none.

    Args:
        model: hub name or folder.
        revision: on the hub.
        required: whether what it says is needed; else one that cannot be read is a warning.
        instead: what could be set where it cannot be read, in words that end in "or ".

    Raises:
        ValueError: it has one that cannot be read, or nobody can tell: what it says must not be guessed then.
    """
    try:
        return AutoFeatureExtractor.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        if _has_no_extractor(model, revision):
            return None
        damage = next(filter(None, (damage_of(Path(model) / name) for name in EXTRACTOR_FILES)), None)
        reason = damage or str(error).strip().split("\n")[0]
        if not required:
            logger.warning("teacher %s: feature extractor not read, 16 kHz assumed (%s)", model, reason)
            return None
        raise InputError(
            f"the feature extractor of teacher {model!r} cannot be read, and it says how waveforms are sampled and "
            f"prepared: set {instead}`model` to a folder with a {EXTRACTOR_FILE} that can be read, or without one "
            f"({reason})"
        ) from error


def _has_no_extractor(model: str, revision: str | None) -> bool:
    if Path(model).is_dir():
        return not any((Path(model) / name).exists() for name in EXTRACTOR_FILES)
    # The hub's answer to the look-up above, which its cache keeps for when it cannot be reached.
    found = (try_to_load_from_cache(model, name, revision=revision) for name in EXTRACTOR_FILES)
    return all(answer is _CACHED_NO_EXIST for answer in found)


def resolve_normalize(model: str, normalize: bool | None, extractor: Any, config: Any) -> bool:
    """The setting; else what the model is known to need, what its extractor says, or its family's habit."""
    if normalize is not None:
        return normalize
    if model in RAW_AUDIO_MODELS:
        resolved, source = False, "it was trained on raw audio"
    elif hasattr(extractor, "do_normalize"):
        resolved, source = bool(extractor.do_normalize), "its preprocessor_config.json says so"
    else:
        # Released models saw normalised audio if their convolutions have layer norm, raw audio if group norm.
        norm = feat_extract_norm(config)
        resolved, source = norm == "layer", f"guessed from feat_extract_norm={norm!r}: no feature extractor"
    logger.info("teacher %s: normalize=%s (%s; set `normalize` to override)", model, resolved, source)
    if resolved and feat_extract_norm(config) == "group":
        logger.warning(
            "teacher %s: waveforms get normalised; if it is facebook/hubert-base-ls960, set normalize=false",
            model,
        )
    return resolved
