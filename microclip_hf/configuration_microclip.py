"""Configuration of microCLIP: the architecture alone; training settings live in `MicroCLIPTrainingArguments`."""

import math
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig


RESNET_ADVICE = (
    "is a CLIP with a ResNet, which has no patch tokens. Take a CLIP with a vision transformer, for example "
    "'openai/clip-vit-base-patch32'."
)


@strict
class MicroCLIPConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MicroCLIPForImageClassification`] (arXiv:2510.02270).

    Args:
        clip_config (`CLIPConfig` or `dict`, *optional*):
            The CLIP that is adapted, any ViT size. Defaults to ViT-B/32.
        saliency_affinity (`"dot"` or `"cosine"`, *optional*, defaults to `"dot"`):
            How two patches are compared: raw dot products as published, or cosines as in TokenCut.
        saliency_threshold (`float`, *optional*, defaults to 0.2):
            Two patches are connected if their affinity is above it.
        saliency_cut (`"std"` or `"mean"`, *optional*, defaults to `"std"`):
            A patch is salient if its entry of the eigenvector is above this statistic of all entries.
        fg_query (`"saliency"`, `"cls"`, `"mean"` or `"random"`, *optional*, defaults to `"saliency"`):
            The query of the [FG] token: mean of the salient patches, the [CLS] token, mean of all patches, one patch.
        fg_pooling (`"attention"`, `"masked_mean"` or `"mean"`, *optional*, defaults to `"attention"`):
            How patches become the [FG] token: attention to the query, mean of the salient patches, mean of all.
        fusion_ratio (`float`, *optional*, defaults to 0.5):
            Share of the [CLS] logits in the fused logits, in [0, 1]: lambda of the paper's TokenFusion (section 3.2).
        logit_scale (`float`, *optional*):
            What cosines are multiplied by to become logits. `None` takes the checkpoint's own `exp(logit_scale)`.
        prior_weighting (`"name"` or `"uniform"`, *optional*, defaults to `"name"`):
            Weights of a class's descriptions in the frozen head: similarity to the class name's prompt, or equal.
        keep_text_model (`bool`, *optional*, defaults to `False`):
            Keep and save CLIP's text tower, so that `set_classes` works after adaptation.

    Raises:
        ValueError: if `clip_config` isn't a ViT CLIP's or a number is out of its range.
    """

    model_type = "microclip"
    sub_configs = {"clip_config": CLIPConfig}
    keys_to_ignore_at_inference = ["cls_logits", "fg_logits", "cls_embeds", "fg_embeds"]

    clip_config: dict | CLIPConfig | None = None
    saliency_affinity: Literal["dot", "cosine"] = "dot"
    saliency_threshold: float | int = 0.2
    saliency_cut: Literal["std", "mean"] = "std"
    fg_query: Literal["saliency", "cls", "mean", "random"] = "saliency"
    fg_pooling: Literal["attention", "masked_mean", "mean"] = "attention"
    fusion_ratio: float | int = 0.5
    logit_scale: float | int | None = None
    prior_weighting: Literal["name", "uniform"] = "name"
    keep_text_model: bool = False
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = (
        "single_label_classification"
    )

    def __post_init__(self, **kwargs: Any) -> None:
        if self.clip_config is None or isinstance(self.clip_config, dict):
            clip_config = self.clip_config or {}
            _check_vit_clip(clip_config)
            self.clip_config = CLIPConfig(**clip_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Range checks, run by `@strict` at construction and at saving."""
        if not 0 <= self.fusion_ratio <= 1:
            raise ValueError(f"fusion_ratio is {self.fusion_ratio}; it must lie in [0, 1] (1 = [CLS] alone).")
        if self.logit_scale is not None and not 0 < self.logit_scale < math.inf:
            raise ValueError(
                f"logit_scale is {self.logit_scale}; it must be a positive number, or None for the checkpoint's own."
            )
        if not math.isfinite(self.saliency_threshold):
            raise ValueError(f"saliency_threshold is {self.saliency_threshold}; it must be a finite number.")

    @classmethod
    def architecture_names(cls) -> list[str]:
        """Names of the settings that are microCLIP's own."""
        shared = {field.name for field in fields(PreTrainedConfig)}
        return [field.name for field in fields(cls) if field.name not in shared | {"clip_config"}]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in the base class, with a plain CLIP configuration wrapped."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if "model_type" not in config_dict:
            raise ValueError(
                "There is no config.json with a 'model_type', as transformers writes it. Pass a CLIP or microCLIP "
                "checkpoint in transformers' format."
            )
        return _wrap_clip(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MicroCLIPConfig":
        """As in the base class; the dictionary of a plain CLIP becomes `clip_config`.

        Raises:
            ValueError: if the dictionary belongs to another kind of model.
        """
        return super().from_dict(_wrap_clip(config_dict), **kwargs)


def _wrap_clip(config_dict: dict[str, Any]) -> dict[str, Any]:
    model_type = config_dict.get("model_type", MicroCLIPConfig.model_type)
    if model_type == MicroCLIPConfig.model_type:
        return config_dict
    _check_vit_clip(config_dict)
    return {
        "clip_config": config_dict,
        "model_type": MicroCLIPConfig.model_type,
        "dtype": config_dict.get("dtype", config_dict.get("torch_dtype")),
    }


def _check_vit_clip(config_dict: dict[str, Any]) -> None:
    model_type = config_dict.get("model_type", CLIPConfig.model_type)
    if model_type != CLIPConfig.model_type:
        raise ValueError(
            f"This is a checkpoint of model type {model_type!r}, and microCLIP adapts CLIP. Pass one that loads as "
            "transformers' CLIPModel with both towers (OpenAI, LAION and MetaCLIP conversions do), for example "
            "'openai/clip-vit-base-patch32'."
        )
    vision = config_dict.get("vision_config") or {}
    if not isinstance(vision, dict):
        vision = vision.to_dict()
    if isinstance(vision.get("layers"), list) or isinstance(vision.get("num_hidden_layers"), list):
        raise ValueError(f"This configuration, whose vision layers are a list, {RESNET_ADVICE}")
