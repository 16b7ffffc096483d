"""What computations on tensors without numbers (the meta device) would hold and do.

So the planner runs a method's own code. Each primitive that torch cannot run without numbers (our kernels, loops of
many like rounds) says beside its code what it does there: it reports its work, and returns empty tensors of the right
shapes.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluscomp.kernels.work import Work

ATEN = torch.ops.aten
PRODUCTS = (ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default)
SORTS = {ATEN.topk.default: 16, ATEN.sort.default: 16, ATEN.sort.stable: 16}  # times the bytes (9 copies were seen)
CUBIC = {  # of n^3 products, or of the smaller side's and all numbers'; the last three as measured
    ATEN.linalg_cholesky_ex.default: 1 / 3, ATEN.linalg_cholesky_ex.L: 1 / 3, ATEN.cholesky_inverse.default: 2 / 3,
    ATEN._linalg_eigh.default: 5, ATEN.linalg_qr.default: 2.5, ATEN._linalg_svd.default: 15,
}  # fmt: skip
Round = TypeVar("Round")
Made = TypeVar("Made")
_active: list["Count"] = []


class Count(TorchDispatchMode):
    """Counts what is done while it is entered: bytes alive and the most at once (`peak`), and the `work`.

    What Python asks of a tensor without numbers has one answer: yes, or 1. So a loop asks "does it still get better?",
    and a check "is all finite?". `exact` turns false once an error was asked for, which no shape can tell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0.0
        self.work, self.exact, self.times = Work(), True, 1.0
        self.made: dict[Any, tuple[Any, Work]] = {}  # of `once`
        self._known: dict[int, int] = {}

    def __enter__(self) -> "Count":
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        _active.pop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is ATEN._local_scalar_dense.default and args[0].is_meta:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        result = function(*args, **(kwargs or {}))
        outputs = [out for out in (result if isinstance(result, tuple | list) else [result]) if isinstance(out, Tensor)]
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in given:  # no view, and not in place
                self._born(tensor)
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        work, moved = Work(calls=1), float(sum(tensor.numel() * tensor.itemsize for tensor in [*inputs, *outputs]))
        if function in PRODUCTS:
            first, second = inputs[-2:]
            work += Work(flops=2.0 * first.numel() * second.shape[-1], traffic=moved)
        elif function in CUBIC:
            twice = inputs[0].itemsize / 4  # 64 bits take twice as long as 32
            size = inputs[0].numel() * min(inputs[0].shape[-2:])
            work += Work(flops=2.0 * CUBIC[function] * size * twice)
        elif function is ATEN.linalg_solve_triangular.default:
            work += Work(flops=float(inputs[0].shape[-1] * inputs[1].numel()))
        elif not function.is_view:
            work += Work(traffic=moved * SORTS.get(function, 1))
        self.work += work * self.times
        return result

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """Count these no longer as alive: whoever has them counts them."""
        for tensor in tensors:
            self._gone(tensor.untyped_storage()._cdata)

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.alive -= self._known.pop(key, 0)


def report(work: Work) -> None:
    """Add work that a primitive without numbers did not do."""
    for count in _active[-1:]:
        count.work += work * count.times


def error_asked() -> None:
    """Note that what follows hangs on an error, which nobody knows without numbers."""
    for count in _active[-1:]:
        count.exact = False


@contextmanager
def times(rounds: float) -> Iterator[None]:
    """What the `with` block does is done so many times over; it runs once, on tensors without numbers."""
    counts = _active[-1:]
    for count in counts:
        count.times *= rounds
    try:
        yield
    finally:
        for count in counts:
            count.times /= rounds if rounds else math.nan


def alike(rounds: Sequence[Round], tensor: Tensor, *, made: float = 1.0) -> Iterator[Round]:
    """The rounds of a loop that are like each other; of a tensor without numbers the first, which counts for all.

    `made` is the share of them that is made as a rule, where the loop may end before.
    """
    if not tensor.is_meta or not rounds:
        yield from rounds
        return
    with times(made * len(rounds)):
        yield rounds[0]


def once(key: Any, tensor: Tensor, make: Callable[[], Made]) -> Made:
    """What `make` gives; where `tensor` has no numbers it follows from `key`, and is made once for equal ones.

    Its work counts every time.
    """
    if not tensor.is_meta or not _active:
        return make()
    count = _active[-1]
    if key not in count.made:
        before, count.work = count.work, Work()
        made = make()
        count.made[key] = made, count.work * (1 / count.times)
        count.work = before
    found, work = count.made[key]
    count.work += work * count.times
    again: Made = deepcopy(found)
    return again


def numbers(values_N: Tensor) -> list[int]:
    """The values (N,) of a tensor of whole numbers as a list; without numbers 0, 1, 2, ..."""
    return list(range(len(values_N))) if values_N.is_meta else values_N.tolist()
