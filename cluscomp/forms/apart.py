"""Every matrix of a model as a linear layer of its own: stacked experts taken apart, GPT-2's transposed layers turned.

What works on linear layers (statistics of their inputs, stored forms, adapters, training) then works on these.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

TINY = 64  # numbers of a matrix that is not worth a codebook or a grid


@dataclass(frozen=True)
class Part:
    """Where the weight (O, I) of such a layer is in transformers' own model: a parameter, of a stack the one `index`.

    `turned`: it is (I, O) there. `count`: so many lie one under the other in a matrix.
    """

    name: str
    index: int | None
    turned: bool
    count: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The weight (O, I) as a view of the parameter."""
        stack = tensor if self.count is None else tensor.view(self.count, -1, tensor.shape[1])
        one = stack if self.index is None else stack[self.index]
        return one.T if self.turned else one


class KeptLinear(nn.Linear):
    """A linear layer that is never compressed: it chooses experts, or is tiny."""


def take_apart(model: nn.Module) -> dict[str, Part]:
    """Change a model of transformers in place; returns, for each weight of a new layer by name, where it was.

    Known are transposed layers (Conv1D), experts that follow transformers' interface for them (two stacks, with or
    without a gate), those of JetMoE, LongCat-Flash, Llama 4 and DBRX. Layers that choose experts, and those of at most
    `TINY` numbers, become `KeptLinear`. Other models stay as they are.
    """
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            part = Part(f"{name}.weight", None, turned=True)
            model.set_submodule(name, _linear(part.of(module.weight), module.bias))
            parts[part.name] = part
        elif (forward := _forward_of(module)) is not None:
            parts |= _unstack(name, module)
            module.forward = partial(forward, module)  # which pickles by its function's name
            _keep_routers(model.get_submodule(name.rpartition(".")[0]), module)
    for name, module in model.named_modules():
        if type(module).__name__ == "JetMoeTopKGating":
            module.forward = partial(_jetmoe_choice, module)
        elif "router" in name or (isinstance(module, nn.Linear) and module.weight.numel() <= TINY):
            _keep(module)
    return parts


def together(tensors: dict[str, Tensor], parts: dict[str, Part]) -> dict[str, Tensor]:
    """Tensors of a model that was taken apart, by name, as transformers' own model has them."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    flat = {part.name for part in parts.values() if part.count is not None}
    for name, tensor in tensors.items():
        part = parts.get(name)
        if part is None:
            found[name] = tensor
        else:
            turned = tensor.T if part.turned else tensor
            stacks.setdefault(part.name, {})[part.index or 0] = turned
            if part.index is None:
                found[part.name] = turned.contiguous()
    for name, stack in stacks.items():
        if name not in found:
            all_of_them = [stack[index] for index in range(len(stack))]
            found[name] = torch.cat(all_of_them) if name in flat else torch.stack(all_of_them)
    return found


def parts_of(model: PreTrainedModel) -> dict[str, Part]:
    """What `take_apart` returns for a model of this config, whether this one is apart or not."""
    return take_apart(_outline(model))


def put_together(model: PreTrainedModel) -> list[str]:
    """Undo `take_apart` in place; returns the names of the weights that stay apart.

    Those are of layers with a compressed one or an adapter among them. One matrix or stack at a time is in memory
    twice. `save_pretrained` then writes the names of transformers' own files. Layers that are together stay so.
    """
    outline = _outline(model)
    kinds = {name: type(module) for name, module in outline.named_modules()}
    inside: dict[str, dict[str, Part]] = {}
    for name, part in take_apart(outline).items():
        inside.setdefault(name.rsplit(".", 1 if part.index is None else 3)[0], {})[name] = part
    names = {name for name, _ in model.named_parameters()}
    left: list[str] = []
    for place, parts in inside.items():
        module = model.get_submodule(place)
        if isinstance(module, Conv1D) or any(part.index is not None and part.name in names for part in parts.values()):
            continue
        if not parts.keys() <= names:
            left += parts
        elif isinstance(module, nn.Linear):
            model.set_submodule(place, _turned(module))
        else:
            _stack(model, module, parts)
    for name, module in model.named_modules():
        if isinstance(module, KeptLinear) and issubclass(kinds.get(name, nn.Module), nn.Linear):
            module.__class__ = kinds[name]
    model._weight_conversions = None  # type: ignore[assignment]  # to transformers: those that it has for the config
    return left


def stacks(block: nn.Module) -> dict[str, list[str]]:
    """The layers of a block that were one stack, by the stack's name: one for each expert."""
    return {
        f"{name}.{key}".lstrip("."): [f"{name}.{key}.{index}".lstrip(".") for index in range(len(stack))]
        for name, module in block.named_modules()
        if _forward_of(module, apart=True) is not None
        for key, stack in module.named_children()
        if isinstance(stack, nn.ModuleList)
    }


def _outline(model: PreTrainedModel) -> PreTrainedModel:
    """Transformers' own model of a model's config, on the meta device."""
    with torch.device("meta"):
        return type(model)(deepcopy(model.config))


def _turned(layer: nn.Linear) -> Conv1D:
    """The transposed layer that a linear layer was."""
    with torch.device("meta"):
        turned = Conv1D(layer.out_features, layer.in_features)
    turned.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    turned.bias = layer.bias
    return turned.train(layer.training)


def _stack(model: nn.Module, module: nn.Module, parts: dict[str, Part]) -> None:
    """Make stacks of experts' matrices again, which compute as transformers' own do."""
    for name in dict.fromkeys(part.name for part in parts.values()):
        ones = {layer: part for layer, part in parts.items() if part.name == name}
        whole = together({layer: model.get_parameter(layer).detach() for layer in ones}, ones)[name]
        holder, _, key = name.rpartition(".")
        delattr(module, key)
        model.get_submodule(holder).register_parameter(key, nn.Parameter(whole, requires_grad=False))
    del module.forward


def _linear(weight_OI: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta", dtype=weight_OI.dtype)
    layer.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def _unstack(name: str, module: Any) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    turned = getattr(module, "is_transposed", False) or type(module).__name__ == "Llama4TextExperts"
    inside, count = ("mlp", module.num_experts) if type(module).__name__ == "DbrxExperts" else ("", None)
    holder = module.get_submodule(inside)
    module._is_hf_initialized = holder._is_hf_initialized = True  # transformers would look for the stacks
    for key, stack in list(holder.named_parameters(prefix=inside, recurse=False)):
        own = key.rpartition(".")[2]
        if stack.ndim == 3 or count is not None:
            indices = range(count or len(stack))
            found = [Part(f"{name}.{key}", index, turned or key == "mlp.w2", count) for index in indices]
            delattr(holder, own)
            module.add_module(own, nn.ModuleList(_linear(part.of(stack)) for part in found))
            parts |= {f"{name}.{own}.{part.index}.weight": part for part in found}
    return parts


def _keep(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        module.__class__ = KeptLinear


def _keep_routers(parent: nn.Module, experts: nn.Module) -> None:
    """Layers beside the experts that give a number for each of them, or one for all, are not compressed."""
    count = max(len(stack) for stack in experts.children() if isinstance(stack, nn.ModuleList))
    inside = set(experts.modules())
    for module in parent.modules():
        if isinstance(module, nn.Linear) and module not in inside and module.out_features in (1, count):
            _keep(module)


def _forward_of(module: nn.Module, *, apart: bool = False) -> Callable[..., Tensor] | None:
    """How experts compute once they are taken apart, of those that are yet to be or are; None for all else."""

    def stacked(key: str) -> bool:
        one = getattr(module, key, None)
        return isinstance(one, nn.ModuleList) if apart else isinstance(one, Tensor) and one.ndim == 3

    kind = type(module).__name__
    if kind == "JetMoeParallelExperts" and stacked("weight"):
        return _jetmoe
    if kind == "Llama4TextExperts" and stacked("down_proj"):
        return _llama4
    if kind == "DbrxExperts" and apart == isinstance(getattr(module, "w1", None), nn.ModuleList):
        return _dbrx
    if kind == "LongcatFlashExperts" and stacked("down_proj"):
        return _longcat
    known = hasattr(module, "has_gate") and stacked("gate_up_proj" if module.has_gate else "up_proj")
    return _experts if known and stacked("down_proj") else None


def _experts(self: Any, hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What the chosen experts make of each token, weighted and added up, as transformers' experts interface has it."""
    mixed_TH = torch.zeros_like(hidden_TH)
    first = self.gate_up_proj if self.has_gate else self.up_proj
    for expert, tokens, places in _routed(chosen_TK, self.num_experts):
        x = first[expert](hidden_TH[tokens])
        if self.has_bias:
            x = x + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert]
        x = self.down_proj[expert](self._apply_gate(x) if self.has_gate else self.act_fn(x))
        if self.has_bias:
            x = x + self.down_proj_bias[expert]
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        mixed_TH.index_add_(0, tokens, (x * weights_TK[tokens, places, None]).to(mixed_TH.dtype))
    return mixed_TH


def _longcat(self: Any, hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """LongCat-Flash's: the last ones hand on what they get."""
    mixed_TH = torch.zeros_like(hidden_TH)
    for expert, tokens, places in _routed(chosen_TK, self.total_experts):
        x = hidden_TH[tokens]
        if expert < self.num_routed_experts:
            gate, up = self.gate_up_proj[expert](x).chunk(2, dim=-1)
            x = self.down_proj[expert](self.act_fn(gate) * up)
        mixed_TH.index_add_(0, tokens, (x * weights_TK[tokens, places, None]).to(mixed_TH.dtype))
    return mixed_TH


def _dbrx(self: Any, hidden_BTH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """DBRX's."""
    hidden_TH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    mixed_TH = torch.zeros_like(hidden_TH)
    for expert, tokens, places in _routed(chosen_TK, self.num_experts):
        x = hidden_TH[tokens]
        x = self.w2[expert](self.mlp.activation_fn(self.w1[expert](x)) * self.v1[expert](x))
        mixed_TH.index_add_(0, tokens, (x * weights_TK[tokens, places, None]).to(mixed_TH.dtype))
    return mixed_TH.view_as(hidden_BTH)


def _jetmoe(self: Any, sorted_NI: Tensor, sizes: list[int]) -> Tensor:
    """JetMoE's: the tokens lie sorted by expert."""
    return torch.cat([expert(x) for expert, x in zip(self.weight, sorted_NI.split(sizes))])


def _jetmoe_choice(self: Any, hidden_TH: Tensor) -> Any:
    """JetMoE's router; on the meta device it chooses evenly."""
    if not hidden_TH.is_meta:
        return type(self).forward(self, hidden_TH)
    rows = len(hidden_TH) * self.top_k
    order = torch.empty(rows, dtype=torch.long, device="meta")
    sizes = [len(part) for part in order.tensor_split(self.num_experts)]
    return order, order, hidden_TH.new_empty(rows), sizes, self.layer(hidden_TH).float()


def _llama4(self: Any, hidden_NH: Tensor) -> Tensor:
    """Llama 4's: all tokens once for each expert."""
    found = []
    for first, last, x in zip(self.gate_up_proj, self.down_proj, hidden_NH.chunk(self.num_experts)):
        gate, up = first(x).chunk(2, dim=-1)
        found.append(last(up * self.act_fn(gate)))
    return torch.cat(found)


def _routed(chosen_TK: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each expert that was chosen the tokens, and at which of their places; evenly on the meta device."""
    if chosen_TK.is_meta:
        share = torch.empty(-(-chosen_TK.numel() // experts), dtype=torch.long, device="meta")
        for expert in range(experts):
            yield expert, share, share
        return
    for expert in chosen_TK.unique().tolist():
        if expert < experts:
            yield expert, *torch.where(chosen_TK == expert)
