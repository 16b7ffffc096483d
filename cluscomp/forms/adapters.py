"""LoRA adapters on compressed layers, by the PEFT library and in its files; what is stored below them never changes."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from cluscomp.errors import InputError
from cluscomp.forms.linear import MARK, compressed, storage_dtype

FOLDER = "adapter"  # inside a checkpoint
WEIGHTS = "adapter_model.safetensors"


def add(model: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
    """Put an adapter W + alpha/rank B A on every compressed layer, in place; B is zero, so no output changes.

    Raises InputError if PEFT is not installed.
    """
    names = list(compressed(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, {"r": rank, "lora_alpha": alpha, "target_modules": names})


def start_from(model: nn.Module, name: str, dense_OI: Float[Tensor, "O I"]) -> None:
    """Let the adapter of layer `name` begin with what is stored below it leaves out of a dense weight (O, I).

    Of that error it takes the part of its rank that is nearest, both factors of one size (LoftQ, arXiv 2310.08659).
    """
    layer: Any = model.get_submodule(name)
    error_OI = dense_OI.float() - layer.base_layer.stored(torch.float32)
    left_OM, sizes_M, right_MI = torch.linalg.svd(error_OI, full_matrices=False)
    (down,), (up,), (scale,) = layer.lora_A.values(), layer.lora_B.values(), layer.scaling.values()
    kept = min(down.weight.shape[0], len(sizes_M))
    roots_R = (sizes_M[:kept] / scale).sqrt()
    down.weight.data[:kept] = roots_R[:, None] * right_MI[:kept]
    up.weight.data[:, :kept] = left_OM[:, :kept] * roots_R


def parameters(model: nn.Module) -> dict[str, Parameter]:
    """The matrices of the adapters by name; none without adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if MARK in name}


def merge(model: nn.Module) -> None:
    """Add the adapters to the dense layers below them, which then stand alone."""
    from peft.tuners.lora import LoraLayer

    for name, module in [*model.named_modules()]:
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)


def write(model: nn.Module, folder: Path) -> None:
    """Write the adapters as PEFT does, 16 bits a number where that is exact."""
    from peft import get_peft_model_state_dict

    folder.mkdir()
    model.peft_config["default"].save_pretrained(folder)  # type: ignore[index, union-attr]
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    tensors = {name: tensor.detach().to(storage_dtype(tensor)).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read(model: nn.Module, folder: Path) -> None:
    """Put the adapters of a folder on a model. Raises InputError if they do not fit it or PEFT is not installed."""
    try:
        put_on(model, folder)
        from peft import set_peft_model_state_dict

        result: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{folder}: {str(error).splitlines()[0]}") from error
    lost = [name for name in result.missing_keys if MARK in name]
    if lost or result.unexpected_keys:
        raise InputError(f"{folder}: {[*lost, *result.unexpected_keys][0]} is missing or of no use")


def put_on(model: nn.Module, folder: Path) -> None:
    """Put adapters of the shapes of a folder's on a model without numbers; `tensors` gives theirs.

    Raises InputError if PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise _missing() from error
    config = LoraConfig.from_pretrained(str(folder))
    _inject(model, {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules})


def tensors(folder: Path) -> dict[str, Tensor]:
    """The matrices of a folder's adapters, by their names in a model that has these."""
    found = load_file(folder / WEIGHTS)
    names = {key: key.removeprefix("base_model.model.").rpartition(".") for key in found}
    return {f"{layer}.default.{last}": found[key] for key, (layer, _, last) in names.items()}


def _inject(model: nn.Module, values: dict[str, Any]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise _missing() from error
    inject_adapter_in_model(LoraConfig(**values, task_type="CAUSAL_LM"), model)
    model.requires_grad_(False)


def _missing() -> InputError:
    return InputError("LoRA adapters need the package PEFT: pip install 'cluscomp[lora]'")
