"""VPTQ: vectors of neighbouring outputs, one codebook a layer, which transformers loads with the package vptq.

The layer's format is that of VPTQ's VQuantLinear (https://github.com/microsoft/VPTQ) with one group, no residual
codebook, no outliers, no permutation and no scales: `indices` (1, groups of outputs, words), packed along the inputs,
and `centroids.weight` (1, K * D).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.formats import folder as folders
from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.linear import compressed
from cluscomp.kernels.codes import code_bits


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write layers with one codebook of vectors along the outputs. Raises InputError for others."""
    layers: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, dict[str, Any]] = {}
    rounded, shared = 0, 0
    for name, layer in compressed(model).items():
        form = layer.stored
        if not isinstance(form, CodebookWeight) or form.axis != "out" or len(form.codebooks) > 1:
            raise folders.refused(name, form, "vptq", "one codebook of vectors along the outputs for each layer")
        centroids_KD = form.centroids(torch.float16)[0]
        rounded += not torch.equal(centroids_KD.float(), form.centroids(torch.float32)[0])
        shared += form.follows
        bits = code_bits(len(centroids_KD))
        codes_GI = form.unpacked()[0].view(form.in_features, -1).T
        filled_KD = F.pad(centroids_KD, (0, 0, 0, 2**bits - len(centroids_KD)))  # a power of two of centroids
        layers[name] = {"indices": folders.words(codes_GI, bits)[None], "centroids.weight": filled_KD.reshape(1, -1)}
        entries[name] = {
            "vector_lens": [-1, centroids_KD.shape[1]], "num_centroids": [-1, 2**bits], "num_res_centroids": [-1, -1],
            "group_num": 1, "group_size": form.in_features, "outlier_size": 0, "indices_as_float": False,
            "enable_norm": False, "enable_perm": False, "is_indice_packed": True,
            "in_features": form.in_features, "out_features": form.out_features,
        }  # fmt: skip
    config = {
        "quant_method": "vptq", "config_for_layers": entries, "shared_layer_config": {},
        "modules_to_not_convert": folders.dense_linears(model),
    }  # fmt: skip
    lost = folders.write(model, tokenizer, folder, layers, config)
    if rounded:
        lost.append(f"exactness: centroids of {rounded} layers, which have scales, are rounded to float16")
    if shared:
        lost.append(f"size: {shared} layers that share another's codebook have a copy of their own")
    return lost


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I) as the package vptq rebuilds it. Raises ImportError where that is not installed."""
    from vptq import VQuantLinear
    from vptq.ops.quant_gemm import dequant

    entries = folders.quantization_of(folder)["config_for_layers"]
    for name, parts in folders.read(folder, names):
        layer = VQuantLinear(**entries[name], enable_proxy_error=False, dtype=torch.float16)
        layer.load_state_dict(parts, strict=False)  # a bias is no part of the weight
        nothing = (
            "outlier_indices",
            "outlier_centroids",
            "res_indices",
            "res_centroids",
            "perm",
            "weight_scale",
            "weight_bias",
        )
        sizes = (
            "is_indice_packed", "enable_outlier", "enable_residual", "enable_perm", "enable_norm", "num_centroids",
            "num_outlier_centroids", "num_res_centroids", "padding", "outlier_padding", "num_codebooks", "group_size",
            "outlier_size", "vector_len", "outlier_vector_len",
        )  # fmt: skip
        centroids_1KD = layer.centroids.weight.view(1, layer.num_centroids, layer.vector_len)
        yield (
            name,
            dequant(
                layer.indices, centroids_1KD, **dict.fromkeys(nothing), **{size: getattr(layer, size) for size in sizes}
            ),
        )
