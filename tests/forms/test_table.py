"""Weights that look up their values in tables: levels against every way to group numbers, bits against tensors."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import correlated, heavy_tailed, made_by, planned, relative_error, statistic_of

from cluscomp.errors import InputError
from cluscomp.forms.table import TableWeight, tables_for
from cluscomp.kernels.levels import best_levels, best_levels_reference
from cluscomp.methods.on_grids import Grid
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.methods.squeezellm import SqueezeLlm


def lost(values, mass, levels) -> float:
    return float((mass * np.square(values[:, None] - levels).min(1)).sum())


def least_of_all_groupings(values, mass, number) -> float:
    """By trying all places where sorted numbers may be cut, each group standing for its weighted mean."""
    order = np.argsort(values)
    values, mass = values[order], mass[order]
    least = np.inf
    for cuts in itertools.combinations(range(1, len(values)), min(number, len(values)) - 1):
        bounds = [0, *cuts, len(values)]
        groups = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        sums = (
            np.average(np.square(values[g] - np.average(values[g], weights=mass[g])), weights=mass[g]) * mass[g].sum()
            for g in groups
        )
        least = min(least, sum(sums))
    return least


@pytest.mark.parametrize("way", [best_levels, best_levels_reference])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 5), st.integers(0, 99), st.booleans())
def test_levels_lose_the_least_there_is(way, rows, columns, number, seed, coarse):
    generator = torch.Generator().manual_seed(seed)
    values_RC = torch.randn(rows, columns, generator=generator)
    values_RC = values_RC.round() if coarse else values_RC  # many are the same
    mass_RC = torch.rand(rows, columns, generator=generator) + 0.01
    levels_RK = way(values_RC, mass_RC, number)
    assert levels_RK.shape == (rows, number) and bool((levels_RK.diff(dim=1) >= 0).all())
    for values, mass, levels in zip(*(part.double().numpy() for part in (values_RC, mass_RC, levels_RK))):
        assert lost(values, mass, levels) == pytest.approx(least_of_all_groupings(values, mass, number), abs=1e-5)


@pytest.mark.parametrize("way", [best_levels, best_levels_reference])
def test_what_counts_nothing_moves_no_level_unless_nothing_counts(way):
    values_RC = torch.tensor([[0.0, 1.0, 5.0, 9.0], [0.0, 1.0, 5.0, 6.0]])
    mass_RC = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert way(values_RC, mass_RC, 2).tolist() == [[0.0, 1.0], [0.5, 5.5]]


def test_both_ways_agree_on_long_rows():
    weight_OI, x_TI = heavy_tailed(128)
    mass_OI = x_TI.square().mean(0).expand_as(weight_OI)[:8]
    torch.testing.assert_close(
        best_levels(weight_OI[:8], mass_OI, 16), best_levels_reference(weight_OI[:8], mass_OI, 16)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(3, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_every_weight_is_the_nearest_value_of_its_own_table(outputs, inputs, width, groups, seed):
    weight_OI, x_TI = correlated(outputs, inputs, seed)
    tables_OGK = tables_for(weight_OI, x_TI.square().mean(0), width, groups)
    stored = TableWeight.nearest(weight_OI, tables_OGK)
    dense = stored(torch.float32).detach().numpy()
    tables = stored.codebooks.detach().float().numpy()
    for o, i in itertools.product(range(outputs), range(inputs)):
        values = tables[o, i * groups // inputs]
        assert dense[o, i] in values
        assert abs(dense[o, i] - float(weight_OI[o, i])) <= np.abs(values - float(weight_OI[o, i])).min() + 1e-6
    ledger = stored.ledger()
    assert ledger["codes"] == outputs * inputs * width and ledger["codebooks"] == 16 * outputs * groups * 2**width
    assert sum(ledger.values()) == sum(t.numel() * t.element_size() * 8 for t in stored.state_dict().values())
    assert stored.paper_bits() == sum(ledger.values()) - ledger["padding"]


@pytest.mark.parametrize("bits", [4.0, 3.3, 3.0, 2.0])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (4096, 11_008)])
def test_the_tables_count_and_are_the_best_under_the_limit(shape, bits):
    """The widest numbers that leave room for one table an output, then as many tables as fit."""
    method = SqueezeLlm(bits=bits, width=None, group=None, weighting="diagonal")
    grid = method.grid(*shape)
    assert sum(planned(method, *shape).ledger().values()) == grid.bits
    size = grid.bits / math.prod(shape)
    assert bits - 16 * 2**grid.width / shape[1] < size <= bits
    assert grid.width + 1 + 16 * 2 ** (grid.width + 1) / shape[1] > bits
    by_hand = SqueezeLlm(bits=None, width=3, group=100, weighting="none").grid(192, 576)
    assert by_hand == Grid(3, 6, "none", 192 * 576 * 3 + 192 * 6 * 8 * 16)


def test_weighting_by_the_inputs_lowers_the_output_error():
    weight_OI, x_TI = heavy_tailed()
    errors = {}
    for weighting in ("none", "diagonal"):
        method = SqueezeLlm(bits=None, width=3, group=None, weighting=weighting)
        seen = statistic_of(x_TI) if method.sees() else None
        stored = made_by(method, weight_OI, seen, torch.Generator())
        errors[weighting] = relative_error(weight_OI, stored(torch.float32).detach(), x_TI)
    rounded = RoundToNearest(bits=None, width=3, group=None, symmetric=False)
    plain = made_by(rounded, weight_OI, statistic_of(x_TI), torch.Generator())
    assert errors["diagonal"] < errors["none"] < relative_error(weight_OI, plain(torch.float32).detach(), x_TI)


def test_damaged_tables_are_found():
    weight_OI, _ = correlated(3, 8)
    stored = TableWeight.nearest(weight_OI, tables_for(weight_OI, torch.ones(8), 2, 1))
    stored.check()
    stored.codebooks.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        stored.check()


def test_as_many_values_as_a_4_bit_file_has_are_void(families, tmp_path):
    """Tables of 16 values hold a grid of 4 bits without loss where no table spans two of its groups."""
    import json
    import shutil

    from reference.recipe import IDLE

    from cluscomp.models.original import Original
    from cluscomp.stages.cluster import Cluster

    folder = shutil.copytree(families("llama", hidden_size=64, intermediate_size=96, head_dim=16), tmp_path / "model")
    (folder / "gguf.json").write_text(json.dumps({"quantised": ["Q4_1"]}))
    original = Original(folder, torch.float32, torch.device("cpu"))
    for width, group, void in [(4, 32, True), (5, 16, True), (3, 32, False), (4, None, False)]:
        method = SqueezeLlm(bits=None, width=width, group=group, weighting="none")
        cluster = Cluster(method=method, **IDLE)
        if void:
            with pytest.raises(InputError, match="would be void"):
                cluster.check(original)
        else:
            cluster.check(original)
