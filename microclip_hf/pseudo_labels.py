"""Pseudo-labels by dynamic knowledge aggregation, and fairness (arXiv:2510.02270, sections 3.3 and 3.4).

B images, K crops, C classes, E joint embedding width; embeddings have unit norm and scores are cosines.
"""

import math

import torch
from torch.nn.functional import normalize


def composite_embeds(crop_embeds: torch.Tensor, cls_embeds: torch.Tensor) -> torch.Tensor:
    """One embedding of an image from its crops, weighted by their relevance: `unit(sum_k softmax_k(z_k . g) z_k)`.

    The crops' embeddings z are `(B, K, E)`, the weak views' [CLS] embeddings g `(B, E)`. Without crops
    (K = 0) the result is g.
    """
    if crop_embeds.shape[1] == 0:
        return cls_embeds
    relevance = (crop_embeds @ cls_embeds.unsqueeze(-1)).softmax(1)
    return normalize((relevance * crop_embeds).sum(1), dim=-1)


def fuse_embeds(cls_embeds: torch.Tensor, fg_embeds: torch.Tensor, cls_ratio: float) -> torch.Tensor:
    """The fused embedding `h = unit(ratio g + (1 - ratio) l)` of [CLS] and [FG], both `(B, E)`.

    Pseudo-labels compare it with the learnable head. Its ratio isn't lambda, by which logits are fused: as published
    it is 0.5 (arXiv:2510.02270, section 3.4) whatever lambda is.
    """
    return normalize(cls_ratio * cls_embeds + (1 - cls_ratio) * fg_embeds, dim=-1)


def align_distribution(
    logits: torch.Tensor,
    log_batch_mean: torch.Tensor,
    log_running_mean: torch.Tensor | None,
    weight: float,
    log_frequencies: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, divided by what each class gets on average (distribution alignment, arXiv:1911.09785).

    Of each head by itself, so that neither head's favourite classes decide where both are mixed. Logits, cosines times
    the logit scale, are `(num_heads, B, C)`; logs of mean probabilities, of this batch and of those before if there
    were any, are `(num_heads, C)`. `weight` is this batch's in the new running mean, in (0, 1]; 1 forgets the batches
    before. `log_frequencies` `(C,)` are the logs of the classes' frequencies pi, by which the quotient is multiplied;
    without them classes are equally frequent. Returns the aligned probabilities and the new log running mean.
    """
    log_mean = log_batch_mean
    if log_running_mean is not None and weight < 1:
        log_mean = torch.logaddexp(log_running_mean + math.log1p(-weight), log_batch_mean + math.log(weight))
    aligned = logits.log_softmax(-1) - log_mean.unsqueeze(1)
    if log_frequencies is not None:
        aligned = aligned + log_frequencies
    return aligned.softmax(-1), log_mean


def aggregate_scores(prior_scores: torch.Tensor, fused_scores: torch.Tensor, prior_ratio: float) -> torch.Tensor:
    """Dynamic knowledge aggregation, `gamma * m . W_LLM + (1 - gamma) * h . unit(W)`; its argmax is the pseudo-label.

    Scores are `(B, C)`, cosines or aligned probabilities: those of the composite embedding with the frozen head, and
    of the fused embedding with the learnable head. `prior_ratio` is gamma.
    """
    return prior_ratio * prior_scores + (1 - prior_ratio) * fused_scores


def fairness_loss(
    log_probabilities: torch.Tensor,
    log_running_mean: torch.Tensor | None,
    log_rest: torch.Tensor | None = None,
    num_images: int | None = None,
    frequencies: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep every class in use: `-mean_c(log pbar_c) / 0.5` of the running mean of class probabilities.

    `pbar` is the batch's mean at an epoch's start, then `0.5 * (stopgrad(pbar) + mean_batch(p))`. All of it is
    computed with logarithms, so that a class whose probability underflows still gets a finite loss and its gradient.
    The mean is the whole batch's, also where this is a part of it: the gradients of the parts add up.

    Args:
        log_probabilities (`torch.Tensor` of shape `(B, C)`): log softmax of the student, with gradient.
        log_running_mean (`torch.Tensor` of shape `(C,)`, *optional*): log of the mean so far, none as an epoch starts.
        log_rest (`torch.Tensor` of shape `(C,)`, *optional*): where the batch is spread over processes or accumulation
            steps, the log of the sum of the other parts' probabilities, without gradient.
        num_images (`int`, *optional*): images of the whole batch. Default: those of `log_probabilities`.
        frequencies (`torch.Tensor` of shape `(C,)`, *optional*): the classes' frequencies pi, by which they count in
            the mean, `-sum_c pi_c log pbar_c / 0.5`: it is least where pbar is pi. Default: all are equal.

    Returns:
        The loss, a scalar with gradient, and the new log running mean `(C,)`, without.
    """
    log_sum = log_probabilities.logsumexp(0)
    if log_rest is not None:
        log_sum = torch.logaddexp(log_sum, log_rest)
    log_mean = log_sum - math.log(num_images if num_images is not None else len(log_probabilities))
    if log_running_mean is not None:
        log_mean = torch.logaddexp(log_running_mean, log_mean) - math.log(2)
    fairness = -log_mean.mean() if frequencies is None else -(frequencies * log_mean).sum()
    return fairness / 0.5, log_mean.detach()
