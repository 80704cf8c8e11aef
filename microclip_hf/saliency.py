"""Which patches belong to the object: a normalised cut of the patch graph (arXiv:2510.02270, section 3.2).

The cut is TokenCut's (arXiv:2202.11539), in the form that microCLIP's authors published as part of SOAP. Tensor
functions on a whole batch, computed in float32 (also under autocast) and without gradient.
"""

import torch


# Weight of the edge between two patches that aren't alike: the graph stays connected.
EPSILON = 1e-6
# Entries of an eigenvector this close to the largest magnitude (relative) count as tied with it.
TIE_TOLERANCE = 1e-4
# TF32 keeps 11 significant bits of a float32's 24: the multiple that splits one there.
SPLIT = 2.0**13 + 1
# How often (I + M) / 2 is squared: from an eigengap of 1e-3 on, the second eigenvector is left with at most exp(-32).
SQUARINGS = 16
# The first of them, in which the identity is kept apart; after 3 it weighs 2^-8.
SQUARINGS_APART = 3


def is_exporting() -> bool:
    """Whether the program is being exported, by tracing, as is `torch.export`'s default.

    PyTorch's compiler alone is no sign of it: older versions say that they export whatever they compile.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


class NonFiniteError(ValueError):
    """Values that must be finite aren't: a model's input or weights, or what a layer made of them."""


def check_finite(values: torch.Tensor, name: str, advice: str) -> None:
    """Refuse NaN and infinite values; switched off in exported programs.

    On a CPU at once, with a [`NonFiniteError`]; elsewhere, and in compiled code, by an assertion on the device, which
    needs no host synchronisation and becomes a `RuntimeError`.
    """
    if is_exporting():
        return
    finite = values.isfinite().all()
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        # Without the shape: where it is dynamic, compiled code can't say it.
        torch._assert_async(finite, f"{name} holds NaN or infinite values. {advice}")
    elif not finite:
        raise NonFiniteError(f"{name} of shape {tuple(values.shape)} holds NaN or infinite values. {advice}")


def gram(rows: torch.Tensor) -> torch.Tensor:
    """`rows @ rows^T` to float32's accuracy, also where the factors of a matrix product are rounded to TF32.

    Each entry is split (T. J. Dekker, Numerische Mathematik 18, 1971) into the leading bits, which TF32 keeps, and the
    rest, whose product with itself is below float32's rounding. Switching TF32 off would be no help: compiled code
    can't, and ONNX Runtime has a switch of its own (`use_tf32`, on by default). The float32 `rows`
    `(batch_size, num_rows, width)` have magnitudes up to 1.
    """
    # The clamp changes no value. It keeps compilers from fusing the multiplication with the subtractions, which would
    # then return `rows` itself.
    scaled = (SPLIT * rows).clamp(-2 * SPLIT, 2 * SPLIT)
    leading = scaled - (scaled - rows)
    crossed = leading @ (rows - leading).transpose(-1, -2)
    return leading @ leading.transpose(-1, -2) + (crossed + crossed.transpose(-1, -2))


def patch_affinity(patch_embeds: torch.Tensor, affinity: str = "dot", threshold: float = 0.2) -> torch.Tensor:
    """The graph of patches: 1 between patches that are alike, `EPSILON` elsewhere (arXiv:2510.02270, section 3.2).

    Alike are `patch_embeds` `(batch_size, num_patches, hidden_size)`, of any norm, whose dot products ("dot", as
    published) or cosines ("cosine", as in TokenCut) are above the threshold; the graph
    `(batch_size, num_patches, num_patches)` is float32.
    """
    patch_embeds = patch_embeds.float()
    if affinity == "cosine":
        patch_embeds = torch.nn.functional.normalize(patch_embeds, dim=-1)
    # Tokens may have any norm, and `gram` takes magnitudes up to 1.
    largest = patch_embeds.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    similarity = gram(patch_embeds / largest) * (largest * largest.transpose(-1, -2))
    return torch.where(similarity > threshold, 1.0, EPSILON).float()


def normalize_graph(graph: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`M = D^-1/2 A D^-1/2`, and the eigenvector of its largest eigenvalue, 1, which is `sqrt(d) / |sqrt(d)|`."""
    root_degree = graph.sum(-1).sqrt()
    normalized = graph / (root_degree.unsqueeze(-1) * root_degree.unsqueeze(-2))
    return normalized, torch.nn.functional.normalize(root_degree, dim=-1)


def has_eigensolver(device: torch.device) -> bool:
    """Whether `torch.linalg.eigh` is to be used: on a CPU, unless the program is being exported.

    There it takes 3 ms for 196 patches and 26 ms for 576, 0.6 % of the vision tower's forward pass. CUDA solves larger
    matrices one after the other and makes the host wait; MPS and ONNX have no solver.
    """
    return device.type == "cpu" and not is_exporting()


def leading_eigenvector(matrix: torch.Tensor) -> torch.Tensor:
    """The eigenvector of the largest eigenvalue, by matrix products only: repeated squaring of `(I + M) / 2`.

    All its eigenvalues are in `[0, 1]`, and its powers tend to the projection of the largest one, of which the column
    with the largest diagonal entry is taken: for a repeated eigenvalue, a vector of its space. While the identity
    dominates, adding it would round the rest: the first squarings keep `c^2 + 2ac` of
    `(aI + c)^2 = a^2 I + 2ac + c^2`.

    Of symmetric matrices `(batch_size, num_patches, num_patches)`, whose eigenvalues lie in `[-1, 1]`; the result
    `(batch_size, num_patches)` has unit norm and an arbitrary sign.
    """
    power = matrix / 2
    identity = 0.5
    for _ in range(SQUARINGS_APART):
        power = gram(power) + 2 * identity * power
        identity = identity**2
    power = power + identity * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(SQUARINGS - SQUARINGS_APART):
        # Divided, since powers of an eigenvalue below 1 would underflow.
        largest = power.amax((-2, -1), keepdim=True)
        power = gram(power / largest.clamp(min=torch.finfo(torch.float32).tiny))
    column = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[:, None, None].expand(-1, power.shape[-1], 1)
    return torch.nn.functional.normalize(power.gather(-1, column).squeeze(-1), dim=-1)


def fiedler_vector(graph: torch.Tensor) -> torch.Tensor:
    """The relaxed normalised cut: eigenvector of the second smallest eigenvalue of `I - D^-1/2 A D^-1/2`.

    Equally, that of the second largest eigenvalue of `M = D^-1/2 A D^-1/2`. The largest is 1 and its eigenvector `u`
    is known (see [`normalize_graph`]); `M - 2 u u^T` moves it to -1, the bottom of the spectrum, so that the wanted
    one comes first however close it was to 1 (on a disconnected graph 4e-6, within float32 rounding). The result
    `(batch_size, num_patches)` has unit norm and an arbitrary sign.
    """
    normalized, trivial = normalize_graph(graph)
    deflated = normalized - 2 * trivial.unsqueeze(-1) * trivial.unsqueeze(-2)
    if has_eigensolver(graph.device):
        return torch.linalg.eigh(deflated).eigenvectors[..., -1]
    return leading_eigenvector(deflated)


def cut(fiedler: torch.Tensor, statistic: str = "std") -> torch.Tensor:
    """Split the patches by the eigenvector, whatever its sign and scale.

    The seed, the entry of largest magnitude (the lowest index where several tie), is made positive; salient are the
    entries above the unbiased standard deviation (`"std"`, as published) or the mean (`"mean"`, TokenCut). An empty
    mask keeps the seed, so that of each row of the bool result `(batch_size, num_patches)` one entry is true.
    """
    magnitude = fiedler.abs()
    tied = magnitude >= (1 - TIE_TOLERANCE) * magnitude.amax(-1, keepdim=True)
    seed = tied.int().argmax(-1, keepdim=True)
    positive = torch.where(fiedler.gather(-1, seed) < 0, -fiedler, fiedler)
    threshold = positive.std(-1, keepdim=True) if statistic == "std" else positive.mean(-1, keepdim=True)
    mask = positive > threshold
    is_seed = torch.arange(fiedler.shape[-1], device=fiedler.device) == seed
    return mask | (is_seed & ~mask.any(-1, keepdim=True))


def has_no_cut(graph: torch.Tensor) -> torch.Tensor:
    """Whether all patches are related alike, so that all directions are equally good; bool, `(batch_size, 1)`."""
    connected = graph > 0.5
    loops = connected.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    edges = connected.sum((-2, -1)).unsqueeze(-1) - loops
    num_patches = graph.shape[-1]
    # Two patches that are alike only to themselves do have a cut.
    isolated = (loops == num_patches) & (num_patches > 2)
    complete = (edges == num_patches * (num_patches - 1)) & (loops == num_patches)
    return complete | ((edges == 0) & (isolated | (loops == 0)))


def saliency_mask(
    patch_embeds: torch.Tensor, affinity: str = "dot", threshold: float = 0.2, statistic: str = "std"
) -> torch.Tensor:
    """The salient patches of each image (arXiv:2510.02270, section 3.2).

    A graph without a cut (all patches alike, or none) keeps every patch, and so does a single patch.

    Args:
        patch_embeds (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`): finite patch tokens.
        affinity, threshold, statistic: see [`patch_affinity`] and [`cut`].

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches)`, bool, at least one entry of each row is true.

    Example:
    ```python
    >>> background, thing = [1.0, 0.1], [0.1, 1.0]
    >>> patch_embeds = torch.tensor([[background, background, thing, background, thing, background]])
    >>> saliency_mask(patch_embeds, affinity="cosine")
    tensor([[False, False,  True, False,  True, False]])
    ```
    """
    check_finite(patch_embeds, "patch_embeds", "Check the weights, and use bfloat16 or float32 if float16 overflows.")
    # Not `no_grad`: an assertion that fails in compiled code would leave gradients off for the whole process.
    patch_embeds = patch_embeds.detach()
    if patch_embeds.shape[1] == 1:
        return torch.ones(patch_embeds.shape[:2], dtype=torch.bool, device=patch_embeds.device)
    with torch.autocast(patch_embeds.device.type, enabled=False):
        graph = patch_affinity(patch_embeds, affinity, threshold)
        return cut(fiedler_vector(graph), statistic) | has_no_cut(graph)
