"""Dependent quantisation: levels of two interleaved grids, on paths through eight states.

In a state a number k stands for the level 2 k, or in odd states for 2 k - sign(k), and its parity says which state is
next. So all levels can be had where a grid of every second one is coded: at high rates a fifth less squared error than
whole numbers leave at equal entropy (Schwarz et al., "Hybrid video coding with trellis-coded quantization", DCC 2019;
the states are the eight of the standard VVC, H.266). A row begins in state 0. Compiled, and in numpy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int8
from numpy.typing import NDArray
from torch import Tensor

from cluscomp.kernels.counting import report
from cluscomp.kernels.integers import hand_on
from cluscomp.kernels.loading import native
from cluscomp.kernels.work import Work

NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])
PRICE = 0.4  # of a bit, in squares of the step: least error at 2 to 4 bits of Gaussian numbers
LARGEST = 120  # size that wanted numbers have in steps at most; the levels beside it stay within a byte
REACHED = 119  # size of a level that a row of so large numbers has
NUMBERS = np.arange(-128, 128)
MOST_BITS = 20.0  # that a number is thought to take
Levels = NDArray[np.int8]


@dataclass(frozen=True)
class Lengths:
    """Bits that numbers take: a row's table is rows[i], or in odd states T more.

    `rows_I`: (I,) uint8; `bits_TK`: (2 T, 256) float32, of the numbers from -128 on.
    """

    rows_I: NDArray[np.uint8]
    bits_TK: NDArray[np.float32]

    def of_rows(self, some: slice) -> "Lengths":
        """Those of some rows."""
        return Lengths(self.rows_I[some], self.bits_TK)


def lengths_of(levels_IO: Int8[Tensor, "I O"], rows_I: NDArray[np.uint8]) -> Lengths:
    """The bits of numbers as often as they are in levels (I, O), of the rows of each table together."""
    symbols_IO, odd_IO = symbols_of(levels_IO.cpu().numpy())
    tables = int(rows_I.max()) + 1
    places_IO = (rows_I[:, None].astype(np.int64) + odd_IO.astype(np.int64) * tables) * 256 + symbols_IO + 128
    counts_TK = np.bincount(places_IO.ravel(), minlength=2 * tables * 256).reshape(-1, 256) + 1e-3
    bits_TK = np.log2(counts_TK.sum(1, keepdims=True)) - np.log2(counts_TK)
    return Lengths(rows_I, np.minimum(bits_TK, MOST_BITS).astype(np.float32))


def gaussian_lengths(spread_I: NDArray[np.float64]) -> Lengths:
    """The bits of numbers of Gaussian rows (I,) whose mean squares are `spread_I` squares of the step, a table each."""
    spread_I1 = np.maximum(spread_I, 0.01)[:, None]
    halves = []
    for odd in (0, 1):
        square_K = ((2 * NUMBERS - odd * np.sign(NUMBERS)) ** 2).astype(np.float64)
        weight_IK = -0.5 * square_K / spread_I1
        halves.append((np.log(np.exp(weight_IK).sum(1, keepdims=True)) - weight_IK) / np.log(2))
    bits_TK = np.minimum(np.concatenate(halves), MOST_BITS).astype(np.float32)
    return Lengths(np.arange(len(spread_I), dtype=np.uint8), bits_TK)


def round_on_paths(
    wanted_RO: Float[Tensor, "R O"],
    factor_RR: Float[Tensor, "R R"],
    steps_R: Float[Tensor, " R"],
    lengths: Lengths | None,
) -> tuple[Int8[Tensor, "R O"], Float[Tensor, " R"], Float[Tensor, "R O"]]:
    """What `integers.round_rows` does, with levels (R, O) in the place of whole numbers; at most 256 rows.

    The levels of a row are the path of least sum of (wanted / step - level)^2 + PRICE times the bits of its numbers, by
    `lengths`, or as Gaussian rows would have it. `wanted_RO` is overwritten.
    """
    levels_RO = torch.empty_like(wanted_RO, dtype=torch.int8)
    scales_R, errors_RO = torch.empty_like(steps_R), torch.empty_like(wanted_RO)
    if wanted_RO.is_meta:
        rows = len(wanted_RO)
        report(Work(flops=1.0 * rows * wanted_RO.numel(), traffic=400.0 * wanted_RO.numel(), calls=12 * rows))
        return levels_RO, scales_R, errors_RO
    if lengths is None:
        spread_R = wanted_RO.double().square().mean(1) / steps_R.double().square()
        lengths = gaussian_lengths(spread_R.nan_to_num().cpu().numpy())
    if native is None or wanted_RO.device.type != "cpu":
        _in_numpy(wanted_RO, factor_RR, steps_R, lengths, levels_RO, scales_R, errors_RO)
    else:
        rows_R, bits_TK = lengths.rows_I, lengths.bits_TK
        factor_RR, steps_R = factor_RR.contiguous(), steps_R.contiguous()
        native.round_on_paths(
            wanted_RO, factor_RR, steps_R, rows_R, bits_TK, PRICE, levels_RO, scales_R, errors_RO
        )  # fmt: skip
    return levels_RO, scales_R, errors_RO


def symbols_of(levels_IO: Levels) -> tuple[Levels, NDArray[np.uint8]]:
    """The numbers (I, O) that stand for levels (I, O), and whether their states are odd, 1 or 0."""
    levels_IO = np.ascontiguousarray(levels_IO)
    symbols_IO, odd_IO = np.empty_like(levels_IO), np.empty(levels_IO.shape, np.uint8)
    if native is not None:
        native.symbols_of(levels_IO, symbols_IO, odd_IO)
        return symbols_IO, odd_IO
    state_I = np.zeros(len(levels_IO), np.int64)
    for o, level_I in enumerate(levels_IO.T.astype(np.int64)):
        odd_I = state_I & 1
        number_I = (level_I + odd_I * np.sign(level_I)) // 2
        symbols_IO[:, o], odd_IO[:, o] = number_I, odd_I
        state_I = NEXT[state_I, number_I & 1]
    return symbols_IO, odd_IO


def _in_numpy(
    wanted_RO: Tensor,
    factor_RR: Tensor,
    steps_R: Tensor,
    lengths: Lengths,
    levels_RO: Tensor,
    scales_R: Tensor,
    errors_RO: Tensor,
) -> None:
    both_2TK = lengths.bits_TK.reshape(2, -1, 256).astype(np.float64)
    for i, wanted_O in enumerate(wanted_RO):
        step = torch.maximum(steps_R[i], wanted_O.abs().max() / LARGEST)
        u_O = (wanted_O.double() / step.double()).nan_to_num().clamp(-121, 121).cpu().numpy()
        level_O = torch.from_numpy(best_path(u_O, both_2TK[:, lengths.rows_I[i]], PRICE)).to(wanted_O.device)
        levels_RO[i] = level_O
        hand_on(i, level_O, step, wanted_RO, factor_RR, scales_R, errors_RO)


def best_path(u_O: NDArray[np.float64], bits_2K: Any, price: float) -> Levels:
    """The levels (O,) with the least sum of (u - level)^2 + price bits, by a table (256,) for even and odd states."""
    level_O4 = _nearest(u_O)
    size_O4, sign_O4 = np.abs(level_O4), np.sign(level_O4)
    smaller_O4 = np.where(size_O4 >= 4, level_O4 - 4 * sign_O4, level_O4)
    smaller_O4[:, 2] = np.where(size_O4[:, 2] == 3, 0, smaller_O4[:, 2])
    odd_4 = np.array([0, 0, 1, 1])
    costs = []
    for some_O4 in (level_O4, smaller_O4):
        number_O4 = (np.abs(some_O4) + odd_4 * (some_O4 != 0)) // 2 * np.sign(some_O4)
        costs.append((some_O4 - u_O[:, None]) ** 2 + price * bits_2K[odd_4, number_O4 + 128])
    level_O4 = np.where(costs[1] < costs[0], smaller_O4, level_O4)
    before = np.array([[s for s in range(8) if to in NEXT[s]] for to in range(8)])  # (8, 2), rising
    way = (before & 1) * 2 + np.array([[list(NEXT[s]).index(to) for s in before[to]] for to in range(8)])
    cost_S, chosen = np.array([0.0] + [np.inf] * 7), []
    for cost_4 in np.minimum(*costs):
        both_S2 = cost_S[before] + cost_4[way]
        pick_S = both_S2.argmin(1)
        cost_S = both_S2[np.arange(8), pick_S]
        chosen.append(pick_S)
    state, found_O = int(cost_S.argmin()), np.empty(len(u_O), np.int8)
    for o in range(len(u_O) - 1, -1, -1):
        pick = chosen[o][state]
        found_O[o] = level_O4[o, way[state, pick]]
        state = int(before[state, pick])
    return found_O


def _nearest(u_O: NDArray[np.float64]) -> NDArray[np.int64]:
    """Nearest levels (O, 4) of even states with k even and k odd, then of odd states with k even and k odd."""
    size_O, sign_O = np.abs(u_O), np.where(u_O < 0, -1, 1)
    third_O = np.where(size_O < 1.5, 0, sign_O * np.maximum(3, 4 * np.rint((size_O + 1) / 4) - 1))
    fourth_O = sign_O * (4 * np.maximum(0, np.rint((size_O - 1) / 4)) + 1)
    return np.stack([4 * np.rint(u_O / 4), 4 * np.floor(u_O / 4) + 2, third_O, fourth_O], 1).astype(np.int64)
