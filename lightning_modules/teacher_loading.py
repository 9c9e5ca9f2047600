"""Loading of Hugging Face encoders as teachers, with checks of configuration, weights and feature extractor."""

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

# fairseq trained this model on raw audio (task.normalize=false), though the extractor file on the hub differs.
# Group norm cancels a gain except for quiet audio (outputs change by 0.06 % at scale 0.1, 42 % at 0.003).
RAW_AUDIO_MODELS = frozenset({"facebook/hubert-base-ls960"})
MASK_EMBEDDING = "masked_spec_embed"
# Weights that a checkpoint may lack, since the hidden states of an encoder in eval mode do not depend on them.
UNUSED_WEIGHTS = (MASK_EMBEDDING, "adapter.")
ADVICE = "choose a speech encoder such as HuBERT, wav2vec 2.0, WavLM or data2vec-audio"
WHISPER = "whisper"
"""``model_type`` of Whisper models, for which there is a separate teacher class."""
EXTRACTOR_FILE = "preprocessor_config.json"
EXTRACTOR_FILES = (EXTRACTOR_FILE, "processor_config.json")  # either may hold the extractor


def read_config(model: str, revision: str | None) -> Any:
    """Read the configuration of a model of any kind."""
    with naming_damage(model):
        try:
            return AutoConfig.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as error:
            raise InputError(_not_found(model, error)) from error


def load_config(model: str, revision: str | None) -> Any:
    """Read the configuration of a model, and refuse one without convolutions over waveforms."""
    config = read_config(model, revision)
    if config.model_type == WHISPER:
        raise InputError(
            f"teacher model {model!r} is a Whisper model: set model.teacher=lightning_modules.whisper.WhisperTeacher"
        )
    if config.model_type == "compact_hubert":
        raise InputError(f"teacher model {model!r} is a compact student, which cannot be a teacher: {ADVICE}")
    if not all(hasattr(config, name) for name in CONV_FIELDS):
        raise InputError(f"teacher model {model!r} ({config.model_type}) has no convolutions over waveforms: {ADVICE}")
    return config


def _not_found(model: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    if Path(model).is_dir():
        return f"the folder {model!r} holds no Hugging Face model with config.json and weights: {reason}"
    return (
        f"the model {model!r} is neither a local folder nor downloadable (offline, or no such name): give a folder "
        f"that holds its config.json and model.safetensors ({reason})"
    )


def load_weights(
    model_class: Any, model: str, revision: str | None, attn_implementation: str | None, **kwargs: Any
) -> Any:
    """Load a ``model_class`` in float32 with every weight from the checkpoint; Hugging Face receives ``kwargs``.

    ``drawn_weights`` of the result are the names of unused weights that the checkpoint lacks.
    """
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    # Loading draws random numbers, which must not change the student's.
    with naming_damage(model), torch.random.fork_rng(devices=[]):
        try:
            loaded, info = model_class.from_pretrained(
                model, revision=revision, dtype=torch.float32, output_loading_info=True, **kwargs
            )
        except OSError as error:
            raise InputError(_not_found(model, error)) from error
    # Hugging Face draws missing weights at random and only logs it; such a teacher's targets are noise.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(UNUSED_WEIGHTS))
    if missing:
        raise InputError(
            f"teacher model {model!r} lacks {len(missing)} weights of {type(loaded).__name__}, the first is "
            f"{missing[0]!r}: its config.json does not fit its weights"
        )
    loaded.drawn_weights = tuple(info["missing_keys"])
    return loaded


def load_model(model: str, revision: str | None, attn_implementation: str | None) -> Any:
    """Load an encoder of the wav2vec 2.0 kind without its head."""
    encoder = load_weights(AutoModel, model, revision, attn_implementation)
    if not hasattr(encoder, "feature_extractor") or not hasattr(getattr(encoder, "encoder", None), "layers"):
        raise InputError(
            f"teacher {model!r} ({type(encoder).__name__}) has no feature_extractor or no encoder.layers: {ADVICE}"
        )
    if getattr(encoder, "adapter", None) is not None:
        encoder.adapter = None  # shortens last_hidden_state for a decoder, but no layer's output
    return encoder


def load_extractor(model: str, revision: str | None, required: bool = True, instead: str = "") -> Any:
    """Load the model's feature extractor; ``None`` if it has none.

    Args:
        model: hub name or folder.
        revision: branch, tag or commit on the hub.
        required: whether an extractor that cannot be read is an error; else it is a warning.
        instead: option to set when it cannot be read, for the message; text that ends in "or ".

    Raises:
        InputError: the extractor cannot be read, or it is unknown whether there is one. Its values are not guessed.
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
            f"the feature extractor of teacher {model!r} cannot be read, and it defines how waveforms are sampled and "
            f"prepared: set {instead}`model` to a folder with a {EXTRACTOR_FILE} that can be read, or without one "
            f"({reason})"
        ) from error


def _has_no_extractor(model: str, revision: str | None) -> bool:
    if Path(model).is_dir():
        return not any((Path(model) / name).exists() for name in EXTRACTOR_FILES)
    # The hub library caches the answer to the look-up above, so it is known even when the hub cannot be reached.
    found = (try_to_load_from_cache(model, name, revision=revision) for name in EXTRACTOR_FILES)
    return all(answer is _CACHED_NO_EXIST for answer in found)


def resolve_normalize(model: str, normalize: bool | None, extractor: Any, config: Any) -> bool:
    """``normalize`` if set; else from the list of known models, the feature extractor, or the model's kind of norm."""
    if normalize is not None:
        return normalize
    if model in RAW_AUDIO_MODELS:
        resolved, source = False, "it was trained on raw audio"
    elif hasattr(extractor, "do_normalize"):
        resolved, source = bool(extractor.do_normalize), "its preprocessor_config.json says so"
    else:
        # Released models were trained on normalised audio if their convolutions have layer norm, else on raw audio.
        norm = feat_extract_norm(config)
        resolved, source = norm == "layer", f"guessed from feat_extract_norm={norm!r}: no feature extractor"
    logger.info("teacher %s: normalize=%s (%s; set `normalize` to override)", model, resolved, source)
    if resolved and feat_extract_norm(config) == "group":
        logger.warning(
            "teacher %s: waveforms get normalised; if it is facebook/hubert-base-ls960, set normalize=false",
            model,
        )
    return resolved
