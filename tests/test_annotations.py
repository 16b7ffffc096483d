"""The shape annotations are really checked while the tests run (conftest.py): each call below has one wrong shape."""

import jaxtyping
import pytest
import torch
from reference.recipe import PAPER

from cluscomp.forms import codebook
from cluscomp.kernels import codes
from cluscomp.models import walk
from cluscomp.models.original import Original
from cluscomp.solve import kmeans, shapes

RECIPE = kmeans.Recipe(20, **PAPER)
SHAPE = shapes.Shape(2, 4, 3.0)
CALLS = {
    "pack": lambda: codes.pack(torch.zeros(4, 3, dtype=torch.long), 2),
    "kmeans": lambda: kmeans.kmeans(torch.zeros(4), 2, RECIPE, torch.Generator()),
    "sub_vectors": lambda: codebook.sub_vectors(torch.zeros(2, 3, 4), 2, "out"),
    "choose": lambda: shapes.choose(lambda _dim: (torch.zeros(16), None), [SHAPE, SHAPE], RECIPE, torch.Generator()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_is_caught(name):
    with pytest.raises(jaxtyping.TypeCheckError):
        CALLS[name]()


def test_a_wrong_shape_is_caught_in_methods(tiny_folder):
    model = Original(tiny_folder, torch.float32, torch.device("cpu")).load_all()
    with pytest.raises(jaxtyping.TypeCheckError):
        walk.Walk(model).embed(torch.zeros(12, dtype=torch.long))
