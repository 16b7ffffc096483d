"""Dependent quantisation: levels of two interleaved grids, on paths through eight states.

In a state a number k stands for the level 2 k, or in odd states for 2 k - sign(k), and its parity says which state is
next. So all levels can be had where a grid of every second one is coded: at high rates a quarter less squared error
than whole numbers leave at equal entropy (Schwarz et al., "Hybrid video coding with trellis-coded quantization", DCC
2019; the states are those of the standard VVC, H.266, with eight). A row begins in state 0. Compiled, and in numpy.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluscomp.kernels.loading import native

NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])
Levels = NDArray[np.int8]


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


def best_path(wanted_O: Any, step: float, price: float) -> Levels:
    """The levels (O,) of a row (O,) with the least sum of (wanted / step - level)^2 + price bits.

    Bits are those of a Gaussian row of the same mean square. As the compiled kernel does it, number by number.
    """
    squares = float(np.square(wanted_O, dtype=np.float64).sum())
    spread = max(squares / len(wanted_O) / step**2, 0.01)
    grids = 2 * np.arange(1, 65)[:, None] - np.array([0, 1])
    least = price * np.log2(1 + 2 * np.exp(-0.5 * grids**2 / spread).sum(0))
    pull = price / (2 * spread * np.log(2))
    u_O = np.nan_to_num(wanted_O.astype(np.float64) / (step * (1 + pull))).clip(-121, 121)
    level_O4 = _nearest(u_O)
    cost_O4 = (1 + pull) * (level_O4 - u_O[:, None]) ** 2 + least.repeat(2)
    before = np.array([[s for s in range(8) if to in NEXT[s]] for to in range(8)])  # (8, 2), rising
    way = (before & 1) * 2 + np.array([[list(NEXT[s]).index(to) for s in before[to]] for to in range(8)])
    cost_S, chosen = np.array([0.0] + [np.inf] * 7), []
    for cost_4 in cost_O4:
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
