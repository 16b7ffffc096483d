"""Bitshift trellises (QTIP, arXiv 2406.11235): codes for sequences of numbers, compiled, and the same in plain torch.

A state of L bits stands for a number, a pure function of these bits. From state s the path goes to
(s << k | j) mod 2^L, so that a sequence of T states is T k bits, of which a state is a window of L. A path whose end
runs into its beginning (tail-biting) has no bits beside these.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cluscomp.kernels.counting import report
from cluscomp.kernels.loading import native, number_of_threads
from cluscomp.kernels.work import Work

Code = Literal["1mad", "3inst"]
MOST_STATE_BITS = 16
PIECE = 2**24  # numbers that the plain version holds of some sequences


def code_values(state_bits: int, code: Code, device: torch.device) -> Float[Tensor, " N"]:
    """The numbers (2^L,) that states stand for, nearly Gaussian of variance 1, in float32.

    "1mad": the sum of the 4 bytes of a s + b mod 2^32 (the paper's Algorithm 1). "3inst": the sum of two 16-bit floats
    of one exponent whose signs and mantissas are bits of such a number (Algorithm 2).
    """
    states_N = torch.arange(2**state_bits, device=device)
    if code == "1mad":
        mixed_N = (states_N * 34038481 + 76625530) & 0xFFFFFFFF
        bytes_N = (mixed_N & 255) + (mixed_N >> 8 & 255) + (mixed_N >> 16 & 255) + (mixed_N >> 24)
        return (bytes_N - 510).float() / 147.8
    mixed_N = ((states_N * 89226354 + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60  # 0x3B60 is 0.922
    halves = [(half_N - (half_N >> 15 << 16)).to(torch.int16) for half_N in (mixed_N & 0xFFFF, mixed_N >> 16)]
    return sum(half_N.view(torch.float16).float() for half_N in halves)  # type: ignore[return-value]


def best_paths(
    targets_ST: Float[Tensor, "S T"],
    values_N: Float[Tensor, " N"],
    width: int,
    *,
    tail_biting: bool = True,
    threads: int | None = None,
) -> Int[Tensor, "S T"]:
    """States (S, T), int32, of a path near each sequence of targets, by least squared error of `values_N` (2^L,).

    `width` (k): bits of a step, 1 to 8 and below L. Without `tail_biting` a path has the least error there is. With it,
    a pass from the middle on and round finds the L - k bits that the end shares with the beginning, and a second one
    the best path that has them (the paper's Algorithm 4); T k >= L. All differences, squares and sums are rounded one
    by one, and the lowest number wins a tie: the result is the same everywhere.

    Raises:
        ValueError: a target is not finite, or sizes cannot be.
    """
    if targets_ST.is_meta:
        report(Work(distances=(2.0 if tail_biting else 1.0) * targets_ST.numel() * len(values_N)))
        return torch.empty_like(targets_ST, dtype=torch.int32)
    if not bool(targets_ST.isfinite().all()):
        raise ValueError("NaN or infinity among its weights")
    targets_ST = targets_ST.float().contiguous()
    if native is None or targets_ST.is_cuda:
        return best_paths_reference(targets_ST, values_N, width, tail_biting=tail_biting)
    states_ST = torch.empty(targets_ST.shape, dtype=torch.int32)
    native.best_paths(targets_ST, values_N.contiguous(), width, tail_biting, states_ST, number_of_threads(threads))
    return states_ST


def best_paths_reference(
    targets_ST: Float[Tensor, "S T"], values_N: Float[Tensor, " N"], width: int, *, tail_biting: bool
) -> Int[Tensor, "S T"]:
    """`best_paths`, (S, T) -> (S, T), in plain torch: Viterbi's algorithm for some sequences at a time."""
    middle, length = targets_ST.shape[1] // 2, targets_ST.shape[1]
    found = []
    for part_PT in targets_ST.split(max(1, PIECE // len(values_N))):
        free = torch.full((len(part_PT),), -1, device=part_PT.device)
        if not tail_biting:
            found.append(_pass(part_PT, values_N, width, free))
            continue
        turned_PT = _pass(part_PT.roll(-middle, 1), values_N, width, free)
        found.append(_pass(part_PT, values_N, width, turned_PT[:, length - middle].long() >> width))
    return torch.cat(found)


def _pass(targets_ST: Tensor, values_N: Tensor, width: int, bits_S: Tensor) -> Tensor:
    """The best paths (S, T) that begin and end with these L - k bits (S,), each with any if they are -1."""
    groups, steps = len(values_N) >> width, 2**width
    least_SG = targets_ST.new_zeros(len(targets_ST), groups)
    any_S1 = bits_S[:, None] < 0
    wanted_SG = any_S1 | (torch.arange(groups, device=bits_S.device) == bits_S[:, None])
    least_SG = least_SG.masked_fill(~wanted_SG, torch.inf)
    came = []
    for target_S in targets_ST.unbind(1):
        error_SN = values_N - target_S[:, None]
        cost_SKG = (least_SG.repeat_interleave(steps, 1) + error_SN * error_SN).unflatten(1, (steps, groups))
        least_SG, from_SG = cost_SKG[:, 0], torch.zeros_like(least_SG, dtype=torch.uint8)
        for step in range(1, steps):
            less_SG = cost_SKG[:, step] < least_SG
            least_SG = torch.where(less_SG, cost_SKG[:, step], least_SG)
            from_SG.masked_fill_(less_SG, step)
        came.append(from_SG)
    lowest_SG = torch.where(
        least_SG == least_SG.amin(1, keepdim=True), torch.arange(groups, device=bits_S.device), groups
    )
    group_S = torch.where(bits_S < 0, lowest_SG.amin(1), bits_S)
    states = []
    for from_SG in reversed(came):
        state_S = from_SG.gather(1, group_S[:, None])[:, 0].long() * groups + group_S
        states.append(state_S.int())
        group_S = state_S >> width
    return torch.stack(states[::-1], 1)


def path_bytes(length: int, width: int) -> int:
    """Bytes of one tail-biting sequence. Raises ValueError if they are no whole number."""
    if length * width % 8:
        raise ValueError(f"{length} steps of {width} bits are no whole bytes")
    return length * width // 8


def pack_paths(states_ST: Int[Tensor, "S T"], state_bits: int, width: int) -> UInt8[Tensor, "S bytes"]:
    """The bits of tail-biting paths of states: (S, T) -> (S, T k / 8), the first bit of a byte being its highest."""
    steps_ST = states_ST >> state_bits - width
    bits_STk = steps_ST[:, :, None] >> torch.arange(width - 1, -1, -1, device=states_ST.device) & 1
    bits_SB8 = bits_STk.reshape(len(states_ST), path_bytes(states_ST.shape[1], width), 8)
    return (bits_SB8 << torch.arange(7, -1, -1, device=states_ST.device)).sum(2).to(torch.uint8)


def unpack_paths(packed_SB: UInt8[Tensor, "S bytes"], state_bits: int, width: int) -> Int[Tensor, "S T"]:
    """The states (S, T) of packed tail-biting paths: windows of L <= 16 bits, which go round the end."""
    wrapped_SB = F.pad(packed_SB[:, None].float(), (0, 2), mode="circular")[:, 0].to(torch.int32)
    windows_SB = wrapped_SB[:, :-2] << 16 | wrapped_SB[:, 1:-1] << 8 | wrapped_SB[:, 2:]
    first_T = torch.arange(packed_SB.shape[1] * 8 // width, device=packed_SB.device) * width
    shift_T = (24 - state_bits - (first_T & 7)).to(torch.int32)
    return windows_SB.index_select(1, first_T >> 3) >> shift_T & (1 << state_bits) - 1


def path_numbers(
    packed_SB: UInt8[Tensor, "S bytes"], values_N: Float[Tensor, " N"], width: int, *, threads: int | None = None
) -> Float[Tensor, "S T"]:
    """The numbers (S, T) that the states of packed tail-biting paths stand for, by `values_N` (2^L,), float32."""
    if packed_SB.is_meta:
        return packed_SB.new_empty(len(packed_SB), packed_SB.shape[1] * 8 // width, dtype=torch.float32)
    if native is None or packed_SB.is_cuda:
        states_ST = unpack_paths(packed_SB, (len(values_N) - 1).bit_length(), width)
        return F.embedding(states_ST, values_N[:, None])[..., 0]
    numbers_ST = torch.empty(len(packed_SB), packed_SB.shape[1] * 8 // width)
    native.follow_paths(
        packed_SB.contiguous(), values_N.float().contiguous(), width, numbers_ST, number_of_threads(threads)
    )
    return numbers_ST
