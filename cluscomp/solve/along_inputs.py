"""Codes and codebooks along the inputs (axis "in"), chosen by what the layer's output loses, tr(E H E^T).

The weight is the sum of M codebooks' sub-vectors. Codes are (M, J, O): of codebook m, for the inputs j D to j D + D - 1
of an output. H (I, I) is the second moment of the layer's inputs, as in `along_outputs`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cluscomp.forms.codebook import CodebookWeight, Storage, centroid_values, sub_vectors
from cluscomp.kernels.counting import alike, times
from cluscomp.solve.along_outputs import Wanted, conjugate_gradients, feedback
from cluscomp.solve.kmeans import Recipe, kmeans, nearest
from cluscomp.solve.shapes import Shape

CANDIDATES = 2**24


def with_feedback(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    shape: Shape,
    storage: Storage,
    generator: torch.Generator,
    *,
    iterations: int,
    least_squares: int,
) -> CodebookWeight:
    """GPTVQ (arXiv 2402.15319): a codebook of K-means, codes with error feedback, the codebook of least output error.

    Args:
        weight_OI: (O, I) in float32.
        moment_II: (I, I), the second moment of its inputs, positive definite (see `damped`).
        shape: length and number of the centroids.
        storage: the type of their values, in which codes are chosen.
        generator: of the seed of K-means.
        iterations: rounds of K-means, in which a sub-vector counts by the mean square of its inputs.
        least_squares: steps towards the codebook of least output error.
    """
    outputs, inputs = weight_OI.shape
    found = kmeans(
        sub_vectors(weight_OI, shape.vector_dim, "in"),
        shape.codebook_size,
        Recipe(iterations, "kd", 1.9, move_centroids=True),
        generator,
        vector_weights(moment_II.diagonal(), outputs, shape.vector_dim),
    )
    book_1KD = centroid_values(found.centroids_KD[None], storage)
    codes_1JO = feedback_vectors(weight_OI, book_1KD[0], moment_II)[None]
    book_1KD = least_squares_codebooks(weight_OI, codes_1JO, book_1KD, moment_II, least_squares)
    return CodebookWeight.from_codes(
        codes_1JO.flatten(1), book_1KD, out_features=outputs, in_features=inputs, axis="in", storage=storage
    )


def as_sum(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    shape: Shape,
    storage: Storage,
    generator: torch.Generator,
    *,
    codebooks: int,
    iterations: int,
    rounds: int,
    least_squares: int,
    beam: int,
) -> CodebookWeight:
    """AQLM (arXiv 2401.06118): sums of centroids of several codebooks, by what the layer's output loses.

    The start is K-means of the weight, then of what is left, and so on; in each round the codebooks are solved for the
    codes, and the codes searched for the codebooks, which have the last word.

    Args:
        weight_OI: (O, I) in float32.
        moment_II: (I, I), the second moment of its inputs, positive definite (see `damped`).
        shape: length and number of each codebook's centroids.
        storage: the type of their values.
        generator: of the seeds of K-means.
        codebooks: M.
        iterations: rounds of K-means, in which a sub-vector counts by the mean square of its inputs.
        rounds: of codebooks and codes in turn.
        least_squares: steps towards the codebooks of least output error, in each round and at the end.
        beam: how many choices of a sub-vector's codes are kept; see `descend`.
    """
    outputs, inputs = weight_OI.shape
    recipe = Recipe(iterations, "kd", 1.9, move_centroids=True)
    importance_N = vector_weights(moment_II.diagonal(), outputs, shape.vector_dim)
    left_ND = sub_vectors(weight_OI, shape.vector_dim, "in")
    codes, books = [], []
    for _ in range(codebooks):
        found = kmeans(left_ND, shape.codebook_size, recipe, generator, importance_N)
        codes.append(found.codes_N.view(-1, outputs))
        books.append(found.centroids_KD)
        left_ND = left_ND - found.centroids_KD[found.codes_N.long()]
    codes_MJO, books_MKD = torch.stack(codes), torch.stack(books)
    for _ in alike(range(rounds), weight_OI):
        books_MKD = least_squares_codebooks(weight_OI, codes_MJO, books_MKD, moment_II, least_squares)
        codes_MJO = descend(weight_OI, codes_MJO, books_MKD, moment_II, beam)
    books_MKD = least_squares_codebooks(weight_OI, codes_MJO, books_MKD, moment_II, least_squares)
    return CodebookWeight.from_codes(
        codes_MJO.flatten(1), books_MKD, out_features=outputs, in_features=inputs, axis="in", storage=storage
    )


def vector_weights(diagonal_I: Float[Tensor, " I"], outputs: int, vector_dim: int) -> Float[Tensor, " N"]:
    """The mean square of each sub-vector's inputs, for K-means: (I,) -> (J O,), the padding counted as nothing."""
    padded_JD = F.pad(diagonal_I, (0, -len(diagonal_I) % vector_dim)).view(-1, vector_dim)
    return padded_JD.mean(1).repeat_interleave(outputs)


def dense(codes_MJO: Int[Tensor, "M J O"], books_MKD: Float[Tensor, "M K D"], inputs: int) -> Float[Tensor, "O I"]:
    """The weight (O, I) that codes (M, J, O) into codebooks (M, K, D) stand for."""
    vectors_JOD = sum(F.embedding(codes_JO, book_KD) for codes_JO, book_KD in zip(codes_MJO, books_MKD))
    assert isinstance(vectors_JOD, Tensor)  # M >= 1
    return vectors_JOD.transpose(0, 1).flatten(1)[:, :inputs]


def feedback_vectors(
    weight_OI: Float[Tensor, "O I"], centroids_KD: Float[Tensor, "K D"], moment_II: Float[Tensor, "I I"]
) -> Int[Tensor, "J O"]:
    """Codes (J, O) chosen D inputs at a time, each error handed on to the inputs to come (GPTVQ, arXiv 2402.15319).

    A sub-vector's code is the one after which the output loses least, all later inputs being at their best: the nearest
    in the metric of `along_outputs.feedback`'s factor. Shapes: (O, I), (K, D), (I, I) positive definite.
    """
    dim = centroids_KD.shape[1]
    codes = []

    def choose(i: int, wanted: Wanted, factor_dd: Tensor) -> Tensor:
        size = len(factor_dd)  # D, or less at the end
        both_dN = torch.cat([wanted(i + size), centroids_KD.T[:size]], dim=1)
        bent_Nd = torch.linalg.solve_triangular(factor_dd.T, both_dN, upper=False).T.contiguous()
        codes.append(nearest(bent_Nd[: len(weight_OI)], bent_Nd[len(weight_OI) :]))
        return centroids_KD[codes[-1].long(), :size].T

    feedback(weight_OI.T.contiguous(), moment_II, choose, step=dim)
    if weight_OI.is_meta:
        return codes[0].new_empty(-(-weight_OI.shape[1] // dim), len(weight_OI))
    return torch.stack(codes)


def descend(
    weight_OI: Float[Tensor, "O I"],
    codes_MJO: Int[Tensor, "M J O"],
    books_MKD: Float[Tensor, "M K D"],
    moment_II: Float[Tensor, "I I"],
    beam: int = 1,
) -> Int[Tensor, "M J O"]:
    """Codes (M, J, O) of no greater output error, one pass over all (AQLM, arXiv 2401.06118, section 3.2).

    Sub-vector by sub-vector, all others standing still, its M codes are chosen one codebook after the other; the `beam`
    best choices so far are kept. With a beam of 1 each code in turn is made the best there is. Outputs do not depend on
    one another: some at a time are searched, so that `CANDIDATES` losses are in memory.
    Shapes: weight (O, I), codebooks (M, K, D), second moment (I, I).
    """
    inputs, dim = weight_OI.shape[1], books_MKD.shape[2]
    spare = -inputs % dim
    moment_II = F.pad(moment_II, (0, spare, 0, spare))
    some = max(1, CANDIDATES // (beam * books_MKD.shape[1]))
    if weight_OI.is_meta:  # one sub-vector of some outputs stands for all
        groups, outputs = codes_MJO.shape[1:]
        some = min(some, outputs)
        error_OI = F.pad(weight_OI[:some] - dense(codes_MJO[:, :, :some], books_MKD, inputs), (0, spare))
        with times(groups * outputs / some):
            slope_OD = error_OI @ moment_II[:, :dim]
            _best_of_beam(codes_MJO[:, 0, :some], books_MKD, slope_OD, moment_II[:dim, :dim], beam)
        return codes_MJO.clone()
    searched = []
    for some_OI, some_MJO in zip(weight_OI.split(some), codes_MJO.split(some, dim=2)):
        error_OI = F.pad(some_OI - dense(some_MJO, books_MKD, inputs), (0, spare))
        found = []
        for j, codes_MO in enumerate(some_MJO.unbind(1)):
            at = slice(j * dim, (j + 1) * dim)
            slope_OD = error_OI @ moment_II[:, at]
            best_MO, change_OD = _best_of_beam(codes_MO, books_MKD, slope_OD, moment_II[at, at], beam)
            error_OI[:, at] += change_OD
            found.append(best_MO)
        searched.append(torch.stack(found, dim=1))
    return torch.cat(searched, dim=2)


def _best_of_beam(
    codes_MO: Int[Tensor, "M O"],
    books_MKD: Float[Tensor, "M K D"],
    slope_OD: Float[Tensor, "O D"],
    moment_DD: Float[Tensor, "D D"],
    beam: int,
) -> tuple[Int[Tensor, "M O"], Float[Tensor, "O D"]]:
    """The codes (M, O) of a sub-vector of each output, and by how much they change its error (O, D).

    `slope_OD` is E H for its inputs. A choice that changes the error by d changes the loss by 2 slope d + d H d.
    """
    kept_MOB = codes_MO[:, :, None]
    change_OBD = torch.zeros_like(slope_OD)[:, None]
    size = books_MKD.shape[1]
    for m, book_KD in enumerate(books_MKD):
        without_OBD = change_OBD + book_KD[kept_MOB[m].long()]
        bent_OBD = without_OBD @ moment_DD
        rest_OB = ((2 * slope_OD[:, None] + bent_OBD) * without_OBD).sum(2)
        size_K = ((book_KD @ moment_DD) * book_KD).sum(1)
        pull_OBD = slope_OD[:, None] + bent_OBD
        loss_OBK = torch.addmm(size_K, pull_OBD.flatten(0, 1), book_KD.T, alpha=-2).view(*rest_OB.shape, size)
        best = (loss_OBK + rest_OB[:, :, None]).flatten(1).topk(min(beam, loss_OBK[0].numel()), largest=False)
        parent_OB, code_OB = best.indices // size, best.indices % size
        kept_MOB = kept_MOB.gather(2, parent_OB.expand(len(books_MKD), -1, -1))
        kept_MOB[m] = code_OB
        change_OBD = without_OBD.gather(1, parent_OB[:, :, None].expand(-1, -1, slope_OD.shape[1])) - book_KD[code_OB]
    return kept_MOB[:, :, 0], change_OBD[:, 0]  # topk gives the best first


def least_squares_codebooks(
    weight_OI: Float[Tensor, "O I"],
    codes_MJO: Int[Tensor, "M J O"],
    books_MKD: Float[Tensor, "M K D"],
    moment_II: Float[Tensor, "I I"],
    steps: int,
) -> Float[Tensor, "M K D"]:
    """The codebooks (M, K, D) that minimise tr(E H E^T) with the codes (M, J, O) fixed, from `books_MKD` on.

    A linear least-squares problem in all codebooks together: conjugate gradients with the diagonal of a part of its
    matrix as preconditioner, at most `steps` of them. Centroids no code points to stay. Shapes: (O, I), (I, I).
    """
    inputs, dim = weight_OI.shape[1], books_MKD.shape[2]

    def gather(values_OI: Tensor) -> Tensor:
        vectors_ND = sub_vectors(values_OI, dim, "in")
        sums = [
            torch.zeros_like(book_KD).index_add_(0, codes_JO.flatten(), vectors_ND)
            for book_KD, codes_JO in zip(books_MKD, codes_MJO)
        ]
        return torch.stack(sums)

    def times_matrix(books_MKD: Tensor) -> Tensor:
        return gather(dense(codes_MJO, books_MKD, inputs) @ moment_II)

    mass_MKD = gather(moment_II.diagonal().expand_as(weight_OI))
    residual_MKD = gather((weight_OI - dense(codes_MJO, books_MKD, inputs)) @ moment_II)
    return conjugate_gradients(books_MKD, residual_MKD, mass_MKD, times_matrix, steps)
