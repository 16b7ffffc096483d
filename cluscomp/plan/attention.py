"""Attention without numbers, as fused kernels do it: the meta device would take the plain one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from cluscomp.kernels.counting import Count
from cluscomp.kernels.work import Work


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it; the meta device would take the plain one, with its matrix of all pairs."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _Fused.apply(self.count, *args[:3])
        return function(*args, **kwargs)


class _Fused(torch.autograd.Function):
    """(B, heads, T, d), (B, key heads, T, d), (B, key heads, T, e) -> (B, heads, T, e), keeping these and logsumexp."""

    @staticmethod
    def forward(ctx, count, query, key, value):  # type: ignore[no-untyped-def]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.count, ctx.flops = count, 2.0 * (query.numel() + output.numel()) * key.shape[-2]
        count.work += Work(flops=ctx.flops, calls=1)
        return output

    @staticmethod
    def backward(ctx, _grad):  # type: ignore[no-untyped-def]
        ctx.count.work += Work(flops=2.5 * ctx.flops, calls=1)
        return None, *(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])
