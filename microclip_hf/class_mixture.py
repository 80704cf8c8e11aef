"""A mixture of Gaussians over image features, one a class, held to what the texts say: adaptation without training.

The model: photo i is of class c with frequency `pi_c`; its feature is `h_i ~ N(mu_c, Sigma)`, with one covariance for
all classes; and its texts say `log q_ic`, balanced log probabilities of a text classifier, which count `text_weight`
times. So `z_ic`, the probability of class c, is in proportion to `pi_c q_ic^text_weight N(h_i; mu_c, Sigma)`. The fit
is expectation maximisation of all of these from `z = q` and equal frequencies on. Without the texts' word on a photo,
which its feature holds too, what is left is linear in h: `log pi_c + h . (P mu_c) - mu_c . (P mu_c) / 2`, where `P` is
the inverse of Sigma.

Texts enter twice, as q, and as the means' prior: `mu_c` counts as many photos as `text_photos` at the place where its
class's linear weight would be `text_scale` times that of the text classifier. So a class without photos is classified
by its text. Relatives are TransCLIP (arXiv:2406.01837) and StatA (arXiv:2501.03729), whose covariances are diagonal or
of the identity's shape: here the whole covariance carries most of the gain.

N photos, C classes, E width of the features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .saliency import check_finite


# Features (n, E) and log probabilities by texts (n, C) of some photos, float32 and on one device.
Batch = tuple[torch.Tensor, torch.Tensor]
# Called for each pass over the photos of this process.
Batches = Callable[[], Iterator[Batch]]
# The sum of a tensor over processes.
Reduce = Callable[[torch.Tensor], torch.Tensor]
NUM_ROUNDS = 20


@dataclass(frozen=True)
class ClassMixture:
    """What was fitted."""

    weight: torch.Tensor  # (C, E), P mu_c
    bias: torch.Tensor  # (C,), log pi_c - mu_c . P mu_c / 2
    text_weight: float
    counts: torch.Tensor  # (C,), expected photos of each class
    # (C,), of the counts: what a draw of other photos and not knowing these photos' classes add to each other.
    standard_errors: torch.Tensor
    frequencies: torch.Tensor  # (C,), pi, which sums to 1

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Log of `pi_c N(h; mu_c, Sigma)` but for what all classes share: features (n, E) to (n, C)."""
        return features @ self.weight.T + self.bias

    def probabilities(self, features: torch.Tensor, text_log_probabilities: torch.Tensor) -> torch.Tensor:
        """The posterior z (n, C), from features (n, E) and texts (n, C)."""
        return (self.scores(features) + self.text_weight * text_log_probabilities).softmax(-1)

    @property
    def frequency_errors(self) -> torch.Tensor:
        """Standard errors (C,) of the frequencies, given the means and the covariance."""
        return self.standard_errors / (self.counts.sum() + len(self.counts))

    @property
    def is_absent(self) -> torch.Tensor:
        """Classes (C,) of which there probably isn't one photo: two standard errors above its count is less than 1."""
        return self.counts + 2 * self.standard_errors < 1


def balance_text(logits: torch.Tensor, log_mean: torch.Tensor) -> torch.Tensor:
    """Log probabilities q (n, C) of text logits (n, C), each divided by its class's mean over all photos, of which
    `log_mean` (C,) is the log: a text classifier's favourite classes lose their lead.

    Less the log frequencies, where classes aren't equally frequent, the mean is what it is in excess of those.
    """
    return (logits.log_softmax(-1) - log_mean).log_softmax(-1)


def log_mean_probability(
    logits: Callable[[], Iterator[torch.Tensor]], reduce: Reduce = lambda values: values
) -> torch.Tensor:
    """Log of the mean probability (C,) that logits, some (n, C) after others, give each class; as if one photo more of
    each class had been seen, so that a few photos don't rule classes out.

    A process without photos has logits of the shape (0, C).

    Raises:
        ValueError: if no process has photos.
    """
    total = 0
    num_photos = 0
    for part in logits():
        total = total + part.softmax(-1).sum(0)
        num_photos += len(part)
    sums = reduce(torch.cat([total, total.new_tensor([num_photos])]))
    if sums[-1] == 0:
        raise ValueError("There are no logits to take a mean of; pass those of one photo or more.")
    num_classes = len(sums) - 1
    return ((sums[:-1] + 1) / (sums[-1] + num_classes)).log()


def fit_class_mixture(
    batches: Batches,
    head: torch.Tensor,
    text_weight: float = 3.0,
    text_photos: float = 4.0,
    text_scale: float = 3.0,
    shrinkage: float = 0.5,
    frequencies: torch.Tensor | None = None,
    reduce: Reduce = lambda values: values,
    num_rounds: int = NUM_ROUNDS,
) -> ClassMixture:
    """Fit the mixture; labels play no part, and the same photos in the same batches give the same result.

    Args:
        batches (`Batches`): the photos of this process; those of all processes are fitted together.
        head (`torch.Tensor` of shape `(C, E)`): the text classifier's linear weights, its logit scale included.
        text_weight, text_photos, text_scale (`float`): see above.
        shrinkage (`float`): share of a ball of the photos' own variance in the covariance, in (0, 1].
        frequencies (`torch.Tensor` of shape `(C,)`, *optional*): where they are known. Default: they are fitted, each
            class as if it had one photo more.
        reduce (`Reduce`, *optional*): sums over processes.
        num_rounds (`int`): of expectation maximisation.

    Raises:
        ValueError: if there are no photos; as [`NonFiniteError`], if the head, a feature or a photo's probabilities by
            texts aren't finite.
    """
    check_finite(head, "The head", "Check the text classifier's weights.")
    center, spread, num_photos = _measure_spread(batches, head, reduce)
    # What all classes share changes nothing but rounding.
    head = text_scale * (head - head.mean(0))
    log_frequencies = (torch.full_like(head[:, 0], 1 / len(head)) if frequencies is None else frequencies).log()
    expect = partial(_expect, batches, center, len(head), reduce)
    counts, sums, variances = expect(lambda photos, text: text)
    check_finite(counts, "The number of photos by their texts", "Check the log probabilities by texts.")
    for _ in range(num_rounds):
        covariance = _shrink(_within_classes(spread, counts, sums, num_photos), spread, num_photos, shrinkage)
        means = (sums + text_photos * head @ covariance) / (counts + text_photos).unsqueeze(-1)
        weight = torch.linalg.solve(covariance, means.T).T
        bias = log_frequencies - (weight * means).sum(-1) / 2
        counts, sums, variances = expect(partial(_joint, weight=weight, bias=bias, text_weight=text_weight))
        if frequencies is None:
            log_frequencies = ((counts + 1) / (num_photos + len(counts))).log()
    bias = log_frequencies - (weight * means).sum(-1) / 2 - weight @ center
    errors = (variances + counts * (1 - counts / num_photos)).clamp(min=0).sqrt()
    return ClassMixture(weight, bias, text_weight, counts, errors, log_frequencies.exp())


def _joint(
    photos: torch.Tensor, text: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, text_weight: float
) -> torch.Tensor:
    return photos @ weight.T + bias + text_weight * text


def _measure_spread(batches: Batches, head: torch.Tensor, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The features' mean (E,), the sum of their squares around it (E, E), and how many there are."""
    # Of the head's shape from the start: a process may have no photos where others have some.
    total = head.new_zeros(head.shape[1])
    num_photos = 0
    for features, _ in batches():
        total = total + features.sum(0)
        num_photos += len(features)
    sums = reduce(torch.cat([total, total.new_tensor([num_photos])]))
    num_photos = sums[-1].item()
    if num_photos == 0:
        raise ValueError("There are no photos to fit the mixture to; pass one or more.")
    center = sums[:-1] / num_photos
    # After the sum over processes, so that all of them stop.
    check_finite(center, "The mean of the features", "Check the images and the model's weights.")
    spread = head.new_zeros(head.shape[1], head.shape[1])
    for features, _ in batches():
        photos = features - center
        spread = spread + photos.T @ photos
    return center, reduce(spread), num_photos


def _expect(
    batches: Batches,
    center: torch.Tensor,
    num_classes: int,
    reduce: Reduce,
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each class the expected photos (C,), the sum of their features around the centre (C, E), and the variance of
    their number (C,).
    """
    total = center.new_zeros(num_classes, len(center) + 2)
    for features, text in batches():
        photos = features - center
        shares = score(photos, text).softmax(-1)
        variances = (shares * (1 - shares)).sum(0)
        total = total + torch.cat([shares.sum(0)[:, None], shares.T @ photos, variances[:, None]], 1)
    total = reduce(total)
    return total[:, 0], total[:, 1:-1], total[:, -1]


def _within_classes(spread: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor, num_photos: float) -> torch.Tensor:
    """The covariance (E, E) within classes: that of all photos less that of their classes' means, which count as
    having seen one more photo, at the centre: the mean of a few photos lies nearer to them than to others of their
    class.
    """
    means = sums / (counts + 1).unsqueeze(-1)
    return (spread - means.T @ (counts.unsqueeze(-1) * means)) / num_photos


def _shrink(covariance: torch.Tensor, spread: torch.Tensor, num_photos: float, shrinkage: float) -> torch.Tensor:
    """Towards a ball with the variance of all photos."""
    variance = spread.trace() / num_photos / len(spread)
    ball = variance.clamp(min=torch.finfo(variance.dtype).eps) * torch.eye(
        len(spread), dtype=spread.dtype, device=spread.device
    )
    return (1 - shrinkage) * covariance + shrinkage * ball
