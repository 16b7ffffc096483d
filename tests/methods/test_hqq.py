"""HQQ against its definition, group by group in numpy, against its authors' package, and against rounding."""

import numpy as np
import pytest
import torch
from layers import heavy_tailed, made_by

from cluscomp.methods.hqq import Hqq

SETTINGS = {"bits": None, "norm": 0.7, "beta": 10.0, "kappa": 1.01}


def test_a_zero_per_group_is_that_of_the_definition():
    """One group at a time, so that no other decides when it ends."""
    for seed in range(5):
        weight = 0.05 * torch.randn(1, 24, generator=torch.Generator().manual_seed(seed))
        w, levels = weight.double().numpy()[0], 7
        scale = float(np.float16((w.max() - w.min()) / levels))
        zero, beta, history = float(np.float16(-w.min() / scale)), 10.0, []
        for _ in range(21):
            q = np.clip(np.round(w / scale + zero), 0, levels)
            error = w - (q - zero) * scale
            history.append((np.abs(error).mean(), zero, q))
            if len(history) > 1 and history[-1][0] >= history[-2][0]:
                break
            sparse = np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** -0.3 / beta, 0)
            zero = float(np.float16(np.mean(q - (w - sparse) / scale)))
            beta *= 1.01
        _, zero, q = min(history, key=lambda entry: entry[0])
        stored = made_by(Hqq(**SETTINGS, width=3, group=None, iterations=20), weight, None, torch.Generator())
        assert float(stored.offsets()) == pytest.approx(zero, rel=1e-2)
        found = stored(torch.float32).detach().numpy()[0]
        np.testing.assert_allclose(found, (q - zero) * scale, rtol=1e-2, atol=2e-3 * scale)


def test_iterations_lower_the_mean_error_and_what_is_stored_counts_zeros_of_16_bits():
    weight_OI, _ = heavy_tailed()
    errors = []
    for iterations in (0, 1, 5, 20):
        method = Hqq(**SETTINGS, width=2, group=64, iterations=iterations)
        stored = made_by(method, weight_OI, None, torch.Generator())
        errors.append(float((stored(torch.float32).detach() - weight_OI).abs().mean()))
        assert sum(stored.ledger().values()) == 256 * 256 * 2 + 256 * 4 * (16 + 16)
    assert errors[-1] < errors[0] and sorted(errors, reverse=True) == errors


def test_constant_groups_come_back():
    """No range: the grid then spans from the constant to 0."""
    weight_OI = torch.tensor([[0.0] * 4 + [0.5] * 4, [-0.25] * 4 + [2.0] * 4])
    stored = made_by(Hqq(**SETTINGS, width=2, group=4, iterations=20), weight_OI, None, torch.Generator())
    torch.testing.assert_close(stored(torch.float32).detach(), weight_OI, rtol=1e-3, atol=0)


def test_it_is_no_worse_than_the_authors_package():
    optimize = pytest.importorskip("hqq.core.optimize", reason="hqq is not installed")
    weight_OI, _ = heavy_tailed()
    grouped = weight_OI.reshape(-1, 64)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    inverse = 7 / (high - low)
    codes, scale, zero = optimize.optimize_weights_proximal_legacy(
        grouped.clone(), inverse, -low * inverse, min_max=[0, 7], axis=1, device="cpu"
    )
    theirs = float(((codes - zero) / scale - grouped).abs().mean())
    stored = made_by(Hqq(**SETTINGS, width=3, group=64, iterations=20), weight_OI, None, torch.Generator())
    ours = float((stored(torch.float32).detach() - weight_OI).abs().mean())
    assert ours < 1.01 * theirs


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("around, spread", [(0.5, 2e-7), (1.0, 1e-5), (-1.0, 1e-4)])
def test_groups_of_nearly_equal_weights_keep_their_size(width, around, spread):
    """A grid between them has more steps from 0 than 16 bits hold, or steps too small for them."""
    weight_OI = around + spread * torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    stored = made_by(Hqq(**SETTINGS, width=width, group=64, iterations=20), weight_OI, None, torch.Generator())
    torch.testing.assert_close(stored(torch.float32).detach(), weight_OI, rtol=1e-3, atol=0)


def test_zeros_of_small_groups_stay_within_16_bits():
    weight_OI = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).half().float()
    stored = made_by(Hqq(**SETTINGS, width=8, group=2, iterations=20), weight_OI, None, torch.Generator())
    error_OI = stored(torch.float32).detach() - weight_OI
    assert float(error_OI.square().sum() / weight_OI.square().sum()) < 1e-6
