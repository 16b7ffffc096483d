"""AQLM: vectors of neighbouring inputs, the centroids of some codebooks added, as transformers loads with aqlm.

Of each layer `codes` (O, I / D, M), as signed numbers; `codebooks` (M, K, 1, D); `scales` (O, 1, 1, 1), here 1.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.formats import folder as folders
from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.linear import compressed
from cluscomp.kernels.codes import code_bits


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write layers with codebooks of vectors along the inputs, all of one shape. Raises InputError for others."""
    forms: dict[str, CodebookWeight] = {}
    for name, layer in compressed(model).items():
        form = layer.stored
        if not isinstance(form, CodebookWeight) or form.axis != "in" or form.in_features % form.codebooks.shape[2]:
            raise folders.refused(
                name, form, "aqlm", "codebooks of vectors along the inputs, which fill a row of the weight"
            )
        forms[name] = form
    shapes = {
        name: (len(form.codebooks), code_bits(form.codebooks.shape[1]), form.codebooks.shape[2])
        for name, form in forms.items()
    }
    books, bits, length = folders.the_same("aqlm", shapes, "codebooks, bits of a code and length are")
    dense = folders.dense_linears(model)  # transformers 4 names their weights, transformers 5 the layers
    config = {
        "quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits, "in_group_size": length,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": [*dense, *(f"{name}.weight" for name in dense)],
    }  # fmt: skip
    lost = folders.write(model, tokenizer, folder, {name: _layer(form, bits) for name, form in forms.items()}, config)
    if bits not in (8, 16):
        lost.append(f"size: a code of {bits} bits takes {8 if bits < 8 else 16}")
    if any(form.scales is not None for form in forms.values()):
        lost.append("exactness: centroids that have scales are rounded to float16")
    return lost


def _layer(form: CodebookWeight, bits: int) -> dict[str, Tensor]:
    centroids_MKD = form.centroids(torch.float16).detach()
    codes_MN = form.unpacked()
    signed_MN = torch.where(codes_MN < 2 ** (bits - 1), codes_MN, codes_MN - 2**bits)
    codes_OGM = signed_MN.view(len(codes_MN), -1, form.out_features).permute(2, 1, 0)
    return {
        "codes": codes_OGM.to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": F.pad(centroids_MKD, (0, 0, 0, 2**bits - centroids_MKD.shape[1]))[:, :, None],
        "scales": torch.ones(form.out_features, 1, 1, 1, dtype=torch.float16),
    }


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I) as the package aqlm rebuilds it. Raises ImportError where that is not installed."""
    from aqlm.utils import _dequantize_weight, unpack_int_data

    bits = folders.quantization_of(folder)["nbits_per_codebook"]
    for name, parts in folders.read(folder, names):
        codes_OGM = unpack_int_data(parts["codes"], bits)
        yield name, _dequantize_weight(codes_OGM, parts["codebooks"].float(), parts["scales"].float()).half()
