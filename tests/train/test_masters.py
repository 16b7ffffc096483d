"""The fit loop against torch's own schedulers and steps written out by hand, and what makes it stop."""

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from cluscomp.train.masters import by_sign, fit, rate

PLAIN = {"lr": 0.1, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0, "clip": None, "half": False}


def rates(schedule, steps, warmup):
    return [rate(schedule, step, steps, warmup) for step in range(steps)]


def stepped(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_rates_are_those_of_torchs_schedulers():
    def optimizer():
        return AdamW([Parameter(torch.zeros(1))], lr=1.0)

    assert rates("constant", 5, 0.0) == [1.0] * 5
    one = optimizer()
    assert rates("cosine", 10, 0.0) == pytest.approx(stepped(CosineAnnealingLR(one, 10), one, 10))
    two = optimizer()
    parts = [LinearLR(two, 0.25, 1.0, total_iters=3), CosineAnnealingLR(two, 16)]
    assert rates("cosine", 20, 0.2) == pytest.approx(stepped(SequentialLR(two, parts, [4]), two, 20))
    assert rates("constant", 4, 1.0) == [0.25, 0.5, 0.75, 1.0]
    three = optimizer()
    assert rates("linear", 10, 0.0) == pytest.approx(stepped(LinearLR(three, 1.0, 0.0, total_iters=10), three, 10))


def targets(count=6):
    return list(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)))


def test_fit_is_adamw_with_clipped_gradients():
    parameter, by_hand = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    settings = PLAIN | {"weight_decay": 0.1, "schedule": "cosine", "warmup": 0.5, "clip": 0.7}
    assert fit([parameter], lambda target: (parameter - target).square().sum(), targets(), **settings) is None
    optimizer = AdamW([by_hand], lr=0.1, weight_decay=0.1)
    for step, target in enumerate(targets()):
        optimizer.param_groups[0]["lr"] = 0.1 * rates("cosine", 6, 0.5)[step]
        gradient = 2 * (by_hand.detach() - target)
        by_hand.grad = gradient * min(1.0, 0.7 / (float(gradient.norm()) + 1e-6))
        optimizer.step()
    assert torch.allclose(parameter, by_hand, atol=1e-6)
    assert not torch.allclose(parameter, torch.ones(3), atol=1e-2)


@pytest.mark.parametrize("half", [False, True])
def test_signed_steps_are_as_long_as_the_learning_rate(half):
    parameter, by_hand = Parameter(torch.zeros(3)), torch.zeros(3)
    settings = PLAIN | {"schedule": "linear", "half": half, "weight_decay": 0.5}
    loss = lambda target: (parameter - target).square().sum()  # noqa: E731
    assert fit([parameter], loss, targets(), **settings, change_gradient=by_sign) is None
    for step, target in enumerate(targets()):
        by_hand -= 0.1 * (1 - step / 6) * (by_hand - target).sign()
    torch.testing.assert_close(parameter.detach(), by_hand)


def test_float16_losses_are_scaled_so_that_small_gradients_survive():
    """1e-8 is below what float16 holds; the step of AdamW does not depend on the size of a gradient."""

    def loss_of(target):
        return ((parameter.half() - target.half()) * torch.tensor(1e-4).half()).square().float().mean() * 1e-3

    moved = {}
    for half in (False, True):
        parameter = Parameter(torch.ones(3))
        assert fit([parameter], loss_of, targets(), **PLAIN | {"half": half}) is None
        moved[half] = float((parameter.detach() - 1).abs().max())
    assert moved[True] > 10 * moved[False]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_ends_it_with_the_number_of_the_step(half, value):
    parameter = Parameter(torch.ones(3))
    planted = targets()
    planted[3][1] = value
    settings = PLAIN | {"half": half}
    reason = fit([parameter], lambda target: (parameter - target).square().sum(), planted, **settings)
    assert reason.startswith("step 4 of 6: loss") and str(value) in reason
    assert bool(parameter.isfinite().all())


def test_a_gradient_that_is_not_finite_ends_it_though_the_loss_is_finite():
    parameter = Parameter(torch.zeros(3))
    reason = fit([parameter], lambda _: parameter.abs().sqrt().sum(), targets(), **PLAIN)
    assert reason == "step 1 of 6: loss 0, gradient nan"
    assert torch.equal(parameter, torch.zeros(3))


def test_gradients_that_overflow_float16_at_any_scale_end_it():
    """The scale halves at each such step, so it takes some seventeen to give up."""
    parameter = Parameter(torch.zeros(3))
    reason = fit([parameter], lambda _: parameter.abs().sqrt().sum(), targets(30), **PLAIN | {"half": True})
    assert reason is not None and reason.endswith("gradient nan")
    assert torch.equal(parameter, torch.zeros(3))
