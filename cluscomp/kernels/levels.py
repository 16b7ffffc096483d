"""K-means of many short rows of numbers, each solved exactly: compiled where possible, and the same in plain torch."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.kernels.counting import report
from cluscomp.kernels.loading import native, number_of_threads
from cluscomp.kernels.work import Work


def best_levels(
    values_RC: Float[Tensor, "R C"], mass_RC: Float[Tensor, "R C"], number: int, *, threads: int | None = None
) -> Float[Tensor, "R K"]:
    """For each row of finite numbers (R, C) the K levels (R, K) of least sum of mass * (number - nearest level)^2.

    Levels rise; a row with fewer distinct numbers repeats its last. Masses (R, C) are not negative; a row without any
    counts its numbers alike. float32, on the values' device; without compiled kernels time grows with C^2 K.
    """
    if values_RC.is_meta:
        copies = [rows_RC.float().contiguous() for rows_RC in (values_RC, mass_RC)]
        report(Work(traffic=40.0 * copies[0].numel() * number * math.log2(2 + values_RC.shape[1])))
        return values_RC.new_empty(len(values_RC), number)
    if native is None:
        return best_levels_reference(values_RC, mass_RC, number)
    levels_RK = torch.empty(len(values_RC), number)
    rows = (rows_RC.detach().float().cpu().contiguous() for rows_RC in (values_RC, mass_RC))
    native.best_levels(*rows, levels_RK, number_of_threads(threads))
    return levels_RK.to(values_RC.device)


def best_levels_reference(
    values_RC: Float[Tensor, "R C"], mass_RC: Float[Tensor, "R C"], number: int
) -> Float[Tensor, "R K"]:
    """`best_levels`, (R, C) -> (R, K), by dynamic programming over all places where a group of sorted numbers may end.

    With error(i, j) of numbers i to j - 1 as one group: least[k][j] = min over i of least[k-1][i] + error(i, j).
    """
    columns = values_RC.shape[1]
    piece = max(1, 2**23 // (columns + 1) ** 2)  # rows at a time
    found = [
        _levels(values_PC.double(), mass_PC.double(), number)
        for values_PC, mass_PC in zip(values_RC.split(piece), mass_RC.split(piece))
    ]
    return torch.cat(found).float()


def _levels(values_PC: Tensor, mass_PC: Tensor, number: int) -> Tensor:
    mass_PC = torch.where(mass_PC.sum(1, keepdim=True) > 0, mass_PC, 1.0)
    values_PC, order_PC = values_PC.sort(1)
    mass_PC = mass_PC.gather(1, order_PC)
    mean_P1 = (mass_PC * values_PC).sum(1, keepdim=True) / mass_PC.sum(1, keepdim=True)
    centred_PC = values_PC - mean_P1  # less is lost in the differences of sums
    sums = [torch.nn.functional.pad(mass_PC * centred_PC**power, (1, 0)).cumsum(1) for power in (0, 1, 2)]
    mass, first, second = (sum_PE[:, None, :] - sum_PE[:, :, None] for sum_PE in sums)  # (P, i, j): i to j - 1
    error_PEE = (second - first.square() / torch.where(mass > 0, mass, 1.0)).clamp(min=0)
    backwards_EE = torch.ones(error_PEE.shape[1:], dtype=torch.bool, device=error_PEE.device).tril(-1)
    error_PEE.masked_fill_(backwards_EE, torch.inf)
    least_PE, cuts = error_PEE[:, 0], []
    for _ in range(number - 1):
        least_PE, cut_PE = (least_PE[:, :, None] + error_PEE).min(1)
        cuts.append(cut_PE)
    ends = [torch.full_like(mean_P1, values_PC.shape[1], dtype=torch.long)]
    for cut_PE in reversed(cuts):
        ends.append(cut_PE.gather(1, ends[-1]))
    end_PK, begin_PK = torch.cat(ends, 1), torch.cat([*ends[1:], torch.zeros_like(ends[0])], 1)
    mass_PK, first_PK = (sum_PE.gather(1, end_PK) - sum_PE.gather(1, begin_PK) for sum_PE in sums[:2])
    mean_PK = mean_P1 + first_PK / torch.where(mass_PK > 0, mass_PK, 1.0)
    last_P1 = torch.where(mass_PK > 0, mean_PK, -torch.inf).amax(1, keepdim=True)
    return torch.where(mass_PK > 0, mean_PK, last_P1).sort(1).values  # empty groups repeat the last
