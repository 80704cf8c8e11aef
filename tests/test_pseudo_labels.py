"""Pseudo-labels and fairness against their definition in float64 numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import LOSS, within

from microclip_hf.pseudo_labels import (
    aggregate_scores,
    align_distribution,
    composite_embeds,
    fairness_loss,
    fuse_embeds,
)


pytestmark = pytest.mark.numerical


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embeds(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("num_crops", [1, 2, 8])
def test_composite(num_crops):
    z, g = embeds(5, num_crops, 6), embeds(5, 6, seed=1)
    for own, crops, anchor in zip(composite_embeds(z, g), z.double().numpy(), g.double().numpy(), strict=True):
        relevance = np.exp(crops @ anchor)
        np.testing.assert_allclose(own, unit((relevance[:, None] * crops).sum(0) / relevance.sum()), **within())


def test_composite_without_crops_is_the_weak_view():
    g = embeds(5, 6)
    assert composite_embeds(torch.empty(5, 0, 6), g).equal(g)


def test_fused_embedding_and_aggregation():
    g, l = embeds(5, 6), embeds(5, 6, seed=1)  # noqa: E741
    expected = unit(0.5 * g.double().numpy() + 0.5 * l.double().numpy())
    np.testing.assert_allclose(fuse_embeds(g, l, 0.5), expected, **within())
    expected = unit(0.8 * g.double().numpy() + 0.2 * l.double().numpy())
    np.testing.assert_allclose(fuse_embeds(g, l, 0.8), expected, **within())
    prior, fused = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(aggregate_scores(prior, fused, 0.75), torch.tensor([[0.75, 0.5]]), **within())
    assert aggregate_scores(prior, fused, 0).equal(fused) and aggregate_scores(prior, fused, 1).equal(prior)


def test_distribution_alignment():
    """Three batches against the definition, `p / mean`, renormalised, with the mean of all batches so far."""
    generator, running, means = torch.Generator().manual_seed(0), None, []
    for batch in range(1, 4):
        logits = 5 * torch.randn(2, 6, 4, generator=generator)
        probabilities = logits.double().softmax(-1)
        means.append(probabilities.mean(1))
        aligned, running = align_distribution(logits, means[-1].log().float(), running, 1 / batch)
        mean = torch.stack(means).mean(0)
        expected = probabilities / mean.unsqueeze(1)
        torch.testing.assert_close(aligned.double(), expected / expected.sum(-1, keepdim=True), **within())
        torch.testing.assert_close(running.exp().double(), mean, **within())


def test_distribution_alignment_of_a_class_that_no_image_gets():
    """Its probabilities underflow, and still nothing is NaN."""
    logits = torch.tensor([[[300.0, 0.0, -300.0], [0.0, 300.0, -300.0]]])
    log_mean = logits.log_softmax(-1).logsumexp(1) - math.log(2)
    aligned, _ = align_distribution(logits, log_mean, None, 1.0)
    # p / mean is (2, 0, 1) for the first image: half of the class that nobody gets is its own.
    torch.testing.assert_close(aligned[0], torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]]) / 3, rtol=LOSS, atol=0)


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(2, 7), st.integers(1, 4), st.integers(0, 1000))
def test_fairness(batch_size, num_classes, steps, seed):
    """Loss, running mean and gradient of every step of an epoch."""
    generator, running, expected = torch.Generator().manual_seed(seed), None, None
    for _ in range(steps):
        logits = 3 * torch.randn(batch_size, num_classes, generator=generator)
        logits.requires_grad_()
        loss, running = fairness_loss(logits.log_softmax(-1), running)
        double = logits.detach().double().requires_grad_()
        mean = double.softmax(-1).mean(0)
        mean = mean if expected is None else 0.5 * (expected + mean)
        reference = -mean.log().mean() / 0.5
        expected = mean.detach()
        torch.testing.assert_close(loss.double(), reference, rtol=LOSS, atol=0)
        torch.testing.assert_close(running.exp().double(), expected, **within())
        (gradient,) = torch.autograd.grad(loss, logits)
        (reference_gradient,) = torch.autograd.grad(reference, double)
        torch.testing.assert_close(gradient.double(), reference_gradient, **within())


def test_fairness_of_a_class_without_probability_is_finite():
    logits = torch.tensor([[0.0, 400.0], [0.0, 500.0]], requires_grad=True)
    loss, _ = fairness_loss(logits.log_softmax(-1), None)
    loss.backward()
    assert loss.item() == pytest.approx((400 + math.log(2)) / 2 / 0.5, rel=LOSS)
    assert logits.grad.isfinite().all() and logits.grad[0, 0] < 0


def test_fairness_is_least_for_equal_use():
    equal = torch.zeros(4, 3).log_softmax(-1)
    uneven = torch.tensor([[2.0, 0, 0]]).expand(4, 3).log_softmax(-1)
    assert fairness_loss(equal, None)[0].item() == pytest.approx(2 * math.log(3), rel=LOSS)
    assert fairness_loss(uneven, None)[0] > fairness_loss(equal, None)[0]
