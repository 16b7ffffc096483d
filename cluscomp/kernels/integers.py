"""Rows rounded to whole numbers one after the other, each row's error handed on: compiled, and in plain torch."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from cluscomp.kernels.counting import report
from cluscomp.kernels.dependent import best_path
from cluscomp.kernels.loading import native
from cluscomp.kernels.work import Work

LARGEST = 127  # size of a number

Rounded = tuple[Int8[Tensor, "R O"], Float[Tensor, " R"], Float[Tensor, "R O"]]


def round_rows(
    wanted_RO: Float[Tensor, "R O"],
    factor_RR: Float[Tensor, "R R"],
    steps_R: Float[Tensor, " R"],
    rate: float,
    *,
    dependent: bool = False,
) -> Rounded:
    """Whole numbers (R, O) in int8 for some rows, the scale (R,) of each row, and the errors (R, O) that are left.

    Row i is divided by steps[i] and rounded. With `rate` the step is first made larger by the factor
    1 + rate step^2 / mean square of the row, which takes small numbers nearer to 0; and by as much as is needed that no
    number is larger than 127. The scale is the least-squares one for these numbers, of which 11 bits are taken, or the
    step if all are 0. The row's error is (wanted[i] - number scale) / factor[i, i], and each later wanted[j] loses
    factor[i, j] times the error. `wanted_RO` is overwritten.

    `dependent`: levels (see kernels/dependent.py) in the place of whole numbers, chosen for all of a row together: the
    path of least sum of (wanted / step - level)^2 + 2 rate bits.
    """
    numbers_RO = torch.empty_like(wanted_RO, dtype=torch.int8)
    scales_R, errors_RO = torch.empty_like(steps_R), torch.empty_like(wanted_RO)
    if wanted_RO.is_meta:
        rows, moved = len(wanted_RO), 400.0 if dependent else 40.0
        report(Work(flops=1.0 * rows * wanted_RO.numel(), traffic=moved * wanted_RO.numel(), calls=12 * rows))
    elif native is not None and wanted_RO.device.type == "cpu":
        native.round_rows(
            wanted_RO, factor_RR.contiguous(), steps_R.contiguous(), 2 * rate if dependent else rate, dependent,
            numbers_RO, scales_R, errors_RO,
        )  # fmt: skip
    elif dependent:
        _on_paths(wanted_RO, factor_RR, steps_R, 2 * rate, numbers_RO, scales_R, errors_RO)
    else:
        _in_torch(wanted_RO, factor_RR, steps_R, rate, numbers_RO, scales_R, errors_RO)
    return numbers_RO, scales_R, errors_RO


def _in_torch(
    wanted_RO: Tensor,
    factor_RR: Tensor,
    steps_R: Tensor,
    rate: float,
    numbers_RO: Tensor,
    scales_R: Tensor,
    errors_RO: Tensor,
) -> None:
    for i, wanted_O in enumerate(wanted_RO):
        step = steps_R[i]
        squares = wanted_O.double().square().sum()
        if rate > 0:
            wider = leading_bits((step * (1 + rate * step.double().square() * len(wanted_O) / squares)).float())
            step = torch.where(squares > 0, wider, step)
        step = torch.maximum(step, wanted_O.abs().max() / LARGEST)
        number_O = (wanted_O / step).round().clamp(-LARGEST, LARGEST)
        size = number_O.double().square().sum()
        fitted = leading_bits(((number_O.double() * wanted_O.double()).sum() / size).float())
        scales_R[i] = torch.where(size > 0, fitted, step)
        numbers_RO[i] = number_O.nan_to_num().to(torch.int8)
        errors_RO[i] = (wanted_O - number_O * scales_R[i]) / factor_RR[i, i]
        wanted_RO[i + 1 :] -= factor_RR[i, i + 1 :, None] * errors_RO[i]


def _on_paths(
    wanted_RO: Tensor,
    factor_RR: Tensor,
    steps_R: Tensor,
    price: float,
    levels_RO: Tensor,
    scales_R: Tensor,
    errors_RO: Tensor,
) -> None:
    for i, wanted_O in enumerate(wanted_RO):
        step = float(torch.maximum(steps_R[i], wanted_O.abs().max() / 120))
        level_O = torch.from_numpy(best_path(wanted_O.cpu().numpy(), step, price)).to(wanted_O.device)
        size = level_O.double().square().sum()
        fitted = leading_bits(((level_O.double() * wanted_O.double()).sum() / size).float())
        scales_R[i] = torch.where(size > 0, fitted, step)
        levels_RO[i] = level_O
        errors_RO[i] = (wanted_O - level_O * scales_R[i]) / factor_RR[i, i]
        wanted_RO[i + 1 :] -= factor_RR[i, i + 1 :, None] * errors_RO[i]


def leading_bits(values: Tensor) -> Tensor:
    """float32 of any shape with its leading 11 bits, which a 16-bit float holds (Veltkamp's splitting)."""
    spread = values * 8193.0
    return spread - (spread - values)
