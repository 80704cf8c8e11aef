"""Models from the Hub or a folder, checked: adapted ones, and CLIPs with the heads of their texts."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, PreTrainedConfig

from .configuration_microclip import (
    CONFIG_FILES,
    HUB_PREFIX,
    MicroCLIPConfig,
    load_image_processor,
    naming_damaged_file,
)
from .model_sources import announce_download, describe_problem
from .modeling_microclip import MicroCLIPForImageClassification, check_loading_report, check_weights
from .open_clip import OPEN_CLIP_CONFIG, OpenClipCheckpoint, is_bare_file, read_open_clip
from .preparation import Preparation
from .text_heads import encode_heads


def load_adapted(source: str) -> MicroCLIPForImageClassification:
    """A saved microCLIP, in float32 and evaluation mode; a plain CLIP, which would get random heads, is refused.

    Raises:
        ValueError: if `source`, a Hub id or a folder, is no such model, weights are damaged or missing, or its image
            processor isn't as [`Preparation`] expects.
    """
    model_type = read_model_type(source)
    if model_type != MicroCLIPConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {model_type!r}; pass a microCLIP, which brings its class names: one written "
            "by microclip adapt, or made by from_clip and saved."
        )
    announce_download(source)
    try:
        # Sizes may differ, so that the report names all that do, in place of an error about the first.
        model, report = MicroCLIPForImageClassification.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"{source} can't be loaded: {error}") from error
    check_loading_report(report, source, "save it again")
    check_weights(model)
    Preparation.of(model.image_processor, model.config.clip_config.vision_config.image_size)
    return model


def read_model_type(source: str) -> str:
    """The `model_type` of a saved model's configuration ("microclip", "clip", ...); an error if there is none.

    A CLIP in open_clip's format is of type "clip".
    """
    source = source.removeprefix(HUB_PREFIX)
    problem = None if is_bare_file(source) else describe_problem(source)
    if problem:
        raise ValueError(f"{source} can't be loaded: {problem}")
    try:
        if read_open_clip(source) is not None:
            return CLIPConfig.model_type
        with naming_damaged_file(source, CONFIG_FILES, {}):
            model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError as error:
        where = "" if os.path.isdir(source) else "there is no such folder here, and from the Hub: "
        raise ValueError(f"{source} can't be loaded: {where}{error}") from error
    if model_type is None:
        raise ValueError(
            f"{source} holds no model: there is no config.json with a 'model_type', as transformers writes it, and no "
            f"{OPEN_CLIP_CONFIG}. Pass a CLIP or microCLIP in one of these formats, or a file of open_clip's."
        )
    return model_type


def read_config(source: str) -> MicroCLIPConfig:
    """The configuration of a saved microCLIP, or of the one that a CLIP becomes, in open_clip's format too."""
    source = source.removeprefix(HUB_PREFIX)
    return _config_of(source, read_open_clip(source))


def _config_of(source: str, checkpoint: OpenClipCheckpoint | None) -> MicroCLIPConfig:
    if checkpoint is None:
        return MicroCLIPConfig.from_pretrained(source)
    return MicroCLIPConfig(clip_config=checkpoint.config)


def load_clip(
    source: str, texts: dict[str, Any], overrides: dict[str, Any]
) -> tuple[MicroCLIPForImageClassification, dict[str, torch.Tensor]]:
    """A microCLIP made of a CLIP from the Hub or a folder, and the heads of plain CLIP to compare it with.

    `texts` are `class_names`, `templates` and perhaps `descriptions`, as for `from_clip`; `overrides` are fields of
    [`MicroCLIPConfig`]. The heads `(num_classes, embed_dim)` are `zero_shot`, of the templates, and with descriptions
    `cupl` too. An error if files are damaged, or the image processor isn't as [`Preparation`] expects.
    """
    source = source.removeprefix(HUB_PREFIX)
    announce_download(source)
    checkpoint = read_open_clip(source)
    config = _config_of(source, checkpoint)
    processor = load_image_processor(source, config, {}) if checkpoint is None else checkpoint.image_processor
    Preparation.of(processor, config.clip_config.vision_config.image_size)
    # The text tower has a second head to make before it is dropped.
    settings = {**overrides, "keep_text_model": True}
    model = MicroCLIPForImageClassification.from_clip(source, image_processor=processor, **texts, **settings)
    heads = {"zero_shot": encode_heads(model.clip, model.tokenizer, texts["class_names"], texts["templates"])[0]}
    if texts.get("descriptions") is not None:
        # A copy, since training changes the model's own.
        heads["cupl"] = model.classifier.weight.detach().clone()
    if not overrides.get("keep_text_model"):
        model.drop_text_model()
    return model, heads


def digest_model(model: MicroCLIPForImageClassification, with_heads: bool = True) -> str:
    """The beginning of a SHA-256 of all that answers depend on: weights, configuration and image processor.

    Heads that were just made of texts are left out, `with_heads=False`: their last bits depend on the machine.
    """
    settings = {"config": model.config.to_dict(), "processor": model.image_processor.to_dict()}
    settings["config"].pop("_name_or_path", None)
    heads = () if with_heads else ("classifier.", "prior_head.")
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith(heads)}
    return digest_weights(weights, settings)


def digest_weights(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None) -> str:
    """The beginning of a SHA-256 of tensors, by their names, and of settings."""
    content = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        data = weight.detach().cpu().reshape(-1).view(torch.uint8)
        content.update(name.encode() + data.numpy().tobytes())
    content.update(json.dumps(settings or {}, sort_keys=True, default=str).encode())
    return content.hexdigest()[:16]


def choose_device(name: str | None, argument: str = "device") -> torch.device:
    """The device of this name, by default an accelerator, else the CPU; an error about `argument` if it isn't here."""
    device = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.cpu()  # from "meta" nothing can be read
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{argument} {device} can't be used here: {error}") from error
    return probe.device
