"""Loading an adapted model, as every command does that uses one."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from ..configuration_microclip import MicroCLIPConfig
from ..modeling_microclip import MicroCLIPForImageClassification


def load_adapted(source: str, **kwargs: Any) -> MicroCLIPForImageClassification:
    """An adapted model, in float32; a plain CLIP, which would get random heads, is refused.

    Args:
        source (`str`): a Hub id or a folder.
        kwargs: as in `from_pretrained`.

    Raises:
        OSError: if there is no model.
        ValueError: if it is of another kind.
    """
    model_type = PreTrainedConfig.get_config_dict(source, **kwargs)[0].get("model_type")
    if model_type != MicroCLIPConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {model_type!r}; pass a microCLIP, which brings its class names: one written "
            "by microclip adapt, or made by from_clip and saved."
        )
    return MicroCLIPForImageClassification.from_pretrained(source, **{"dtype": torch.float32, **kwargs})
