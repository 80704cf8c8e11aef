"""What FSDP and DeepSpeed, which split a model over processes, have to know of it."""

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from ..modeling_microclip import MicroCLIPForImageClassification


def splits_models(accelerator: Accelerator) -> bool:
    """Whether all processes must take part in each forward."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_splittable(model: MicroCLIPForImageClassification) -> None:
    """Have the logit scale, a number that these can't split, kept whole: it's frozen, and a buffer is saved alike."""
    scale = model.clip.logit_scale.detach()
    del model.clip.logit_scale
    model.clip.register_buffer("logit_scale", scale)


def serve_encoders(model: torch.nn.Module) -> None:
    """Have a model that FSDP2 splits gather its weights for the encoders too; by itself it does so for `forward`."""
    if not isinstance(model, FSDPModule):
        return
    for name in ("encode_image", "coarse_embeds"):
        register_fsdp_forward_method(model, name)
    # save_pretrained copies the code of the model's class, which now is one that FSDP2 made of ours.
    sharded_class = type(model)
    original_class = sharded_class.__bases__[-1]
    sharded_class.__module__ = original_class.__module__
    sharded_class.__name__ = original_class.__name__


def release_whole_weights(model: torch.nn.Module) -> None:
    """Have a model that FSDP2 splits hold its parts again: after an encoder some weights are still whole, and what is
    written to those is lost.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
