"""Bits: the ledger of a whole model, and the choice of codebook sizes that meets a bit target."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from cluscomp import adapters
from cluscomp.kernels.codes import MAX_CODE_BITS, code_bits, packed_bytes
from cluscomp.kmeans import Recipe, kmeans
from cluscomp.models import compressed, unique_tensors
from cluscomp.weights import SCALE_BITS, Axis, Storage, codebook_bits, lines_of, num_sub_vectors, storage_dtype

MAX_VECTOR_DIM = 16
SHORTLIST = 4  # candidates whose error is measured
SAMPLE = 32_768  # sub-vectors of a measurement, or 16 a centroid if that is more
MEASURE_ITERATIONS = 10  # with few, small codebooks look worse than they are
OFFSETS = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0)  # bits about the target that a menu offers

Matrices = Sequence[tuple[int, int]]  # (O, I) of those that share a codebook
Points = Callable[[int], tuple[Tensor, Tensor | None]]  # sub-vectors (N, D) of length D, and their weights (N,) or None


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
    """Sub-vector length D and number of centroids K of a codebook, with the stored bits per weight of its matrices."""

    vector_dim: int
    codebook_size: int
    bits: float


def stored_bits(
    matrices: Matrices, axis: Axis, vector_dim: int, codebook_size: int, storage: Storage = "float16"
) -> float:
    """Bits per weight that matrices (O, I) with one codebook take: what their `CodebookWeight.ledger`s add up to.

    Per matrix ceil(N/8) * 8 * ceil(log2 K) for the codes, the packed stream being padded to a multiple of 8, and if
    there are several 32 for its scale; for the codebook 16 * K * D, with one of 8 bits 8 * K * D + 32.
    """
    bits = codebook_bits(codebook_size, vector_dim, storage) + _scale_bits(matrices)
    for out_features, in_features in matrices:
        vectors = num_sub_vectors(out_features, in_features, vector_dim, axis)
        bits += packed_bytes(vectors, code_bits(codebook_size)) * 8
    return bits / _weights(matrices)


def _scale_bits(matrices: Matrices) -> int:
    return SCALE_BITS * len(matrices) if len(matrices) > 1 else 0


def _weights(matrices: Matrices) -> int:
    return sum(out_features * in_features for out_features, in_features in matrices)


def reachable(matrices: Matrices, axis: Axis, bits: float, storage: Storage = "float16") -> list[Shape]:
    """For each D the largest K with which matrices (O, I) that share a codebook stay at or under `bits` a weight.

    With D fixed more centroids never fit worse, so nothing else needs to be considered. K never exceeds the number
    of sub-vectors or 65,536. Raises ValueError, with the bits that are within reach, if no codebook fits.
    """
    return list(_reachable(tuple(matrices), axis, bits, storage))


@cache  # blocks are alike: a plan asks the same for each
def _reachable(matrices: tuple[tuple[int, int], ...], axis: Axis, bits: float, storage: Storage) -> list[Shape]:
    length = min(lines_of(*matrix, axis)[1] for matrix in matrices)
    fixed, each = codebook_bits(0, 1, storage), codebook_bits(1, 1, storage) - codebook_bits(0, 1, storage)
    fixed += _scale_bits(matrices)
    dims = range(1, min(MAX_VECTOR_DIM, length) + 1)
    shapes = []
    for vector_dim in dims:
        vectors = [num_sub_vectors(*matrix, vector_dim, axis) for matrix in matrices]
        for width in range(MAX_CODE_BITS, 0, -1):
            budget = bits * _weights(matrices) - sum(packed_bytes(count, width) * 8 for count in vectors) - fixed
            size = min(int(budget // (each * vector_dim)), 1 << width, sum(vectors))
            if size >= 2 and code_bits(size) == width:
                shapes.append(Shape(vector_dim, size, stored_bits(matrices, axis, vector_dim, size, storage)))
                break
    if not shapes:
        least, dim = min((stored_bits(matrices, axis, dim, 2, storage), dim) for dim in dims)
        raise ValueError(
            f"bits={bits} is out of reach for {described(matrices)}: "
            f"the least is {least:.3f}, with vector_dim={dim} and codebook_size=2"
        )
    return shapes


def described(matrices: Matrices) -> str:
    """Matrices (O, I) in words."""
    shapes = " and ".join(f"{out_features} x {in_features}" for out_features, in_features in matrices)
    return f"a {shapes} matrix" if len(matrices) == 1 else f"matrices of {shapes} with one codebook"


def expected_bits(shape: Shape) -> float:
    """Quality of (D, K) for Gaussian weights in bits: log2(K)/D less the high-rate loss of D dimensions.

    The loss is half the log2 of Zador's constant with the sphere bound on the cell shape; it ranks candidates only.
    """
    dim = shape.vector_dim
    log_constant = math.log(2 / (dim + 2)) + 2 / dim * math.lgamma(dim / 2 + 1) + (dim + 2) / 2 * math.log1p(2 / dim)
    return math.log2(shape.codebook_size) / dim - log_constant / math.log(4)


def measured_error(points: Points, shape: Shape, recipe: Recipe, generator: torch.Generator) -> float:
    """Squared error per weight that clustering with (D, K) will leave, from a short K-means on a sample of sub-vectors.

    Fewer points per centroid than there are in all make the sample's own error too small; the factor
    (1 - K/N) / (1 - K/n) corrects that to first order. A test compares the outcome with full clustering. Where the
    points have weights the error is weighted by them.
    """
    points_ND, weights_N = points(shape.vector_dim)
    total = len(points_ND)
    sample = min(total, max(SAMPLE, 16 * shape.codebook_size))
    if sample < total:
        rows_n = torch.randperm(total, generator=generator)[:sample].to(points_ND.device)
        points_ND = points_ND[rows_n]
        weights_N = None if weights_N is None else weights_N[rows_n]
    short = replace(recipe, iterations=min(MEASURE_ITERATIONS, recipe.iterations))
    found = kmeans(points_ND, shape.codebook_size, short, generator, weights_N)
    bias = 1 - shape.codebook_size / sample
    correction = (1 - shape.codebook_size / total) / bias if bias else 1.0
    return found.inertia / points_ND.numel() * correction


def choose(points: Points, shapes: list[Shape], recipe: Recipe, generator: torch.Generator) -> Shape:
    """The (D, K) of least measured error (see `measured_error`) among the best by `expected_bits`.

    `shapes` as `reachable` gives them.
    """
    shortlist = sorted(shapes, key=expected_bits, reverse=True)[:SHORTLIST]
    if len(shortlist) == 1:
        return shortlist[0]
    return min(shortlist, key=lambda shape: measured_error(points, shape, recipe, generator))


def menu(
    points: Points,
    shapes: Callable[[float], list[Shape]],
    bits: float,
    recipe: Recipe,
    generator: torch.Generator,
    floor: float = 0.0,
) -> list[tuple[Shape, float]]:
    """Shapes at and around a bit target with their measured errors; the first is the one that `choose` would take.

    `shapes(bits)` is as `reachable` gives them. At the target some are measured, at other rates the best by
    `expected_bits`, none below a share `floor` of the target.
    """
    at_target = sorted(shapes(bits), key=expected_bits, reverse=True)[:SHORTLIST]
    measured = dict.fromkeys([*at_target, *around(shapes, bits, floor)])
    errors = {shape: measured_error(points, shape, recipe, generator) for shape in measured}
    first = min(at_target, key=lambda shape: errors[shape])
    return [(first, errors.pop(first)), *errors.items()]


def around(shapes: Callable[[float], list[Shape]], bits: float, floor: float = 0.0) -> list[Shape]:
    """The best shapes by `expected_bits` at rates around a bit target, none below a share `floor` of it.

    `shapes(bits)` is as `reachable` gives them.
    """
    found = []
    for offset in (offset for offset in OFFSETS if bits + offset >= floor * bits):
        with suppress(ValueError):  # fewer bits than any codebook takes
            found.append(max(shapes(bits + offset), key=expected_bits))
    return found


def expected_shapes(
    groups: Sequence[Matrices],
    shapes: Callable[[Matrices, float], list[Shape]],
    bits: float,
    quality: Callable[[Shape], float] = expected_bits,
) -> list[Shape]:
    """A shape for each group of matrices, of least total damage in `bits` a weight of all of them.

    As if the weights were Gaussian and of one variance, so that nothing is measured: `quality` of a shape is as
    `expected_bits`. `shapes(matrices, bits)` is as `reachable` gives them.
    """
    numbers = [_weights(matrices) for matrices in groups]
    offered = [
        [max(shapes(matrices, bits), key=quality), *around(partial(shapes, matrices), bits)] for matrices in groups
    ]
    menus = [
        [Option(round(shape.bits * number), number * 4 ** -quality(shape)) for shape in found]
        for found, number in zip(offered, numbers)
    ]
    return [found[number] for found, number in zip(offered, allocate(menus, bits * sum(numbers)))]


@dataclass(frozen=True)
class Option:
    """What a codebook would cost, in bits, and the damage that it would leave."""

    bits: int
    damage: float


def allocate(menus: list[list[Option]], budget: float | None = None) -> list[int]:
    """Which option of each menu to take, so that all together do the least damage in `budget` bits.

    None: in the bits of all first options, which are within any budget.

    For a price of a bit each menu's best option stands alone (Lagrange); the lowest price that keeps within the bits is
    found by bisection over the prices at which a choice changes. What is left is spent on the best single changes.
    Never more damage than the first options together.
    """

    def at(price: float) -> list[int]:
        return [min(range(len(menu)), key=lambda i: menu[i].damage + price * menu[i].bits) for menu in menus]

    def total(picked: list[int], what: str) -> float:
        return float(sum(getattr(menu[i], what) for menu, i in zip(menus, picked)))

    first = [0] * len(menus)
    budget = total(first, "bits") if budget is None else budget
    prices = sorted(
        {(a.damage - b.damage) / (b.bits - a.bits) for menu in menus for a in menu for b in menu if a.bits < b.bits}
    )
    low, high = -1, len(prices)  # just above prices[high] all is within the budget
    picked = first
    while high - low > 1:
        middle = (low + high) // 2
        found = at(math.nextafter(prices[middle], math.inf))
        if total(found, "bits") <= budget:
            high, picked = middle, found
        else:
            low = middle
    while True:
        left = budget - total(picked, "bits")
        gains = [
            (menu[i].damage - option.damage, number, j)
            for number, (menu, i) in enumerate(zip(menus, picked))
            for j, option in enumerate(menu)
            if option.bits - menu[i].bits <= left and option.damage < menu[i].damage
        ]
        if not gains:
            return picked if total(picked, "damage") <= total(first, "damage") else first
        _, number, j = max(gains)
        picked = [*picked[:number], j, *picked[number + 1 :]]
