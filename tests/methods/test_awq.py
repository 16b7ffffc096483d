"""AWQ against its definition written out on the inputs themselves, and against plain rounding."""

import numpy as np
import pytest
import torch
from layers import correlated, heavy_tailed, made_by, relative_error, statistic_of

from cluscomp.methods.awq import Awq
from cluscomp.methods.rtn import RoundToNearest

SHAPE = {"bits": None, "width": 3, "group": 8, "symmetric": False}


def rounded_by_hand(weight, width, group, symmetric, shrink=None):
    """The dense weight in numpy, group by group; `shrink` (O, G) narrows the grids."""
    dense = np.empty_like(weight)
    levels = 2**width - 1
    for o in range(len(weight)):
        for g, start in enumerate(range(0, weight.shape[1], group)):
            values = weight[o, start : start + group]
            factor = 1 if shrink is None else shrink[o, g]
            low, high = min(values.min(), 0) * factor, max(values.max(), 0) * factor
            if symmetric:
                scale, zero = float(np.float16(2 * max(-low, high) / levels)), 2 ** (width - 1)
            else:
                scale = float(np.float16((high - low) / levels))
                zero = np.clip(np.round(-low / scale), 0, levels)
            dense[o, start : start + group] = scale * (np.clip(np.round(values / scale + zero), 0, levels) - zero)
    return dense


def lost(weight, dense, x):
    return np.square(x @ (dense - weight).T).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_the_best_of_the_grid_on_the_inputs_themselves(seed, symmetric):
    weight_OI, x_TI = correlated(6, 24, seed)
    x_TI = x_TI * torch.linspace(0.1, 4, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(seed))]
    weight, x = weight_OI.double().numpy(), x_TI.double().numpy()
    candidates = []
    for step in range(20):
        s = np.abs(x).mean(0) ** (step / 20)
        s = 1 / np.float16(1 / (s / np.sqrt(s.max() * s.min()))).astype(np.float64)
        candidates.append(rounded_by_hand(weight * s, 3, 8, symmetric) / s)
    losses = [lost(weight, dense, x) for dense in candidates]
    method = Awq(**SHAPE | {"symmetric": symmetric}, steps=20, clip=0)
    found = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())(torch.float32).detach().double().numpy()
    assert lost(weight, found, x) == pytest.approx(min(losses), rel=1e-3)
    assert losses[0] > min(losses)


def test_each_groups_clip_is_the_best_for_its_own_part_of_the_output():
    weight_OI, x_TI = correlated(5, 24, 1)
    weight, x = weight_OI.double().numpy(), x_TI.double().numpy()
    expected = np.empty_like(weight)
    for start in range(0, 24, 8):
        part, seen = weight[:, start : start + 8], x[:, start : start + 8]
        options = [rounded_by_hand(part, 3, 8, False, np.full((5, 1), 1 - 0.05 * n)) for n in range(10)]
        losses = [np.square(seen @ (dense - part).T).sum(0) for dense in options]
        for o, best in enumerate(np.argmin(losses, 0)):
            expected[o, start : start + 8] = options[best][o]
    method = Awq(**SHAPE, steps=1, clip=10)  # one step: all scales are 1
    found = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())(torch.float32).detach()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_it_beats_rounding_on_a_layer_with_large_channels_at_the_same_bits():
    weight_OI, x_TI = heavy_tailed()
    arguments = {"bits": 3.2, "width": None, "group": None, "symmetric": False}
    losses = []
    for method in (
        RoundToNearest(**arguments),
        Awq(**arguments, steps=20, clip=0),
        Awq(**arguments, steps=20, clip=10),
    ):
        stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
        assert 3.1 < sum(stored.ledger().values()) / 256**2 <= 3.2
        losses.append(relative_error(weight_OI, stored(torch.float32).detach(), x_TI))
    assert losses[2] < losses[1] < 0.85 * losses[0]


def test_the_statistic_has_the_mean_size_of_each_input():
    _, x_TI = correlated(1, 6)
    torch.testing.assert_close(statistic_of(x_TI).magnitude_I, x_TI.abs().mean(0))


def test_dead_inputs_are_no_obstacle():
    weight_OI, x_TI = correlated(4, 16)
    x_TI[:, 3] = 0
    for seen in (x_TI, torch.zeros(2, 16)):
        stored = made_by(Awq(**SHAPE, steps=20, clip=10), weight_OI, statistic_of(seen), torch.Generator())
        assert bool(stored(torch.float32).isfinite().all())
