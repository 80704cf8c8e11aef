"""Open_clip's settings of a model and of photos -> transformers' configuration and image processor.

What transformers' CLIP has no place for is refused by name.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from PIL.Image import Resampling
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..configuration_microclip import RESNET_ADVICE


ADVICE = (
    "Take a CLIP with a ViT of its own and CLIP's text tower, for example 'imageomics/bioclip' or "
    "'laion/CLIP-ViT-B-16-laion2B-s34B-b88K'."
)
METACLIP_2_ADVICE = (
    "Of MetaCLIP 2 take transformers' own format, for example 'facebook/metaclip-2-worldwide-huge-quickgelu'."
)
SIGLIP = "is a SigLIP"
COCA = "is a CoCa"
TIMM_TOWER = "has a timm tower"
ATTENTIONAL_POOL = "has an attentional pool"
LAYER_SCALE = "has layer scale"
OTHER_TEXT_TOWER = "has another text tower than CLIP's"
# What open_clip takes where a configuration is silent.
VISION_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT_DEFAULTS = {
    **{"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0},
    **{"context_length": 77, "vocab_size": 49408},
}
# Settings that change nothing of what is computed here, or that are read where they are needed.
HARMLESS = {
    *("norm_kwargs", "hf_tokenizer_name", "patch_dropout", "pos_embed_type", "output_tokens", "pad_id", "eos_id"),
    *("attn_pooler_queries", "attn_pooler_heads", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
}
# Values that ask for nothing that CLIP hasn't: of any setting, and of single ones.
NEUTRAL = (None, False, {}, "default")
TANH = {"approximate": "tanh"}
VISION_NEUTRAL = {"pool_type": "tok", "act_kwargs": TANH}
TEXT_NEUTRAL = {"pool_type": "argmax", "proj_type": "linear", "act_kwargs": TANH}
FOREIGN_SETTINGS = {
    "timm_model_name": TIMM_TOWER,
    "attentional_pool": ATTENTIONAL_POOL,
    "ls_init_value": LAYER_SCALE,
    "embed_cls": COCA,
    "hf_model_name": OTHER_TEXT_TOWER,
}


def check_settings(source: str, settings: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> None:
    """Refuse what `CLIPModel` or `CLIPImageProcessor` can't do; `source` is for the error."""
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in settings]
    if missing:
        raise ValueError(f"{source} isn't configured as an open_clip model: it lacks {', '.join(missing)}. {ADVICE}")
    if isinstance(settings["vision_cfg"].get("layers"), list):
        raise ValueError(f"{source} {RESNET_ADVICE}")
    if settings.get("multimodal_cfg"):
        raise foreign_error(source, COCA)
    if settings.get("init_logit_bias") is not None:
        raise foreign_error(source, SIGLIP)
    _check_tower(source, settings["vision_cfg"], VISION_DEFAULTS, VISION_NEUTRAL)
    _check_tower(source, settings["text_cfg"], TEXT_DEFAULTS, TEXT_NEUTRAL)
    resize_mode = preprocessing.get("resize_mode")
    if resize_mode not in (None, "shortest", "squash"):
        raise ValueError(
            f"{source} prepares photos with resize_mode {resize_mode!r}, which leaves margins, and CLIP's image "
            "processor doesn't. Take a checkpoint with 'shortest' or 'squash'."
        )


def _check_tower(source: str, tower: Mapping[str, Any], known: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    for name, value in tower.items():
        if name in known or name in HARMLESS or value in (*NEUTRAL, neutral.get(name)):
            continue
        what = FOREIGN_SETTINGS.get(name, "has a setting that CLIP hasn't")
        # So MetaCLIP 2 pools its texts.
        advice = METACLIP_2_ADVICE if (name, value) == ("pool_type", "eos") else ADVICE
        raise foreign_error(source, f"{what} ({name} {value!r})", advice)


def foreign_error(source: str, what: str, advice: str = ADVICE) -> ValueError:
    """The error about another kind of model; `what` says what it has or is."""
    return ValueError(f"{source} {what}, for which transformers' CLIPModel has no place. {advice}")


def make_config(source: str, settings: Mapping[str, Any]) -> CLIPConfig:
    """Transformers' configuration; the vocabulary's last token ends a text, as in CLIP's."""
    vision = {**VISION_DEFAULTS, **settings["vision_cfg"]}
    text = {**TEXT_DEFAULTS, **settings["text_cfg"]}
    end = text["vocab_size"] - 1
    return CLIPConfig(
        vision_config={
            **_tower_config(settings, vision, vision["width"] // vision["head_width"]),
            **{name: _side(source, name, vision[name]) for name in ("image_size", "patch_size")},
        },
        text_config={
            **_tower_config(settings, text, text["heads"]),
            **{"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]},
            **{"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end},
        },
        projection_dim=settings["embed_dim"],
    )


def _tower_config(settings: Mapping[str, Any], tower: Mapping[str, Any], heads: int) -> dict[str, Any]:
    gelu = "gelu_pytorch_tanh" if tower.get("act_kwargs") == TANH else "gelu"
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if settings.get("quick_gelu") else gelu,
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
        "projection_dim": settings["embed_dim"],
    }


def _side(source: str, name: str, value: int | list[int]) -> int:
    """Of a square; anything else is an error."""
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) > 1:
        raise ValueError(f"{source} has the {name} {value}, and CLIPModel takes squares. {ADVICE}")
    return sides.pop()


def make_image_processor(preprocessing: Mapping[str, Any], side: int) -> CLIPImageProcessorPil:
    """Resizes a photo's shorter side and cuts out the middle, or squashes the photo; OpenAI's colours by default."""
    square = {"height": side, "width": side}
    squash = preprocessing.get("resize_mode") == "squash"
    bilinear = preprocessing.get("interpolation") == "bilinear"
    colors = {}
    for name in ("mean", "std"):
        value = preprocessing.get(name)
        if value is not None:
            colors[f"image_{name}"] = value if isinstance(value, list) else [value] * 3
    return CLIPImageProcessorPil(
        size=square if squash else {"shortest_edge": side},
        do_center_crop=not squash,
        crop_size=square,
        resample=Resampling.BILINEAR if bilinear else Resampling.BICUBIC,
        **colors,
    )


def infer_settings(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """A model's settings from the shapes of its weights, by open_clip's names.

    The number of heads leaves no trace in them. It is taken to be as in open_clip's models: heads are 64 wide, and in
    vision towers wider where there would be more than 16.
    """
    width, patch_size = shapes["visual.conv1.weight"][0], shapes["visual.conv1.weight"][-1]
    context_length, text_width = shapes["positional_embedding"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    vision = {
        **_infer_tower(shapes, "visual.", width),
        "head_width": width // min(max(1, width // 64), 16),
        "patch_size": patch_size,
        "image_size": grid * patch_size,
    }
    text = {
        **_infer_tower(shapes, "", text_width),
        "heads": max(1, text_width // 64),
        "context_length": context_length,
        "vocab_size": shapes["token_embedding.weight"][0],
    }
    return {"embed_dim": shapes["visual.proj"][1], "vision_cfg": vision, "text_cfg": text}


def _infer_tower(shapes: Mapping[str, torch.Size], prefix: str, width: int) -> dict[str, Any]:
    blocks = f"{prefix}transformer.resblocks."
    return {
        "layers": sum(name.startswith(blocks) and name.endswith(".ln_1.weight") for name in shapes),
        "width": width,
        "mlp_ratio": Fraction(shapes[f"{blocks}0.mlp.c_fc.weight"][0], width),  # times the width a whole number
    }
