"""What is known of transformers: which units of a block can be left out, and the config of the model without them."""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.models.original import block_names, blocks, check_supported, linears, without_numbers

MLPS = (  # what makes the units of an MLP, and what reads them
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.fc1",), "mlp.fc2"),
    (("fc1",), "fc2"),
)
WIDTHS = ("intermediate_size", "ffn_dim")  # what configs call the number of units
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
STATIC = ("default", "linear", "llama3")  # rotary embeddings whose frequencies are the same for every length


@dataclass(frozen=True)
class Heads:
    """The heads of attention: `queries` that ask `keys`, of `dims` dimensions, of which `kept` stay."""

    queries: int
    keys: int
    dims: int
    kept: int


@dataclass(frozen=True)
class Smaller:
    """A model with fewer units: its config, and what goes. None stands for what stays as it is.

    `makes` and `reads`: the layers of an MLP, by their names in a block; of its `width` units `units` stay.
    """

    config: PreTrainedConfig
    makes: tuple[str, ...]
    reads: str
    width: int
    units: int | None
    heads: Heads | None

    def shape(self, name: str, shape: torch.Size) -> tuple[int, ...]:
        """What the shape of a block's parameter becomes, by the parameter's name in the block."""
        layer, _, kind = name.rpartition(".")
        rows, columns = {}, {}
        if self.units is not None:
            rows, columns = dict.fromkeys(self.makes, self.units), {self.reads: self.units}
        if self.heads is not None:
            query, key, value, output = ATTENTION
            many, few = self.heads.queries * self.heads.kept, self.heads.keys * self.heads.kept
            rows, columns = rows | {query: many, key: few, value: few}, columns | {output: many}
        first = rows.get(layer, shape[0])
        return (first, columns.get(layer, shape[1])) if kind == "weight" and len(shape) == 2 else (first, *shape[1:])

    def with_frequencies(self, frequencies_P: Tensor) -> PreTrainedConfig:
        """The config for heads whose pairs rotate by these frequencies, (P,).

        LongRoPE's factors say them: transformers divides by them, and there is one list for the model.
        """
        config = deepcopy(self.config)
        text = config.get_text_config()
        theta = text.rope_parameters["rope_theta"]
        steps_P = torch.arange(len(frequencies_P), dtype=torch.float64) / len(frequencies_P)
        factors = (1 / (frequencies_P.double().cpu() * theta**steps_P)).tolist()
        text.rope_parameters = text.rope_parameters | {"short_factor": factors, "long_factor": factors}
        return config


def smaller(config: PreTrainedConfig, units: float, heads: float) -> Smaller:
    """A model with these shares of the units of its MLPs and of the dimensions of its heads.

    One width for all blocks, as configs say one. Raises InputError that tells which and why for a model that cannot be
    cut so: whether it can is seen by the shapes that transformers gives the smaller config's model.
    """
    model, found = _made(config), Smaller(deepcopy(config), (), "", 0, None, None)
    if units < 1:
        found = _with_units(model, found, units)
        _check_shapes(model, _made(found.config), found, "units", units)
    if heads < 1:
        found = _with_heads(model, found, heads)
        made = _made(found.config)
        _check_shapes(model, made, found, "heads", heads)
        before, after = (float(getattr(_attention(blocks(one)[0]), "scaling", None) or 0) for one in (model, made))
        if not before or not after:
            raise _refused(model, "heads", heads, "by what its attention scales scores is not known")
        # of what rotates: query and key each have the root of what makes the scores those of the model
        found.config.get_text_config().rope_parameters["attention_factor"] = (before / after) ** 0.5
    return found


def frequencies(model: nn.Module) -> Tensor | None:
    """The frequencies of a model's rotary embedding, (P,); None but for a single list of them."""
    named = (getattr(part, "inv_freq", None) for part in model.modules())
    found = [one for one in named if isinstance(one, Tensor)]
    return found[0] if len(found) == 1 else None


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    model = without_numbers(config)
    check_supported(model)
    return model


def _with_units(model: PreTrainedModel, found: Smaller, share: float) -> Smaller:
    """With fewer units in each MLP."""
    layers, text = [linears(block) for block in blocks(model)], found.config.get_text_config()
    makes, reads = next((one for one in MLPS if all({*one[0], one[1]} <= each.keys() for each in layers)), ((), ""))
    if not reads:
        known = "; ".join(", ".join([*makes, reads]) for makes, reads in MLPS)
        raise _refused(model, "units", share, f"none of these make the MLP of all its blocks: {known}")
    width = layers[0][reads].in_features
    left = round(share * width)
    if left == 0:
        raise InputError(f"decompose.units={share}: none of {width} units of an MLP would be left; take more")
    key = next((key for key in WIDTHS if getattr(text, key, None) == width), None)
    if key is None:
        raise _refused(model, "units", share, f"its config has no {' or '.join(WIDTHS)} of {width} for all blocks")
    setattr(text, key, left)
    return replace(found, makes=makes, reads=reads, width=width, units=left)


def _with_heads(model: PreTrainedModel, found: Smaller, share: float) -> Smaller:
    """With fewer dimensions in each head: whole pairs that rotate together."""
    layers, text = [linears(block) for block in blocks(model)], found.config.get_text_config()
    if not all({*ATTENTION} <= each.keys() for each in layers):
        raise _refused(model, "heads", share, f"the attention of its blocks is not made of {', '.join(ATTENTION)}")
    queries, keys = text.num_attention_heads, text.num_key_value_heads
    dims = layers[0][ATTENTION[0]].out_features // queries
    turning_P, parameters = frequencies(model), getattr(text, "rope_parameters", None) or {}
    if turning_P is None or 2 * len(turning_P) != dims or parameters.get("rope_type") not in STATIC:
        raise _refused(model, "heads", share, "not all dimensions of its heads rotate by one list of fixed frequencies")
    kept = 2 * round(share * dims / 2)
    if kept == 0:
        raise InputError(f"decompose.heads={share}: none of {dims} dimensions of a head would be left; take more")
    text.head_dim, ones = kept, [1.0] * (kept // 2)
    text.rope_parameters = {
        "rope_type": "longrope", "rope_theta": parameters["rope_theta"], "factor": 1.0, "attention_factor": 1.0,
        "short_factor": ones, "long_factor": ones, "original_max_position_embeddings": text.max_position_embeddings,
    }  # fmt: skip
    return replace(found, heads=Heads(queries, keys, dims, kept))


def _check_shapes(model: PreTrainedModel, cut: PreTrainedModel, found: Smaller, key: str, share: float) -> None:
    """Raise InputError, naming a parameter, if transformers' smaller model has not the shapes that we leave."""
    prefixes = tuple(f"{name}." for name in block_names(model))
    made = {name: tuple(parameter.shape) for name, parameter in cut.named_parameters()}
    for name, parameter in model.named_parameters():
        inside = next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), None)
        left = tuple(parameter.shape) if inside is None else found.shape(inside, parameter.shape)
        if made.get(name) != left:
            raise _refused(
                model, key, share, f"its config would make {name} {made.get(name)}, where {left} would be left"
            )


def _attention(block: nn.Module) -> nn.Module:
    return block.get_submodule(ATTENTION[0].rpartition(".")[0])


def _refused(model: PreTrainedModel, key: str, share: float, why: str) -> InputError:
    return InputError(
        f"decompose.{key}={share}: {type(model).__name__} cannot be cut: {why}; decompose.{key}=1 leaves it as it is"
    )
