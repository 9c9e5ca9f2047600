"""Models that a student can be: ``HubertModel``, ``CompactHubertModel`` or a subclass of one's own.

A student's model is a Hugging Face model of HuBERT's layout: ``feature_extractor``, ``feature_projection`` and
``encoder``, whose ``layers`` grow. What its layers are, and how frames pass through them, is its own matter:

* Every layer is called as ``layer(hidden_BFD, attention_mask=mask)`` and returns (B, F, D).
* A model whose layers are called in another way has ``encoder.layer_states(hidden_BFD, valid_BF, branch)``, which
  returns the state of each layer at the frame rate of the convolutions, as :class:`CompactHubertModel` has.
* ``layer_group`` (default 1) is the number of layers that stay together when the model grows.
* Its ``forward`` is the one of ``HubertModel``, so that an exported folder can be scored and deployed.
"""

from typing import Any, cast

from transformers import HubertConfig, HubertModel

from datamodules.errors import InputError
from lightning_modules.compact_hubert import CompactHubertModel
from lightning_modules.lookup import find_named

HUBERT, COMPACT = "hubert", "compact_hubert"
ARCHITECTURES: dict[str, type[HubertModel]] = {HUBERT: HubertModel, COMPACT: CompactHubertModel}


def find_architecture(name: str) -> type[HubertModel]:
    """The model class with this name, or at this dotted path (``my_module.MyModel``).

    Raises:
        InputError: there is no such class, or it is not a ``HubertModel``.
    """
    own = "a subclass of transformers.HubertModel, my_module.MyModel"
    found = find_named(name, ARCHITECTURES, "model.student.architecture", own)
    if not (isinstance(found, type) and issubclass(found, HubertModel)):
        raise InputError(f"model.student.architecture={name} is not {own}")
    return found


def config_class(name: str) -> type[HubertConfig]:
    """The class of a model's configuration."""
    return cast(type[HubertConfig], find_architecture(name).config_class)


def build_model(config: dict[str, Any], architecture: str | None = None) -> HubertModel:
    """Build the model of a configuration in plain values; its ``model_type`` names the class if no path is given."""
    name = architecture or config.get("model_type", HUBERT)
    return find_architecture(name)(config_class(name).from_dict(config))
