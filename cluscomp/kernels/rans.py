"""Whole numbers of one byte to a stream and back by rANS (Duda, arXiv 1311.2540): compiled, and the same in numpy.

Number (i, o) of a matrix (I, O) belongs to table rows[i] + columns[o], in which each value has a frequency; those of a
table add up to 2^14. The numbers are dealt out in turn to L states of 32 bits, which share one stream of 16-bit words.
Numbers that stand for levels (kernels/dependent.py) belong to the second half of the tables in odd states.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluscomp.kernels.dependent import NEXT
from cluscomp.kernels.loading import native

PRECISION = 14
WHOLE = 1 << PRECISION  # what the frequencies of a table add up to
LEAST = 1 << 16  # of a state between two numbers; where all begin
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
States = NDArray[np.uint32]


def lanes_for(numbers: int) -> int:
    """L: 1 to 32, a power of two, so that what states take beside the numbers is little."""
    return 1 << min(5, max(0, (numbers >> 13).bit_length() - 1))


def encode(
    numbers_IO: NDArray[np.int8],
    rows_I: Bytes,
    columns_O: Bytes,
    frequencies_TK: Words,
    odd_IO: Bytes | None = None,
) -> tuple[States, Words]:
    """The last states (L,) and the words of some numbers (I, O).

    Args:
        numbers_IO: (I, O), -128 to 127.
        rows_I: (I,), the part of the table's place that an input has.
        columns_O: (O,), that of an output.
        frequencies_TK: (T, 256), of the values from -128 on.
        odd_IO: (I, O), 1 where the state is odd, of numbers that stand for levels.

    Raises:
        ValueError: a number has no frequency, a place is none of a table, or frequencies do not add up to 2^14.
    """
    states_L = np.empty(lanes_for(numbers_IO.size), np.uint32)
    if native is None:
        return states_L, _encode(numbers_IO, rows_I, columns_O, frequencies_TK, states_L, odd_IO)
    words = np.empty(numbers_IO.size, np.uint16)
    numbers_IO = np.ascontiguousarray(numbers_IO)
    count = native.rans_encode(numbers_IO, odd_IO, rows_I, columns_O, frequencies_TK, states_L, words)
    return states_L, words[:count].copy()


def decode(
    states_L: States, words: Words, rows_I: Bytes, columns_O: Bytes, frequencies_TK: Words, *, dependent: bool = False
) -> NDArray[np.int8]:
    """The numbers (I, O) that `encode` wrote, or the levels they stand for.

    Raises:
        ValueError: this is no stream of so many numbers, or the tables are none; nothing is read past its end.
    """
    states_L, numbers_IO = states_L.copy(), np.empty((len(rows_I), len(columns_O)), np.int8)
    if native is not None:
        read = native.rans_decode(words, rows_I, columns_O, frequencies_TK, dependent, states_L, numbers_IO)
    elif dependent:
        read = _decode_levels(states_L, words, rows_I, columns_O, frequencies_TK, numbers_IO)
    else:
        read = _decode(states_L, words, rows_I, columns_O, frequencies_TK, numbers_IO)
    if read != len(words) or bool((states_L != LEAST).any()):
        raise ValueError("the stream of numbers is not one that was written")
    return numbers_IO


def _tables(rows_I: Bytes, columns_O: Bytes, frequencies_TK: Words, *, dependent: bool = False) -> tuple[Any, Any]:
    """Frequencies and their sums before each value, (T, 256), after looking at both."""
    frequencies_TK = frequencies_TK.astype(np.int64)
    if bool((frequencies_TK.sum(1) != WHOLE).any()):
        raise ValueError("the frequencies of a table must add up to 2^14")
    if int(rows_I.max()) + int(columns_O.max()) >= len(frequencies_TK) // (1 + dependent):
        raise ValueError("a number points past the tables")
    return frequencies_TK, frequencies_TK.cumsum(1) - frequencies_TK


def _rounds(rows_I: Bytes, columns_O: Bytes, lanes: int) -> tuple[Any, Any]:
    """The table of each number, (rounds, L), and whether there is a number."""
    places_N = (rows_I[:, None].astype(np.int64) + columns_O).ravel()
    missing = -len(places_N) % lanes
    there_N = np.arange(len(places_N) + missing) < len(places_N)
    return np.pad(places_N, (0, missing)).reshape(-1, lanes), there_N.reshape(-1, lanes)


def _encode(
    numbers_IO: Any, rows_I: Bytes, columns_O: Bytes, frequencies_TK: Words, states_L: States, odd_IO: Bytes | None
) -> Words:
    """All lanes of a round at once, from the last round to the first, and words in the order of reading."""
    frequencies, starts = _tables(rows_I, columns_O, frequencies_TK, dependent=odd_IO is not None)
    places_RL, there_RL = _rounds(rows_I, columns_O, len(states_L))
    if odd_IO is not None:
        second_N = odd_IO.ravel().astype(np.int64) * (len(frequencies_TK) // 2)
        places_RL = places_RL + np.pad(second_N, (0, places_RL.size - second_N.size)).reshape(places_RL.shape)
    symbols_RL = np.pad(numbers_IO.ravel().astype(np.int64) + 128, (0, there_RL.size - numbers_IO.size))
    symbols_RL = symbols_RL.reshape(places_RL.shape)
    frequency_RL = np.where(there_RL, frequencies[places_RL, symbols_RL], WHOLE)
    if not bool(frequency_RL.all()):
        raise ValueError("a number that its table does not have")
    start_RL = np.where(there_RL, starts[places_RL, symbols_RL], 0)
    state_L, written = np.full(len(states_L), LEAST, np.int64), []
    for frequency_L, start_L in zip(frequency_RL[::-1], start_RL[::-1]):
        full_L = state_L >= frequency_L << (32 - PRECISION)
        written.append(state_L[full_L] & 0xFFFF)
        state_L = np.where(full_L, state_L >> 16, state_L)
        state_L = (state_L // frequency_L << PRECISION) + state_L % frequency_L + start_L
    states_L[:] = state_L
    return np.concatenate(written[::-1]).astype(np.uint16)


def _decode(
    states_L: States, words: Words, rows_I: Bytes, columns_O: Bytes, frequencies_TK: Words, numbers_IO: Any
) -> int:
    """Fills the numbers and the last states; how many words were read, -1 if there are too few."""
    frequencies, starts = _tables(rows_I, columns_O, frequencies_TK)
    symbols_TS = np.stack([np.repeat(np.arange(256), frequency_K) for frequency_K in frequencies])
    places_RL, there_RL = _rounds(rows_I, columns_O, len(states_L))
    state_L, read, found = states_L.astype(np.int64), 0, []
    for places_L, there_L in zip(places_RL, there_RL):
        slot_L = state_L & (WHOLE - 1)
        symbol_L = symbols_TS[places_L, slot_L]
        next_L = frequencies[places_L, symbol_L] * (state_L >> PRECISION) + slot_L - starts[places_L, symbol_L]
        state_L = np.where(there_L, next_L, state_L)
        empty_L = there_L & (state_L < LEAST)
        count = int(empty_L.sum())
        if read + count > len(words):
            return -1
        state_L[empty_L] = state_L[empty_L] << 16 | words[read : read + count]
        read += count
        found.append(symbol_L - 128)
    states_L[:] = state_L
    numbers_IO[:] = np.concatenate(found)[: numbers_IO.size].reshape(numbers_IO.shape)
    return read


def _decode_levels(
    states_L: States, words: Words, rows_I: Bytes, columns_O: Bytes, frequencies_TK: Words, levels_IO: Any
) -> int:
    """As `_decode`, one number after the other, for each says to which table the next one belongs."""
    frequencies, starts = _tables(rows_I, columns_O, frequencies_TK, dependent=True)
    symbols_TS = [np.repeat(np.arange(256), frequency_K).tolist() for frequency_K in frequencies]
    frequency, start, half, read = frequencies.tolist(), starts.tolist(), len(frequencies) // 2, 0
    state_L, number = [int(state) for state in states_L], 0
    for i, row in enumerate(rows_I.tolist()):
        path = 0
        for o, column in enumerate(columns_O.tolist()):
            lane, table = number % len(state_L), row + column + (path & 1) * half
            slot = state_L[lane] & (WHOLE - 1)
            symbol = symbols_TS[table][slot]
            state = frequency[table][symbol] * (state_L[lane] >> PRECISION) + slot - start[table][symbol]
            if state < LEAST:
                if read == len(words):
                    return -1
                state, read = state << 16 | int(words[read]), read + 1
            state_L[lane], number, value = state, number + 1, symbol - 128
            level = 2 * value - (path & 1) * ((value > 0) - (value < 0))
            levels_IO[i, o] = (level + 128) % 256 - 128
            path = int(NEXT[path, value & 1])
    states_L[:] = state_L
    return read
