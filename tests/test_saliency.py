"""The normalised cut against float64 and against its definition."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from microclip_hf import saliency
from microclip_hf.saliency import EPSILON, cut, fiedler_vector, patch_affinity, saliency_mask


def laplacian64(graph):
    graph = np.asarray(graph, dtype=np.float64)
    root = np.sqrt(graph.sum(1))
    return np.eye(len(graph)) - graph / np.outer(root, root)


def mask64(fiedler, statistic="std"):
    """The cut, from its definition, in float64."""
    fiedler = np.asarray(fiedler, dtype=np.float64)
    magnitude = np.abs(fiedler)
    seed = int(np.argmax(magnitude >= magnitude.max() * (1 - 1e-4)))
    fiedler = fiedler * np.sign(fiedler[seed])
    mask = fiedler > (fiedler.std(ddof=1) if statistic == "std" else fiedler.mean())
    if not mask.any():
        mask[seed] = True
    return mask


def random_graph(num_patches, density, seed):
    rng = np.random.default_rng(seed)
    alike = rng.random((num_patches, num_patches)) < density
    alike = np.triu(alike) | np.triu(alike).T
    return np.where(alike, 1.0, EPSILON)


def block_graph(*sizes):
    """Disconnected blocks of patches that are all alike."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(labels[:, None] == labels, 1.0, EPSILON)


@pytest.mark.parametrize("num_patches", [9, 49, 196])
@pytest.mark.parametrize("statistic", ["std", "mean"])
def test_masks_equal_float64(num_patches, statistic):
    """Wherever the eigengap is over 1e-3 and no entry within 1e-5 of the threshold."""
    graphs, expected = [], []
    for seed in range(60):
        graph = random_graph(num_patches, (0.05, 0.3, 0.6, 0.9)[seed % 4], seed)
        values, vectors = scipy.linalg.eigh(laplacian64(graph))
        fiedler = vectors[:, 1]
        margin = np.abs(np.abs(fiedler) - (fiedler.std(ddof=1) if statistic == "std" else 0)).min()
        magnitudes = np.sort(np.abs(fiedler))
        tied = magnitudes[-2] > magnitudes[-1] * (1 - 1e-3)
        if statistic == "mean":
            margin = np.abs(fiedler - fiedler.mean()).min()
        if values[2] - values[1] > 1e-3 and margin > 1e-5 and not tied:
            graphs.append(torch.tensor(graph, dtype=torch.float32))
            expected.append(mask64(fiedler, statistic))
    assert len(graphs) >= 20
    masks = cut(fiedler_vector(torch.stack(graphs)), statistic)
    assert np.array_equal(masks.numpy(), np.stack(expected))


@pytest.mark.parametrize("num_patches", [49, 196])
def test_disconnected_graphs_equal_float64(num_patches):
    """Two components and noise inside them: the two largest eigenvalues are 4e-6 apart."""
    compared = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(num_patches // 4, num_patches // 2 - 1))
        alike = np.zeros((num_patches, num_patches), dtype=bool)
        alike[:size, :size] = random_graph(size, 0.7, seed) == 1
        alike[size:, size:] = random_graph(num_patches - size, 0.7, seed + 100) == 1
        np.fill_diagonal(alike, True)
        order = rng.permutation(num_patches)
        graph = np.where(alike, 1.0, EPSILON)[np.ix_(order, order)]
        values, vectors = scipy.linalg.eigh(laplacian64(graph))
        fiedler = vectors[:, 1]
        magnitudes = np.sort(np.abs(fiedler))
        margin = np.abs(np.abs(fiedler) - fiedler.std(ddof=1)).min()
        if values[2] - values[1] < 1e-3 or magnitudes[-2] > magnitudes[-1] * (1 - 1e-3) or margin < 1e-5:
            continue
        mask = cut(fiedler_vector(torch.tensor(graph, dtype=torch.float32)[None]))[0]
        assert np.array_equal(mask.numpy(), mask64(fiedler)), seed
        compared += 1
    assert compared >= 15


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
def test_repeated_eigenvalues_give_an_eigenvector(graph):
    """Any unit vector of the space is right: eigenvalue and residual are checked, in float64."""
    fiedler = fiedler_vector(torch.tensor(graph, dtype=torch.float32)[None])[0].double().numpy()
    laplacian = laplacian64(graph)
    second = scipy.linalg.eigvalsh(laplacian)[1]
    assert np.isclose(np.linalg.norm(fiedler), 1, atol=1e-6)
    assert np.linalg.norm(laplacian @ fiedler - second * fiedler) < 2e-5
    assert abs(fiedler @ np.sqrt(graph.sum(1))) / np.linalg.norm(np.sqrt(graph.sum(1))) < 1e-5


def test_two_blocks_are_separated():
    patches = torch.cat([torch.tensor([[2.0, 0]]).expand(30, 2), torch.tensor([[0, 2.0]]).expand(19, 2)])
    mask = saliency_mask(patches[None])[0]
    assert mask.equal(torch.arange(49) >= 30)


def test_two_patches():
    """Unlike each other, they are two equal blocks; alike, they have no cut."""
    assert saliency_mask(2 * torch.eye(2)[None]).tolist() == [[True, False]]
    assert saliency_mask(torch.full((1, 2, 4), 3.0)).all() and saliency_mask(torch.zeros(1, 2, 4)).all()


def test_two_equal_blocks_keep_the_first_patch():
    """Every entry has the same magnitude, below their standard deviation."""
    patches = torch.tensor([[2.0, 0], [0, 2.0]]).repeat(8, 1)
    assert saliency_mask(patches[None])[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("patches", [torch.full((9, 4), 3.0), torch.full((9, 4), 0.01), 2 * torch.eye(9)])
def test_no_cut_keeps_every_patch(patches):
    assert saliency_mask(patches[None]).all()


def test_one_patch_keeps_itself():
    assert saliency_mask(torch.randn(3, 1, 8)).equal(torch.ones(3, 1, dtype=torch.bool))


def test_images_of_a_batch_do_not_matter_to_each_other():
    """No cut, a clear cut and an empty one side by side."""
    batch = torch.stack(
        [torch.full((16, 16), 3.0), torch.randn(16, 16), torch.eye(2).repeat(8, 8) * 2, 2 * torch.eye(16)]
    )
    assert saliency_mask(batch).equal(torch.cat([saliency_mask(image[None]) for image in batch]))


def test_affinities():
    patches = torch.tensor([[[1.0, 0], [0.15, 0], [3.0, 4.0]]])
    assert (patch_affinity(patches)[0] == 1).int().tolist() == [[1, 0, 1], [0, 0, 1], [1, 1, 1]]
    assert (patch_affinity(patches, "cosine", 0.7)[0] == 1).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert patch_affinity(patches)[0, 0, 1].item() == pytest.approx(1e-6)


def cuttable(fiedler):
    """Whether neither the seed nor the threshold hangs on rounding."""
    magnitudes = fiedler.abs().sort().values
    distances = [(fiedler * sign - level).abs().min() for sign in (1, -1) for level in (fiedler.std(), 0.0)]
    return (
        magnitudes[-1] > 1e-3
        and magnitudes[-2] < 0.999 * magnitudes[-1]
        and min(distances) > 1e-4 * magnitudes[-1]
        and (fiedler - fiedler.mean()).abs().min() > 1e-4 * magnitudes[-1]
    )


vectors = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=60).map(torch.tensor)


@settings(max_examples=200)
@given(vectors, st.floats(0.01, 100), st.sampled_from([-1, 1]), st.sampled_from(["std", "mean"]))
def test_cut_is_invariant_to_sign_and_scale(fiedler, scale, sign, statistic):
    assume(cuttable(fiedler))
    expected = cut(fiedler[None], statistic)
    assert cut(sign * scale * fiedler[None], statistic).equal(expected)
    assert np.array_equal(expected[0].numpy(), mask64(fiedler, statistic))


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(8, 64))
def test_mask_is_invariant_to_permutation_of_patches(seed, num_patches):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(1, num_patches, 6, generator=generator)
    graph = patch_affinity(patches)
    values = torch.linalg.eigvalsh(torch.tensor(laplacian64(graph[0])))
    assume(values[2] - values[1] > 1e-3 and cuttable(fiedler_vector(graph)[0]))
    order = torch.randperm(num_patches, generator=generator)
    assert saliency_mask(patches[:, order]).equal(saliency_mask(patches)[:, order])


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


def test_nan_is_an_error_in_compiled_code():
    """There the check is an assertion on the device; a Python branch would break the graph."""
    compiled = torch.compile(saliency_mask, fullgraph=True, backend="eager")
    patches = torch.randn(2, 9, 4)
    assert compiled(patches).equal(saliency_mask(patches))
    patches[0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        compiled(patches)
    assert torch.is_grad_enabled()


def test_back_ends_without_eigh_run_it_on_the_cpu(monkeypatch):
    patches = torch.randn(2, 25, 8)
    expected = saliency_mask(patches)
    monkeypatch.setattr(saliency, "BACKENDS_WITHOUT_EIGH", ("cpu",))
    assert saliency_mask(patches).equal(expected)
