"""Where K-means starts: at positions of each codebook's own, or at the same ones in all matrices of one size."""

import pytest
import torch
from layers import statistic_of
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


def layers_of(*weights: torch.Tensor, prices=(None, None)) -> dict[str, Layer]:
    names = [f"layer{number}" for number in range(len(weights))]
    made = [
        Layer(weight_OI, 0, statistic_of(torch.randn(256, 48), "moment"), torch.Generator().manual_seed(0), 0, price)
        for weight_OI, price in zip(weights, prices)
    ]
    return dict(zip(names, made))


@pytest.mark.parametrize("method", ["cluscomp", "cluscomp_data_free"])
def test_a_layer_of_zeros_that_shares_a_codebook_stays_zero(method):
    torch.manual_seed(0)
    layers = layers_of(torch.randn(32, 48), torch.zeros(32, 48))
    compress = composed(f"method={method}", *SHAPE, "method.share=block").stages["cluster"].method.compress
    (found,) = compress(layers)
    weight_OI, zeros_OI = (found.stored[name](torch.float32) for name in layers)
    assert weight_OI.count_nonzero() == weight_OI.numel() and not zeros_OI.any()


@pytest.mark.parametrize("measure", ["true", "brief", "false"])
def test_no_codebook_gets_less_than_the_floor_of_the_limit(measure):
    torch.manual_seed(0)
    layers, least = layers_of(torch.randn(256, 48), torch.randn(256, 48), prices=(1.0, 1e-3)), {}
    for floor in (0, 0.9):
        chosen = (
            composed("method=cluscomp_data_free", "bits=3", f"method.measure={measure}", f"method.floor={floor}")
            .stages["cluster"]
            .method
        )
        found = [one.stored for one in chosen.compress(layers)]
        least[floor] = min(sum(form.ledger().values()) / (256 * 48) for each in found for form in each.values())
    assert least[0] < 2.5 < least[0.9]
