"""Forms made of forms, by hand."""

import pytest
import torch

from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.masked import Masked
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.stored import described, total
from cluscomp.forms.sum import Sum


def plain(*rows):
    return PlainWeight(torch.tensor(rows, dtype=torch.float16))


COLUMN, ROW = plain([1.0], [2.0]), plain([3.0, 0.0, -1.0])
OUTER = [[3.0, 0.0, -1.0], [6.0, 0.0, -2.0]]


def test_a_product_of_a_column_and_a_row():
    form = LowRank(COLUMN, ROW)
    assert form(torch.float32).tolist() == OUTER
    assert form.product(torch.tensor([[1.0, 5.0, 1.0]])).tolist() == [[2.0, 4.0]]
    assert form.ledger() == {"numbers": 16 * 5} and form.paper_bits() == 80
    assert form.spec() == {"left": described(COLUMN), "right": described(ROW)}
    assert described(ROW) == {"kind": "plain", "out_features": 1, "in_features": 3}
    with pytest.raises(ValueError, match="factors of rank 3 and 1"):
        LowRank(ROW, ROW)


def test_a_mask_leaves_zeros_and_takes_a_bit_a_weight():
    kept_OI = torch.tensor([[True, True, False], [False, True, True]])
    form = Masked.keeping(LowRank(COLUMN, plain([3.0, -1.0])), kept_OI)
    assert form(torch.float32).tolist() == [[3.0, -1.0, 0.0], [0.0, 6.0, -2.0]]
    assert form.mask.tolist() == [0b110011]
    assert form.ledger() == {"masks": 6, "padding": 2, "numbers": 64} and form.paper_bits() == 70


def test_what_is_kept_gets_the_gradient_of_its_place():
    inner = plain([1.0], [2.0])
    form = Masked.keeping(inner, torch.tensor([[True, False], [False, True]]))
    assert form(torch.float32).tolist() == [[1.0, 0.0], [0.0, 2.0]]
    form.to_masters()
    (form(torch.float32) * torch.tensor([[5.0, 6.0], [7.0, 8.0]])).sum().backward()
    assert inner.numbers.grad.tolist() == [[5.0], [8.0]]


def test_a_sum_of_codes_and_what_they_leave_out():
    codes = CodebookWeight.from_codes(
        torch.tensor([[0, 1, 1]]), torch.tensor([[[1.0, 1.0], [0.0, 2.0]]]), out_features=2, in_features=3, axis="out"
    )
    form = Sum([codes, LowRank(COLUMN, ROW)])
    assert form(torch.float32).tolist() == [[4.0, 0.0, -1.0], [7.0, 2.0, 0.0]]
    x_BI = torch.tensor([[1.0, 5.0, 1.0]])
    assert form.product(x_BI).tolist() == [[3.0, 17.0]]
    assert form.product(x_BI.repeat(9, 1)) is None  # codes have no shorter way for so many tokens
    assert form.ledger() == total(codes.ledger(), {"numbers": 80})
    assert form.paper_bits() == 16 * 3 + 16 * 4 + 80
    codes_MN, size = form.coded()
    assert codes_MN.tolist() == [[0, 1, 1]] and size == 2
    with pytest.raises(ValueError, match="a sum of weights of 1 x 3 and 2 x 3"):
        Sum([codes, ROW])


def test_forms_without_codes_or_grids_say_none():
    form = Sum([LowRank(COLUMN, ROW)])
    assert form.coded() is None and not form.lies_on(width=4, group=1) and form.learns == {"values"}
