"""Codes in turn and VPTQ, against brute force and against what has one codebook."""

import pytest
import torch

from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.sum import Sum
from cluscomp.methods.vptq import Vptq
from cluscomp.solve.along_outputs import damped, feedback_codes, output_error
from cluscomp.solve.in_turn import codes_in_turn, with_residual
from cluscomp.solve.layer import Seen


def drawn(outputs: int, inputs: int, seed: int = 0):
    """A weight (O, I) and the inputs of a layer, some of them far larger than others and alike."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mixed_II = torch.randn(inputs, inputs, generator=generator)
    x_TI = torch.randn(8 * inputs, inputs, generator=generator) @ mixed_II * torch.linspace(0.1, 2, inputs)
    seen = Seen({"moment"})
    seen.add(x_TI)
    return weight_OI, seen, generator


def by_force(weight_IO, books, moment_II):
    """The codes of each input, all distances compared, with the others' correction from the whole inverse each time."""
    left_IO, moment_II = weight_IO.double().clone(), moment_II.double()
    dim = books[0].shape[1]
    todo = moment_II.diagonal().argsort(descending=True, stable=True).tolist()
    codes = [torch.zeros(len(left_IO), left_IO.shape[1] // dim, dtype=torch.int64) for _ in books]
    while todo:
        i, inverse = todo[0], torch.linalg.inv(moment_II[todo][:, todo])
        rest_GD = left_IO[i].view(-1, dim).clone()
        for book_KD, found in zip(books, codes):
            found[i] = torch.cdist(rest_GD, book_KD.double()).argmin(1)
            rest_GD -= book_KD.double()[found[i]]
        todo = todo[1:]
        left_IO[todo] -= torch.outer(inverse[1:, 0] / inverse[0, 0], rest_GD.flatten())
    return codes


@pytest.mark.parametrize("sizes", [[7], [5, 9], [4, 3, 6]])
def test_codes_are_those_of_brute_force(sizes):
    weight_OI, seen, generator = drawn(12, 20)
    moment_II = damped(seen.matrix_II, 0.01)
    books = [torch.randn(size, 3, generator=generator) / (1 + number) for number, size in enumerate(sizes)]
    found, errors_IO = codes_in_turn(weight_OI.T.contiguous(), books, moment_II)
    for ours, forced in zip(found, by_force(weight_OI.T, books, moment_II)):
        assert torch.equal(ours.long(), forced)
    assert errors_IO.shape == (20, 12) and bool(errors_IO.any())


@pytest.mark.parametrize("outputs", [12, 13])
def test_one_codebook_has_the_codes_of_feedback(outputs):
    weight_OI, seen, generator = drawn(outputs, 150)
    moment_II, book_KD = damped(seen.matrix_II, 0.01), torch.randn(16, 4, generator=generator)
    weight_IO = weight_OI.T.contiguous()
    (codes_IG,), _ = codes_in_turn(weight_IO, [book_KD], moment_II)
    assert (codes_IG == feedback_codes(weight_IO, book_KD, moment_II)).float().mean() > 0.99  # but for rounding


def test_a_residual_codebook_lowers_the_error_as_a_sum_of_two_forms():
    weight_OI, seen, _ = drawn(32, 64)
    moment_II, errors = damped(seen.matrix_II, 0.01), []
    for sizes in ([32], [32, 32]):
        stored = with_residual(
            weight_OI, moment_II, 4, sizes, "float16", torch.Generator().manual_seed(0), iterations=10
        )
        errors.append(output_error(weight_OI - stored(torch.float32).detach(), moment_II))
        assert sum(stored.ledger().values()) == len(sizes) * (64 * 8 * 5 + 32 * 4 * 16)
        assert isinstance(stored, Sum if len(sizes) > 1 else CodebookWeight)
    assert errors[1] < 0.35 * errors[0]  # 1.25 bits a weight more: at best 0.18 of Gaussian errors


def vptq(**changes) -> Vptq:
    by_hand = {"bits": None, "vector_dim": None, "codebook_size": None, "allocation": "uniform", "storage": "float16"}
    return Vptq(**by_hand | {"residual_size": None, "iterations": 10, "damping": 0.01} | changes)


@pytest.mark.parametrize("residual", [None, 4, 16])
@pytest.mark.parametrize("bits", [2.0, 3.0, 4.5])
def test_both_codebooks_stay_within_the_bits(bits, residual):
    weight_OI, seen, generator = drawn(96, 64)
    method = vptq(bits=bits, residual_size=residual)
    shape = method.shape(96, 64)
    stored = method.stored(weight_OI, seen, generator, shape)
    counted = sum(stored.ledger().values()) / weight_OI.numel()
    assert counted == pytest.approx(shape.bits) and bits - 0.8 < counted <= bits


def test_bits_and_shape_by_hand_count_alike():
    chosen = vptq(bits=3.0, residual_size=16).shape(96, 64)
    by_hand = vptq(vector_dim=chosen.vector_dim, codebook_size=chosen.codebook_size, residual_size=16)
    assert by_hand.shape(96, 64) == chosen


def test_a_residual_codebook_that_leaves_no_room_is_told():
    with pytest.raises(ValueError, match=r"bits=1\.0 is out of reach with method\.residual_size=512 for a 96 x 64"):
        vptq(bits=1.0, residual_size=512).shape(96, 64)
