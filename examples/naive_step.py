"""
A plain reference for one adaptation step of microCLIP (arXiv:2510.02270), with transformers' `CLIPModel` and torch.

It is what the speed and memory of `microclip_hf` are compared with, and a second opinion on its numbers, so it shares
no code with it. It is written as the paper reads: one forward for each set of views, all hidden states kept, the
second path of the last layer beside the forward, a full eigendecomposition of each image's Laplacian.

It does the obvious: no gradient in the teacher or for frozen parameters, scaled dot-product attention, batched calls.
It deliberately doesn't deflate the Laplacian (disconnected graphs need that), give graphs without a cut an answer of
their own, guard against probabilities that underflow, schedule the learning rate, or know autocast, gradient
accumulation or several processes. To adapt a model use `microclip adapt`.

B images, C classes, N patches, D vision width, E joint embedding width, K crops, S image size.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import BaseModelOutputWithPooling


def saliency_mask(patches: Tensor) -> Tensor:
    """The salient patches of each image by a normalised cut, (B, N, D) to (B, N) bool, at least one a row."""
    affinity = torch.where(patches @ patches.transpose(1, 2) > 0.2, 1.0, 1e-6)
    root_degree = affinity.sum(-1).sqrt()
    laplacian = torch.eye(patches.shape[1], device=patches.device) - affinity / (
        root_degree.unsqueeze(2) * root_degree.unsqueeze(1)
    )
    eigenvector = torch.linalg.eigh(laplacian).eigenvectors[:, :, 1]
    seed = eigenvector.abs().argmax(-1, keepdim=True)
    eigenvector = eigenvector * eigenvector.gather(-1, seed).sign()
    # The seed is the largest entry: it is in every mask but an empty one, which keeps it too.
    return (eigenvector > eigenvector.std(-1, keepdim=True)).scatter(-1, seed, True)


class NaiveStep:
    """
    Teacher, student and optimiser; each call of `step` is one update of the weights.

    Args:
        clip: in float32, adapted in place; its text tower may have been removed. What isn't adapted is frozen.
        classifier (C, E): where the learnable head W starts.
        prior_head (C, E): the frozen head W_LLM, of unit norm.
        logit_scale: default: the checkpoint's own, `exp(logit_scale)`.
        learning_rate: of AdamW.
        prior_ratio: gamma, the share of the frozen head in the pseudo-labels.
        fusion_ratio: lambda, the share of [CLS] in the logits; pseudo-labels take the mean of [CLS] and [FG].
    """

    def __init__(
        self,
        clip: CLIPModel,
        classifier: Tensor,
        prior_head: Tensor,
        logit_scale: float | None = None,
        learning_rate: float = 1e-4,
        prior_ratio: float = 0.5,
        fusion_ratio: float = 0.5,
    ) -> None:
        self.clip, self.prior_head = clip.eval().requires_grad_(False), prior_head.to(clip.device)
        self.prior_ratio = prior_ratio
        self.fusion_ratio = fusion_ratio
        self.logit_scale = clip.logit_scale.exp().item() if logit_scale is None else logit_scale
        self.pixel_mean = torch.tensor(OPENAI_CLIP_MEAN, device=clip.device).view(3, 1, 1)
        self.pixel_std = torch.tensor(OPENAI_CLIP_STD, device=clip.device).view(3, 1, 1)
        width = clip.config.vision_config.hidden_size
        self.classifier = nn.Parameter(classifier.detach().to(clip.device, copy=True))
        self.query_proj, self.key_proj, self.value_proj = (
            nn.Parameter(torch.eye(width, device=clip.device)) for _ in range(3)
        )
        self.trained = [self.classifier, self.query_proj, self.key_proj, self.value_proj]
        for module in clip.vision_model.modules():
            if isinstance(module, nn.LayerNorm):
                self.trained += module.requires_grad_(True).parameters()
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.1)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the running mean of class probabilities."""
        self.class_mean: Tensor | None = None

    def step(self, weak: Tensor, crops: Tensor, strong: Tensor) -> tuple[float, Tensor]:
        """One update from uint8 views: weak and strong (B, 3, S, S), crops (B, K, 3, S, S) with K of at least 1.

        Returns:
            The loss, and the pseudo-labels (B,).
        """
        pseudo_labels = self.pseudo_labels(weak, crops)
        logits = self.logits(strong)
        loss = cross_entropy(logits, pseudo_labels) + self.fairness(logits)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), pseudo_labels

    def pseudo_labels(self, weak: Tensor, crops: Tensor) -> Tensor:
        """Labels (B,) of uint8 views (B, 3, S, S) and (B, K, 3, S, S) with the current weights."""
        return self.pseudo_scores(weak, crops).argmax(-1)

    @torch.no_grad()
    def pseudo_scores(self, weak: Tensor, crops: Tensor) -> Tensor:
        """Scores (B, C), in cosines, whose largest is the label; arguments as above."""
        output, head = self.vision_tower(weak), normalize(self.classifier, dim=-1)
        coarse, fine = self.cls_embeds(output), self.fg_embeds(output)
        crop_embeds = torch.stack([self.cls_embeds(self.vision_tower(crop)) for crop in crops.unbind(1)], 1)
        relevance = (crop_embeds * coarse.unsqueeze(1)).sum(-1, keepdim=True).softmax(1)
        composite = normalize((relevance * crop_embeds).sum(1), dim=-1)
        fused = normalize(0.5 * coarse + 0.5 * fine, dim=-1)
        return self.prior_ratio * composite @ self.prior_head.T + (1 - self.prior_ratio) * fused @ head.T

    def logits(self, views: Tensor) -> Tensor:
        """Fused logits (B, C) of uint8 views (B, 3, S, S)."""
        output, head = self.vision_tower(views), normalize(self.classifier, dim=-1)
        coarse, fine = self.cls_embeds(output), self.fg_embeds(output)
        ratio = self.fusion_ratio
        return self.logit_scale * (ratio * coarse @ head.T + (1 - ratio) * fine @ head.T)

    def fairness(self, logits: Tensor) -> Tensor:
        """The loss () that keeps every class in use, from logits (B, C); updates the running mean."""
        mean = logits.softmax(-1).mean(0)
        if self.class_mean is not None:
            mean = 0.5 * (self.class_mean + mean)
        self.class_mean = mean.detach()
        return -mean.log().mean() / 0.5

    def vision_tower(self, views: Tensor) -> BaseModelOutputWithPooling:
        """CLIP's vision tower on uint8 views (B, 3, S, S), with the hidden states (B, 1 + N, D) of every layer."""
        pixel_values = (views.float() / 255 - self.pixel_mean) / self.pixel_std
        return self.clip.vision_model(pixel_values, output_hidden_states=True)

    def cls_embeds(self, output: BaseModelOutputWithPooling) -> Tensor:
        """CLIP's own image feature g (B, E), of unit norm."""
        return normalize(self.clip.visual_projection(output.pooler_output), dim=-1)

    def fg_embeds(self, output: BaseModelOutputWithPooling) -> Tensor:
        """The [FG] token l (B, E), of unit norm: salient patches ask, all patches and a null token of zeros answer."""
        patches = self.patch_tokens(output)
        with torch.no_grad():
            mask = saliency_mask(patches).unsqueeze(-1)
        query = (mask * patches).sum(1) / mask.sum(1)
        tokens = torch.cat([patches, torch.zeros_like(patches[:, :1])], 1)
        keys, values = tokens @ self.key_proj.T, tokens @ self.value_proj.T
        scores = keys @ (query @ self.query_proj.T).unsqueeze(-1) / patches.shape[-1] ** 0.5
        pooled = (scores.softmax(1) * values).sum(1)
        return normalize(self.clip.visual_projection(pooled), dim=-1)

    def patch_tokens(self, output: BaseModelOutputWithPooling) -> Tensor:
        """Patch tokens P (B, N, D): the last layer again, each token with its own value in place of attention."""
        vision, layer = self.clip.vision_model, self.clip.vision_model.encoder.layers[-1]
        hidden_states = output.hidden_states[-2]
        values = layer.self_attn.v_proj(layer.layer_norm1(hidden_states))
        hidden_states = hidden_states + layer.self_attn.out_proj(values)
        hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        return vision.post_layernorm(hidden_states)[:, 1:]
