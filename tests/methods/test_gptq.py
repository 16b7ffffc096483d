"""GPTQ against the optimal brain surgeon written out in numpy, and against plain rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import correlated, heavy_tailed, made_by, relative_error, statistic_of

from cluscomp.methods.gptq import Gptq
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.solve.along_outputs import damped

BY_HAND = {"bits": None, "width": 3, "group": None, "symmetric": False, "damping": 0.01}


def grid_by_hand(weight_OC, width, symmetric):
    """Scales and zeros (O,) in float64, scales as 16 bits hold them."""
    low, high = np.minimum(weight_OC.min(1), 0), np.maximum(weight_OC.max(1), 0)
    levels = 2**width - 1
    if symmetric:
        scale = np.float16(2 * np.maximum(-low, high) / levels).astype(np.float64)
        return scale, np.full_like(scale, 2 ** (width - 1))
    scale = np.float16((high - low) / levels).astype(np.float64)
    return scale, np.clip(np.round(-low / scale), 0, levels)


def surgeon(weight_OI, moment_II, width, symmetric, group, act_order, static):
    """The dense weight, the slow way: after each input the inverse of what is left is found anew."""
    weight = weight_OI.astype(np.float64).copy()
    rounded = np.empty_like(weight)
    inputs = weight.shape[1]
    groups = -(-inputs // group)
    group_of = np.array([i * groups // inputs for i in range(inputs)])
    members = [np.flatnonzero(group_of == g) for g in range(groups)]
    grids = [grid_by_hand(weight[:, columns], width, symmetric) for columns in members]
    order = np.argsort(-moment_II.diagonal(), kind="stable") if act_order else np.arange(inputs)
    left = list(order)
    while left:
        j = left[0]
        g = group_of[j]
        if not static and j == members[g][0]:
            grids[g] = grid_by_hand(weight[:, members[g]], width, symmetric)
        scale, zero = grids[g]
        steps = np.clip(np.round(weight[:, j] / np.where(scale > 0, scale, 1) + zero), 0, 2**width - 1)
        rounded[:, j] = scale * (steps - zero)
        inverse = np.linalg.inv(moment_II[np.ix_(left, left)])
        error = (weight[:, j] - rounded[:, j]) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return rounded


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6), st.integers(2, 90), st.integers(2, 4), st.booleans(), st.integers(1, 90), st.integers(0, 2),
    st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_optimal_brain_surgeon(outputs, inputs, width, symmetric, group, kind, seed):
    """More inputs than a batch of feedback (64), groups across its borders, in all three orders of work."""
    act_order, static = [(False, False), (False, True), (True, True)][kind]
    weight_OI, x_TI = correlated(outputs, inputs, seed)
    statistic = statistic_of(x_TI)
    settings_ = BY_HAND | {"width": width, "symmetric": symmetric, "group": group}
    method = Gptq(**settings_, act_order=act_order, static_groups=static)
    found = made_by(method, weight_OI, statistic, torch.Generator())(torch.float32).detach()
    moment_II = damped(statistic.matrix_II, 0.01).double().numpy()
    expected = surgeon(weight_OI.numpy(), moment_II, width, symmetric, group, act_order, static)
    differing = np.abs(found.numpy() - expected) > 1e-3 * np.abs(expected).max()
    # a number half way between two of the grid may fall either way, and then moves all that come after it
    ours, theirs = (relative_error(weight_OI, torch.as_tensor(d, dtype=torch.float32), x_TI) for d in (found, expected))
    assert not differing.any() or (differing.mean() < 0.3 and ours < 1.1 * theirs + 1e-6)


def test_the_codes_are_mostly_those_of_the_surgeon():
    """The case of ties above is rare: over ten layers hardly a number differs."""
    differing = []
    for seed in range(10):
        weight_OI, x_TI = correlated(6, 70, seed)
        statistic = statistic_of(x_TI)
        method = Gptq(**BY_HAND | {"group": 16}, act_order=True, static_groups=True)
        found = made_by(method, weight_OI, statistic, torch.Generator())(torch.float32).detach().numpy()
        moment_II = damped(statistic.matrix_II, 0.01).double().numpy()
        expected = surgeon(weight_OI.numpy(), moment_II, 3, False, 16, True, True)
        differing.append((np.abs(found - expected) > 1e-3).mean())
    assert sorted(differing)[6] == 0


@pytest.mark.parametrize("width, much", [(3, 0.5), (2, 0.6)])
def test_feedback_beats_rounding_by_much_and_act_order_by_more(width, much):
    """The layer of notes in the literature's style: heavy tails, correlated inputs, some large channels."""
    weight_OI, x_TI = heavy_tailed()
    shape = {"bits": None, "width": width, "group": 128, "symmetric": False}
    plain = made_by(RoundToNearest(**shape), weight_OI, None, torch.Generator())
    first = relative_error(weight_OI, plain(torch.float32).detach(), x_TI)
    errors = []
    for act_order, static in [(False, False), (True, True)]:
        method = Gptq(**shape, act_order=act_order, static_groups=static, damping=0.01)
        stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
        assert stored.ledger() == plain.ledger()
        errors.append(relative_error(weight_OI, stored(torch.float32).detach(), x_TI))
    assert errors[1] < errors[0] < much * first and errors[1] < 0.4 * first


def test_inputs_without_correlation_leave_plain_rounding():
    weight_OI = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    statistic = statistic_of(torch.eye(20))
    shape = {"bits": None, "width": 3, "group": 5, "symmetric": False}
    expected = made_by(RoundToNearest(**shape), weight_OI, None, torch.Generator()).state_dict()
    for act_order in (False, True):
        method = Gptq(**shape, act_order=act_order, static_groups=True, damping=0.01)
        found = made_by(method, weight_OI, statistic, torch.Generator()).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dead_inputs_and_one_token_are_no_obstacle():
    weight_OI, x_TI = correlated(4, 12, 0)
    x_TI[:, 3] = 0
    for seen in (x_TI, x_TI[:1], torch.zeros(2, 12)):
        method = Gptq(**BY_HAND, act_order=True, static_groups=True)
        dense_OI = made_by(method, weight_OI, statistic_of(seen), torch.Generator())(torch.float32)
        assert bool(dense_OI.isfinite().all())


def test_act_order_needs_static_groups():
    with pytest.raises(ValueError, match="static_groups=true"):
        Gptq(**BY_HAND, act_order=True, static_groups=False)
