"""Codes into several codebooks along the outputs, chosen one after the other for each input, with error feedback.

The weight is the sum of the codebooks' sub-vectors, each codebook with a size of its own. Codes and second moments are
as in `along_outputs`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cluscomp.forms.codebook import CodebookWeight, Storage, centroid_values, sub_vectors
from cluscomp.forms.stored import Stored
from cluscomp.forms.sum import Sum
from cluscomp.solve.along_outputs import Wanted, feedback
from cluscomp.solve.kmeans import Recipe, kmeans, nearest


def codes_in_turn(
    weight_IO: Float[Tensor, "I O"], books: Sequence[Float[Tensor, "K D"]], moment_II: Float[Tensor, "I I"]
) -> tuple[list[Int[Tensor, "I G"]], Float[Tensor, "I O"]]:
    """Codes into each of some codebooks, and what they leave of each input's row as it stood when it was coded.

    Input by input, in the order of falling mean square: the first codebook's nearest vectors, the second's to what
    these leave, and so on; what all of them leave is handed on to the inputs to come (`along_outputs.feedback`).

    Args:
        weight_IO: (I, O) in float32.
        books: (K, D) each, of one D.
        moment_II: (I, I), positive definite (see `along_outputs.damped`).

    Returns:
        The codes (I, ceil(O / D)) of each codebook, and the errors (I, O).
    """
    inputs, outputs = weight_IO.shape
    dim = books[0].shape[1]
    order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    codes: list[list[Tensor]] = [[] for _ in books]
    errors: list[Tensor] = []

    def choose(i: int, wanted: Wanted, factor_11: Tensor) -> Tensor:  # noqa: ARG001
        wanted_1O = wanted(i + 1)
        left_1O = wanted_1O
        for book_KD, found in zip(books, codes):
            found.append(nearest(F.pad(left_1O, (0, -outputs % dim)).view(-1, dim), book_KD))
            left_1O = left_1O - book_KD[found[-1].long()].view(1, -1)[:, :outputs]
        errors.append(left_1O)
        return wanted_1O - left_1O

    feedback(weight_IO[order_I], moment_II[order_I][:, order_I], choose)
    if weight_IO.is_meta:
        return [found[0].new_empty(inputs, len(found[0])) for found in codes], torch.empty_like(weight_IO)
    back_I = order_I.argsort()
    return [torch.stack(found)[back_I] for found in codes], torch.cat(errors)[back_I]


def with_residual(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    vector_dim: int,
    sizes: Sequence[int],
    storage: Storage,
    generator: torch.Generator,
    *,
    iterations: int,
) -> Stored:
    """VPTQ (arXiv 2409.17066, Algorithm 1): a codebook of K-means, codes with feedback, and codebooks of what is left.

    Each further codebook is that of K-means of the errors which the codes before leave when they are chosen with
    feedback; then the codes of all codebooks are chosen anew. In K-means a sub-vector counts by the mean square of its
    input.

    Args:
        weight_OI: (O, I) in float32.
        moment_II: (I, I), the second moment of its inputs, positive definite (see `along_outputs.damped`).
        vector_dim: D, the outputs of a sub-vector.
        sizes: the number of centroids of each codebook.
        storage: the type of their values, in which codes are chosen.
        generator: of the seeds of K-means.
        iterations: rounds of K-means.

    Returns:
        One codebook's form, or the sum of several.
    """
    outputs, inputs = weight_OI.shape
    recipe = Recipe(iterations, "kd", 1.9, move_centroids=True)
    importance_N = moment_II.diagonal().repeat_interleave(-(-outputs // vector_dim))
    weight_IO = left_IO = weight_OI.T.contiguous()
    centroids: list[Tensor] = []
    codes: list[Tensor] = []
    for size in sizes:
        points_ND = sub_vectors(left_IO.T, vector_dim, "out")
        centroids.append(kmeans(points_ND, size, recipe, generator, importance_N).centroids_KD)
        books = [centroid_values(centroids_KD[None], storage)[0] for centroids_KD in centroids]
        codes, left_IO = codes_in_turn(weight_IO, books, moment_II)
    parts: list[Stored] = [
        CodebookWeight.from_codes(
            codes_IG.flatten()[None], centroids_KD[None],
            out_features=outputs, in_features=inputs, axis="out", storage=storage,
        )
        for codes_IG, centroids_KD in zip(codes, centroids)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else Sum(parts)
