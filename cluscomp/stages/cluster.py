"""Stage cluster: every linear layer inside the blocks is compressed by the method (paper, section 3.2)."""

from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass

from cluscomp.errors import InputError
from cluscomp.methods import Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from cluscomp.models import Original
    from cluscomp.stages import Job


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Cluster:
    """Compress block after block. Embeddings, head, norms and biases stay as they are."""

    takes: ClassVar[str] = "original"
    distributed: ClassVar[bool] = False
    method: InstanceOf[Method]

    def inputs(self) -> dict[str, str]:
        """Nothing is read but the model."""
        return {}

    def check(self, original: "Original") -> None:
        """Ask the method about the shape of every linear layer. Raises InputError that names the layer."""
        from cluscomp.models import block_names, blocks, linears

        model = original.model()
        for name, block in zip(block_names(model), blocks(model)):
            for layer, dense in linears(block).items():
                try:
                    self.method.check(dense.out_features, dense.in_features)
                except ValueError as error:
                    raise InputError(f"{name}.{layer}: {error}") from error

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Compress the model, whose blocks are read from its file one by one; finished blocks survive a kill.

        Returns `relative_error`, the squared error over the squared size of all compressed weights, and the same for
        each layer. Raises InputError, naming the layer, if a weight is not finite or the method refuses it.
        """
        from cluscomp import checkpoint
        from cluscomp.models import block_names, blocks
        from cluscomp.tracking import Progress

        progress = Progress("cluster", len(blocks(model)))
        squares: dict[str, list[float]] = {}  # by layer: squared error, squared size
        for index, (name, block) in enumerate(zip(block_names(model), blocks(model))):
            job.original.load_block(model, index)
            part = job.folder / f"block-{index:03}.safetensors"
            saved = checkpoint.read_part(part)
            if saved is None:
                found = self.compress_block(block, name, job.seed)
                checkpoint.save_part(part, block, found)
            else:
                checkpoint.put_part(block, saved)
                found = saved.numbers
            squares |= {f"{name}.{layer}": numbers for layer, numbers in found.items()}
            progress.step(f"relative error {_ratio(found):.4f}")
        by_layer = {layer: error / size if size else 0.0 for layer, (error, size) in squares.items()}
        return {"relative_error": _ratio(squares), "relative_error_by_layer": by_layer}

    def compress_block(self, block: "nn.Module", name: str, seed: int) -> dict[str, list[float]]:
        """Replace every linear layer of a block; by layer, the squared error and squared size of its weight."""
        import torch

        from cluscomp import checkpoint
        from cluscomp.models import linears

        squares = {}
        for layer, dense in linears(block).items():
            weight_OI = dense.weight.detach().float()
            if not bool(weight_OI.isfinite().all()):
                raise InputError(f"{name}.{layer}: NaN or infinity among its weights; the model is damaged")
            generator = torch.Generator().manual_seed(layer_seed(seed, f"{name}.{layer}"))
            try:
                stored = self.method.compress(weight_OI, generator)
            except ValueError as error:
                raise InputError(f"{name}.{layer}: {error}") from error
            checkpoint.replace(block, layer, stored)
            with torch.no_grad():
                difference_OI = stored(torch.float32) - weight_OI
            squares[layer] = [float(matrix.double().square().sum()) for matrix in (difference_OI, weight_OI)]
        return squares


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed from the run's seed and its name, so that results do not depend on the order of layers."""
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7])


def _ratio(squares: dict[str, list[float]]) -> float:
    """Squared error over squared size of several layers together."""
    error, size = (sum(values) for values in zip(*squares.values()))
    return error / size if size else 0.0
