"""The output embeddings of a compressed model: dense, they are a third of the time of a token on a CPU in float32."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.forms.linear import storage_dtype
from cluscomp.kernels import halves
from cluscomp.kernels.loading import native

SAMPLE = 4096  # numbers of the weight that are compared before each product


class Head(nn.Linear):
    """A dense linear layer that reads its float32 weight in 16 bits for products of few rows without gradients.

    Where 16 bits hold the weight exactly, as a checkpoint stores it, that is half of the memory to read. The first such
    product makes a copy, which stays, and another product sees what has changed in the weight since: by its version,
    and where `weight.data` was changed, as merged adapters do, by `SAMPLE` numbers of it. Without compiled kernels, and
    not on the CPU, it is an ordinary linear layer.
    """

    _halves: Tensor | None = None  # the weight in 16 bits; None where they do not hold it
    _seen: tuple[int, int] | None = None  # place and version of the weight that was looked at
    _sample: Tensor | None = None  # numbers of it

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # tracing around compiled kernels takes long
    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """x W^T + b: (..., I) -> (..., O)."""
        few = x.numel() <= halves.MOST_ROWS * self.in_features and not torch.is_grad_enabled()
        served = few and native is not None and x.dtype == torch.float32 and x.is_cpu and self.weight.is_cpu
        weight = self._in_halves() if served else None
        if weight is None:
            return super().forward(x)
        y = halves.multiply(x.reshape(-1, self.in_features), weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _in_halves(self) -> Tensor | None:
        weight = self.weight.detach()
        seen = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        flat = weight.reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLE) | 1]  # an odd step, which comes by all columns
        if seen != self._seen or self._sample is None or not torch.equal(sample, self._sample):
            dtype = storage_dtype(weight)
            self._seen, self._halves = seen, weight.to(dtype) if dtype.itemsize == 2 else None
            self._sample = sample.clone()
        return self._halves


def put_head_in(model: PreTrainedModel) -> None:
    """Make an ordinary linear layer of output embeddings a `Head`, with the same tensors under the same names."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Head
