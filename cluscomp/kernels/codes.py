"""Codes of a codebook, packed into bits.

The packed form is a little-endian bit stream: code i takes the bits [i*b, (i+1)*b) of the bytes. The stream is padded
with zeros to a multiple of 8 codes, so that 8 codes always fill b whole bytes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from cluscomp.kernels.loading import native

MAX_CODE_BITS = 16


def code_bits(num_centroids: int) -> int:
    """Bits of one packed code: ceil(log2 K), at least 1. Raises ValueError outside 2 <= K <= 65536."""
    if not 2 <= num_centroids <= 1 << MAX_CODE_BITS:
        raise ValueError(f"{num_centroids} centroids: a codebook has 2 to {1 << MAX_CODE_BITS}")
    return (num_centroids - 1).bit_length()


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of `num_codes` packed codes of `bits` bits each, padding to a multiple of 8 codes included."""
    return -(-num_codes // 8) * bits


def pack(codes_N: Int[Tensor, " N"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack codes of `bits` bits each: (N,) integers -> (ceil(N/8)*bits,) uint8.

    Raises ValueError if a code does not fit into `bits`.
    """
    if len(codes_N) and not 0 <= int(codes_N.min()) <= int(codes_N.max()) < 1 << bits:
        raise ValueError(f"codes from {int(codes_N.min())} to {int(codes_N.max())} do not fit {bits} bits")
    if native is not None and codes_N.device.type == "cpu":
        packed = torch.empty(packed_bytes(len(codes_N), bits), dtype=torch.uint8)
        native.pack(codes_N.to(torch.int32).contiguous(), bits, packed)
        return packed
    if codes_N.is_meta:
        return codes_N.new_empty(packed_bytes(len(codes_N), bits), dtype=torch.uint8)
    return _packed(codes_N, bits)


def _packed(codes_N: Tensor, bits: int) -> Tensor:
    """`pack` in plain torch."""
    groups = F.pad(codes_N.to(torch.int32), (0, -len(codes_N) % 8)).view(-1, 8)
    bytes_ = torch.zeros(len(groups), bits + 2, dtype=torch.int32, device=codes_N.device)
    for position in range(8):
        first, shift = divmod(position * bits, 8)
        for offset in range(3):
            bytes_[:, first + offset] |= groups[:, position] << shift >> 8 * offset & 255
    return bytes_[:, :bits].to(torch.uint8).flatten()


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, num_codes: int) -> Int[Tensor, " N"]:
    """The inverse of `pack`: (bytes,) uint8 -> (num_codes,) int32. Raises ValueError if the length is wrong."""
    if len(packed) != packed_bytes(num_codes, bits):
        raise ValueError(f"{len(packed)} bytes for {num_codes} codes of {bits} bits ({packed_bytes(num_codes, bits)})")
    if packed.is_meta:
        return packed.new_empty(num_codes, dtype=torch.int32)
    if native is not None and packed.device.type == "cpu" and num_codes:
        codes_N = torch.empty(num_codes, dtype=torch.int32)
        native.unpack(packed.contiguous(), bits, codes_N)
        return codes_N
    return _unpacked(packed, bits, num_codes)


def _unpacked(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """`unpack` in plain torch."""
    bytes_ = F.pad(packed.view(-1, bits), (0, 2)).to(torch.int32)
    groups = torch.empty(len(bytes_), 8, dtype=torch.int32, device=packed.device)
    for position in range(8):
        first, shift = divmod(position * bits, 8)
        window = bytes_[:, first] | bytes_[:, first + 1] << 8 | bytes_[:, first + 2] << 16
        groups[:, position] = window >> shift & (1 << bits) - 1
    return groups.flatten()[:num_codes]
