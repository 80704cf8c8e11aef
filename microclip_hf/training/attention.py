"""In which precision the student's attention is computed."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Trainer


class WholeAttention(TorchFunctionMode):
    """Scaled dot-product attention is computed in float32, autocast or not, and returned in its input's precision."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, *others = args
        with torch.autocast(query.device.type, enabled=False):
            return function(query.float(), key.float(), value.float(), *others, **kwargs).to(query.dtype)


def student_attention(trainer: Trainer) -> contextlib.AbstractContextManager:
    """For a forward that is trained: [`WholeAttention`] on a CPU in bfloat16, where PyTorch's backward pass is many
    times as slow as in float32. Nothing elsewhere, nor for a model that is compiled, split, or computes layers again.
    """
    args = trainer.args
    is_slow = args.bf16 and args.device.type == "cpu"
    is_whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.torch_compile)
    layers = trainer.model.clip.vision_model.encoder.layers
    is_plain = is_whole and not any(layer.gradient_checkpointing for layer in layers)
    return WholeAttention() if is_slow and is_plain else contextlib.nullcontext()
