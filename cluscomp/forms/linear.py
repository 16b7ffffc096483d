"""The linear layer that uses a stored weight; all such layers of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cluscomp.forms.stored import Stored


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """The narrowest of bfloat16, float16 and the tensor's own dtype that holds its values exactly.

    It is how tensors that are not compressed (embeddings, norms, biases) are stored, counted and compared.
    """
    if tensor.is_floating_point() and tensor.itemsize > 2:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return dtype
    return tensor.dtype


class _RebuiltLinear(torch.autograd.Function):
    """x W^T + b that keeps x and the stored form for the backward pass, never the dense W.

    Of a large W only a tile exists at a time, forward and backward, and of its gradient too. `kept` holds the dense W
    where it stays `rebuilt`, and through it the gradient goes on to the stored form; else it is empty.
    """

    @staticmethod
    def forward(ctx, x, bias, weight, kept, *parameters):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.kept, ctx.tiles = weight, kept, weight.tiles()
        if x.dtype != torch.float32 or x.device.type != "cpu":  # sums of tiles are to be float32
            ctx.tiles = [slice(0, x.shape[-1])]
        ctx.save_for_backward(x, *parameters)
        if len(ctx.tiles) == 1:
            return F.linear(x, kept[0] if kept else weight(x.dtype), bias)
        y = x.new_zeros(*x.shape[:-1], weight.out_features) if bias is None else bias.repeat(*x.shape[:-1], 1)
        y_BO = y.view(-1, weight.out_features)
        for inputs in ctx.tiles:
            y_BO.addmm_(x[..., inputs].reshape(-1, inputs.stop - inputs.start), weight(x.dtype, inputs).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0]  # unpacking also checks that no parameter changed since the forward pass
        parameters = list(ctx.weight.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        sums: list[Tensor] = []
        for inputs in ctx.tiles:
            with torch.enable_grad():
                dense_OI = ctx.kept[0] if ctx.kept else ctx.weight(x.dtype, inputs)
            if grad_x is not None:
                grad_x[..., inputs] = grad @ dense_OI.detach()
            if trained:
                grad_BO, x_BI = grad.reshape(-1, grad.shape[-1]), x[..., inputs].reshape(-1, dense_OI.shape[1])
                # in the weight's memory order, so that nothing is transposed on the way to the codebooks
                transposed = len(ctx.tiles) > 1 or not dense_OI.is_contiguous()
                dense_grad_OI = (x_BI.T @ grad_BO).T if transposed else grad_BO.T @ x_BI
                found = torch.autograd.grad(dense_OI, trained, dense_grad_OI, retain_graph=bool(ctx.kept))
                sums = [a.add_(b) for a, b in zip(sums, found)] if sums else list(found)
        grads = iter(sums)
        return grad_x, grad_bias, None, None, *(next(grads) if p.requires_grad else None for p in parameters)


class CompressedLinear(nn.Linear):
    """A linear layer whose weight is stored compressed; one class for all methods and model families.

    The dense weight lives only during a forward or backward pass. `weight` is an empty tensor of zero bytes: it gives
    code that asks for `layer.weight.dtype` its answer, and it makes a loader that does not know this layer stop at a
    shape mismatch instead of filling in random weights. As an `nn.Linear` it takes PEFT's adapters like any other.
    """

    weight: Tensor
    dense: Tensor | None  # (O, I) while it is `rebuilt`
    _is_hf_initialized = True  # transformers, which looks at the shape of a Linear's weight, has nothing to initialise

    def __init__(self, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a dense weight
        self.in_features, self.out_features = stored.in_features, stored.out_features
        self.stored, self.dense = stored, None
        device = next(stored.parameters()).device
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # tracing around compiled kernels takes long
    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """x W^T + b with the weight rebuilt in x's dtype: (..., I) -> (..., O); where asked, x W^T is normalised."""
        # their dictionaries: torch's look-up of an attribute takes longer than the product of a small layer
        stored, bias = cast(Stored, self._modules["stored"]), self._parameters["bias"]
        if not stored.post_norm:
            return self._product(x, stored, bias)
        y = F.layer_norm(self._product(x, stored, None), (self.out_features,))
        return y if bias is None else y + bias

    def _product(self, x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
        place = x.device.type
        if place != "meta" and torch.is_autocast_enabled(place):
            x = x.to(torch.get_autocast_dtype(place))
        if not torch.is_grad_enabled():
            product = stored.product(x)
            if product is not None:
                return product if bias is None else product + bias
        kept = [] if self.dense is None or self.dense.dtype != x.dtype else [self.dense]
        if kept and not torch.is_grad_enabled():
            return F.linear(x, kept[0], bias)
        return _RebuiltLinear.apply(x, bias, stored, kept, *stored.parameters())  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


SMALL = 1024  # numbers of a tensor that is not worth holding in parts
MOST_REBUILT = 2**26  # numbers of dense weights of one block that are kept for several passes
BASE = ".base_layer"  # what PEFT adds to the name of a layer under an adapter
MARK = ".lora_"  # in the names of an adapter's tensors


def compressed(model: nn.Module) -> dict[str, CompressedLinear]:
    """The compressed layers of a model or block, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def parts_of_stored(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tensor of this name is part of the stored weight of a compressed layer."""
    layers = compressed(model).keys()
    return lambda name: name.partition(".stored.")[0] in layers


def in_parts(block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The tensors of a block that several processes hold in parts: codes, with module and name; small ones stay whole.

    They are whole numbers and no process learns them. Forms that stay decoded are left out: it would save little.
    """
    forms = [layer.stored for layer in compressed(block).values() if not layer.stored.decoded_bytes()]
    modules = [module for form in forms for module in form.modules()]
    tensors = [(module, *pair) for module in modules for pair in module.named_buffers(recurse=False)]
    return [found for found in tensors if not found[2].is_floating_point() and found[2].numel() >= SMALL]


@contextmanager
def rebuilt(block: nn.Module, dtype: torch.dtype, *, learning: bool = False) -> Iterator[None]:
    """Let the layers of a block that `can_stay_rebuilt` do so once for all passes within: those without gradients, or,
    `learning`, those with them, of stored weights that do not change meanwhile.

    The numbers are the same.
    """
    layers = can_stay_rebuilt(block)
    with torch.set_grad_enabled(learning):
        for layer in layers:
            layer.dense = layer.stored(dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.dense = None


def can_stay_rebuilt(block: nn.Module) -> list[CompressedLinear]:
    """The layers of a block whose dense weights may be in memory together, a quarter of a GB in float32 at the most.

    Not those of which there is a tile at a time; none where all together are too large.
    """
    layers = [layer for layer in compressed(block).values() if len(layer.stored.tiles()) == 1]
    return layers if sum(layer.out_features * layer.in_features for layer in layers) <= MOST_REBUILT else []


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name, tied ones once, under their first name."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())
