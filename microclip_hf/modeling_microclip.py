"""microCLIP for image classification (arXiv:2510.02270) around transformers' `CLIPModel` or `MetaClip2Model`.

B images, C classes, N patches, D vision width, E joint embedding width.
"""

import copy
import difflib
import importlib
import os
import random
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention, silu
from transformers import (
    BaseImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2EncoderLayer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_microclip import (
    CONFIG_FILES,
    HUB_KEYWORDS,
    TOKENIZER_FILES,
    WEIGHTS_FILES,
    MicroCLIPConfig,
    check_loading_report,
    check_source,
    check_weights,
    checkpoint_files,
    describe_missing,
    load_image_processor,
    naming_damaged_file,
    pick_hub_kwargs,
)
from .saliency import check_finite, saliency_mask
from .text_heads import (
    AnyCLIP,
    check_class_names,
    check_templates,
    encode_heads,
    load_tokenizer,
    match_descriptions,
)


@dataclass
class MicroCLIPOutput(ModelOutput):
    r"""
    Output of [`MicroCLIPForImageClassification`].

    Args:
        loss (`torch.Tensor` of shape `()`, with `labels`): cross-entropy of `logits`.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): fused logits, `fusion_ratio * cls_logits +
            (1 - fusion_ratio) * fg_logits`, float32; in evaluation mode after `model.logit_adjustment`, which changes
            nothing unless pseudo-labels were aligned or a class mixture was fitted.
        cls_logits, fg_logits (`torch.Tensor` of shape `(batch_size, num_labels)`): of the [CLS] path, CLIP's own image
            feature, and of the [FG] path, the saliency-guided token, against the learnable head.
        cls_embeds, fg_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`): of both paths, unit norm.
        patch_embeds (`torch.Tensor` of shape `(batch_size, num_patches, width)`, with `output_patch_embeds=True`):
            patch tokens of the last layer's value path, after `post_layernorm`, not projected; the tower's width.
        saliency_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`, with `output_patch_embeds=True`):
            the salient patches, row by row of the patch grid.
        fg_attention (`torch.Tensor` of shape `(batch_size, num_patches + 1)`, with `output_patch_embeds=True`):
            weight of each patch in the [FG] token; the last entry is the null token's. Rows sum to 1.
        hidden_states (`tuple(torch.Tensor)`, with `output_hidden_states=True`): of the vision tower,
            `num_hidden_layers + 1` of shape `(batch_size, num_patches + 1, hidden_size)`.
        attentions (`tuple(torch.Tensor)`, with `output_attentions=True` and eager attention): `num_hidden_layers` of
            shape `(batch_size, num_heads, num_patches + 1, num_patches + 1)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cls_logits: torch.Tensor | None = None
    fg_logits: torch.Tensor | None = None
    cls_embeds: torch.Tensor | None = None
    fg_embeds: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None
    saliency_mask: torch.Tensor | None = None
    fg_attention: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class IdentityLinear(nn.Linear):
    """A square linear layer without bias that starts as the identity."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)


class MicroCLIPPooling(nn.Module):
    """Patch tokens into one [FG] token: saliency-oriented attention pooling (SOAP, arXiv:2510.02270, section 3.2).

    One head over the patches and a null token of zeros: `softmax((W_q q) . (W_k p_j) / sqrt(D))`, `sum_j a_j W_v p_j`.
    """

    def __init__(self, config: MicroCLIPConfig) -> None:
        super().__init__()
        hidden_size = config.clip_config.vision_config.hidden_size
        self.query = config.fg_query
        self.pooling = config.fg_pooling
        # The query "random" is this share of the way through the patches, the same in every image, so that an image's
        # logits don't depend on its batch.
        self.random_place = random.Random(0).random()
        self.query_proj = IdentityLinear(hidden_size)
        self.key_proj = IdentityLinear(hidden_size)
        self.value_proj = IdentityLinear(hidden_size)

    def forward(
        self, patch_embeds: torch.Tensor, mask: torch.Tensor, cls_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled token `(batch_size, hidden_size)` and the attention `(batch_size, num_patches + 1)`.

        Of the patch tokens `(batch_size, num_patches, hidden_size)`, the mask of the salient ones `(batch_size,
        num_patches)` and [CLS] after `post_layernorm`, `(batch_size, hidden_size)`.
        """
        if self.pooling != "attention":
            weights = _mean_weights(mask, patch_embeds.dtype, masked=self.pooling == "masked_mean")
            return _weighted_sum(weights, patch_embeds), nn.functional.pad(weights, (0, 1))
        query = self.query_proj(self._query(patch_embeds, mask, cls_token)) * patch_embeds.shape[-1] ** -0.5
        scores = _weighted_sum(query, self.key_proj(patch_embeds).transpose(-1, -2))
        # The null token's key is zero, so its score is 0 and its value adds nothing.
        attention = nn.functional.pad(scores, (0, 1)).softmax(-1, dtype=torch.float32).to(patch_embeds.dtype)
        # W_v is linear: applied to the sum, it runs once an image instead of once a patch.
        return self.value_proj(_weighted_sum(attention[:, :-1], patch_embeds)), attention

    def _query(self, patch_embeds: torch.Tensor, mask: torch.Tensor, cls_token: torch.Tensor) -> torch.Tensor:
        if self.query == "cls":
            return cls_token
        if self.query == "random":
            return patch_embeds[:, int(self.random_place * patch_embeds.shape[1])]
        weights = _mean_weights(mask, patch_embeds.dtype, masked=self.query == "saliency")
        return _weighted_sum(weights, patch_embeds)


def _mean_weights(mask: torch.Tensor, dtype: torch.dtype, masked: bool) -> torch.Tensor:
    """Weights `(B, N)` of a mean over the salient patches, or over all."""
    chosen = mask if masked else torch.ones_like(mask)
    return (chosen / chosen.sum(-1, keepdim=True)).to(dtype)


def _weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`(B, n)` weights and `(B, n, m)` values to `(B, m)`."""
    return (weights.unsqueeze(1) @ values).squeeze(1)


class LastLayerTokens(nn.Module):
    """What microCLIP's last layers add to those of transformers, which the classes below name."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokens: Literal["cls", "all"] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """As in the base class, or, with `tokens`, of [CLS] alone (`"cls"`) or of the patches too (`"all"`).

        These don't attend to others: each keeps to its own value, so that it stays local (arXiv:2510.02270, section
        3.2). From `(batch_size, num_patches + 1, hidden_size)` to the same, or to `(batch_size, 1, hidden_size)`.
        """
        if tokens is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention = self.self_attn
        normed = self.layer_norm1(hidden_states)
        values = attention.v_proj(normed)
        heads = [
            states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for states in (attention.q_proj(normed[:, :1]), attention.k_proj(normed), values)
        ]
        dropout = attention.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(*heads, dropout_p=dropout, scale=attention.scale)
        mixed = mixed.transpose(1, 2).flatten(2)
        if tokens == "cls":
            hidden_states = hidden_states[:, :1]
        else:
            mixed = torch.cat([mixed, values[:, 1:]], 1)
        hidden_states = hidden_states + attention.out_proj(mixed)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class MicroCLIPLastLayer(LastLayerTokens, CLIPEncoderLayer):
    """CLIP's last encoder layer, with the same weights; it can compute what microCLIP needs of it, and no more."""


class MicroMetaClip2LastLayer(LastLayerTokens, MetaClip2EncoderLayer):
    """The same of a MetaCLIP 2."""


class QuickGELU(nn.Module):
    """CLIP's activation `x sigmoid(1.702 x)` as a SiLU, which keeps one tensor for the backward pass, not two."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scaled = 1.702 * hidden_states
        # A CPU is bound by memory here: what nothing else needs is overwritten.
        return silu(scaled, inplace=not torch.is_grad_enabled()).div_(1.702)


class MicroCLIPHead(nn.Module):
    """Cosines of embeddings with one vector a class, in `weight` `(num_labels, projection_dim)`, rows of any norm."""

    def __init__(self, num_labels: int, embed_dim: int, learnable: bool = True) -> None:
        super().__init__()
        if learnable:
            self.weight = nn.Parameter(torch.empty(num_labels, embed_dim))
        else:
            self.register_buffer("weight", torch.zeros(num_labels, embed_dim))

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """Unit embeddings `(batch_size, embed_dim)` to float32 cosines `(batch_size, num_labels)`, autocast or not."""
        with torch.autocast(embeds.device.type, enabled=False):
            return embeds.float() @ normalize(self.weight.float(), dim=-1).T


class LogitAdjustment(nn.Module):
    """In evaluation, logits times `scale`, less `bias`, both (num_labels,) (logit adjustment, arXiv:2007.07314).

    One and zero, unless adaptation sets them. Where self-training aligned the distributions, the bias is the log of
    the mean probability that the fused embedding gave each class on the latest training batches, relative to the
    class's frequency, so that predictions come out about as frequent. Where a class mixture was fitted, its linear
    weights have norms, which heads of cosines haven't: these are in the scale.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_labels))
        self.register_buffer("bias", torch.zeros(num_labels))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size, num_labels)` to logits."""
        return logits if self.training else logits * self.scale - self.bias

    def reset(self) -> None:
        """Change nothing."""
        self.scale.fill_(1)
        self.bias.zero_()


class MicroCLIPPreTrainedModel(PreTrainedModel):
    """What every microCLIP model shares with transformers: loading, saving, initialisation, attention back ends."""

    config: MicroCLIPConfig
    config_class = MicroCLIPConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["MicroCLIPLastLayer", "MicroMetaClip2LastLayer", "MicroCLIPPooling"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # One and zero, where a checkpoint doesn't bring them.
    _keys_to_ignore_on_load_missing = [r"logit_adjustment\.(scale|bias)"]
    # A CLIP checkpoint brings its text tower; it is used only where `keep_text_model` asks for it.
    _keys_to_ignore_on_load_unexpected = [r"text_model\.", r"text_projection\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, IdentityLinear):
            init.eye_(module.weight)
        elif isinstance(module, MicroCLIPHead) and isinstance(module.weight, nn.Parameter):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
        elif isinstance(module, MicroCLIPHead):
            init.zeros_(module.weight)
        elif isinstance(module, LogitAdjustment):
            init.ones_(module.scale)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class MicroCLIPForImageClassification(MicroCLIPPreTrainedModel):
    """A CLIP whose [CLS] token is fused with a saliency-guided [FG] token, and two heads made from text.

    Args:
        config ([`MicroCLIPConfig`]): the architecture. Weights are random; `from_clip` or `from_pretrained` load them.

    Example:
    ```python
    >>> from PIL import Image

    >>> model = MicroCLIPForImageClassification.from_clip("openai/clip-vit-base-patch32", ["red disc", "blue bar"])
    >>> inputs = model.image_processor(Image.open("photo.jpg"), return_tensors="pt")
    >>> model(**inputs).logits.shape
    torch.Size([1, 2])
    ```
    """

    def __init__(self, config: MicroCLIPConfig) -> None:
        super().__init__(config)
        # By default transformers guesses it from the class's name, which a subclass may change.
        self.loss_type = "ForImageClassification"
        self.num_labels = config.num_labels
        self.clip = with_own_layers(clip_class(config.clip_config)._from_config(config.clip_config))
        self.fg_pooling = MicroCLIPPooling(config)
        embed_dim = config.clip_config.projection_dim
        self.classifier = MicroCLIPHead(config.num_labels, embed_dim)
        self.prior_head = MicroCLIPHead(config.num_labels, embed_dim, learnable=False)
        self.logit_adjustment = LogitAdjustment(config.num_labels)
        self.image_processor: BaseImageProcessor | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if not config.keep_text_model:
            self.drop_text_model()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.vision_model.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.clip.vision_model.embeddings.patch_embedding = value

    @property
    def logit_scale(self) -> torch.Tensor | float:
        """What cosines are multiplied by: `config.logit_scale`, or the checkpoint's `exp(logit_scale)`, in float32."""
        if self.config.logit_scale is not None:
            return float(self.config.logit_scale)
        return self.clip.logit_scale.float().exp()

    def coarse_embeds(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """The [CLS] path alone, CLIP's own image feature, for a little less than a plain CLIP forward.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
            interpolate_pos_encoding (`bool`): accept another size than the checkpoint's, whose position encodings are
                interpolated.

        Returns:
            `torch.Tensor` of shape `(batch_size, projection_dim)`, unit norm, float32.

        Raises:
            ValueError: on another number of channels, NaN, or another size without `interpolate_pos_encoding`.
        """
        self._check_pixels(pixel_values)
        vision = self.clip.vision_model
        hidden_states = run_tower(vision, pixel_values, interpolate_pos_encoding)
        cls_token = vision.post_layernorm(vision.encoder.layers[-1](hidden_states, tokens="cls"))[:, 0]
        return normalize(self.clip.visual_projection(cls_token).float(), dim=-1)

    def encode_image(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MicroCLIPOutput:
        """Both paths of the vision tower (arXiv:2510.02270, sections 3.1 and 3.2), without the heads.

        Args:
            pixel_values, interpolate_pos_encoding: see [`coarse_embeds`], also for its errors.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*): default: the configuration's.
            output_attentions (`bool`, *optional*): default: the configuration's.
            kwargs: handed on to the encoder layers but the last, whose attention is always sdpa.

        Returns:
            [`MicroCLIPOutput`] with everything but `loss` and logits.
        """
        self._check_pixels(pixel_values)
        config = self.config
        vision = self.clip.vision_model
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        selected = attentions = None
        if output_hidden_states or output_attentions:
            captured = vision(pixel_values, output_hidden_states=True, output_attentions=output_attentions, **kwargs)
            # The input of the last layer, which is run below in another way.
            hidden_states = captured.hidden_states[-2]
            attentions = captured.attentions
            selected = _select(captured.hidden_states, output_hidden_states) if output_hidden_states else None
        else:
            hidden_states = run_tower(vision, pixel_values, **kwargs)
        tokens = vision.post_layernorm(vision.encoder.layers[-1](hidden_states, tokens="all"))
        cls_token = tokens[:, 0]
        patch_embeds = tokens[:, 1:]
        mask = saliency_mask(patch_embeds, config.saliency_affinity, config.saliency_threshold, config.saliency_cut)
        fg_token, attention = self.fg_pooling(patch_embeds, mask, cls_token)
        return MicroCLIPOutput(
            cls_embeds=normalize(self.clip.visual_projection(cls_token).float(), dim=-1),
            fg_embeds=normalize(self.clip.visual_projection(fg_token).float(), dim=-1),
            patch_embeds=patch_embeds,
            saliency_mask=mask,
            fg_attention=attention,
            hidden_states=selected,
            attentions=attentions,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_patch_embeds: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MicroCLIPOutput:
        r"""
        Classify images (TokenFusion, arXiv:2510.02270, section 3.2).

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): class indices, for the loss.
                Self-training doesn't use them.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): see [`coarse_embeds`], errors too.
            output_patch_embeds (`bool`, *optional*, defaults to `False`): also return `patch_embeds`, `saliency_mask`
                and `fg_attention`.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in any transformers model.

        Returns:
            [`MicroCLIPOutput`] or a tuple of its values that aren't `None`.
        """
        encoded = self.encode_image(pixel_values, interpolate_pos_encoding, **kwargs)
        cls_cosines = self.classifier(encoded.cls_embeds)
        fg_cosines = self.classifier(encoded.fg_embeds)
        scale = self.logit_scale
        if isinstance(scale, torch.Tensor):
            scale = scale.to(cls_cosines.device)
        cls_logits = scale * cls_cosines
        fg_logits = scale * fg_cosines
        ratio = self.config.fusion_ratio
        logits = self.logit_adjustment(ratio * cls_logits + (1 - ratio) * fg_logits)
        return MicroCLIPOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            cls_logits=cls_logits,
            fg_logits=fg_logits,
            cls_embeds=encoded.cls_embeds,
            fg_embeds=encoded.fg_embeds,
            patch_embeds=encoded.patch_embeds if output_patch_embeds else None,
            saliency_mask=encoded.saliency_mask if output_patch_embeds else None,
            fg_attention=encoded.fg_attention if output_patch_embeds else None,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def freeze_for_adaptation(self) -> None:
        """Leave trainable what microCLIP adapts: vision LayerNorms, the learnable head, the pooling's projections.

        ViT-B/32: 1,809,408 + 512 C parameters (arXiv:2510.02270, section 4). The projections are frozen where
        `fg_pooling` doesn't use them.
        """
        self.requires_grad_(False)
        for module in self.clip.vision_model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
        self.classifier.requires_grad_(True)
        self.fg_pooling.requires_grad_(self.config.fg_pooling == "attention")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the base class; the image processor and the tokenizer saved beside the weights come along.

        Raises:
            OSError: if it is clearly a path, and no folder.
            ValueError: if a file of the checkpoint is damaged, or it has no text tower where one is asked for.
        """
        source = pretrained_model_name_or_path
        missing = None if source is None else describe_missing(os.fspath(source), pick_hub_kwargs(kwargs))
        if missing:
            raise OSError(f"{source} can't be loaded: {missing}")
        with_report = kwargs.pop("output_loading_info", False)
        with naming_damaged_file(source, WEIGHTS_FILES, kwargs):
            model, report = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing = " ".join(report["missing_keys"])
        if "text_model." in missing and "vision_model." not in missing:
            raise ValueError(f"{os.fspath(source)!r} has no text tower; load it without keep_text_model=True.")
        if source is not None:
            source = os.fspath(source)
            hub_kwargs = pick_hub_kwargs(kwargs)
            model.image_processor = load_image_processor(source, model.config, hub_kwargs)
            if model.config.keep_text_model:
                try:
                    model.tokenizer = load_tokenizer(source, hub_kwargs)
                except ValueError:
                    # Without its files the model still classifies; damaged ones are an error.
                    if checkpoint_files(source, TOKENIZER_FILES, hub_kwargs):
                        raise
        return (model, report) if with_report else model

    @classmethod
    def from_clip(
        cls,
        clip: str | os.PathLike | AnyCLIP,
        class_names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_processor: BaseImageProcessor | None = None,
        batch_size: int = 256,
        quick_gelu: bool | None = None,
        **kwargs: Any,
    ) -> "MicroCLIPForImageClassification":
        """A model ready to adapt: CLIP's weights in float32 and both heads built from the class names' texts.

        Args:
            clip (`str`, `os.PathLike`, `CLIPModel` or `MetaClip2Model`): a Hub id, a folder, or a model (which is
                copied, not changed); in open_clip's format too, then also a file of weights.
            class_names (`Sequence[str]`): at least two different names.
            templates (`str` or `Sequence[str]`, *optional*): prompts with `{}`, default "a photo of a {}.".
            descriptions (`Mapping[str, Sequence[str]]`, *optional*): `{class: [sentence, ...]}`. Keys match class
                names whatever their case, `_` and `-`; classes without an entry are described by their templates.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): default: the one saved with `clip`.
            image_processor (`BaseImageProcessor`, *optional*): saved with the model. Default: the one saved with
                `clip` (PIL back end), or CLIP's own for the model's image size.
            batch_size (`int`, *optional*, defaults to 256): texts encoded at once.
            quick_gelu (`bool`, *optional*): of a bare file of open_clip's, whose weights don't tell: whether the model
                has OpenAI's activation.
            kwargs: fields of [`MicroCLIPConfig`]; others go to the CLIP's `from_pretrained` (`revision`, ...).

        Raises:
            TypeError, ValueError: for what doesn't fit, and for damaged files; names and texts are checked before
                anything is loaded.
        """
        class_names = check_class_names(class_names)
        check_templates(templates)
        match_descriptions(class_names, descriptions)
        _check_keywords(kwargs)
        dtype = _pop_dtype(kwargs)
        config_kwargs = {f.name: kwargs.pop(f.name) for f in fields(MicroCLIPConfig) if f.name in kwargs}
        checkpoint = _read_open_clip(clip, quick_gelu, kwargs)
        if checkpoint is None:
            clip, source = _load_clip(clip, dtype, kwargs)
        else:
            clip, tokenizer = checkpoint.load(dtype, tokenizer, **kwargs)
            source, image_processor = checkpoint.source, image_processor or checkpoint.image_processor
        check_weights(clip)
        keep_text_model = config_kwargs.pop("keep_text_model", False)
        config_kwargs |= {"clip_config": copy.deepcopy(clip.config), "keep_text_model": True, "dtype": clip.dtype}
        config = MicroCLIPConfig(**config_kwargs, **_label_maps(class_names))
        config._attn_implementation = clip.config._attn_implementation
        # Without memory for weights that are replaced at once.
        with torch.device("meta"):
            model = cls(config)
        model.clip = with_own_layers(clip)
        model.fg_pooling = MicroCLIPPooling(config).to(clip.device, clip.dtype)
        model.tokenizer = tokenizer or load_tokenizer(source, pick_hub_kwargs(kwargs))
        model.image_processor = image_processor or load_image_processor(source, config, pick_hub_kwargs(kwargs))
        model.set_classes(class_names, templates, descriptions, batch_size=batch_size)
        if not keep_text_model:
            model.drop_text_model()
        return model.eval()

    def set_classes(
        self,
        class_names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 256,
    ) -> None:
        """Build both heads anew for these classes, with the text tower.

        Args:
            class_names, templates, descriptions, batch_size: see [`from_clip`].
            tokenizer (`PreTrainedTokenizerBase`, *optional*): default: the one saved with the model.

        Raises:
            ValueError: if the text tower was dropped, or as in [`from_clip`].
        """
        if not self.config.keep_text_model:
            raise ValueError(
                "This model has no text tower (it was dropped to halve the checkpoint), so its classes can't be "
                "changed. Build it with from_clip(..., keep_text_model=True), or from the CLIP again."
            )
        tokenizer = tokenizer or self.tokenizer or load_tokenizer(None, {})
        weighting = self.config.prior_weighting
        weights = encode_heads(self.clip, tokenizer, class_names, templates, descriptions, weighting, batch_size)
        like = self.clip.visual_projection.weight
        for name, weight in zip(("classifier", "prior_head"), weights, strict=True):
            head = MicroCLIPHead(*weight.shape, learnable=name == "classifier")
            head.weight.data.copy_(weight)
            setattr(self, name, head.to(like.device, like.dtype))
        self.logit_adjustment = LogitAdjustment(len(weights[0])).to(like.device, like.dtype).train(self.training)
        self.tokenizer = tokenizer
        self.config.update(_label_maps(class_names))
        self.num_labels = self.config.num_labels

    def drop_text_model(self) -> None:
        """Remove CLIP's text tower, which classification doesn't need; `set_classes` can't be called afterwards."""
        if self.clip.text_projection is not None:
            del self.clip.text_model
            self.clip.text_projection = None
        self.config.keep_text_model = False
        self.tokenizer = None

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in the base class; the image processor, and the tokenizer of a kept text tower, are saved too."""
        # First, since the base class may push the folder to the Hub.
        for processor in (self.image_processor, self.tokenizer):
            if processor is not None and is_main_process:
                processor.save_pretrained(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _check_pixels(self, pixel_values: torch.Tensor | None) -> None:
        if pixel_values is None:
            raise ValueError("pixel_values is missing; pass the image processor's output, model(**inputs).")
        channels = self.config.clip_config.vision_config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; expected (batch_size, {channels}, height, "
                "width). Convert images to RGB and let the image processor batch them."
            )
        check_finite(pixel_values, "pixel_values", "Check the images and their normalisation.")


def _select(states: tuple[torch.Tensor, ...], selection: bool | int | list[int]) -> tuple[torch.Tensor | None, ...]:
    """All of them for `True`; else only those at the indices, with `None` in the places of the others."""
    if selection is True:
        return states
    indices = [selection] if isinstance(selection, int) else selection
    return tuple(
        state if index in indices or index - len(states) in indices else None for index, state in enumerate(states)
    )


def run_tower(
    vision: CLIPVisionModel | MetaClip2VisionModel,
    pixel_values: torch.Tensor,
    interpolate_pos_encoding: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """The last layer's input; the inputs of earlier layers aren't kept."""
    hidden_states = vision.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    hidden_states = vision.pre_layrnorm(hidden_states)
    for layer in vision.encoder.layers[:-1]:
        hidden_states = layer(hidden_states, None, **kwargs)
    return hidden_states


def clip_class(config: CLIPConfig | MetaClip2Config) -> type[AnyCLIP]:
    """The model that a CLIP's configuration is of."""
    return MetaClip2Model if isinstance(config, MetaClip2Config) else CLIPModel


def with_own_layers(clip: AnyCLIP) -> AnyCLIP:
    """The same weights and numbers, in the layers that are defined here."""
    layers = clip.vision_model.encoder.layers
    last = layers[-1]
    # Its class, and not the layer, is swapped: weights keep their names and devices, hooks and gradient
    # checkpointing stay on, and a layer made anew would need to know how CLIP's configuration was read.
    last.__class__ = MicroMetaClip2LastLayer if isinstance(clip, MetaClip2Model) else MicroCLIPLastLayer
    # Accelerate's hook, where a model is spread over devices, calls the `forward` that it found.
    if "_old_forward" in vars(last):
        last._old_forward = types.MethodType(type(last).forward, last)
    for layer in layers:
        if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
            layer.mlp.activation_fn = QuickGELU()
    return clip


def _label_maps(class_names: Sequence[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def _check_keywords(kwargs: dict[str, Any]) -> None:
    """What the class names decide, or is misspelt, is refused; transformers refuses what else it doesn't know."""
    for name in ("num_labels", "id2label", "label2id", "clip_config"):
        if name in kwargs:
            raise TypeError(f"from_clip got {name}, which follows from class_names and clip; leave it out.")
    parameters = signature(MicroCLIPForImageClassification.from_clip).parameters
    taken = {*parameters, *MicroCLIPConfig.architecture_names(), *HUB_KEYWORDS}
    taken |= {"dtype", "torch_dtype", "attn_implementation", "device_map", "device_mesh"}
    for name in sorted(kwargs.keys() - taken):
        near = difflib.get_close_matches(name, sorted(taken), 1, cutoff=0.85)
        if near:
            raise TypeError(f"from_clip has no argument {name!r}; did you mean {near[0]!r}?")


def _pop_dtype(kwargs: dict[str, Any]) -> torch.dtype | Literal["auto"]:
    """The precision that is asked for, in any spelling that transformers takes; float32 by default."""
    old = kwargs.pop("torch_dtype", None)
    if old is not None:
        warnings.warn("torch_dtype is deprecated; pass dtype to from_clip.", FutureWarning, stacklevel=3)
    dtype = kwargs.pop("dtype", None) or old or torch.float32
    value = vars(torch).get(dtype, dtype) if isinstance(dtype, str) else dtype
    if value != "auto" and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise ValueError(f'dtype is {dtype!r}; pass "float32", "bfloat16", "float16", as a torch.dtype, or "auto".')
    return value


def _read_open_clip(clip: Any, quick_gelu: bool | None, kwargs: dict[str, Any]) -> Any:
    """What is in open_clip's format, as the package's `OpenClipCheckpoint`; `None` for anything else.

    Imported by name, and only where the package is: this module travels to the Hub with every adapted model, which
    needs no conversion any more, and transformers would copy, or ask for, what an import statement names.
    """
    if isinstance(clip, (str, os.PathLike)):
        try:
            open_clip = importlib.import_module(".open_clip", __package__)
        except ModuleNotFoundError:
            return None
        return open_clip.read_open_clip(clip, quick_gelu, pick_hub_kwargs(kwargs))
    if quick_gelu is not None:
        raise TypeError("from_clip got quick_gelu, which only applies when clip is a file of open_clip's.")
    return None


def _load_clip(clip: Any, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> tuple[AnyCLIP, str | None]:
    """A CLIP with both towers, and where it is from; whatever else is there is refused."""
    if isinstance(clip, AnyCLIP):
        if kwargs:
            raise TypeError(f"from_clip got {', '.join(kwargs)}, which only apply when clip is a Hub id or a folder.")
        source = clip.config._name_or_path or None
        return copy.deepcopy(clip).to(dtype=clip.dtype if dtype == "auto" else dtype), source
    hub_kwargs = pick_hub_kwargs(kwargs)
    source = check_source(clip, hub_kwargs)
    with naming_damaged_file(source, CONFIG_FILES, hub_kwargs):
        model_type = PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0].get("model_type")
    if model_type == MicroCLIPConfig.model_type:
        raise ValueError(
            f"{source!r} is an adapted microCLIP. Load it with from_pretrained (and change its classes with "
            "set_classes, if its text tower was kept), or start from the CLIP that it was made of."
        )
    config = MicroCLIPConfig.from_pretrained(source, **hub_kwargs).clip_config
    # Weights of another shape are refused below, by name.
    kwargs = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with naming_damaged_file(source, WEIGHTS_FILES, hub_kwargs):
        clip, report = clip_class(config).from_pretrained(source, dtype=dtype, **kwargs)
    check_loading_report(report, source, "pass a CLIP with both of its towers")
    return clip, source
