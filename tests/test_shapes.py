"""The shape annotations are really checked while the tests run (conftest.py): each call below has one wrong shape."""

import jaxtyping
import pytest
import torch

from cluscomp import blocks, budget, kmeans, weights
from cluscomp.kernels import codes, nearest
from cluscomp.models import Original

CALLS = {
    "nearest": lambda: nearest.nearest_plain(torch.zeros(4, 3), torch.zeros(3)),
    "gather": lambda: codes.gather(torch.zeros(4), torch.zeros(5, dtype=torch.long)),
    "means": lambda: kmeans.means(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), 2),
    "sub_vectors": lambda: weights.sub_vectors(torch.zeros(2, 3, 4), 2, "out"),
    "choose": lambda: budget.choose(torch.zeros(16), 3.0, "out", torch.Generator()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_is_caught(name):
    with pytest.raises(jaxtyping.TypeCheckError):
        CALLS[name]()


def test_a_wrong_shape_is_caught_in_methods(tiny_folder):
    model = Original(tiny_folder, torch.float32, torch.device("cpu")).load_all()
    with pytest.raises(jaxtyping.TypeCheckError):
        blocks.Walk(model).embed(torch.zeros(12, dtype=torch.long))
