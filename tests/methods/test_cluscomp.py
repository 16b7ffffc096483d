"""Where K-means starts: at positions of each codebook's own, or at the same ones in all matrices of one size."""

import pytest
import torch
from pipelines import composed

from cluscomp.solve.layer import Layer

SHAPE = ["method.vector_dim=4", "method.codebook_size=16"]


def centroids(init: str, weight_OI: torch.Tensor, own: int, run: int) -> torch.Tensor:
    method = composed("method=cluscomp_paper", *SHAPE, f"method.init={init}").stages["cluster"].method
    layer = Layer(weight_OI, 0, None, torch.Generator().manual_seed(own), run)
    (found,) = method.compress({"layer": layer})
    return found.stored["layer"].codebooks.detach()


@pytest.mark.parametrize(("init", "own_matters", "run_matters"), [("random_points", 1, 0), ("shared_points", 0, 1)])
def test_the_start_is_shared_or_each_codebooks_own(init, own_matters, run_matters):
    weight_OI = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    first = centroids(init, weight_OI, own=1, run=0)
    assert torch.equal(first, centroids(init, weight_OI, own=2, run=0)) != own_matters
    assert torch.equal(first, centroids(init, weight_OI, own=1, run=1)) != run_matters
    moved = centroids(init, 2 * weight_OI, own=1, run=0)  # the same positions of another matrix
    torch.testing.assert_close(moved, 2 * first)


def test_the_papers_recipe_starts_as_its_code_does():
    method = composed("method=cluscomp_paper", *SHAPE).stages["cluster"].method
    assert method.init == "shared_points" and not method.sees()
