"""A file of weights by open_clip's names -> weights by the names of transformers' `CLIPModel`."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint

from ..configuration_microclip import RESNET_ADVICE, abbreviate, naming_damaged_file
from .settings import (
    ADVICE,
    ATTENTIONAL_POOL,
    COCA,
    LAYER_SCALE,
    OTHER_TEXT_TOWER,
    SIGLIP,
    TIMM_TOWER,
    foreign_error,
)


# What patterns of names stand for.
FOREIGN_WEIGHTS = {
    r"logit_bias$": SIGLIP,
    r"text_decoder\.": COCA,
    r"visual\.attn_pool\.": ATTENTIONAL_POOL,
    r"visual\.trunk\.": TIMM_TOWER,
    r".*\.ls_[12]\.gamma$": LAYER_SCALE,
    r"transformer\.(embeddings|encoder)\.": OTHER_TEXT_TOWER,
}
# How names begin in open_clip and in transformers; the first that fits counts.
RENAMED = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection.": "text_projection.",
    "text_projection": "text_projection.weight",
}
RENAMED_IN_LAYERS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
TRANSPOSED = ("visual.proj", "text_projection")  # features are multiplied by these from the right
NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def load_weights(file: Path, source: str) -> dict[str, torch.Tensor]:
    """A CLIP's weights by open_clip's names, mapped from the file rather than read; errors speak of `source`.

    Of a training's checkpoint those alone; the prefixes of data parallelism and of `CustomTextCLIP` are left out.

    Raises:
        ValueError: if the file is damaged or holds code, or the weights are another kind of model's.
    """
    content = _read_file(file)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    weights = {
        re.sub(r"^(module\.)?(text\.)?", "", name): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    if any(re.match(r"(clip\.)?(vision|text)_model\.", name) for name in weights):
        raise ValueError(f"{file} holds weights in transformers' format; pass the folder that it lies in.")
    if any(name.startswith("visual.layer1.") for name in weights):
        raise ValueError(f"{source} {RESNET_ADVICE}")
    for pattern, what in FOREIGN_WEIGHTS.items():
        if any(re.match(pattern, name) for name in weights):
            raise foreign_error(source, what)
    if not all(f"{tower}transformer.resblocks.0.ln_1.weight" in weights for tower in ("visual.", "")):
        raise ValueError(f"{file} doesn't hold a CLIP's weights by open_clip's names. {ADVICE}")
    return weights


def rename_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by transformers' names, as copies. The dictionary is emptied, so that nothing is there twice."""
    renamed = {}
    for name in list(weights):
        weight = weights.pop(name)
        if name in NO_WEIGHTS:
            continue
        if name in TRANSPOSED:
            weight = weight.T
        if name == "logit_scale":
            weight = weight.reshape(())
        name = _rename(name)
        parts = {name: weight}
        if ".in_proj_" in name:  # of queries, keys and values, one below the other
            cut = zip("qkv", weight.chunk(3), strict=True)
            parts = {name.replace("in_proj_", f"{part}_proj."): rows for part, rows in cut}
        renamed |= {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    return renamed


def _rename(name: str) -> str:
    begin = next(filter(name.startswith, RENAMED), None)
    name = name if begin is None else RENAMED[begin] + name.removeprefix(begin)
    for old, new in RENAMED_IN_LAYERS.items() if ".layers." in name else ():
        name = name.replace(old, new)
    return name


def _read_file(file: Path) -> Any:
    """What a file holds, without running code of its own."""
    try:
        with naming_damaged_file(file.parent, (file.name,), {}):
            if file.suffix == ".safetensors":
                return load_file(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        code = _describe_code(file)
        if code:
            raise ValueError(f"{file} {code}") from error
        raise


def _describe_code(file: Path) -> str | None:
    """What there is besides weights in a pickle that is whole; `None` where nothing is found."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return (
                "is a TorchScript program, as OpenAI's files are, and no file's program is run. Of OpenAI's CLIPs "
                "take transformers' format, for example 'openai/clip-vit-base-patch32'."
            )
    names = abbreviate(get_unsafe_globals_in_checkpoint(file))
    return names and (
        f"holds more than weights, {names}, which could do anything while it is loaded, so it isn't. Ask for the "
        "weights as .safetensors, or save them alone where you trust the file."
    )
