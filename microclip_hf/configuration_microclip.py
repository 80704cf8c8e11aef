"""Configuration of microCLIP, the architecture alone; and the files, weights and image processor of a checkpoint."""

import contextlib
import difflib
import json
import math
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPConfig,
    MetaClip2Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


# By model_type. Their models have the same towers, whose modules have the same names.
CLIP_CONFIGS = {kind.model_type: kind for kind in (CLIPConfig, MetaClip2Config)}
# Why models that are used like CLIPs can't be adapted, by the first word of their model_type.
OTHER_TOWERS = {
    "siglip": "SigLIP has no [CLS] token",
    "siglip2": "SigLIP 2 has no [CLS] token",
    "tipsv2": "TIPSv2 has a DINOv2 for its vision tower",
}
RESNET_ADVICE = (
    "is a CLIP with a ResNet, which has no patch tokens. Take a CLIP with a vision transformer, for example "
    "'openai/clip-vit-base-patch32'."
)

# The files of a checkpoint, by what is read from them.
CONFIG_FILES = ("config.json",)
WEIGHTS_FILES = (
    *("model*.safetensors", "model*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("sentencepiece.bpe.model", "spiece.model"),  # of MetaCLIP 2, whose vocabularies are XLM-V's and mT5's
)
# Keywords that say which files of the Hub, and how they are loaded.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
HUB_PREFIX = "hf-hub:"  # as open_clip marks ids of the Hub
PICKLES = (".bin", ".pt", ".pth")
LFS_POINTER = b"version https://git-lfs"


@strict
class MicroCLIPConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MicroCLIPForImageClassification`] (arXiv:2510.02270): the architecture, not the training.

    Args:
        clip_config (`CLIPConfig`, `MetaClip2Config` or `dict`, *optional*): the CLIP that is adapted, any ViT size.
            Defaults to ViT-B/32.
        saliency_affinity (`"dot"` or `"cosine"`, *optional*, defaults to `"dot"`): how two patches are compared, raw
            dot products as published, or cosines as in TokenCut.
        saliency_threshold (`float`, *optional*, defaults to 0.2): two patches are connected if their affinity is more.
        saliency_cut (`"std"` or `"mean"`, *optional*, defaults to `"std"`): a patch is salient if its entry of the
            eigenvector is above this statistic of all entries.
        fg_query (`"saliency"`, `"cls"`, `"mean"` or `"random"`, *optional*, defaults to `"saliency"`): the query of
            the [FG] token, mean of the salient patches, the [CLS] token, mean of all patches, one patch.
        fg_pooling (`"attention"`, `"masked_mean"` or `"mean"`, *optional*, defaults to `"attention"`): how patches
            become the [FG] token, attention to the query, mean of the salient patches, mean of all.
        fusion_ratio (`float`, *optional*, defaults to 0.5): lambda of section 3.2 in [0, 1], share of [CLS] logits.
        logit_scale (`float`, *optional*): factor of cosines. Defaults to the checkpoint's own `exp(logit_scale)`.
        prior_weighting (`"name"` or `"uniform"`, *optional*, defaults to `"name"`): weights of a class's descriptions
            in the frozen head, similarity to the class name's prompt, or equal.
        keep_text_model (`bool`, *optional*, defaults to `False`): keep and save CLIP's text tower for `set_classes`.

    Raises:
        ValueError: if `clip_config` isn't a ViT CLIP's or a number is out of its range.
    """

    model_type = "microclip"
    sub_configs = {"clip_config": AutoConfig}
    keys_to_ignore_at_inference = ["cls_logits", "fg_logits", "cls_embeds", "fg_embeds"]

    clip_config: dict | CLIPConfig | MetaClip2Config | None = None
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
            self.clip_config = CLIP_CONFIGS[_model_type(clip_config)](**clip_config)
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

    @property
    def class_names(self) -> list[str]:
        """The classes in the order of their indices, which is that of the logits; `id2label` may be in another."""
        return [self.id2label[index] for index in range(self.num_labels)]

    @classmethod
    def architecture_names(cls) -> list[str]:
        """Names of the settings that are microCLIP's own."""
        others = {"clip_config", *(field.name for field in fields(PreTrainedConfig))}
        return [field.name for field in fields(cls) if field.name not in others]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in the base class, with a plain CLIP configuration wrapped."""
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with naming_damaged_file(source, CONFIG_FILES, kwargs):
            config_dict, kwargs = super().get_config_dict(*args, **kwargs)
            if "model_type" not in config_dict:
                raise ValueError(
                    "There is no config.json with a 'model_type', as transformers writes it. Pass a CLIP or microCLIP "
                    "checkpoint in transformers' format, or a CLIP in open_clip's."
                )
        return _wrap_clip(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MicroCLIPConfig":
        """As in the base class; a plain CLIP's dictionary becomes `clip_config`, any other model's is an error."""
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


def _model_type(config_dict: dict[str, Any]) -> str:
    return str(config_dict.get("model_type", CLIPConfig.model_type))


def _check_vit_clip(config_dict: dict[str, Any]) -> None:
    model_type = _model_type(config_dict)
    if model_type not in CLIP_CONFIGS:
        family = model_type.split("_")[0]
        reason = f"; {OTHER_TOWERS[family]}" if family in OTHER_TOWERS else ""
        raise ValueError(
            f"This is a checkpoint of model type {model_type!r}, and microCLIP adapts CLIP{reason}. Pass one that "
            "loads as transformers' CLIPModel or MetaClip2Model with both towers (OpenAI, LAION and MetaCLIP "
            "conversions do), for example 'openai/clip-vit-base-patch32', or 'facebook/metaclip-2-worldwide-b32', "
            "which reads many languages."
        )
    vision = config_dict.get("vision_config") or {}
    if not isinstance(vision, dict):
        vision = vision.to_dict()
    if isinstance(vision.get("layers"), list) or isinstance(vision.get("num_hidden_layers"), list):
        raise ValueError(f"This configuration, whose vision layers are a list, {RESNET_ADVICE}")


def abbreviate(names: Sequence[str]) -> str:
    """The first names of a list, quoted, for an error's text."""
    return ", ".join([*map(repr, names[:5]), *(["..."] if len(names) > 5 else [])])


@contextlib.contextmanager
def naming_damaged_file(
    source: str | os.PathLike | None, patterns: Sequence[str], hub_kwargs: dict[str, Any]
) -> Iterator[None]:
    """While `patterns` of a checkpoint's files are read: if that fails and one is damaged, the error says which."""
    hub_kwargs = dict(hub_kwargs)  # what reads the checkpoint may take from it
    try:
        yield
    except Exception as error:
        for file in checkpoint_files(source, patterns, hub_kwargs):
            damage = _describe_damage(file)
            if damage:
                raise ValueError(
                    f"{file} {damage}. Download it again (with 'git lfs pull' in a Git clone), or save it again."
                ) from error
        raise


def checkpoint_files(
    source: str | os.PathLike | None, patterns: Sequence[str], hub_kwargs: dict[str, Any]
) -> list[Path]:
    """The files of a checkpoint that are on this machine; without those of weights that safetensors supersede."""
    if source is None:
        return []
    subfolder = hub_kwargs.get("subfolder") or ""
    folder = Path(source, subfolder)
    if not os.path.isdir(source):
        config = f"{subfolder}/config.json".lstrip("/")
        cache = {name: hub_kwargs.get(name) for name in ("cache_dir", "revision")}
        with contextlib.suppress(ValueError):  # of what is no Hub id
            cached = try_to_load_from_cache(os.fspath(source), config, **cache)
            folder = Path(cached).parent if isinstance(cached, str) else folder
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    has_safetensors = any(file.suffix == ".safetensors" for file in files)
    return [file for file in files if not has_safetensors or ".bin" not in file.suffixes]


def _describe_damage(file: Path) -> str | None:
    with open(file, "rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        return "is empty"
    if start == LFS_POINTER:
        return "is a Git LFS pointer, which stands for a file that wasn't downloaded"
    if start.lstrip().startswith(b"<"):
        return "is a web page"
    if file.suffix == ".json":
        return _describe_json_damage(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return None
        except SafetensorError as error:
            return f"is damaged, for example an incomplete download ({error})"
    if file.suffix in PICKLES:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception:  # whose text advises to run what is in the file
            return "is damaged, for example an incomplete download, or holds more than weights"
    return None


def _describe_json_damage(file: Path) -> str | None:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        return f"isn't JSON, for example an incomplete download ({error})"
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__} where a JSON object is expected"
    if file.name.endswith(".index.json"):
        shards = content.get("weight_map")
        if not isinstance(shards, dict):
            return "lacks the weight_map, which says what file holds which weights"
        missing = sorted(name for name in set(shards.values()) if not (file.parent / name).exists())
        return f"names {', '.join(missing[:5])}, which is missing in its folder" if missing else None
    return None


def describe_missing(source: str, hub_kwargs: dict[str, Any]) -> str | None:
    """Why there is no model to load, where that is known without asking the Hub; `None` for a folder and for what may
    be a Hub id: `user/name`, unless a folder `user` here holds one with a name like it, or what is in the cache.
    """
    if os.path.isdir(source) or checkpoint_files(source, CONFIG_FILES, hub_kwargs):
        return None
    if os.path.isfile(source):
        return "that is a file; pass the folder that it lies in."
    path = Path(os.path.expanduser(source))
    siblings = [entry.name for entry in path.parent.glob("*") if entry.is_dir()]
    near = difflib.get_close_matches(path.name, siblings, 1)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not near:
        return None
    advice = (
        f"did you mean {os.fspath(path.with_name(near[0]))!r}?" if near else "pass a folder, or a Hub id, user/name."
    )
    return f"there is no such folder here; {advice}"


def check_source(clip: Any, hub_kwargs: dict[str, Any]) -> str:
    """Where a CLIP is to be loaded from; refuses what is neither a folder that exists nor a Hub id."""
    if not isinstance(clip, (str, os.PathLike)):
        raise TypeError(
            f"clip is a {type(clip).__module__}.{type(clip).__name__}; pass a Hub id, a folder, or a transformers "
            "CLIPModel or MetaClip2Model."
        )
    source = os.fspath(clip).removeprefix(HUB_PREFIX)
    if re.fullmatch(r"RN\d+(x\d+)?", source):
        raise ValueError(f"{source!r} {RESNET_ADVICE}")
    missing = describe_missing(source, hub_kwargs)
    if missing:
        raise ValueError(f"{source} can't be loaded: {missing}")
    return source


def pick_hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of keywords those of `HUB_KEYWORDS`."""
    return {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}


def check_loading_report(report: dict[str, Any], source: str, advice: str) -> None:
    """Refuse a checkpoint that lacks weights, or some of which have another shape than its configuration says."""
    if report["missing_keys"]:
        raise ValueError(f"{source!r} lacks the weights {abbreviate(sorted(report['missing_keys']))}; {advice}.")
    for name, saved, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{source!r} has the weight {name!r} of shape {tuple(saved)}, where its configuration asks for "
            f"{tuple(expected)}: they belong to different models; {advice}."
        )


def check_weights(model: PreTrainedModel) -> None:
    """Refuse weights that hold NaN or infinite values."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(
                f"The weight {name!r} ({weight.dtype}) holds NaN or infinite values; download the checkpoint again, "
                "or load it in float32."
            )


def load_image_processor(
    source: str | None, config: MicroCLIPConfig, hub_kwargs: dict[str, Any]
) -> BaseImageProcessor:
    """The image processor saved with a checkpoint, with the PIL back end; an error if its file is damaged.

    Where there is none, CLIP's own stands in; where it keeps the shape of a picture, it is made to cut out the middle,
    as CLIP does, since the model takes squares. Both with a warning, save where `source` is `None`.
    """
    if source is None:
        return default_image_processor(config)
    try:
        with naming_damaged_file(source, PROCESSOR_FILES, hub_kwargs):
            processor = _read_image_processor(source, hub_kwargs)
    except OSError as error:
        reason = "" if os.path.isdir(source) else f" ({textwrap.shorten(str(error), 150)})"
        warnings.warn(f"{source!r} has no image processor; CLIP's own stands in{reason}.", stacklevel=3)
        return default_image_processor(config)
    settings = processor.to_dict()
    if settings.get("do_center_crop") or not dict(settings.get("size") or {}).get("shortest_edge"):
        return processor
    crop = _square(config)
    warnings.warn(
        f"The image processor of {source!r} doesn't crop, and the model takes squares; the middle {crop['height']} x "
        f"{crop['width']} pixels are cut out, as CLIP does.",
        stacklevel=3,
    )
    return processor.from_dict({**settings, "do_center_crop": True, "crop_size": crop})


def _read_image_processor(source: str, hub_kwargs: dict[str, Any]) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil", **hub_kwargs)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The image processor of {source!r} can't be loaded: {textwrap.shorten(str(error), 200)} Mend its "
            "preprocessor_config.json (image_processor_type is the name of a class in transformers), or in "
            "Python pass image_processor= to from_clip."
        ) from error


def default_image_processor(config: MicroCLIPConfig) -> BaseImageProcessor:
    """CLIP's own preparation for the model's image size, with the PIL back end."""
    square = _square(config)
    return CLIPImageProcessorPil(size={"shortest_edge": square["height"]}, crop_size=square)


def _square(config: MicroCLIPConfig) -> dict[str, int]:
    size = config.clip_config.vision_config.image_size
    return {"height": size, "width": size}
