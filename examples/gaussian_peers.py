"""
TransCLIP and StatA: Gaussians over the training images' features, on which texts and similar images agree.

What is fitted classifies an image that wasn't there by its text and one Gaussian a class, without neighbours. N
training images, C classes, E width of the features. All features are of unit norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize


CHUNK = 1024  # rows of the matrix of similarities that are in memory at once
NUM_STEPS = 5  # from images to their neighbours, in a round
# Far below the mean variance of features, 1 / E.
MIN_VARIANCE = 1e-8


@dataclass(frozen=True)
class Gaussians:
    """One Gaussian a class, of diagonal covariance, and how much its word counts beside the text's."""

    means: torch.Tensor  # (C, E), unit norm
    variances: torch.Tensor  # (C, E), or (1, E) where classes share them
    weight: float

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Log likelihood of features (n, E) under each class (n, C), but for what all share, times `weight`."""
        precisions = 1 / self.variances
        squares = features**2 @ precisions.T - 2 * features @ (self.means * precisions).T
        squares = squares + (self.means**2 * precisions).sum(-1)
        return -self.weight / 2 * (squares + self.variances.log().sum(-1))


@dataclass(frozen=True)
class Neighbors:
    """Each image's most similar other ones."""

    index: torch.Tensor  # (N, k)
    similarity: torch.Tensor  # (N, k), cosines

    @classmethod
    def find(cls, features: torch.Tensor, count: int) -> "Neighbors":
        """The `count` of each of the features (N, E), or all others where there are fewer."""
        similarities, indices = [], []
        for start in range(0, len(features), CHUNK):
            own = features[start : start + CHUNK] @ features.T
            rows = torch.arange(len(own))
            own[rows, start + rows] = -torch.inf
            similarity, index = own.topk(min(count, len(features) - 1), dim=-1)
            similarities.append(similarity)
            indices.append(index)
        return cls(torch.cat(indices), torch.cat(similarities))

    def assign(self, evidence: torch.Tensor, shares: torch.Tensor, weight: float) -> torch.Tensor:
        """Shares (N, C) of the classes in each image, by log evidence (N, C) and its neighbours' shares, both ways."""
        for _ in range(NUM_STEPS):
            votes = torch.einsum("nk,nkc->nc", self.similarity, shares[self.index])
            sent = self.similarity.unsqueeze(-1) * shares.unsqueeze(1)
            votes = votes.index_add(0, self.index.flatten(), sent.flatten(0, 1))
            shares = (evidence + weight * votes).softmax(-1)
        return shares


def fit_transclip(
    features: torch.Tensor,
    head: torch.Tensor,
    scale: float,
    num_confident: int = 8,
    num_neighbors: int = 3,
    weight: float = 1 / 50,
    neighbor_weight: float = 1 / 6,
    num_rounds: int = 10,
) -> Gaussians:
    """TransCLIP without labels (arXiv:2406.01837): classes share a variance, and their means start at images.

    Args:
        features (`torch.Tensor` of shape `(N, E)`): of the training images.
        head (`torch.Tensor` of shape `(C, E)`): the texts.
        scale (`float`): of the cosines.
        num_confident (`int`): images of each class that its mean starts from, those that its text is surest of.
        num_neighbors, neighbor_weight (`int`, `float`): of the graph of similar images.
        weight (`float`): of the log likelihood.
        num_rounds (`int`): of assigning images to classes and fitting the Gaussians.
    """
    text = (scale * features @ head.T).log_softmax(-1)
    confident = text.topk(min(num_confident, len(features)), dim=0).indices
    width = features.shape[1]
    own = Gaussians(normalize(features[confident].mean(0), dim=-1), features.new_full((1, width), 1 / width), weight)

    def update(shares: torch.Tensor) -> Gaussians:
        means = normalize(_weighted_mean(shares, features), dim=-1)
        class_shares = shares.mean(0, keepdim=True)
        variances = class_shares @ _variances(shares, features, means)
        return Gaussians(means, variances.clamp_min(MIN_VARIANCE), weight)

    return _alternate(
        features, text, own, update, Neighbors.find(features, num_neighbors), neighbor_weight, num_rounds
    )


def fit_stata(
    features: torch.Tensor,
    head: torch.Tensor,
    scale: float,
    anchor: float = 1.0,
    num_neighbors: int = 3,
    weight: float = 1 / 50,
    neighbor_weight: float = 1 / 6,
    num_rounds: int = 10,
) -> Gaussians:
    """StatA (arXiv:2501.03729): each class has its variances, and its text holds both; more, the fewer images it has.

    Args:
        anchor (`float`): how many images a text counts as.
        features, head, scale, num_neighbors, neighbor_weight, weight, num_rounds: as in [`fit_transclip`].
    """
    text = (scale * features @ head.T).log_softmax(-1)
    first_variance = 1 / features.shape[1]
    own = Gaussians(head, torch.full_like(head, first_variance), weight)

    def update(shares: torch.Tensor) -> Gaussians:
        counts = shares.argmax(-1).bincount(minlength=len(head)).to(features.dtype)
        trust = (counts / (anchor + counts)).unsqueeze(-1)
        means = normalize(trust * _weighted_mean(shares, features) + (1 - trust) * head, dim=-1)
        anchored = first_variance + (head - means) ** 2
        variances = trust * _variances(shares, features, means) + (1 - trust) * anchored
        return Gaussians(means, variances.clamp_min(MIN_VARIANCE), weight)

    return _alternate(
        features, text, own, update, Neighbors.find(features, num_neighbors), neighbor_weight, num_rounds
    )


def _alternate(
    features: torch.Tensor,
    text: torch.Tensor,
    own: Gaussians,
    update: Callable[[torch.Tensor], Gaussians],
    graph: Neighbors,
    neighbor_weight: float,
    num_rounds: int,
) -> Gaussians:
    """Assign images to classes, by log probabilities of the texts (N, C), and fit the Gaussians, in turns."""
    shares = text.exp()
    for _ in range(num_rounds):
        shares = graph.assign(text + own.scores(features), shares, neighbor_weight)
        own = update(shares)
    return own


def _weighted_mean(shares: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    counts = shares.sum(0).clamp_min(torch.finfo(shares.dtype).tiny)
    return (shares / counts).T @ features


def _variances(shares: torch.Tensor, features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Mean squares (C, E) of the features around their classes' means (C, E)."""
    squares = _weighted_mean(shares, features**2) - 2 * means * _weighted_mean(shares, features) + means**2
    return squares.clamp_min(0)
