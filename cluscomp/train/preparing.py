"""Training of a dense model that is to be compressed, at weights as compression would leave them: CrAM, Quant-Noise.

Layers compute with other weights than they have, which stay bit for bit as they are: nothing has to be put back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.forms.codebook import sub_vectors
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.solve.kmeans import Recipe, kmeans
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.on_text import train_windows
from cluscomp.train.steps import Steps

Layers = dict[str, nn.Linear]


class Clusters:
    """Which sub-vectors (D neighbouring outputs of one input) of linear layers share a centroid.

    Found by K-means on the weights as they are before every `refresh`-th step, and kept until the next.
    """

    def __init__(self, vector_dim: int, codebook_size: int, iterations: int, refresh: int, seed: int) -> None:
        self.vector_dim, self.codebook_size, self.refresh, self.seed = vector_dim, codebook_size, refresh, seed
        self._recipe = Recipe(iterations, "kd", 1.9, True)
        self._codes: dict[str, Tensor] = {}

    def begin(self, step: int, layers: Layers) -> None:
        """Find them anew, if this step, counted from 0, is one to do so."""
        if step % self.refresh == 0:
            for name, layer in layers.items():
                points_ND = sub_vectors(layer.weight.detach().float(), self.vector_dim, "out")
                generator = torch.Generator().manual_seed(self.seed)
                self._codes[name] = kmeans(points_ND, self.codebook_size, self._recipe, generator).codes_N.long()

    def points(self, name: str) -> int:
        """How many sub-vectors a layer has."""
        return len(self._codes[name])

    def means(self, name: str, weight_OI: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """The weight (O, I) with the mean of its cluster for each sub-vector; so each has the mean gradient of its."""
        codes_N, points_ND = self._codes[name], sub_vectors(weight_OI.float(), self.vector_dim, "out")
        sums_KD = points_ND.new_zeros(self.codebook_size, self.vector_dim).index_add(0, codes_N, points_ND)
        counts_K = codes_N.bincount(minlength=self.codebook_size).clamp(min=1)
        return self.weight((sums_KD / counts_K[:, None])[codes_N], weight_OI).to(weight_OI.dtype)

    def weight(self, points_ND: Float[Tensor, "N D"], like_OI: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """Sub-vectors (N, D) as a weight of the shape of another (O, I)."""
        outputs, inputs = like_OI.shape
        return points_ND.reshape(inputs, -1)[:, :outputs].T


class Prepared(Objective):
    """Cross-entropy of a dense model whose linear layers compute with what `at` makes of their weights, if anything.

    By itself it is plain training. Without gradients, where it is scored, layers compute with their weights.
    """

    passes = 1  # forward and backward, of a batch

    def __init__(self, model: PreTrainedModel, trained: Trained, layers: Layers, ids_BT: Tensor) -> None:
        super().__init__(  # noise is drawn for a batch, and CrAM looks ahead for one
            model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids_BT, by_example=False
        )
        self.layers = layers
        self.at: Callable[[str, Tensor], Tensor] | None = None

    def begin(self, step: int) -> None:
        """What is to be done before a step, counted from 0."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the layers ask which weights to compute with; also a backward pass that makes a block's insides again."""
        for name, layer in self.layers.items():
            layer.forward = partial(self._product, name, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers.values():
                vars(layer).pop("forward", None)  # the class's own forward shows again

    def _product(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        if self.at is None:
            return F.linear(x, layer.weight, layer.bias)
        weight_OI = self.at(name, layer.weight)
        bias_O = None if layer.bias is None else layer.bias.to(weight_OI.dtype)
        return F.linear(x.to(weight_OI.dtype), weight_OI, bias_O).to(x.dtype)


class Cram(Prepared):
    """The gradient at the compression of a step ahead (CrAM, arXiv 2207.14200): L(C(W + rho g)), g the gradient at W.

    g is that of the mean loss of this batch, which may be a part of a step alone (`accumulation`, ranks). C puts
    cluster means in the place of sub-vectors, through which the gradient is the mean of a cluster's; without
    `clusters` it changes nothing. `plus`: g is added (CrAM+), as much of it as this batch is of its step.
    """

    passes = 2

    def __init__(self, *arguments: Any, rho: float, plus: bool, clusters: Clusters | None) -> None:
        super().__init__(*arguments)
        self.rho, self.plus, self.clusters = rho, plus, clusters
        self._gradients: dict[str, Tensor | None] = {}
        self._to_mean: Tensor | float = 1.0  # what they are to be multiplied by

    def begin(self, step: int) -> None:
        """Find clusters anew, now and then."""
        if self.clusters is not None:
            self.clusters.begin(step, self.layers)

    def loss(self, input_ids: Tensor, labels: Tensor, of_step: Tensor | int, **batch: Any) -> Tensor:
        """The loss, as `Objective` gives it; both gradients are of this batch."""
        self.at = None
        if not torch.is_grad_enabled():
            return super().loss(input_ids, labels, of_step, **batch)
        weights = list(self.trained)
        gradients = torch.autograd.grad(
            self.scaled(super().loss(input_ids, labels, of_step, **batch), of_step),
            weights,
            allow_unused=True,  # an expert may get no token
        )
        self._to_mean = of_step / (labels != IGNORED).sum().clamp(min=1)
        self._gradients, self.at = dict(zip(self.layers, gradients)), self._compressed
        loss = super().loss(input_ids, labels, of_step, **batch)
        if self.plus:
            known = [(weight, gradient) for weight, gradient in zip(weights, gradients) if gradient is not None]
            along = torch.stack([(weight * gradient).sum() for weight, gradient in known]).sum()
            loss = loss + along - along.detach()
        return loss

    def _compressed(self, name: str, weight_OI: Tensor) -> Tensor:
        gradient_OI, ahead_OI = self._gradients[name], weight_OI
        if gradient_OI is not None:
            ahead_OI = weight_OI.float() + self.rho * (self._to_mean * gradient_OI)  # a step that 16 bits would lose
        return ahead_OI if self.clusters is None else self.clusters.means(name, ahead_OI)


class QuantNoise(Prepared):
    """In each forward pass a share of the sub-vectors is its cluster's mean (Quant-Noise, arXiv 2004.07320).

    Which ones is drawn anew for each batch. Through those the gradient goes straight; the others' is the plain one.
    """

    def __init__(self, *arguments: Any, share: float, clusters: Clusters) -> None:
        super().__init__(*arguments)
        self.share, self.clusters = share, clusters
        self.noised: dict[str, Tensor] = {}  # by layer, which sub-vectors
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        """Find clusters anew, now and then; what is drawn depends on the seed and the step."""
        self.clusters.begin(step, self.layers)
        self._generator.manual_seed(int.from_bytes(sha256(f"{self.clusters.seed} {step}".encode()).digest()[:7]))

    def loss(self, *arguments: Any, **batch: Any) -> Tensor:
        """The loss, as `Objective` gives it, with noise drawn for this batch."""
        self.at = None
        if torch.is_grad_enabled():
            for name, layer in self.layers.items():
                drawn_N = torch.rand(self.clusters.points(name), generator=self._generator) < self.share
                self.noised[name] = drawn_N.to(layer.weight.device)
            self.at = self._noisy
        return super().loss(*arguments, **batch)

    def _noisy(self, name: str, weight_OI: Tensor) -> Tensor:
        values_OI = weight_OI.detach()
        noised_ND = self.noised[name][:, None].expand(-1, self.clusters.vector_dim)
        noised_OI = self.clusters.weight(noised_ND, values_OI)
        return weight_OI + torch.where(noised_OI, self.clusters.means(name, values_OI) - values_OI, 0)


def prepare(
    model: PreTrainedModel,
    original: Original,
    train_WT: np.ndarray,
    held_out_WT: np.ndarray,
    settings: Steps,
    rule: Callable[..., Prepared],
    *,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Read all blocks of a dense model and train their linear weights in place; returns what `train_whole` does.

    Args:
        model: the model, its blocks not read yet.
        original: reads them.
        train_WT: windows (W, T) of token ids for all steps, in their order.
        held_out_WT: windows that are scored before and after.
        settings: batches, learning rate and so on.
        rule: makes a `Prepared` of its first arguments.
        folder: where the state lies that a killed run goes on from.
        seed: of dropout.
    """
    layers: Layers = {}
    for index, (name, block) in enumerate(zip(block_names(model), blocks(model))):
        original.load_block(model, index)
        layers |= {f"{name}.{layer}": linear for layer, linear in linears(block).items()}
    parameters = dict(model.named_parameters())
    trained = Trained(
        model, codebooks=False, others={f"{name}.weight": parameters[f"{name}.weight"] for name in layers}
    )
    train, held_out = torch.from_numpy(train_WT), torch.from_numpy(held_out_WT)
    objective = rule(model, trained, layers, held_out[:1])
    with objective.installed():
        found = train_windows(
            model, trained, objective, train, held_out, settings,
            name="prepare", folder=folder, seed=seed, begin=objective.begin,
        )  # fmt: skip
    return {"passes": objective.passes * found["steps"] * settings.accumulation} | found
