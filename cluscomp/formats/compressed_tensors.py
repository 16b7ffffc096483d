"""compressed-tensors: whole numbers on uniform grids, its "pack-quantized", as vLLM and transformers load them.

Of each layer `weight_packed` (O, words) int32, numbers packed along the inputs; `weight_scale` (O, G); `weight_shape`;
and with zeros `weight_zero_point` (words, G), packed along the outputs. Layers may differ in width and groups. Zeros
are loaded by transformers 5.23 with compressed-tensors 0.20 only under CompressedTensorsConfig(dequantize=True).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.formats import folder as folders
from cluscomp.forms.uniform import UniformWeight


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write layers on grids with whole zeros. Raises InputError for others."""
    forms = folders.grids(model, "compressed-tensors")
    alike: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, form in forms.items():
        kind = form.width, None if form.groups == 1 else form.in_features // form.groups, form.zeros is None
        alike.setdefault(kind, []).append(name)
    groups: dict[str, dict[str, Any]] = {}
    for (width, group, symmetric), names in alike.items():
        size: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        weights = {"num_bits": width, "type": "int", "symmetric": symmetric, "dynamic": False} | size
        groups[f"group_{len(groups)}"] = {"targets": names, "weights": weights}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": folders.dense_linears(model),
    }  # fmt: skip
    lost = folders.write(model, tokenizer, folder, {name: _layer(form) for name, form in forms.items()}, config)
    if any(form.zeros is not None for form in forms.values()):
        lost.append(
            "loading: as it has zeros transformers takes it only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    return lost


def _layer(form: UniformWeight) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": folders.words(form.unpacked(), form.width),
        "weight_scale": form.scales.detach(),
        "weight_shape": torch.tensor([form.out_features, form.in_features]),
    }
    if form.zeros is not None:
        zeros_GO = form.offsets().to(torch.int32).T
        tensors["weight_zero_point"] = folders.words(zeros_GO, form.width).T
    return tensors


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I) as the package compressed-tensors rebuilds it.

    Raises ImportError where that is not installed.
    """
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    groups = folders.quantization_of(folder)["config_groups"].values()
    schemes = {name: QuantizationScheme(**group) for group in groups for name in group["targets"]}
    for name, parts in folders.read(folder, names):
        yield name, PackedQuantizationCompressor.decompress(parts, schemes[name])["weight"]
