"""Rotations against dense matrices of SciPy and NumPy, their signs against the generator's published numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from cluscomp.forms.rotated import Rotated, factors, orthogonal, rotated, signs, spread_out
from cluscomp.forms.uniform import grids_for, rounded_weight

CPU = torch.device("cpu")
SEED = torch.tensor([1234567])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hartley(order):
    numbers = np.arange(order)
    angles = 2 * np.pi * np.outer(numbers, numbers) / order
    return (np.cos(angles) + np.sin(angles)) / math.sqrt(order)


@pytest.mark.parametrize(
    "size, expected",
    [(1, []), (2, [2]), (64, [64]), (128, [64, 2]), (4096, [64, 64]), (576, [64, 9]), (1536, [64, 8, 3]), (7, [7])],
)
def test_sizes_are_powers_of_two_times_an_odd_factor(size, expected):
    assert factors(size) == expected and math.prod(expected) == size


@pytest.mark.parametrize("order", [1, 2, 3, 8, 9, 43, 64])
def test_the_matrices_are_symmetric_and_orthogonal(order):
    matrix_FF = orthogonal(order, CPU)
    assert torch.equal(matrix_FF, matrix_FF.T)
    torch.testing.assert_close(matrix_FF @ matrix_FF, torch.eye(order), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size, odd", [(1, 1), (16, 1), (256, 1), (576, 9), (1536, 3), (35, 35)])
def test_numbers_are_spread_as_the_dense_matrix_does(size, odd):
    power = size // odd
    dense_NN = np.kron(hartley(odd), hadamard(power) / math.sqrt(power))
    x_BN = normal(3, size)
    np.testing.assert_allclose(spread_out(x_BN).numpy(), x_BN.numpy() @ dense_NN, rtol=0, atol=1e-5)
    assert spread_out(x_BN.bfloat16()).dtype == torch.bfloat16


def test_signs_are_those_of_the_published_generator():
    published = [  # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    expected = [-1.0 if number >= 2**63 else 1.0 for number in published]
    assert signs(SEED, 5, 0).tolist() == expected
    assert signs(SEED, 3, 2).tolist() == expected[2:]
    many_N = signs(SEED, 100_000, 0)
    assert set(many_N.tolist()) == {1.0, -1.0} and abs(float(many_N.mean())) < 0.01
    assert abs(float((many_N[1:] * many_N[:-1]).mean())) < 0.01
    assert not torch.equal(many_N, signs(SEED + 1, 100_000, 0))


def grid(weight_OI, width=3):
    """Each weight of (O, I) rounded to grids of a whole row."""
    return rounded_weight(weight_OI, *grids_for(weight_OI, width, 1, symmetric=False), width, symmetric=False)


@pytest.mark.parametrize("inputs, outputs", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("shape", [(192, 576), (576, 1536), (33, 47), (1, 7)], ids=str)
def test_a_rotation_is_undone(shape, inputs, outputs):
    weight_OI = normal(*shape)
    turned_OI = rotated(weight_OI, SEED, inputs=inputs, outputs=outputs)
    assert float(turned_OI.square().sum()) == pytest.approx(float(weight_OI.square().sum()), rel=1e-5)
    inner = grid(turned_OI, 8)
    form = Rotated(inner, SEED, inputs=inputs, outputs=outputs)
    left_OI, error_OI = form(torch.float32) - weight_OI, inner(torch.float32) - turned_OI
    back_OI = rotated(left_OI, SEED, inputs=inputs, outputs=outputs)  # what is left is the grid's error, turned back
    assert float((back_OI - error_OI).detach().abs().max()) < 1e-5 * float(weight_OI.abs().max())


def test_outliers_are_spread_so_that_a_grid_loses_less():
    weight_OI = normal(64, 576)
    weight_OI[:, 5] *= 40
    weight_OI[3] *= 10
    turned_OI = rotated(weight_OI, SEED, inputs=True, outputs=True)
    form = Rotated(grid(turned_OI), SEED, inputs=True, outputs=True)
    errors = [float((one(torch.float32).detach() - weight_OI).square().sum()) for one in (form, grid(weight_OI))]
    assert errors[0] < 0.5 * errors[1]


def test_the_seed_decides_the_rotation_and_is_all_that_is_stored():
    inner = grid(normal(24, 48))
    first, same, other = (Rotated(inner, torch.tensor([seed]), inputs=True, outputs=True) for seed in (1, 1, 2))
    assert torch.equal(first(torch.float32), same(torch.float32))
    assert not torch.allclose(first(torch.float32), other(torch.float32), atol=1e-2)
    assert first.state_dict().keys() - {f"inner.{name}" for name in inner.state_dict()} == {"seed"}
    assert first.ledger() == inner.ledger() | {"seeds": 64}
    assert first.paper_bits() == inner.paper_bits() + 64
