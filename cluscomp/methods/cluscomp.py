"""ClusComp: a K-means codebook for each weight (arXiv 2503.13089, section 3.2), or one for several of a block.

And what the layers' inputs can add to it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.errors import named
from cluscomp.methods import Compressed
from cluscomp.methods.on_grids import check_choice
from cluscomp.settings import settings

if TYPE_CHECKING:
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.groups import Group
    from cluscomp.solve.layer import Layer
    from cluscomp.solve.shapes import Effort, Matrices, Shape


@settings
class ClusComp:
    """Cut the weight into sub-vectors and store a codebook of their K-means centroids and a code for each.

    Either `bits` is given, the most bits per weight that may be stored (1 to 8), and the length D and number of
    centroids K are chosen for each matrix; or `vector_dim` (D) and `codebook_size` (K) are fixed by hand.
    `axis` "out" is the paper's: a sub-vector is D neighbouring outputs of one input. `storage` is the type of the
    codebook's values. `share`: which weights of a block have one codebook and a scale each, "input" those that read the
    same input (query, key and value; gate and up), "experts" the same matrix of all experts, "block" all, "none" (the
    paper) each its own. `allocation` "uniform"
    gives every codebook at most `bits`, which leaves some unspent as codes take whole bits; "fill" spends them, with
    `bits` as the most of a block (nothing else where a block has one codebook, or D and K are fixed), and gives no
    codebook less than about a share `floor` of `bits`. With `measure` the errors of shapes are measured on the weights,
    "brief" on fewer of them and in fewer rounds;
    without, they are those of Gaussian ones, so that shapes follow from the matrices' shapes alone. `iterations`,
    `init`, `over_relaxation` and `move_centroids` are the recipe of K-means (`kmeans.Recipe`); the paper's is 20,
    shared_points, 1, false. "shared_points" are random points at the same positions in all matrices of one size, as in
    the paper's code; those of "random_points" are drawn for each codebook by itself.

    The rest spends no bytes and is not in the paper; any of it needs calibration text and axis "out".
    `weighting` "diagonal": a sub-vector counts by the mean square of its input. `assign` "hessian": codes are chosen
    input by input, errors handed on to the inputs to come (`damping` is added to the diagonal of the second moment, as
    a share of its mean; before, what is beside the diagonal shrinks by a share `shrinkage`: of little text it is mostly
    chance). `least_squares`: so many steps towards the codebook of least output error for these codes.
    `descent`: so many times the codes then descend input by input with all others fixed, and the codebook follows.
    """

    bits: float | None = Field(ge=1, le=8)
    vector_dim: int | None = Field(ge=1, le=64)
    codebook_size: int | None = Field(ge=2, le=65_536)
    axis: Literal["out", "in"]
    storage: Literal["float16", "float8", "int8"]
    share: Literal["none", "input", "experts", "block"]
    allocation: Literal["uniform", "fill"]
    measure: bool | Literal["brief"]
    floor: float = Field(ge=0, le=1)
    iterations: int = Field(ge=1)
    init: Literal["random_points", "shared_points", "kd"]
    over_relaxation: float = Field(gt=0, le=2)
    move_centroids: bool
    weighting: Literal["none", "diagonal"]
    assign: Literal["nearest", "hessian"]
    damping: float = Field(gt=0, le=1)
    shrinkage: float = Field(ge=0, lt=1)
    least_squares: int = Field(ge=0)
    descent: int = Field(ge=0)

    @model_validator(mode="after")
    def _fit_together(self) -> "ClusComp":
        check_choice(self.bits, vector_dim=self.vector_dim, codebook_size=self.codebook_size)
        if self.share != "none" and self.storage != "float16":
            raise ValueError(f"method.share={self.share} needs method.storage=float16 (here {self.storage})")
        if self.axis == "in" and self.sees():
            raise ValueError(
                f"method.axis=in needs method.weighting=none, method.assign=nearest, method.least_squares=0 and "
                f"method.descent=0 (here {self.weighting}, {self.assign}, {self.least_squares} and {self.descent})"
            )
        return self

    def without_effect(self) -> set[str]:
        """Settings that decide nothing, by which runs are not told apart; see `runs.experiment.key_settings`."""
        return set() if self.shrinkage else {"shrinkage"}

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs or its diagonal, if an option asks for it."""
        if self.assign == "hessian" or self.least_squares > 0 or self.descent > 0:
            return frozenset({"moment"})
        return frozenset() if self.weighting == "none" else frozenset({"diagonal"})

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Group after group of layers that share a codebook; see `Method.compress`."""
        groups = self._groups(layers)
        methods = [self] * len(groups)
        if self.bits is not None and self.allocation == "fill" and (len(groups) > 1 or not self.measure):
            methods = [
                replace(self, **option.settings)
                for option in solve.allocate.share_out([*self.offers(layers)], self.bits)
            ]
        for names, method in zip(groups, methods):
            group = method._opened(layers, names)
            with named(names):
                shape = group.best(method._shapes(group.matrices, method.bits), self._effort)
                stored = group.stored(
                    shape, self.storage, assign=self.assign, least_squares=self.least_squares, descent=self.descent
                )
            yield Compressed(dict(zip(names, stored)), asdict(shape))

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """What the layers that share a codebook may have; one group is open at a time. See `methods.Offers`."""
        assert self.bits is not None  # who asks for offers has looked
        for names in self._groups(layers):
            group = self._opened(layers, names)
            if self._effort is not None:
                yield solve.allocate.measured_menu(group, self._shapes, self.bits, self.floor, self._effort)
            else:
                yield solve.allocate.expected_menu(
                    names, group.matrices, self._shapes, self.bits, group.worth, floor=self.floor
                )

    @property
    def _effort(self) -> "Effort | None":
        """What the measurement of a shape's error takes; None: none is measured."""
        return {True: solve.shapes.FULL, "brief": solve.shapes.BRIEF, False: None}[self.measure]

    def _groups(self, layers: "dict[str, Layer]") -> list[list[str]]:
        """The names of the layers that share a codebook, group after group."""
        keys: dict[str, Callable[[str], Any]] = {
            "none": lambda name: name,
            "input": lambda name: layers[name].input,
            "experts": lambda name: layers[name].stack or (name,),
            "block": lambda _name: None,
        }
        groups: dict[Any, list[str]] = {}
        for name in layers:
            groups.setdefault(keys[self.share](name), []).append(name)
        return list(groups.values())

    def _opened(self, layers: "dict[str, Layer]", names: list[str]) -> "Group":
        import torch

        opened = [layers[name] for name in names]
        init: Literal["random_points", "kd"] = "kd" if self.init == "kd" else "random_points"
        recipe = solve.kmeans.Recipe(self.iterations, init, self.over_relaxation, self.move_centroids)
        generator = opened[0].generator
        if self.init == "shared_points":  # drawn anew for each codebook, and the same for all with as many sub-vectors
            generator = torch.Generator().manual_seed(opened[0].seed)
        return solve.groups.Group(
            names, opened, recipe, generator, axis=self.axis, weighting=self.weighting,
            damping=self.damping, shrinkage=self.shrinkage,
        )  # fmt: skip

    def _shapes(self, matrices: "Matrices", bits: float | None) -> "list[Shape]":
        """What may be chosen from for the codebook of matrices of these shapes."""
        if bits is not None:
            return solve.shapes.reachable(matrices, self.axis, bits, self.storage)
        assert self.vector_dim is not None and self.codebook_size is not None  # check_choice
        return [solve.shapes.fixed(matrices, self.axis, self.vector_dim, self.codebook_size, self.storage)]
