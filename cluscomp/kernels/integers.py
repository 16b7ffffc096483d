"""Rows rounded to whole numbers one after the other, each row's error handed on: compiled, and in plain torch."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from cluscomp.kernels.counting import report
from cluscomp.kernels.loading import native
from cluscomp.kernels.work import Work

LARGEST = 127  # size of a number

Rounded = tuple[Int8[Tensor, "R O"], Float[Tensor, " R"], Float[Tensor, "R O"]]


def round_rows(
    wanted_RO: Float[Tensor, "R O"], factor_RR: Float[Tensor, "R R"], steps_R: Float[Tensor, " R"]
) -> Rounded:
    """Whole numbers (R, O) in int8 for some rows, the scale (R,) of each row, and the errors (R, O) that are left.

    Row i is divided by steps[i] and rounded; the step is made larger where a number would be above 127. The scale is
    the least-squares one for these numbers, of which 11 bits are taken, or the step if all are 0. The row's error is
    (wanted[i] - number scale) / factor[i, i], and each later wanted[j] loses factor[i, j] times the error.
    `wanted_RO` is overwritten.
    """
    numbers_RO = torch.empty_like(wanted_RO, dtype=torch.int8)
    scales_R, errors_RO = torch.empty_like(steps_R), torch.empty_like(wanted_RO)
    if wanted_RO.is_meta:
        rows = len(wanted_RO)
        report(Work(flops=1.0 * rows * wanted_RO.numel(), traffic=40.0 * wanted_RO.numel(), calls=12 * rows))
    elif native is not None and wanted_RO.device.type == "cpu":
        native.round_rows(wanted_RO, factor_RR.contiguous(), steps_R.contiguous(), numbers_RO, scales_R, errors_RO)
    else:
        _in_torch(wanted_RO, factor_RR, steps_R, numbers_RO, scales_R, errors_RO)
    return numbers_RO, scales_R, errors_RO


def _in_torch(
    wanted_RO: Tensor,
    factor_RR: Tensor,
    steps_R: Tensor,
    numbers_RO: Tensor,
    scales_R: Tensor,
    errors_RO: Tensor,
) -> None:
    for i, wanted_O in enumerate(wanted_RO):
        step = torch.maximum(steps_R[i], wanted_O.abs().max() / LARGEST)
        number_O = (wanted_O / step).round().clamp(-LARGEST, LARGEST)
        numbers_RO[i] = number_O.nan_to_num().to(torch.int8)
        hand_on(i, number_O, step, wanted_RO, factor_RR, scales_R, errors_RO)


def hand_on(
    i: int,
    number_O: Tensor,
    step: Tensor,
    wanted_RO: Tensor,
    factor_RR: Tensor,
    scales_R: Tensor,
    errors_RO: Tensor,
) -> None:
    """Fit the scale of row i to its numbers (O,), keep the error that is left and take it from the rows to come.

    As `round_rows` says; in plain torch, for whole numbers and for levels.
    """
    size = number_O.double().square().sum()
    fitted = leading_bits(((number_O.double() * wanted_RO[i].double()).sum() / size).float())
    scales_R[i] = torch.where(size > 0, fitted, step)
    errors_RO[i] = (wanted_RO[i] - number_O * scales_R[i]) / factor_RR[i, i]
    wanted_RO[i + 1 :] -= factor_RR[i, i + 1 :, None] * errors_RO[i]


def leading_bits(values: Tensor) -> Tensor:
    """float32 of any shape with its leading 11 bits, which a 16-bit float holds (Veltkamp's splitting)."""
    spread = values * 8193.0
    return spread - (spread - values)
