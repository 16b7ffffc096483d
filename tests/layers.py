"""Single layers to compress: a weight (O, I), the inputs (T, I) it sees, and what an approximation of it loses."""

import torch

from cluscomp.methods import Method
from cluscomp.plan import dry
from cluscomp.plan.places import Place
from cluscomp.solve.layer import Layer, Seen


def correlated(outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian weight and inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.eye(inputs) + torch.rand(inputs, inputs, generator=generator)
    x_TI = torch.randn(4 * inputs, inputs, generator=generator) @ mixing_II
    return torch.randn(outputs, inputs, generator=generator), x_TI


def heavy_tailed(size: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer more like those of language models: rows of different size, few strong directions, 8 large channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tails = (normal(size, size, 6).square().mean(-1)).rsqrt()  # Student's t with 6 degrees of freedom
    weight_OI = 0.02 * normal(size, size) * tails * (0.3 * normal(size, 1)).exp()
    rotation_II = torch.linalg.qr(normal(size, size)).Q
    x_TI = normal(4096, size) * torch.linspace(0, -5, size).exp().sqrt() @ rotation_II.T
    x_TI += 0.1 * normal(4096, size)
    x_TI[:, :8] *= 8
    return weight_OI, x_TI


def statistic_of(x_TI: torch.Tensor, *names: str) -> Seen:
    """What a method is shown of such inputs; all there is, unless it is named."""
    seen = Seen(names or ("moment", "magnitude"))
    seen.add(x_TI)
    return seen


def made_by(method: Method, weight_OI: torch.Tensor, seen: Seen | None, generator: torch.Generator):
    """The stored form that a method makes of a layer alone in its block. An error does not name the layer."""
    try:
        (found,) = method.compress({"layer": Layer(weight_OI, 0, seen, generator)})
    except ValueError as error:
        raise ValueError(str(error).removeprefix("layer: ")) from error
    return found.stored["layer"]


def planned(method: Method, *shape: int):
    """The form that a method will make of a layer (O, I) alone in its block, as the planner has it."""
    return dry.compress(method, {"layer": Place(*shape, 0)}, torch.float32).stored["layer"]


def relative_error(weight_OI: torch.Tensor, dense_OI: torch.Tensor, x_TI: torch.Tensor) -> float:
    """Squared error of the outputs over their squared size."""
    return float((x_TI @ (dense_OI - weight_OI).T).square().sum() / (x_TI @ weight_OI.T).square().sum())
