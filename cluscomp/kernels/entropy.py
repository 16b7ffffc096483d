"""Whole numbers of one byte as a stream near their entropy: the tables it takes, and what it holds beside the numbers.

A matrix (I, O) has rows and columns of different spread. Each input and each output has a level, the logarithm of its
spread in steps, and number (i, o) belongs to table level_i + level_o, so that a few tables serve all. The stream is

    tables T - 1 | bits of an input's level + 16 times those of an output's | levels, packed (kernels/codes.py)
    T times: least value, int8 | number of values - 1 | a byte for each: its frequency
    L states of 32 bits | words of 16 bits (kernels/rans.py), all little-endian

A frequency's byte b stands for (16 + b % 16) 2^(b // 16), 0 for none; they are scaled to 2^14 in whole numbers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cluscomp.kernels.codes import pack, packed_bytes, unpack
from cluscomp.kernels.dependent import symbols_of
from cluscomp.kernels.rans import PRECISION, WHOLE, Bytes, Words, decode, encode, lanes_for

STEPS = (4.0, 2.0, 1.0, 0.5)  # of levels, in log2 of the mean square
MOST_LEVELS = 16
LAST_STATE = 24  # bits of a last state that hold no numbers, on the average
SMALLEST = 0.02  # mean square of a row of zeros
PIECE = 2**22  # numbers that are counted at a time
TRIED = 2**20  # numbers on which levels are tried, about


@dataclass(frozen=True)
class Levels:
    """The levels of inputs (I,) and outputs (O,), from 0 on."""

    rows_I: Bytes
    columns_O: Bytes

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of an input's and of an output's level."""
        return int(self.rows_I.max()).bit_length(), int(self.columns_O.max()).bit_length()

    @property
    def tables(self) -> int:
        """T, how many tables they point to."""
        return int(self.rows_I.max()) + int(self.columns_O.max()) + 1


@dataclass(frozen=True)
class Plan:
    """How numbers will be coded, and the bits this takes: of the numbers, and of all beside them."""

    levels: Levels
    tables: bytes
    frequencies_TK: Words
    numbers: float
    beside: float
    dependent: bool = False

    @property
    def bits(self) -> float:
        """The whole stream, as far as entropy tells."""
        return self.numbers + self.beside


def write(
    numbers_IO: Int8[Tensor, "I O"], plan: Plan | None = None, *, dependent: bool = False
) -> UInt8[Tensor, " bytes"]:
    """The stream of some numbers (I, O), by the `plan` of these numbers where it is known.

    `dependent`: of the numbers of quantiser's levels (I, O), see kernels/dependent.py.
    """
    plan = plan or planned(numbers_IO, dependent=dependent)
    levels, array_IO, odd_IO = plan.levels, numbers_IO.cpu().numpy(), None
    if plan.dependent:
        array_IO, odd_IO = symbols_of(array_IO)
    states_L, words = encode(array_IO, levels.rows_I, levels.columns_O, plan.frequencies_TK, odd_IO)
    first, second = levels.widths
    parts = [bytes([len(plan.frequencies_TK) - 1, first | second << 4])]
    for level_N, width in ((levels.rows_I, first), (levels.columns_O, second)):
        if width:
            parts.append(pack(torch.from_numpy(level_N.astype(np.int32)), width).numpy().tobytes())
    parts += [plan.tables, states_L.astype("<u4").tobytes(), words.astype("<u2").tobytes()]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def read(stream: UInt8[Tensor, " bytes"], inputs: int, outputs: int, *, dependent: bool = False) -> Int8[Tensor, "I O"]:
    """The numbers, or quantiser's levels, (I, O) of a stream.

    Raises ValueError if `write` did not make it of so many.
    """
    rest = _Bytes(stream.cpu().numpy().tobytes())
    tables, widths = rest.take(1)[0] + 1, rest.take(1)[0]
    levels = []
    for size, width in ((inputs, widths & 15), (outputs, widths >> 4)):
        if width > 8:
            raise ValueError(f"levels of {width} bits")
        packed = torch.frombuffer(bytearray(rest.take(packed_bytes(size, width))) or bytearray(1), dtype=torch.uint8)
        level = unpack(packed, width, size).numpy().astype(np.uint8) if width else np.zeros(size, np.uint8)
        levels.append(level)
    frequencies_TK = np.zeros((tables, 256), np.uint16)
    for frequency_K in frequencies_TK:
        least, count = int.from_bytes(rest.take(1), signed=True), rest.take(1)[0] + 1
        values = np.frombuffer(rest.take(count), np.uint8)
        if least + count > 128 or not values.any():
            raise ValueError("a table of values that are none of a byte")
        frequency_K[least + 128 : least + 128 + count] = _scaled(values)
    states_L = np.frombuffer(rest.take(4 * lanes_for(inputs * outputs)), "<u4").astype(np.uint32)
    words = rest.take(len(rest.left) // 2 * 2)
    if rest.left:
        raise ValueError("a stream of half words")
    rows_I, columns_O = levels
    words_ = np.frombuffer(words, "<u2").astype(np.uint16)
    found_IO = decode(states_L, words_, rows_I, columns_O, frequencies_TK, dependent=dependent)
    return torch.from_numpy(found_IO)


class _Bytes:
    """Bytes to be taken from the front."""

    def __init__(self, left: bytes) -> None:
        self.left = left

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises ValueError if there are fewer."""
        taken, self.left = self.left[:count], self.left[count:]
        if len(taken) != count:
            raise ValueError("a stream that ends too early")
        return taken


def planned(numbers_IO: Int8[Tensor, "I O"], *, dependent: bool = False) -> Plan:
    """The best levels and tables for numbers (I, O) of those that are tried; of many, on a share of the outputs.

    `dependent`: for quantiser's levels (I, O).
    """
    array_IO, odd_IO = np.ascontiguousarray(numbers_IO.cpu().numpy()), None
    if dependent:
        array_IO, odd_IO = symbols_of(array_IO)
    inputs, outputs = array_IO.shape
    every = max(1, array_IO.size // TRIED)
    some_IS = np.ascontiguousarray(array_IO[:, ::every])
    some_odd_IS = None if odd_IO is None else np.ascontiguousarray(odd_IO[:, ::every])

    def bits(levels: Levels) -> float:
        plan = _plan(some_IS, Levels(levels.rows_I, levels.columns_O[::every]), some_odd_IS)
        return plan.numbers * array_IO.size / some_IS.size + plan.beside

    best = Levels(np.zeros(inputs, np.uint8), np.zeros(outputs, np.uint8))
    least, flat_O = bits(best), best.columns_O
    rows_I, columns_O = _spreads(array_IO)
    for both in (False, True):
        last = np.inf
        for step in STEPS:
            levels = Levels(_leveled(rows_I, step), _leveled(columns_O, step) if both else flat_O)
            found = bits(levels)
            if found < least:
                best, least = levels, found
            if found > last:
                break
            last = found
    return _plan(array_IO, best, odd_IO)


def _spreads(array_IO: NDArray[np.int8]) -> tuple[Any, Any]:
    """log2 of the mean square of each input (I,) and each output (O,), whose products are near those of all numbers."""
    squares_IO = array_IO.astype(np.float32) ** 2
    column_O: Any = np.ones(array_IO.shape[1], np.float32)
    for _ in range(3):
        row_I = squares_IO @ (1 / column_O) / len(column_O) + SMALLEST
        column_O = (1 / row_I) @ squares_IO / len(row_I) + SMALLEST
    return np.log2(row_I), np.log2(column_O)


def _leveled(spread_N: Any, step: float) -> Bytes:
    """Levels (N,) of spreads (N,), all that are above the highest as one."""
    level_N = np.rint((spread_N - spread_N.min()) / step)
    return np.minimum(level_N, MOST_LEVELS - 1).astype(np.uint8)  # type: ignore[no-any-return]


def _plan(array_IO: NDArray[np.int8], levels: Levels, odd_IO: Bytes | None) -> Plan:
    counts_TK = _counts(array_IO, levels, odd_IO)
    parts, frequencies_TK = [], np.zeros(counts_TK.shape, np.uint16)
    for count_K, frequency_K in zip(counts_TK, frequencies_TK):
        found = np.flatnonzero(count_K)
        first, last = (int(found[0]), int(found[-1])) if len(found) else (128, 128)
        values = _as_bytes(count_K[first : last + 1]) if len(found) else np.ones(1, np.uint8)
        frequency_K[first : last + 1] = _scaled(values)
        parts.append((first - 128).to_bytes(1, signed=True) + bytes([last - first]) + values.tobytes())
    tables = b"".join(parts)
    lengths_TK = PRECISION - np.log2(np.maximum(frequencies_TK, 1))
    inputs, outputs = array_IO.shape
    first_width, second_width = levels.widths
    packed = packed_bytes(inputs, first_width) + packed_bytes(outputs, second_width)
    beside = 8.0 * (2 + packed + len(tables)) + LAST_STATE * lanes_for(array_IO.size)
    numbers = float((counts_TK * lengths_TK).sum())
    return Plan(levels, tables, frequencies_TK, numbers, beside, dependent=odd_IO is not None)


def _counts(array_IO: NDArray[np.int8], levels: Levels, odd_IO: Bytes | None) -> NDArray[np.int64]:
    """How often each value is in each table, (T, 256); those of odd states come last."""
    counts = np.zeros(levels.tables * 256 * (1 if odd_IO is None else 2), np.int64)
    place_O = levels.columns_O.astype(np.int32) * 256 + 128
    rows = max(1, PIECE // array_IO.shape[1])
    for start in range(0, len(array_IO), rows):
        piece_RO = levels.rows_I[start : start + rows, None].astype(np.int32) * 256 + place_O
        piece_RO += array_IO[start : start + rows]
        if odd_IO is not None:
            piece_RO += odd_IO[start : start + rows].astype(np.int32) * (levels.tables * 256)
        counts += np.bincount(piece_RO.ravel(), minlength=len(counts))
    return counts.reshape(-1, 256)


def _as_bytes(count_K: Any) -> Bytes:
    """Counts (K,) as bytes of frequencies, rounded; 0 for none."""
    mantissa_K, exponent_K = np.frexp(count_K * ((31 << 15) / count_K.max()))
    mantissa_K, exponent_K = np.rint(mantissa_K * 32), exponent_K - 5
    carry_K = mantissa_K == 32
    byte_K = (exponent_K + carry_K) * 16 + np.where(carry_K, 0, mantissa_K - 16)
    return np.where(count_K > 0, byte_K.clip(1, 255), 0).astype(np.uint8)


def _scaled(values: Bytes) -> Words:
    """Bytes of frequencies (K,), not all 0, as frequencies that add up to 2^14; none is lost."""
    weights = np.where(values > 0, (16 + (values & 15).astype(np.int64)) << (values >> 4).astype(np.int64), 0)
    there = values > 0
    scaled = weights * (WHOLE - int(there.sum())) // int(weights.sum()) + there
    scaled[weights.argmax()] += WHOLE - int(scaled.sum())
    return scaled.astype(np.uint16)
