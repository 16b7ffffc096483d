"""Whole numbers of few bits by their entropy, with a step for each input from the second moment (WaterSIC).

After all later inputs have taken over what they can of it, an error e of input i costs (e / d_i)^2, d being the
diagonal of the upper Cholesky factor of H's inverse. Steps c d_i make all inputs' costs alike: the water level of
rate-distortion theory, with one constant c for the whole weight (egorlifar/watersic on GitHub, ICML 2026).
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from cluscomp.forms.entropy import EntropyWeight
from cluscomp.kernels.counting import alike, error_asked, times
from cluscomp.kernels.dependent import REACHED, Lengths, lengths_of, round_on_paths
from cluscomp.kernels.entropy import Plan, planned
from cluscomp.kernels.integers import LARGEST, round_rows
from cluscomp.solve.along_outputs import BATCH, inverse_factor, output_error

TURNS = 40  # of the search for c
NEAR = 0.004  # bits a weight that the search may leave unspent
PROBED = 256  # outputs that a first search looks at
LEARNED = 5  # times that the bits of levels are learned from those found
PASSES = 6  # over the whole weight, in the search as a rule
LADDER = (-1.25, -0.75, -0.25, 0.25, 0.75, 1.25)  # log2 of c about the first, at which a menu's errors are measured


@dataclass(frozen=True)
class Rounding:
    """Numbers (I, O) of a weight at log2(c) = `level`, the scale (I,) of each input, and how they would be coded."""

    level: float
    numbers_IO: Int8[Tensor, "I O"]
    scales_I: Float[Tensor, " I"]
    plan: Plan


class Curvature:
    """What rounding needs to know of a layer's inputs; layers that read one input share it.

    Args:
        moment_II: (I, I), the second moment of the inputs, positive definite (see `along_outputs.damped`).
    """

    def __init__(self, moment_II: Float[Tensor, "I I"]) -> None:
        self.order_I = moment_II.diagonal().argsort(descending=True, stable=True)
        self.moment_II = moment_II[self.order_I][:, self.order_I]
        self.factor_II = inverse_factor(self.moment_II, moment_II.dtype)


class WaterFilling:
    """A weight (O, I) made ready to be rounded at any c.

    Args:
        weight_OI: (O, I) in float32.
        curvature: of its inputs.
        dependent: levels of a quantiser with eight states in the place of whole numbers (kernels/dependent.py).
        scaled_outputs: each output has a scale, too.
        refits: how often the scales are fitted to the numbers.
    """

    def __init__(
        self,
        weight_OI: Float[Tensor, "O I"],
        curvature: Curvature,
        *,
        dependent: bool = False,
        scaled_outputs: bool,
        refits: int,
    ) -> None:
        self._dependent, self._scaled_outputs, self._refits = dependent, scaled_outputs, refits
        self._lengths: Lengths | None = None  # of the bits of levels, once some are known
        self._order_I, self._moment_II = curvature.order_I, curvature.moment_II
        self._factor_II = curvature.factor_II
        self._weight_IO = weight_OI.T[self._order_I].contiguous()
        self._numbers = weight_OI.numel()

    def stored(self, bits: float) -> EntropyWeight:
        """The stored form of as many bits a weight as can be had below `bits`; nothing is spent above.

        Raises ValueError if even zeros would take more.
        """
        inputs, outputs = self._weight_IO.shape
        most = bits * self._numbers - 16 * (inputs + (outputs if self._scaled_outputs else 0))
        if self._weight_IO.is_meta:
            return self._without_numbers(most)
        start, every = self._guess(most), max(1, outputs // PROBED)
        if self._dependent:
            for _ in range(LEARNED):  # a path should pay what its numbers will take
                found = self._rounded(start, every)
                self._lengths = lengths_of(found.numbers_IO, found.plan.levels.rows_I)
        if every > 1:
            start = self._search(most, start, every).level
        left = most
        while True:
            found = self._search(left, start)
            stored = self._in_order(found, *self._refitted(found))
            above = len(stored.stream) * 8 - most
            if above <= 0:
                return stored
            start, left = found.level, left - above - 8

    def errors(self, bits: float) -> list[tuple[float, float]]:
        """Bits a weight and the relative error of the output, tr(E H E^T) over tr(W H W^T), H damped, around `bits`.

        Of a share of the outputs; what fitted scales take off is measured at `bits` alone. Without numbers only `bits`.
        """
        inputs, outputs = self._weight_IO.shape
        every = max(1, outputs // PROBED)
        if self._weight_IO.is_meta:
            error_asked()
            with times(len(LADDER) + PASSES / 2):
                self._rounded(0.0, every)
            return [(bits, 1.0)]
        beside = 16 * (inputs + (outputs if self._scaled_outputs else 0))
        most = bits * self._numbers - beside
        middle = self._search(most, self._guess(most), every)
        some_IO = self._weight_IO[:, ::every]
        size = output_error(some_IO.T, self._moment_II) or 1.0
        fitted = self._error(middle, every, *self._refitted(middle, every)) / (self._error(middle, every) or 1.0)
        found = []
        for offset in LADDER:
            rounding = self._rounded(middle.level + offset, every)
            damage = self._error(rounding, every) / size * fitted
            found.append(((self._bits(rounding) + beside) / self._numbers, damage))
        return found

    def _error(
        self, found: Rounding, every: int, scales_I: Tensor | None = None, outputs_O: Tensor | None = None
    ) -> float:
        """tr(E H E^T) over one of `every` outputs, with the scales of the rounding or others."""
        dense_IO = found.numbers_IO * (found.scales_I if scales_I is None else scales_I)[:, None]
        dense_IO = dense_IO if outputs_O is None else dense_IO * outputs_O
        return output_error((dense_IO - self._weight_IO[:, ::every]).T, self._moment_II)

    def _guess(self, most: float) -> float:
        """log2(c) at which numbers that spread as Gaussian ones take `most` bits."""
        spread = float(self._weight_IO.square().mean().sqrt()) or 1.0
        entropy = math.log2(spread * math.sqrt(2 * math.pi * math.e))
        return (
            entropy - float(self._factor_II.diagonal().log2().mean()) - max(most / self._numbers, 0.1) - self._dependent
        )

    def _rounded(self, level: float, every: int = 1) -> Rounding:
        """All outputs, or one of `every`, rounded at a c, in the order of work."""
        left_IO = self._weight_IO[:, ::every].clone()
        steps_I = 2.0**level * self._factor_II.diagonal()
        numbers_IO, scales_I = torch.empty_like(left_IO, dtype=torch.int8), torch.empty_like(steps_I)
        for start in alike(range(0, len(left_IO), BATCH), left_IO):
            now, later = slice(start, start + BATCH), slice(start + BATCH, None)
            given = left_IO[now], self._factor_II[now, now], steps_I[now]
            lengths = None if self._lengths is None else self._lengths.of_rows(now)
            numbers_IO[now], scales_I[now], errors_BO = (
                round_on_paths(*given, lengths) if self._dependent else round_rows(*given)
            )
            with times(0.5):  # so many are left on the average
                left_IO[later].addmm_(self._factor_II[now, later].T, errors_BO, alpha=-1)
        plan = planned(numbers_IO, dependent=self._dependent) if not left_IO.is_meta else None
        return Rounding(level, numbers_IO, scales_I, plan)  # type: ignore[arg-type]

    def _bits(self, found: Rounding) -> float:
        """Bits of the whole stream, of which the numbers of some outputs are known."""
        return found.plan.numbers * self._numbers / found.numbers_IO.numel() + found.plan.beside

    def _search(self, most: float, start: float, every: int = 1) -> Rounding:
        """The numbers that take nearly `most` bits, from log2(c) = `start` on: the secant, held between bounds."""
        level, finest, best, before = start, -math.inf, None, None
        wanted = most - 0.5 * NEAR * self._numbers
        for _ in range(TURNS):
            found = self._rounded(level, every)
            bits = self._bits(found)
            if bits > most:
                finest = level
                if not bool(found.numbers_IO.any()):
                    break
            elif best is None or level < best.level:
                best = found
                if most - bits <= NEAR * self._numbers:
                    break
            if best is not None and (best.level - finest < 1e-4 or self._cannot_be_finer(found)):
                break
            slope = -float(self._numbers)
            if before is not None and (bits - before[1]) * (level - before[0]) < 0:
                slope = min(slope / 10, (bits - before[1]) / (level - before[0]))
            before = level, bits
            level += max(-3.0, min(3.0, (wanted - bits) / slope))
            coarsest = math.inf if best is None else best.level
            if not finest < level < coarsest:
                level = (finest + coarsest) / 2 if math.isfinite(finest + coarsest) else before[0] + 1
        if best is None:
            raise ValueError(f"{most / self._numbers:.3f} bits a weight are left for its numbers: too few")
        return best

    def _cannot_be_finer(self, found: Rounding) -> bool:
        """Whether a smaller c would change nothing: all weights are 0, or every input has a number of 127."""
        largest_I = found.numbers_IO.abs().amax(1)
        return bool(
            ((largest_I >= (REACHED if self._dependent else LARGEST)) | (self._weight_IO.abs().amax(1) == 0)).all()
        )

    def _refitted(self, found: Rounding, every: int = 1) -> tuple[Tensor, Tensor | None]:
        """Scales (I,) of inputs and, where wanted, (O,) of outputs of least output error for these numbers.

        Both are linear least squares, the other fixed: (H o Z T^2 Z^T) s = diag(H W T Z^T) for inputs.
        """
        numbers_IO, scales_I = found.numbers_IO.float(), found.scales_I
        outputs_O = numbers_IO.new_ones(numbers_IO.shape[1])
        wanted_IO = self._moment_II @ self._weight_IO[:, ::every]
        for _ in alike(range(self._refits), numbers_IO):
            scaled_IO = numbers_IO * outputs_O
            matrix_II = (scaled_IO @ scaled_IO.T) * self._moment_II
            side_I = (scaled_IO * wanted_IO).sum(1)
            dead_I = matrix_II.diagonal() == 0
            matrix_II.diagonal().mul_(1 + 1e-6).add_(dead_I.float())
            side_I = torch.where(dead_I, scales_I, side_I)
            factor_II, wrong = torch.linalg.cholesky_ex(matrix_II.double())
            if bool(wrong == 0):
                scales_I = torch.cholesky_solve(side_I.double()[:, None], factor_II)[:, 0].float()
            if self._scaled_outputs:
                dense_IO = numbers_IO * scales_I[:, None]
                size_O = (dense_IO * (self._moment_II @ dense_IO)).sum(0)
                outputs_O = torch.where(size_O > 0, (dense_IO * wanted_IO).sum(0) / size_O, 1.0)
        return scales_I, outputs_O if self._scaled_outputs else None

    def _in_order(self, found: Rounding, scales_I: Tensor, outputs_O: Tensor | None) -> EntropyWeight:
        """The stored form with inputs as the weight has them."""
        back_I = self._order_I.argsort()
        rows_I = found.plan.levels.rows_I[back_I.cpu().numpy()]
        plan = replace(found.plan, levels=replace(found.plan.levels, rows_I=rows_I))
        return EntropyWeight.from_numbers(found.numbers_IO[back_I], scales_I[back_I], outputs_O, plan)

    def _without_numbers(self, most: float) -> EntropyWeight:
        """The form that takes all of `most` bits, on the meta device; the work of the search and the fit is counted."""
        if most < 8:
            raise ValueError(f"{most / self._numbers:.3f} bits a weight are left for its numbers: too few")
        with times(PASSES * (2 if self._dependent else 1)):
            found = self._rounded(0.0)
        self._refitted(found)
        error_asked()
        with torch.device("meta"):
            return EntropyWeight.empty(
                out_features=self._weight_IO.shape[1],
                in_features=len(self._weight_IO),
                stream_bytes=int(most // 8),
                scaled_outputs=self._scaled_outputs,
                dependent=self._dependent,
            )
