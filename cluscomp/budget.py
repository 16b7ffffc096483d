"""Bits: the ledger of a whole model, and the choice of codebook sizes that meets a bit target."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cluscomp import adapters
from cluscomp.kernels.codes import MAX_CODE_BITS, code_bits, packed_bytes
from cluscomp.kmeans import Recipe, kmeans
from cluscomp.models import compressed, unique_tensors
from cluscomp.weights import Axis, Storage, codebook_bits, lines_of, num_sub_vectors, storage_dtype, sub_vectors

MAX_VECTOR_DIM = 16
SHORTLIST = 4  # candidates whose error is measured
SAMPLE = 32_768  # sub-vectors of a measurement, or 16 a centroid if that is more
MEASURE_ITERATIONS = 10  # with few, small codebooks look worse than they are


@dataclass(frozen=True)
class Size:
    """Bits of a model as stored. Per-weight figures divide by the number of dense weights they cover.

    `paper_bits_per_weight` and `linear_bits_per_weight` cover the compressed matrices alone, what papers quote: the
    one as the paper counts (Equation 3, 16 bits a code), the other as stored (packed codes, padding).
    `model_bits_per_weight` covers every parameter of the model (of adapters the bits, not the number). `ledger` holds
    bits by part: `kept` is what is not compressed, `adapters` what LoRA adds; together the tensors of the file.
    """

    paper_bits_per_weight: float
    linear_bits_per_weight: float
    model_bits_per_weight: float
    ledger: dict[str, int]


def size_of(model: nn.Module, kept_bits: int | None = None) -> Size:
    """Count every stored bit of a model in memory, tied tensors once; all figures agree if nothing is compressed.

    `kept_bits` of a number that is not compressed, for a model without values (on the meta device); null looks.
    """

    def bits_of(tensor: Tensor) -> int:
        return tensor.numel() * (storage_dtype(tensor).itemsize * 8 if kept_bits is None else kept_bits)

    layers = compressed(model)
    ledger: dict[str, int] = {}
    for layer in layers.values():
        for part, bits in layer.stored.ledger().items():  # type: ignore[operator]
            ledger[part] = ledger.get(part, 0) + bits
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    linear_bits = sum(ledger.values())
    paper_bits = sum(layer.stored.paper_bits() for layer in layers.values())  # type: ignore[operator]
    inside = tuple(f"{name}.stored." for name in layers)
    others = {name: tensor for name, tensor in unique_tensors(model).items() if not name.startswith(inside)}
    kept = [tensor for name, tensor in others.items() if adapters.MARK not in name]
    added = [tensor for name, tensor in others.items() if adapters.MARK in name]
    ledger["kept"] = sum(map(bits_of, kept))
    if added:
        ledger["adapters"] = sum(map(bits_of, added))
    per_weight = sum(ledger.values()) / (weights + sum(tensor.numel() for tensor in kept))
    if not layers:
        return Size(per_weight, per_weight, per_weight, ledger)
    return Size(paper_bits / weights, linear_bits / weights, per_weight, ledger)


def check_file(size: Size, tensor_bytes: int) -> None:
    """Raise RuntimeError unless the ledger is what a checkpoint's tensors take, within 0.1 %: a claim must be true."""
    claimed = sum(size.ledger.values()) / 8
    if abs(claimed - tensor_bytes) > 0.001 * tensor_bytes:
        raise RuntimeError(f"the ledger counts {claimed:.0f} bytes, the checkpoint's tensors take {tensor_bytes}")


@dataclass(frozen=True)
class Shape:
    """Sub-vector length D and number of centroids K of one matrix, with its stored bits per weight."""

    vector_dim: int
    codebook_size: int
    bits: float


def stored_bits(
    out_features: int, in_features: int, axis: Axis, vector_dim: int, codebook_size: int, storage: Storage = "float16"
) -> float:
    """Stored bits per weight of one matrix with one codebook: paper Equation 3 with packed codes and padding.

    (ceil(log2 K) * codes + 16 * K * D) / (O * I), the codes being those of padded lines, in whole groups of 8; with a
    codebook of 8 bits 8 * K * D + 32 in the place of 16 * K * D.
    """
    num_vectors = num_sub_vectors(out_features, in_features, vector_dim, axis)
    codes = packed_bytes(num_vectors, code_bits(codebook_size)) * 8
    return (codes + codebook_bits(codebook_size, vector_dim, storage)) / (out_features * in_features)


def reachable(
    out_features: int, in_features: int, axis: Axis, bits: float, storage: Storage = "float16"
) -> list[Shape]:
    """For each D the largest K whose stored bits per weight stay at or under `bits`.

    With D fixed more centroids never fit worse, so nothing else needs to be considered. K never exceeds the number
    of sub-vectors or 65,536. Raises ValueError, with the bits that are within reach, if no codebook fits.
    """
    _, length = lines_of(out_features, in_features, axis)
    fixed, each = codebook_bits(0, 1, storage), codebook_bits(1, 1, storage) - codebook_bits(0, 1, storage)
    dims = range(1, min(MAX_VECTOR_DIM, length) + 1)
    shapes = []
    for vector_dim in dims:
        num_vectors = num_sub_vectors(out_features, in_features, vector_dim, axis)
        for width in range(MAX_CODE_BITS, 0, -1):
            budget = bits * out_features * in_features - packed_bytes(num_vectors, width) * 8 - fixed
            size = min(int(budget // (each * vector_dim)), 1 << width, num_vectors)
            if size >= 2 and code_bits(size) == width:
                actual = stored_bits(out_features, in_features, axis, vector_dim, size, storage)
                shapes.append(Shape(vector_dim, size, actual))
                break
    if not shapes:
        least, dim = min((stored_bits(out_features, in_features, axis, dim, 2, storage), dim) for dim in dims)
        raise ValueError(
            f"bits={bits} is out of reach for a {out_features} x {in_features} matrix: "
            f"the least is {least:.3f}, with vector_dim={dim} and codebook_size=2"
        )
    return shapes


def expected_bits(shape: Shape) -> float:
    """Quality of (D, K) for Gaussian weights in bits: log2(K)/D less the high-rate loss of D dimensions.

    The loss is half the log2 of Zador's constant with the sphere bound on the cell shape; it ranks candidates only.
    """
    dim = shape.vector_dim
    log_constant = math.log(2 / (dim + 2)) + 2 / dim * math.lgamma(dim / 2 + 1) + (dim + 2) / 2 * math.log1p(2 / dim)
    return math.log2(shape.codebook_size) / dim - log_constant / math.log(4)


def measured_error(
    weight_OI: Float[Tensor, "O I"],
    shape: Shape,
    axis: Axis,
    recipe: Recipe,
    generator: torch.Generator,
    weights_N: Callable[[int], Float[Tensor, " N"] | None] = lambda _dim: None,
) -> float:
    """Squared error per weight that clustering with (D, K) will leave, from a short K-means on a sample of sub-vectors.

    Fewer points per centroid than the whole matrix has make the sample's own error too small; the factor
    (1 - K/N) / (1 - K/n) corrects that to first order. A test compares the outcome with full clustering.
    `weights_N(D)` gives the importance of each sub-vector of that length, (N,); then the error is weighted by it.
    """
    points_ND = sub_vectors(weight_OI, shape.vector_dim, axis)
    importance_N = weights_N(shape.vector_dim)
    total = len(points_ND)
    sample = min(total, max(SAMPLE, 16 * shape.codebook_size))
    if sample < total:
        rows_n = torch.randperm(total, generator=generator)[:sample].to(points_ND.device)
        points_ND = points_ND[rows_n]
        importance_N = None if importance_N is None else importance_N[rows_n]
    short = replace(recipe, iterations=min(MEASURE_ITERATIONS, recipe.iterations))
    found = kmeans(points_ND, shape.codebook_size, short, generator, importance_N)
    bias = 1 - shape.codebook_size / sample
    correction = (1 - shape.codebook_size / total) / bias if bias else 1.0
    return found.inertia / points_ND.numel() * correction


def choose(
    weight_OI: Float[Tensor, "O I"],
    shapes: list[Shape],
    axis: Axis,
    recipe: Recipe,
    generator: torch.Generator,
    weights_N: Callable[[int], Float[Tensor, " N"] | None] = lambda _dim: None,
) -> Shape:
    """The (D, K) of least measured error (see `measured_error`) among the best by `expected_bits`.

    Shapes: (O, I) finite; `shapes` as `reachable` gives them.
    """
    shortlist = sorted(shapes, key=expected_bits, reverse=True)[:SHORTLIST]
    if len(shortlist) == 1:
        return shortlist[0]
    return min(shortlist, key=lambda shape: measured_error(weight_OI, shape, axis, recipe, generator, weights_N))
