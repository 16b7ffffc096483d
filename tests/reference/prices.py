"""What errors of layers and blocks cost, by the model's own forward pass and autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cluscomp.models.original import block_names, blocks, linears


def by_autograd(model: PreTrainedModel, ids_WT: Tensor) -> dict[str, float]:
    """By the name of each linear layer and block, the mean over tokens but the first of |g|^2 |z|^2 / O.

    For outputs z and their gradient g of the summed loss. `ids_WT`: windows of token ids, one at a time.
    """
    outputs: dict[str, Tensor] = {}
    for name, block in zip(block_names(model), blocks(model)):
        for layer, linear in linears(block).items():
            linear.register_forward_hook(lambda _module, _args, out, key=f"{name}.{layer}": outputs.update({key: out}))
        block.register_forward_hook(
            lambda _module, _args, out, key=name: outputs.update({key: out[0] if isinstance(out, tuple) else out})
        )
    model.requires_grad_(True)
    found: dict[str, float] = {}
    for window_T in ids_WT:
        logits_TV = model(window_T[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits_TV[:-1], window_T[1:], reduction="sum")
        for name, gradient in zip(outputs, torch.autograd.grad(loss, [*outputs.values()])):
            both_T = gradient.square().mean(-1) * outputs[name].square().sum(-1)
            found[name] = found.get(name, 0.0) + float(both_T.detach().flatten()[1:].sum()) / ids_WT.numel()
    return found
