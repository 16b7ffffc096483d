"""Streams of whole numbers: back to the number, near the entropy, compiled as in numpy, and none that does harm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.kernels import entropy, rans
from cluscomp.kernels.loading import native

compiled = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")


def entropy_of(numbers):
    _, counts = np.unique(numbers.numpy(), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def numbers_of(kind, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal_IO = torch.randn(inputs, outputs, generator=generator)
    made = {
        "one value": torch.full_like(normal_IO, -128 if seed % 2 else 127),
        "any": torch.randint(-128, 128, (inputs, outputs), generator=generator),
        "normal": normal_IO * 1.2,
        "skewed": (normal_IO.exp() ** 2).clamp(max=100) - 3,
        "rare": torch.where(normal_IO > 3, 90, 0),
        "of any spread": normal_IO * torch.logspace(-2, 1.5, inputs)[:, None] * torch.logspace(-0.5, 0.5, outputs),
    }
    return made[kind].round().clamp(-128, 127).to(torch.int8)


KINDS = ["one value", "any", "normal", "skewed", "rare", "of any spread"]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_numbers_come_back(kind, inputs, outputs, seed):
    numbers_IO = numbers_of(kind, inputs, outputs, seed)
    stream = entropy.write(numbers_IO)
    assert stream.dtype == torch.uint8
    assert torch.equal(entropy.read(stream, inputs, outputs), numbers_IO)


@compiled
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_numpy_writes_the_same_bytes_and_reads_them(kind, inputs, outputs, seed):
    numbers_IO = numbers_of(kind, inputs, outputs, seed)
    stream = entropy.write(numbers_IO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "native", None)
        assert torch.equal(entropy.write(numbers_IO), stream)
        assert torch.equal(entropy.read(stream, inputs, outputs), numbers_IO)


@pytest.mark.parametrize("kind", ["normal", "skewed", "rare"])
def test_a_large_stream_is_within_a_200th_of_a_bit_of_the_entropy(kind):
    numbers_IO = numbers_of(kind, 576, 1536)
    bits = 8 * len(entropy.write(numbers_IO)) / numbers_IO.numel()
    assert entropy_of(numbers_IO) - 0.001 < bits < entropy_of(numbers_IO) + 0.005
    assert abs(entropy.planned(numbers_IO).bits / numbers_IO.numel() - bits) < 0.0005


def test_tables_follow_the_spread_of_inputs_and_outputs():
    """Each number Gaussian with a known spread: the stream takes little more than the sum of their entropies."""
    inputs, outputs = 400, 600
    spread_IO = torch.logspace(-0.5, 1, inputs)[:, None] * torch.logspace(-0.3, 0.3, outputs)
    numbers_IO = (torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(1)) * spread_IO).round()
    cell = torch.special.ndtr((numbers_IO + 0.5) / spread_IO) - torch.special.ndtr((numbers_IO - 0.5) / spread_IO)
    needed = float(-cell.clamp(min=1e-9).log2().mean())
    numbers_IO = numbers_IO.clamp(-127, 127).to(torch.int8)
    plan = entropy.planned(numbers_IO)
    assert plan.levels.rows_I.max() > 0 and plan.levels.columns_O.max() > 0
    assert needed - 0.01 < 8 * len(entropy.write(numbers_IO, plan)) / numbers_IO.numel() < needed + 0.06
    assert entropy_of(numbers_IO) > needed + 0.2


def test_no_damage_reads_or_writes_outside():
    """Every byte changed, streams cut and made longer, noise: an error that says so, or numbers of the right shape."""
    numbers_IO = numbers_of("of any spread", 30, 50)
    stream, found = entropy.write(numbers_IO), 0
    generator = torch.Generator().manual_seed(0)
    wrong = [stream[:n] for n in range(0, len(stream), 7)] + [torch.cat([stream, stream[:2]])]
    wrong += [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in range(300)]
    for place in range(len(stream)):
        changed = stream.clone()
        changed[place] ^= 1 + int(torch.randint(0, 255, (1,), generator=generator))
        wrong.append(changed)
    for native_or_not in {rans.native, None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rans, "native", native_or_not)
            for one in wrong[:: 1 if native_or_not else 60]:
                try:
                    assert entropy.read(one, 30, 50).shape == (30, 50)
                except ValueError:
                    found += native_or_not is rans.native
    assert found > 0.98 * len(wrong)


@pytest.mark.parametrize("without", [False, True])
def test_the_coder_refuses_what_cannot_be(without, monkeypatch):
    if without:
        monkeypatch.setattr(rans, "native", None)
    numbers_IO, none = np.zeros((3, 4), np.int8), np.zeros(3, np.uint8)
    rows_I, columns_O, frequencies_TK = none, np.zeros(4, np.uint8), np.zeros((1, 256), np.uint16)
    with pytest.raises(ValueError, match="add up to"):
        rans.encode(numbers_IO, rows_I, columns_O, frequencies_TK)
    frequencies_TK[0, 128] = rans.WHOLE
    states_L, words = rans.encode(numbers_IO, rows_I, columns_O, frequencies_TK)
    assert len(words) == 0
    with pytest.raises(ValueError, match="table does not have"):
        rans.encode(numbers_IO + 1, rows_I, columns_O, frequencies_TK)
    with pytest.raises(ValueError, match="past the tables"):
        rans.encode(numbers_IO, rows_I + 1, columns_O, frequencies_TK)
    with pytest.raises(ValueError, match="not one that was written"):
        rans.decode(states_L, np.ones(1, np.uint16), rows_I, columns_O, frequencies_TK)


@compiled
def test_sizes_that_do_not_fit_are_refused():
    rows_I, columns_O = np.zeros(3, np.uint8), np.zeros(4, np.uint8)
    frequencies_TK = np.full((1, 256), 64, np.uint16)
    numbers_IO, states_L, words = np.zeros((3, 4), np.int8), np.full(1, 1 << 16, np.uint32), np.zeros(12, np.uint16)
    native.rans_encode(numbers_IO, None, rows_I, columns_O, frequencies_TK, states_L, words)
    for place, wrong in enumerate(
        [
            np.zeros((4, 4), np.int8),
            np.zeros((3, 3), np.uint8),
            rows_I[:2],
            columns_O[:2],
            np.zeros((1, 255), np.uint16),
            states_L[:0],
            words[:11],
        ]
    ):
        good = [numbers_IO, None, rows_I, columns_O, frequencies_TK, states_L, words]
        with pytest.raises(ValueError, match=r"sizes differ|256 frequencies"):
            native.rans_encode(*[*good[:place], wrong, *good[place + 1 :]])
