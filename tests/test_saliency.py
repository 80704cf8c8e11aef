"""The normalised cut against float64 and against its definition."""

import functools

import numpy as np
import pytest
import scipy.linalg
import torch
from exact_cut import has_one_mask, known_mask, known_masks, laplacian64, mask64
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import COSINE
from torch.overrides import TorchFunctionMode

from microclip_hf import MicroCLIPConfig, saliency
from microclip_hf.saliency import (
    EPSILON,
    cut,
    fiedler_vector,
    gram,
    has_eigensolver,
    normalize_graph,
    patch_affinity,
    saliency_mask,
)


pytestmark = pytest.mark.numerical


@pytest.fixture(params=["eigh", "products"])
def solver(request, monkeypatch):
    monkeypatch.setattr(saliency, "has_eigensolver", lambda device: request.param == "eigh")


@pytest.fixture
def products(monkeypatch):
    monkeypatch.setattr(saliency, "has_eigensolver", lambda device: False)


class TruncatedFactors(TorchFunctionMode):
    """Matrix products as on a GPU with TF32: of each factor, 11 significant bits are read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm):
            args = [(factor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for factor in args]
        return function(*args, **(kwargs or {}))


def random_graph(num_patches, density, seed):
    rng = np.random.default_rng(seed)
    alike = rng.random((num_patches, num_patches)) < density
    alike = np.triu(alike) | np.triu(alike).T
    return np.where(alike, 1.0, EPSILON)


def block_graph(*sizes):
    """Disconnected blocks of patches that are all alike."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(labels[:, None] == labels, 1.0, EPSILON)


def joined_graph(num_patches, seed, blocks=3):
    """Blocks with noise inside, joined by a few edges, in any order: several eigenvalues are close to the second."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_patches) * blocks // num_patches)
    alike = (labels[:, None] == labels) & (rng.random((num_patches, num_patches)) < rng.choice([0.5, 0.8, 1]))
    joined = rng.integers(0, num_patches, (rng.integers(2, num_patches // 2), 2))
    alike[joined[:, 0], joined[:, 1]] = True
    return np.where(np.triu(alike) | np.triu(alike).T | np.eye(num_patches, dtype=bool), 1.0, EPSILON)


def disconnected_graph(num_patches, seed):
    """Two components and noise inside them: the two largest eigenvalues are 4e-6 apart."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(num_patches // 4, num_patches // 2 - 1))
    alike = np.zeros((num_patches, num_patches), dtype=bool)
    alike[:size, :size] = random_graph(size, 0.7, seed) == 1
    alike[size:, size:] = random_graph(num_patches - size, 0.7, seed + 100) == 1
    np.fill_diagonal(alike, True)
    order = rng.permutation(num_patches)
    return np.where(alike, 1.0, EPSILON)[np.ix_(order, order)]


def clustered_patches(num_images, num_patches, seed):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_images, 5, 8, generator=generator)
    labels = torch.randint(0, 5, (num_images, num_patches, 1), generator=generator)
    return centers.take_along_dim(labels, 1) + 0.6 * torch.randn(num_images, num_patches, 8, generator=generator)


def comparable(graphs, statistic="std", largest_gap=2.0):
    """The graphs with a known mask, as a batch, and their masks."""
    pairs = [(graph, known_mask(graph, statistic, largest_gap)) for graph in graphs]
    graphs, masks = zip(*((graph, mask) for graph, mask in pairs if mask is not None), strict=True)
    return torch.tensor(np.stack(graphs), dtype=torch.float32), np.stack(masks)


@pytest.mark.parametrize("num_patches", [9, 49, 196])
@pytest.mark.parametrize("statistic", ["std", "mean"])
def test_masks_equal_float64(num_patches, statistic, solver):
    graphs, expected = comparable(
        (random_graph(num_patches, (0.05, 0.3, 0.6, 0.9)[seed % 4], seed) for seed in range(60)), statistic
    )
    assert len(graphs) >= 20
    assert np.array_equal(cut(fiedler_vector(graphs), statistic).numpy(), expected)


@functools.cache
def hard_graphs(num_patches, tries):
    """Eigengaps from 1e-3 to 5e-3."""
    return comparable((joined_graph(num_patches, seed) for seed in range(tries)), largest_gap=5e-3)


HARD = [(25, 1500, 5), (49, 1500, 30), (196, 120, 30)]


@pytest.mark.parametrize("num_patches, tries, least", HARD)
def test_masks_of_small_eigengaps_equal_float64(num_patches, tries, least, solver):
    graphs, expected = hard_graphs(num_patches, tries)
    assert len(graphs) >= least
    assert np.array_equal(cut(fiedler_vector(graphs)).numpy(), expected)


@pytest.mark.parametrize("num_patches, tries, least", HARD)
def test_tf32_does_not_change_the_cut(num_patches, tries, least, products):
    graphs, expected = hard_graphs(num_patches, tries)
    with TruncatedFactors():
        masks = cut(fiedler_vector(graphs))
    assert np.array_equal(masks.numpy(), expected)


def test_tf32_does_not_change_the_graph():
    patches = torch.randn(4, 49, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)
    similarity = (patches.double() @ patches.double().mT).numpy()
    unit = torch.nn.functional.normalize(patches, dim=-1)
    with TruncatedFactors():
        graph, product, plain = patch_affinity(patches, threshold=100.0), gram(unit), unit @ unit.mT
    sure = np.abs(similarity - 100) > COSINE * np.abs(similarity).max()
    assert sure.mean() > 0.99
    assert np.array_equal(graph.numpy()[sure] == 1, similarity[sure] > 100)
    exact = unit.double() @ unit.double().mT
    assert (product - exact).abs().max() < COSINE < 1e-4 < (plain - exact).abs().max()


@pytest.mark.parametrize("num_patches, count", [(49, 40), (196, 40), (256, 8), (576, 4)])
@pytest.mark.parametrize("statistic", ["std", "mean"])
def test_disconnected_graphs_equal_float64(num_patches, count, statistic, solver):
    graphs, expected = comparable((disconnected_graph(num_patches, seed) for seed in range(count)), statistic)
    assert len(graphs) >= count // 2
    assert np.array_equal(cut(fiedler_vector(graphs), statistic).numpy(), expected)


@pytest.mark.parametrize("affinity, threshold", [("dot", 0.2), ("cosine", 0.5)])
@pytest.mark.parametrize("blocks", [2, 3])
def test_feature_and_block_graphs_equal_float64(affinity, threshold, blocks, solver):
    features = patch_affinity(clustered_patches(60, 49, seed=blocks), affinity, threshold)
    joined = [joined_graph(49, seed, blocks) for seed in range(60)]
    graphs, expected = comparable([*features.double().numpy(), *joined])
    assert len(graphs) >= 45
    assert np.array_equal(cut(fiedler_vector(graphs)).numpy(), expected)


@pytest.mark.parametrize(
    "graph",
    [
        block_graph(5, 5, 5),
        block_graph(*[1] * 9),
        block_graph(20, 20, 9),
        np.where(np.abs(np.subtract.outer(np.arange(12), np.arange(12)) % 12) % 11 <= 1, 1.0, EPSILON),  # a cycle
        random_graph(196, 0.02, 0),
    ],
    ids=["three blocks", "isolated", "uneven blocks", "cycle", "sparse"],
)
def test_repeated_eigenvalues_give_an_eigenvector(graph, solver):
    """Any unit vector of the space is right: eigenvalue and residual are checked, in float64."""
    fiedler = fiedler_vector(torch.tensor(graph, dtype=torch.float32)[None])[0].double().numpy()
    laplacian = laplacian64(graph)
    second = scipy.linalg.eigvalsh(laplacian)[1]
    assert abs(np.linalg.norm(fiedler) - 1) < COSINE
    assert np.linalg.norm(laplacian @ fiedler - second * fiedler) < 2 * COSINE
    assert abs(fiedler @ np.sqrt(graph.sum(1))) / np.linalg.norm(np.sqrt(graph.sum(1))) < COSINE


def test_two_blocks_are_separated(solver):
    patches = torch.cat([torch.tensor([[2.0, 0]]).expand(30, 2), torch.tensor([[0, 2.0]]).expand(19, 2)])
    mask = saliency_mask(patches[None])[0]
    assert mask.equal(torch.arange(49) >= 30)


def test_two_patches(solver):
    """Unlike each other, they are two equal blocks; alike, they have no cut."""
    assert saliency_mask(2 * torch.eye(2)[None]).tolist() == [[True, False]]
    assert saliency_mask(torch.full((1, 2, 4), 3.0)).all() and saliency_mask(torch.zeros(1, 2, 4)).all()


def test_two_equal_blocks_keep_the_first_patch(solver):
    """Every entry has the same magnitude, below their standard deviation."""
    patches = torch.tensor([[2.0, 0], [0, 2.0]]).repeat(8, 1)
    assert saliency_mask(patches[None])[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("patches", [torch.full((9, 4), 3.0), torch.full((9, 4), 0.01), 2 * torch.eye(9)])
def test_no_cut_keeps_every_patch(patches, solver):
    assert saliency_mask(patches[None]).all()


def test_one_patch_keeps_itself(solver):
    assert saliency_mask(torch.randn(3, 1, 8)).equal(torch.ones(3, 1, dtype=torch.bool))


def test_images_of_a_batch_do_not_matter_to_each_other(solver):
    """No cut, a clear cut and an empty one side by side."""
    clear = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    assert known_masks(clear[None], MicroCLIPConfig())[0] is not None
    batch = torch.stack([torch.full((16, 16), 3.0), clear, torch.eye(2).repeat(8, 8) * 2, 2 * torch.eye(16)])
    assert saliency_mask(batch).equal(torch.cat([saliency_mask(image[None]) for image in batch]))


def test_affinities():
    patches = torch.tensor([[[1.0, 0], [0.15, 0], [3.0, 4.0]]])
    assert (patch_affinity(patches)[0] == 1).int().tolist() == [[1, 0, 1], [0, 0, 1], [1, 1, 1]]
    assert (patch_affinity(patches, "cosine", 0.7)[0] == 1).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert patch_affinity(patches)[0, 0, 1].item() == pytest.approx(1e-6)


vectors = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=40).map(torch.tensor)


@settings(max_examples=100)
@given(vectors, st.floats(0.01, 100), st.sampled_from([-1, 1]), st.sampled_from(["std", "mean"]))
def test_cut_is_invariant_to_sign_and_scale(fiedler, scale, sign, statistic):
    largest = fiedler.abs().max().item()
    assume(largest > 1e-3 and has_one_mask(fiedler, 1e-4 * largest, statistic))
    expected = cut(fiedler[None], statistic)
    assert cut(sign * scale * fiedler[None], statistic).equal(expected)
    assert np.array_equal(expected[0].numpy(), mask64(fiedler, statistic))


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(8, 64))
def test_mask_is_invariant_to_permutation_of_patches(seed, num_patches):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(1, num_patches, 6, generator=generator)
    (expected,) = known_masks(patches, MicroCLIPConfig())
    assume(expected is not None)
    order = torch.randperm(num_patches, generator=generator)
    assert np.array_equal(saliency_mask(patches)[0], expected)
    assert np.array_equal(saliency_mask(patches[:, order])[0], expected[order])


def test_autocast_and_half_precision_do_not_change_the_cut():
    patches = torch.randn(4, 49, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = saliency_mask(patches.float())
    assert saliency_mask(patches).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert saliency_mask(patches.float()).equal(expected)


def test_no_gradient_flows_through_the_mask():
    assert not saliency_mask(torch.randn(2, 9, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_an_error(bad):
    patches = torch.randn(2, 9, 4)
    patches[1, 3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        saliency_mask(patches)


def test_nan_is_an_error_in_compiled_code(solver):
    """There the check is an assertion on the device; a Python branch would break the graph."""
    compiled = torch.compile(saliency_mask, fullgraph=True, backend="eager")
    patches = clustered_patches(2, 9, seed=0)
    assert not any(mask is None for mask in known_masks(patches, MicroCLIPConfig()))
    assert compiled(patches).equal(saliency_mask(patches))
    patches[0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        compiled(patches)
    assert torch.is_grad_enabled()


def test_products_replace_eigh_off_the_cpu():
    assert [has_eigensolver(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "xpu")] == [True] + 3 * [False]


class SaliencyMask(torch.nn.Module):
    def forward(self, patch_embeds):
        return saliency_mask(patch_embeds)


def test_mask_can_be_exported():
    """For any batch size, without an eigensolver, and with eager's masks."""
    patches = clustered_patches(40, 49, seed=0)
    expected = known_masks(patches, MicroCLIPConfig())
    patches = patches[[mask is not None for mask in expected]]
    expected = torch.tensor(np.stack([mask for mask in expected if mask is not None]))
    assert len(patches) >= 20
    batch = {"patch_embeds": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(SaliencyMask(), (patches[:2],), dynamic_shapes=batch)
    assert not any("linalg_eigh" in str(node.target) for node in exported.graph.nodes)
    for size in (1, 5, len(patches)):
        assert exported.module()(patches[:size]).equal(expected[:size])
        assert saliency_mask(patches[:size]).equal(expected[:size])


def cut_residual(graph, fiedler):
    """How far unit vectors are from eigenvectors of the Laplacian `L`: the norm of `L f - (f^T L f) f`."""
    # A sum, not a matrix product: that may be rounded to TF32.
    applied = fiedler - (normalize_graph(graph)[0] * fiedler.unsqueeze(-2)).sum(-1)
    eigenvalue = (fiedler * applied).sum(-1, keepdim=True)
    return torch.linalg.vector_norm(applied - eigenvalue * fiedler, dim=-1)


def test_residual():
    """Of any unit vector, against float64; none of the second eigenvector."""
    graph = random_graph(49, 0.3, 0)
    batch = torch.tensor(graph, dtype=torch.float32)[None]
    vector = torch.nn.functional.normalize(torch.randn(49, generator=torch.Generator().manual_seed(0)), dim=-1)
    applied = laplacian64(graph) @ vector.numpy()
    expected = np.linalg.norm(applied - (vector.numpy() @ applied) * vector.numpy())
    assert cut_residual(batch, vector[None]).item() == pytest.approx(expected, abs=COSINE)
    assert cut_residual(batch, fiedler_vector(batch)).item() < COSINE
