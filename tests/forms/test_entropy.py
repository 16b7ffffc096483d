"""The form that is coded by its entropy: decoded once, again when the stream is another, and never in part."""

from copy import deepcopy

import pytest
import torch

from cluscomp.forms import entropy
from cluscomp.forms.entropy import EntropyWeight
from cluscomp.forms.layers import size_of
from cluscomp.forms.linear import CompressedLinear
from cluscomp.forms.stored import build, described


def numbers_of(inputs, outputs, seed=0):
    normal_IO = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))
    return normal_IO.mul(2).round().to(torch.int8)


def form_of(inputs=20, outputs=30, scaled=True, seed=0):
    scales_I = torch.linspace(0.1, 0.5, inputs)
    outputs_O = torch.linspace(1, 2, outputs) if scaled else None
    return EntropyWeight.from_numbers(numbers_of(inputs, outputs, seed), scales_I, outputs_O)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_weight_is_numbers_times_scales(scaled):
    form = form_of(scaled=scaled)
    expected_IO = numbers_of(20, 30).float() * form.scales[:, None].float()
    if scaled:
        expected_IO = expected_IO * form.outputs.float()
    assert torch.equal(form(torch.float32), expected_IO.T)
    assert form.ledger() == {"codes": 8 * len(form.stream), "scales": 16 * (50 if scaled else 20)}


def test_the_stream_is_decoded_once(monkeypatch):
    form, calls = form_of(), []
    monkeypatch.setattr(
        entropy, "read", lambda *given, read=entropy.read, **more: calls.append(1) or read(*given, **more)
    )
    first_IO = form.numbers()
    form(torch.float32)
    form.check()
    assert form.numbers() is first_IO and len(calls) == 1
    assert "stream" in form.state_dict() and not any(
        tensor.dtype == torch.int8 for tensor in form.state_dict().values()
    )


def test_another_stream_is_decoded_anew():
    form, other = form_of(), form_of(seed=1)
    form.numbers()
    if len(other.stream) == len(form.stream):
        form.load_state_dict(other.state_dict())
    form.stream = other.stream.clone()
    assert torch.equal(form.numbers(), numbers_of(20, 30, 1))
    form.stream.copy_(other.stream)
    assert torch.equal(deepcopy(form).numbers(), numbers_of(20, 30, 1))


def test_a_form_is_loaded_into_an_empty_one():
    form = form_of()
    for empty in (build(described(form)), build(described(form)).to("meta")):
        empty.load_state_dict(form.state_dict(), assign=True)
        assert torch.equal(empty.numbers(), form.numbers())


def test_without_numbers_it_has_shapes_alone():
    spec = described(form_of())
    with torch.device("meta"):
        form = build(spec)
    assert form(torch.float16).shape == (30, 20) and form.numbers().is_meta
    assert form.decoded_bytes() == 600


def test_what_stays_decoded_counts_in_memory_and_not_in_the_file():
    form = form_of()
    size = size_of(torch.nn.Sequential(CompressedLinear(form, None, torch.float32)))
    assert size.linear_bits_per_weight == sum(form.ledger().values()) / 600
    assert size.linear_bits_in_memory == size.linear_bits_per_weight + 8


def test_a_damaged_stream_is_an_error_wherever_it_is_used():
    form = form_of()
    form.stream[-3] ^= 5
    for use in (form.check, form.numbers, lambda: form(torch.float32)):
        with pytest.raises(ValueError, match="not one that was written"):
            use()


def test_tiles_are_the_whole_weight(monkeypatch):
    monkeypatch.setattr(entropy, "TILE", 100)
    form = form_of()
    tiles = form.tiles()
    assert len(tiles) == 7
    assert torch.equal(torch.cat([form(torch.float32, tile) for tile in tiles], 1), form(torch.float32))


def test_scales_that_do_not_fit_are_refused():
    for wrong in (torch.nan, 1e6):
        with pytest.raises(ValueError, match="16-bit float"):
            EntropyWeight.from_numbers(numbers_of(2, 3), torch.tensor([1.0, wrong]))
