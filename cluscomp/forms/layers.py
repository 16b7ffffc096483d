"""Stored forms by their names in config.json: put into models and described; the ledger of bits."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cluscomp.errors import InputError, named
from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.entropy import EntropyWeight
from cluscomp.forms.lattice import LatticeWeight
from cluscomp.forms.linear import (
    BASE,
    MARK,
    CompressedLinear,
    compressed,
    parts_of_stored,
    storage_dtype,
    unique_tensors,
)
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.masked import Masked
from cluscomp.forms.normal_float import NormalFloatWeight
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.ranked import Ranked
from cluscomp.forms.rotated import Rotated
from cluscomp.forms.signs import SignWeight
from cluscomp.forms.stored import KINDS, Stored, build, described, total
from cluscomp.forms.sum import Sum
from cluscomp.forms.table import TableWeight
from cluscomp.forms.trellis import TrellisWeight
from cluscomp.forms.uniform import UniformWeight

SHARES = "shares"  # in the entry of a layer in config.json: the layer that stores its trainable tensors
FORMS: tuple[type[Stored], ...] = (
    CodebookWeight, UniformWeight, TableWeight, NormalFloatWeight, EntropyWeight, PlainWeight, TrellisWeight,
    LatticeWeight, SignWeight, LowRank, Ranked, Masked, Rotated, Sum,
)  # fmt: skip
KINDS.update({form.kind: form for form in FORMS})


def empty_layers(model: nn.Module, weights: dict[str, dict[str, Any]], dtype: torch.dtype) -> dict[str, str]:
    """Put compressed layers of these kinds and shapes, by name, in the place of dense ones: on the meta device.

    Returns the names of tensors that another layer stores, and of that one's. Raises InputError, naming the layer, for
    shapes that cannot be or are not the layer's.
    """
    try:
        with torch.device("meta"):
            stored, shared = build_all(weights)
    except ValueError as error:
        raise InputError(f"quantization_config.weights of config.json: {error}") from error
    modules = dict(model.named_modules())
    for name, weight in stored.items():
        dense, shape = modules.get(name), (weight.out_features, weight.in_features)
        if not isinstance(dense, nn.Linear) or shape != (dense.out_features, dense.in_features):
            there = f"{dense.out_features} x {dense.in_features}" if isinstance(dense, nn.Linear) else "none"
            raise InputError(
                f"quantization_config.weights of config.json: {name} is a weight of {shape[0]} x {shape[1]}; "
                f"of the model's linear layers that is {there}"
            )
        with torch.device("meta"):
            layer = CompressedLinear(weight, dense.bias, dtype)
        model.set_submodule(name, layer)
    return shared


def reshape(model: nn.Module, shapes: Any) -> None:
    """Put linear layers of these shapes [O, I], by name, in the place of the config's: on the meta device.

    Raises InputError, naming the layer, for shapes that cannot be, or one of no linear layer.
    """
    modules = dict(model.named_modules())
    for name, shape in dict(shapes).items():
        dense = modules.get(name)
        pair = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
        if not isinstance(dense, nn.Linear) or not pair:
            raise InputError(f"quantization_config.shapes of config.json: {name} = {shape} is no linear layer's [O, I]")
        new = nn.Linear(shape[1], shape[0], dense.bias is not None, device="meta", dtype=dense.weight.dtype)
        model.set_submodule(name, new.train(dense.training))


def check_values(model: nn.Module) -> None:
    """Raise InputError, by name, if what is stored is damaged (see `Stored.check`), or another number is not finite."""
    inside = parts_of_stored(model)
    for name, parameter in model.named_parameters():
        if not (inside(name) or parameter.is_meta or bool(parameter.isfinite().all())):
            raise InputError(f"{name}: NaN or infinity among its numbers; the checkpoint is damaged")
    for name, layer in compressed(model).items():
        if any(tensor.is_meta for tensor in layer.stored.state_dict().values()):  # on a disk, by device_map
            continue
        try:
            layer.stored.check()
        except ValueError as error:
            raise InputError(f"{name}: {error}; the checkpoint is damaged") from error


def put_in(model: nn.Module, name: str, stored: Stored) -> None:
    """Put a compressed layer in the place of the dense linear layer `name`; the bias stays."""
    dense = model.get_submodule(name)
    model.set_submodule(name, CompressedLinear(stored, dense.bias, dense.weight.dtype))  # type: ignore[arg-type]


def take_out(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Put a dense linear layer in the place of the compressed layer `name`, with the weight that it rebuilds.

    Raises InputError for one that no dense layer stands for.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, CompressedLinear)
    if layer.stored.post_norm:
        raise InputError(f"{name}: normalises what it gives (post_norm), which a dense layer does not")
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    with torch.no_grad():
        dense.weight = nn.Parameter(layer.stored(dtype).contiguous(), requires_grad=False)
    dense.bias = layer.bias
    model.set_submodule(name, dense)


def specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind and shapes of every stored weight of a model by layer name, as config.json holds them.

    Raises ValueError, with the layer's name, for one that shares some of its trained tensors and not all.
    """
    found: dict[str, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    for full, layer in compressed(model).items():
        name = full.removesuffix(BASE)
        found[name] = described(layer.stored)
        first, *others = {owners.setdefault(id(parameter), name) for parameter in layer.stored.parameters()}
        if others:
            raise ValueError(f"{name}: some of what it trains is stored by another layer, and some is not")
        if first != name:
            found[name][SHARES] = first
    return found


def build_all(specs: dict[str, dict[str, Any]]) -> tuple[dict[str, Stored], dict[str, str]]:
    """The stored forms of some layers by name, and of each tensor that another layer stores the name of that one's.

    Raises ValueError, naming the layer, for a spec that no form takes.
    """
    stored: dict[str, Stored] = {}
    for name, spec in specs.items():
        with named([name]):
            stored[name] = build({key: value for key, value in spec.items() if key != SHARES})
    shared: dict[str, str] = {}
    for name, spec in specs.items():
        if first := spec.get(SHARES):
            with named([name]):
                if first not in stored or specs[first].get(SHARES):
                    raise ValueError(f"shares = {first}: that layer stores nothing of its own")
                stored[name].follow(stored[first])
            shared |= {f"{name}.stored.{key}": f"{first}.stored.{key}" for key, _ in stored[name].named_parameters()}
    return stored, shared


@dataclass(frozen=True)
class Size:
    """Bits of a model as stored. Per-weight figures divide by the number of dense weights they cover.

    `paper_bits_per_weight` and `linear_bits_per_weight` cover the compressed matrices alone, what papers quote: the
    one as the paper counts (Equation 3, 16 bits a code), the other as stored (packed codes, padding).
    `linear_bits_in_memory` adds to what is stored what stays decoded beside it once the matrices were used.
    `model_bits_per_weight` covers every parameter of the model (of adapters the bits, not the number). `ledger` holds
    bits by part: `kept` is what is not compressed, `adapters` what LoRA adds; together the tensors of the file.
    """

    paper_bits_per_weight: float
    linear_bits_per_weight: float
    linear_bits_in_memory: float
    model_bits_per_weight: float
    ledger: dict[str, int]


def size_of(model: nn.Module, kept_bits: int | None = None) -> Size:
    """Count every stored bit of a model in memory, tied tensors once; all figures agree if nothing is compressed.

    `kept_bits` of a number that is not compressed, for a model without values (on the meta device); null looks.
    """

    def bits_of(tensor: Tensor) -> int:
        return tensor.numel() * (storage_dtype(tensor).itemsize * 8 if kept_bits is None else kept_bits)

    layers = compressed(model)
    ledger = total(*(layer.stored.ledger() for layer in layers.values()))
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    linear_bits = sum(ledger.values())
    paper_bits = sum(layer.stored.paper_bits() for layer in layers.values())
    inside = parts_of_stored(model)
    others = {name: tensor for name, tensor in unique_tensors(model).items() if not inside(name)}
    kept = [tensor for name, tensor in others.items() if MARK not in name]
    added = [tensor for name, tensor in others.items() if MARK in name]
    ledger["kept"] = sum(map(bits_of, kept))
    per_weight = sum(ledger.values()) / (weights + sum(tensor.numel() for tensor in kept))
    if not layers:
        return Size(per_weight, per_weight, per_weight, per_weight, ledger)
    in_memory = linear_bits + 8 * sum(layer.stored.decoded_bytes() for layer in layers.values())
    size = Size(paper_bits / weights, linear_bits / weights, in_memory / weights, per_weight, ledger)
    return with_adapters(size, sum(map(bits_of, added)))


def with_adapters(size: Size, bits: int) -> Size:
    """The size of a model beside which LoRA adapters of so many bits stand."""
    if not bits:
        return size
    below = sum(size.ledger.values())
    per_weight = size.model_bits_per_weight * (below + bits) / below
    return replace(size, ledger=size.ledger | {"adapters": bits}, model_bits_per_weight=per_weight)


def in_file(size: Size, tensor_bytes: int) -> Size:
    """The size of a model whose file takes these bytes: what other code wrote wider than needed counts as it lies.

    That can only be what is not compressed; of what is, the types were compared when it was read.
    """
    claimed = sum(size.ledger.values())
    ledger = size.ledger | {"kept": size.ledger["kept"] + 8 * tensor_bytes - claimed}
    per_weight = size.model_bits_per_weight * 8 * tensor_bytes / claimed
    return replace(size, ledger=ledger, model_bits_per_weight=per_weight)


def check_file(size: Size, tensor_bytes: int) -> None:
    """Raise RuntimeError unless the ledger is what a checkpoint's tensors take, within 0.1 %: a claim must be true."""
    claimed = sum(size.ledger.values()) / 8
    if abs(claimed - tensor_bytes) > 0.001 * tensor_bytes:
        raise RuntimeError(f"the ledger counts {claimed:.0f} bytes, the checkpoint's tensors take {tensor_bytes}")


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or buffer of that name is. Raises InputError if the shapes differ."""
    parent_name, _, key = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    present = getattr(parent, key)
    if present.shape != tensor.shape:
        raise InputError(f"{name}: shape {tuple(tensor.shape)} in the file, {tuple(present.shape)} in the config")
    if key in parent._parameters:
        parent._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[key] = tensor
