"""Numbers on uniform grids for a weight: with error feedback (GPTQ), scaled inputs (AWQ) or fitted zeros (HQQ)."""

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.forms.stored import MOST, in_16_bits
from cluscomp.forms.uniform import (
    UniformWeight,
    bounds,
    divisor,
    grid_for,
    grids_for,
    middle,
    nearest,
    of_groups,
    rounded_weight,
    spread,
)
from cluscomp.kernels.counting import alike, numbers
from cluscomp.solve.along_outputs import Wanted, feedback, output_error


def with_feedback(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    width: int,
    groups: int,
    *,
    symmetric: bool,
    act_order: bool,
    static_groups: bool,
) -> UniformWeight:
    """Numbers chosen input by input, each error handed on to the inputs still to come (GPTQ, arXiv 2210.17323).

    Args:
        weight_OI: (O, I) in float32.
        moment_II: (I, I), the second moment of its inputs, positive definite (see `damped`).
        width: bits of a number.
        groups: grids of each output.
        symmetric: without zeros.
        act_order: inputs in the order of falling mean square.
        static_groups: grids of the weights as they were, not as corrected when a group's first input comes.
    """
    inputs = weight_OI.shape[1]
    scales_OG, zeros_OG = grids_for(weight_OI, width, groups, symmetric=symmetric)
    parts = bounds(inputs, groups)
    group_of = [number for number, group in enumerate(parts) for _ in range(group.start, group.stop)]
    order_I = torch.arange(inputs, device=weight_OI.device)
    if act_order:
        order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    order = numbers(order_I)
    codes_IO = torch.empty(inputs, len(weight_OI), dtype=torch.int32, device=weight_OI.device)

    def choose(i: int, wanted: Wanted, _factor: Tensor) -> Tensor:
        column, number = order[i], group_of[order[i]]
        if not static_groups and column == parts[number].start:
            scales_OG[:, number], zeros_OG[:, number] = grid_for(
                wanted(parts[number].stop).T, width, symmetric=symmetric
            )
        scale_O, zero_O = scales_OG[:, number], zeros_OG[:, number]
        codes_IO[column] = codes_O = nearest(wanted(i + 1)[0], scale_O, zero_O, width)
        return ((codes_O - zero_O) * scale_O)[None]

    feedback(weight_OI.T[order_I].contiguous(), moment_II[order_I][:, order_I], choose)
    return UniformWeight.from_codes(codes_IO.T.contiguous(), scales_OG, None if symmetric else zeros_OG.int(), width)


def with_scaled_inputs(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    size_I: Float[Tensor, " I"],
    width: int,
    groups: int,
    *,
    symmetric: bool,
    steps: int,
    clip: int,
) -> UniformWeight:
    """Numbers for each input's weights times s = (its mean size)^a, divided by s again (AWQ, arXiv 2306.00978).

    Args:
        weight_OI: (O, I) in float32.
        moment_II: (I, I), the second moment of its inputs.
        size_I: (I,), their mean size.
        width: bits of a number.
        groups: grids of each output.
        symmetric: without zeros.
        steps: a is the best of 0, 1/`steps`, 2/`steps`, ... below 1, by the error of the layer's output.
        clip: each grid is narrowed by 5 % as often as helps, `clip` - 1 times at most; 0: not at all.
    """
    inputs = weight_OI.shape[1]
    size_I = size_I.clamp(min=1e-4)
    best = None
    for step in alike(range(steps), weight_OI):
        scale_I = size_I ** (step / steps)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        inverse_I = in_16_bits(1 / scale_I).float()
        scaled_OI = weight_OI / inverse_I
        scales_OG, zeros_OG = grids_for(scaled_OI, width, groups, symmetric=symmetric)
        error_OI = _error(scaled_OI, spread(scales_OG, inputs), spread(zeros_OG, inputs), width)
        error = output_error(error_OI * inverse_I, moment_II)
        if best is None or error < best[0]:
            best = error, inverse_I, scales_OG, zeros_OG
    assert best is not None  # steps >= 1
    _, inverse_I, scales_OG, zeros_OG = best
    scaled_OI = weight_OI / inverse_I
    if clip:
        scaled_II = moment_II * inverse_I * inverse_I[:, None]
        scales_OG, zeros_OG = _clipped(scaled_OI, scaled_II, width, groups, symmetric, clip)
    codes_OI = nearest(scaled_OI, spread(scales_OG, inputs), spread(zeros_OG, inputs), width)
    zeros = None if symmetric else zeros_OG.int()
    return UniformWeight.from_codes(codes_OI, scales_OG, zeros, width, inverse_I)


def _clipped(
    weight_OI: Tensor, moment_II: Tensor, width: int, groups: int, symmetric: bool, clip: int
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (O, G) of each group (O, C) narrowed as its part of the output's error likes best."""
    scales, zeros = [], []
    for group in alike(bounds(weight_OI.shape[1], groups), weight_OI):
        weight_OC, moment_CC = weight_OI[:, group], moment_II[group, group]
        least_O = torch.full_like(weight_OC[:, 0], torch.inf)
        best_O, best_zero_O = torch.zeros_like(least_O), torch.zeros_like(least_O)
        for narrower in alike(range(clip), weight_OI):
            shrink = 1 - 0.05 * narrower
            scale_O, zero_O = grid_for(weight_OC, width, symmetric=symmetric, shrink=shrink)
            error_OC = _error(weight_OC, scale_O[:, None], zero_O[:, None], width)
            error_O = ((error_OC @ moment_CC) * error_OC).sum(1)
            better_O = error_O < least_O
            best_O, best_zero_O = torch.where(better_O, scale_O, best_O), torch.where(better_O, zero_O, best_zero_O)
            least_O = torch.minimum(error_O, least_O)
        scales.append(best_O)
        zeros.append(best_zero_O)
    of_all = (-1, groups)  # where one stands for all
    return torch.stack(scales, 1).expand(of_all), torch.stack(zeros, 1).expand(of_all)


def _error(weight: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
    """Values of the grid less the weights they stand for; all of one shape, or spread to it."""
    return (nearest(weight, scale, zero, width) - zero) * scale - weight


def with_fitted_zeros(
    weight_OI: Float[Tensor, "O I"],
    width: int,
    groups: int,
    *,
    norm: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> UniformWeight:
    """Numbers on grids whose zeros are fitted by half-quadratic splitting (HQQ, Badri and Shaji, 2023).

    Args:
        weight_OI: (O, I) in float32.
        width: bits of a number.
        groups: grids of each output.
        norm: the power of errors whose sum the zeros are fitted to.
        beta: the weight of the proximal operator at first.
        kappa: the factor by which it grows.
        iterations: the most there are; all ends once the mean error falls no more.
    """
    inputs = weight_OI.shape[1]

    def mean(part_OGC: Tensor) -> Tensor:
        return part_OGC.mean(2)

    low_OG = of_groups(weight_OI, groups, lambda part_OGC: part_OGC.amin(2))
    high_OG = of_groups(weight_OI, groups, lambda part_OGC: part_OGC.amax(2))
    if width == 1:
        mean_OG = of_groups(weight_OI, groups, mean)
        away_OI = (weight_OI - spread(mean_OG, inputs)).abs()
        away_OG = of_groups(away_OI, groups, mean)
        low_OG, high_OG = mean_OG - away_OG, mean_OG + away_OG
    first_OG = ((high_OG - low_OG) / (2**width - 1)).half().float()
    flat_OG = (first_OG == 0) | (low_OG.abs() > MOST * first_OG)  # one number, or nearly the same ones: from them to 0
    low_OG = torch.where(flat_OG, low_OG.clamp(max=0), low_OG)
    high_OG = torch.where(flat_OG, high_OG.clamp(min=0), high_OG)
    scales_OG = in_16_bits((high_OG - low_OG) / (2**width - 1)).float()
    zeros_OG = in_16_bits(-low_OG / divisor(scales_OG)).float()
    scale_OI = spread(divisor(scales_OG), inputs)
    steps_OI = weight_OI / scale_OI  # what follows is in steps of the grids
    best, least = zeros_OG, torch.tensor(torch.inf, device=weight_OI.device)
    for turn in alike(range(iterations + 1), weight_OI, made=0.6):  # a third of them or all
        zero_OI = spread(zeros_OG, inputs)
        codes_OI = (steps_OI + zero_OI).round_().clamp_(0, 2**width - 1)
        error_OI = (steps_OI + zero_OI).sub_(codes_OI).mul_(scale_OI)
        size_OI = error_OI.abs()
        now = size_OI.mean()
        if not bool(now < least):
            break
        best, least = zeros_OG, now
        if turn < iterations:
            shrunk_OI = size_OI.sub_(size_OI.pow(norm - 1).div_(beta)).clamp_(min=0)
            sparse_OI = shrunk_OI.copysign_(error_OI).div_(scale_OI)
            wanted_OI = codes_OI.sub_(steps_OI).add_(sparse_OI)
            zeros_OG = in_16_bits(of_groups(wanted_OI, groups, mean).clamp(-MOST, MOST)).float()
            beta *= kappa
    codes_OI = nearest(weight_OI, scale_OI, spread(best, inputs), width)
    return UniformWeight.from_codes(codes_OI, scales_OG, best, width)


def clipped_by_histogram(weight_OI: Float[Tensor, "O I"], width: int, bins: int) -> UniformWeight:
    """Numbers on one symmetric grid, clipped where a histogram expects the least squared error (SLiM-Quant).

    Weight (O, I) in float32; the histogram spans its weights in `bins` bins. Ten clips up to the largest weight are
    tried, then twenty between the neighbours of the best (arXiv 2410.09615, section 3.1). Raises ValueError for weights
    that are not finite or too large for a 16-bit scale.
    """
    size, levels = in_16_bits(weight_OI.abs().max()[None]).float(), 2**width - 1
    step = 2 * size / bins
    places_N = ((weight_OI + size) / divisor(step)).long().clamp(0, bins - 1).flatten()
    ones_N = torch.ones_like(places_N, dtype=torch.float64)
    counts_B = ones_N.new_zeros(bins).index_add(0, places_N, ones_N)
    centres_B = (torch.arange(bins, device=weight_OI.device) + 0.5) * step - size

    def best(clips_C: Tensor) -> Tensor:
        scales_C1 = in_16_bits(2 * clips_C / levels).float()[:, None]
        errors_CB = _error(centres_B, scales_C1, torch.full_like(scales_C1, middle(width)), width)
        return clips_C.gather(0, (errors_CB.square() * counts_B).sum(1).argmin(0, keepdim=True))

    tenths_C = torch.arange(1, 11, device=weight_OI.device) / 10
    clip = best(size * tenths_C)
    clip = best(clip + size * torch.linspace(-0.1, 0.1, 21, device=weight_OI.device).clamp(min=-0.09))
    scales_O1 = in_16_bits(2 * clip / levels).float().expand(len(weight_OI), 1)
    return rounded_weight(weight_OI, scales_O1, torch.full_like(scales_O1, middle(width)), width, symmetric=True)
