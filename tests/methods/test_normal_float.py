"""NormalFloat: the published levels, QLoRA's bits, scales of 8 bits by hand."""

import pytest
import torch
from pipelines import composed

from cluscomp.errors import InputError
from cluscomp.forms.normal_float import TOGETHER, NormalFloatWeight, from_8_bits, in_8_bits, levels
from cluscomp.methods.normal_float import NormalFloat
from cluscomp.plan import dry
from cluscomp.plan.places import Place

PUBLISHED = [  # NF4 in the authors' code, bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_levels_are_the_published_ones_and_of_other_widths_likewise():
    assert levels(4, torch.device("cpu")).tolist() == pytest.approx(PUBLISHED, abs=5e-7)
    for width in range(2, 9):
        found = levels(width, torch.device("cpu"))
        assert len(found) == 2**width and bool((found.diff() > 0).all())
        assert (float(found[0]), float(found[2 ** (width - 1) - 1]), float(found[-1])) == (-1, 0, 1)


def test_weights_take_the_nearest_level_of_their_groups_scale():
    weight_OI = torch.randn(40, 130, generator=torch.Generator().manual_seed(0))
    stored = NormalFloatWeight.nearest(weight_OI, 4, 3)  # groups of 44, 43 and 43 inputs
    scales_OG = from_8_bits(stored.scales, stored.steps, stored.mean).double()
    for group, (begin, end) in enumerate([(0, 44), (44, 87), (87, 130)]):
        part_OC = weight_OI[:, begin:end].double()
        scale_O1 = scales_OG[:, group : group + 1]
        torch.testing.assert_close(scale_O1, part_OC.abs().amax(1, keepdim=True), rtol=1e-2, atol=0)
        away_OCK = (part_OC[:, :, None] - scale_O1[:, :, None] * torch.tensor(PUBLISHED).double()).abs()
        expected_OC = scale_O1 * torch.tensor(PUBLISHED).double()[away_OCK.argmin(2)]
        torch.testing.assert_close(stored(torch.float32)[:, begin:end].double(), expected_OC, rtol=1e-4, atol=1e-6)


def test_scales_are_steps_from_their_mean_each_256_with_a_step_of_their_own():
    scales_OG = torch.rand(100, 7, generator=torch.Generator().manual_seed(0))
    scales_OG.view(-1)[TOGETHER] = 50.0
    numbers_OG, steps_S, mean_1 = in_8_bits(scales_OG)
    assert len(steps_S) == 3 and mean_1.item() == pytest.approx(float(scales_OG.mean()))
    away = (from_8_bits(numbers_OG, steps_S, mean_1) - scales_OG).flatten().abs()
    for part, step in zip(away.split(TOGETHER), steps_S):
        assert float(part.max()) <= float(step) * 0.501
    assert float(steps_S[1]) == pytest.approx((50 - float(mean_1)) / 127, rel=1e-5)


def test_nf4_is_qloras_4_127_bits_and_takes_no_limit_beside():
    method = composed("method=nf4").stages["cluster"].method
    assert method == NormalFloat(bits=None, width=4, group=64)
    (form,) = dry.compress(method, {"one": Place(4096, 4096, 0)}, torch.float32).stored.values()
    ledger = form.ledger()
    assert ledger == {"codes": 4 * 4096**2, "scales": 4096**2 // 64 * 8 + 32 * 4096**2 // (64 * 256) + 32, "padding": 0}
    assert sum(ledger.values()) / 4096**2 == pytest.approx(4.127, abs=5e-4)
    with pytest.raises(InputError, match=r"bits=3.* chooses method.width and method.group .*here 4 and 64"):
        composed("method=nf4", "bits=3")


def test_a_limit_below_two_bits_is_out_of_reach():
    with pytest.raises(ValueError, match=r"bits=2.0 is out of reach .* the least is 2.\d+, with method.width=2"):
        NormalFloat(bits=2.0, width=None, group=None).grid(64, 64)
