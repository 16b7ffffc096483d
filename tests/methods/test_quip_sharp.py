"""QuIP#: its tables by their definitions, stored bits under any limit, error against other methods."""

from dataclasses import replace

import pytest
import torch
from layers import correlated, heavy_tailed, made_by, planned, relative_error, statistic_of

from cluscomp.forms.lattice import TABLES, LatticeWeight, e8p, short_e8
from cluscomp.forms.stored import build, described
from cluscomp.methods.quip_sharp import QuipSharp
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.solve.kmeans import nearest

METHOD = QuipSharp(bits=2.0, width=None, scales="matrix", damping=0.01)


def made(method, weight_OI, x_TI):
    return made_by(method, weight_OI, statistic_of(x_TI, "moment"), torch.Generator().manual_seed(0))


def in_e8(vectors_KD):
    """All whole or all half numbers, of an even sum."""
    whole_K = (vectors_KD % 1 == 0).all(1) | (vectors_KD % 1 == 0.5).all(1)
    return bool(whole_K.all()) and bool((vectors_KD.sum(1) % 2 == 0).all())


def test_e8p_is_65536_vectors_of_the_lattice_moved_by_a_quarter():
    table_KD = e8p()
    assert table_KD.shape == (65536, 8) and len(table_KD.unique(dim=0)) == 65536
    assert in_e8(table_KD - 0.25) and in_e8(table_KD + 0.25 - 0.5)
    halves_KD = torch.where(((table_KD - 0.25) % 1 == 0.5).all(1)[:, None], table_KD - 0.25, table_KD + 0.25)
    assert bool((halves_KD % 1 == 0.5).all())
    rows, counts = halves_KD.abs().unique(dim=0, return_counts=True)
    assert rows.shape == (256, 8) and set(counts.tolist()) == {256}
    norms = rows.square().sum(1)
    assert int((norms <= 10).sum()) == 227 and int((norms == 12).sum()) == 29


def test_the_table_of_one_bit_is_256_short_vectors_of_the_lattice():
    table_KD = short_e8()
    assert table_KD.shape == (256, 8) and len(table_KD.unique(dim=0)) == 256 and in_e8(table_KD)
    norms, counts = table_KD.square().sum(1).unique(return_counts=True)
    assert norms.tolist() == [0, 2, 4] and counts.tolist() == [1, 240, 15]


@pytest.mark.parametrize(
    "width, least, most", [(1, 0.29, 0.34), (2, 0.086, 0.0945), (3, 0.026, 0.032), (4, 0.0075, 0.0095)]
)
def test_gaussian_numbers_lose_what_the_lattice_does(width, least, most):
    numbers_ND = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    left_ND = numbers_ND.clone()
    for name, factor in TABLES[width]:
        vectors_KD = factor * (e8p() if name == "e8p" else short_e8())
        left_ND -= vectors_KD[nearest(left_ND, vectors_KD).long()]
    assert least < float(left_ND.square().mean() / numbers_ND.square().mean()) < most


@pytest.mark.parametrize("scales", ["matrix", "output"])
@pytest.mark.parametrize("bits", [1.0, 1.7, 2.0, 3.5, 4.0, 8.0])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (64, 48)], ids=str)
def test_a_limit_is_met_and_spent(shape, bits, scales):
    form = planned(replace(METHOD, bits=bits, scales=scales), *shape)
    weights = shape[0] * shape[1]
    spent = sum(form.ledger().values())
    assert bits * weights - 8 - (bits == 8.0) * 2**22 < spent <= bits * weights
    assert form.inner.bits(**form.inner.spec())["codes"] == 8 * form.inner.codes.numel()


def test_by_hand_the_width_is_stored_with_a_scale_and_a_seed():
    form = planned(replace(METHOD, bits=None, width=3), 576, 1536)
    assert form.ledger() == {"seeds": 64, "codes": 3 * 576 * 1536, "scales": 16}


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.0, 3.0, 3.3, 4.0])
@pytest.mark.parametrize("shape", [(33, 47), (32, 24)], ids=str)
def test_what_is_stored_is_what_was_chosen(shape, bits):
    weight_OI, x_TI = correlated(*shape)
    form = made(replace(METHOD, bits=bits), weight_OI, x_TI)
    assert type(form.inner) is LatticeWeight and form.spec() == planned(replace(METHOD, bits=bits), *shape).spec()
    lost = float((form(torch.float32).detach() - weight_OI).square().mean())
    assert lost < 1 and relative_error(weight_OI, form(torch.float32).detach(), x_TI) < 0.6
    again = build(described(form))
    again.load_state_dict(form.state_dict())
    assert torch.equal(again(torch.float32), form(torch.float32))


def test_more_bits_lose_less_and_all_less_than_rounding():
    weight_OI, x_TI = heavy_tailed(128)
    rounding = RoundToNearest(bits=2.0, width=None, group=None, symmetric=False)
    lost = {
        bits: relative_error(weight_OI, made(replace(METHOD, bits=bits), weight_OI, x_TI)(torch.float32).detach(), x_TI)
        for bits in (1.5, 2.0, 3.0, 4.0)
    }
    rounded_OI = made_by(rounding, weight_OI, None, torch.Generator())(torch.float32).detach()
    assert lost[4.0] < lost[3.0] < lost[2.0] < lost[1.5]
    assert lost[2.0] < 0.3 * relative_error(weight_OI, rounded_OI, x_TI)


@pytest.mark.parametrize("scales", ["matrix", "output"])
def test_a_weight_of_zeros_and_one_too_small_for_16_bits_become_zero(scales):
    for weight_OI in (torch.zeros(32, 32), torch.randn(32, 32) * 1e-9):
        form = made(replace(METHOD, bits=3.0, scales=scales), weight_OI, torch.eye(32))
        assert not bool(form(torch.float32).any())


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"bits": None}, {"width": 2}):
        with pytest.raises(ValueError, match=r"method\.width"):
            replace(METHOD, **wrong)
    with pytest.raises(ValueError, match="out of reach"):
        planned(replace(METHOD, bits=1.0), 3, 5)
