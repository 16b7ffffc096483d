"""GPTQ: whole numbers on uniform grids, as GPTQModel and transformers load them.

Of each layer `qweight` (words, O) int32, numbers packed along the inputs; `qzeros` (G, words), packed along the
outputs; `scales` (G, O) float16; `g_idx` (I,), each input's group. The older layout stores zeros less one
(checkpoint_format "gptq"), which cannot hold a zero of 0: only grids without zeros are written so, for readers that
know nothing else; others as "gptq_v2".
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.formats import folder as folders
from cluscomp.forms.uniform import UniformWeight

WIDTHS = (2, 3, 4, 8)  # that the kernels know
STEP = 32  # of which inputs and outputs are whole multiples there


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write layers on grids of one width and group size. Raises InputError for others."""
    forms = folders.grids(model, "gptq")
    for name, form in forms.items():
        if form.width not in WIDTHS or form.in_features % STEP or form.out_features % STEP:
            raise folders.refused(
                name, form, "gptq", f"numbers of 2, 3, 4 or 8 bits of layers whose sizes are multiples of {STEP}"
            )
    whole = all(form.groups == 1 for form in forms.values())
    alike = {
        name: (form.width, -1 if whole else form.in_features // form.groups, form.zeros is None)
        for name, form in forms.items()
    }
    width, group, symmetric = folders.the_same("gptq", alike, "width, group size and symmetry are")
    config = {
        "quant_method": "gptq", "bits": width, "group_size": group, "sym": bool(symmetric), "desc_act": False,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2", "lm_head": False,
    }  # fmt: skip
    layers = {name: _layer(form, less=int(symmetric)) for name, form in forms.items()}
    return folders.write(model, tokenizer, folder, layers, config)


def _layer(form: UniformWeight, less: int) -> dict[str, Tensor]:
    """A layer's tensors, with zeros stored `less` by so much."""
    zeros_OG = form.offsets().to(torch.int32) - less
    group = form.in_features // form.groups
    return {
        "qweight": folders.words(form.unpacked(), form.width).T,
        "qzeros": folders.words(zeros_OG.T, form.width),
        "scales": form.scales.detach().T,
        "g_idx": (torch.arange(form.in_features) // group).to(torch.int32),
    }


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I) as the package gptqmodel rebuilds it. Raises ImportError where it is not installed."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    said = folders.quantization_of(folder)
    width, group, symmetric = said["bits"], said["group_size"], said["sym"]
    for name, parts in folders.read(folder, names):
        inputs, outputs = len(parts["g_idx"]), parts["scales"].shape[1]
        layer = TorchLinear(width, group, symmetric, False, inputs, outputs, bias="bias" in parts).eval()
        layer.load_state_dict(parts)
        if said["checkpoint_format"] == "gptq":
            convert_gptq_v1_to_v2_format_module(layer, width, torch.int32)
        yield name, layer.dequantize_weight().T
