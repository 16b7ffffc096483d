"""Exports of a checkpoint, read back by the formats' own packages: are they the same model?

    python benchmarks/exports.py CODEBOOKS GRIDS [--windows 4] [--output FILE]

CODEBOOKS and GRIDS are checkpoints of one real model, made within minutes without a GPU:

    cluscomp model=smollm2_135m 'order=[cluster]' evaluate=none bits=3 method=cluscomp_data_free
    cluscomp model=smollm2_135m 'order=[cluster]' evaluate=none bits=null method=rtn method.width=4 method.group=64

Dense in float32: logits bit by bit. VPTQ: each layer as the package vptq dequantises it, bit by bit, and the bytes of
the weights beside those of the checkpoint. GPTQ: perplexity of the model as transformers loads it with optimum and
GPTQModel; without them only the weights, unpacked here. What is not installed is left out, and said.
"""

import argparse
import math
import pydoc_data.topics
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from goals import Goal, finish
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cluscomp import checkpoint
from cluscomp.formats.export import export
from cluscomp.forms.linear import compressed
from cluscomp.store.tensor_files import tensor_bytes

LENGTH = 256  # tokens of a window


def windows(folder: Path, count: int) -> Tensor:
    """Token ids (count, LENGTH) of Python's own documentation, which every machine has."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * count * LENGTH])["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.eval()(ids).logits.float()


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    losses = [float(model.eval()(row[None], labels=row[None]).loss) for row in ids]
    return math.exp(sum(losses) / len(losses))


def weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    layers = compressed(checkpoint.load(folder, dtype))
    return {name: layer.stored(dtype).detach() for name, layer in layers.items()}


def exported(folder: Path, format_: str, place: Path, dtype: str = "auto") -> Path:
    for sentence in export(folder, format=format_, output=place / format_, dtype=dtype):
        print(f"  {format_}, lost: {sentence}")
    return place / format_


def dense(folder: Path, place: Path, ids: Tensor) -> list[Goal]:
    ours = logits(checkpoint.load(folder, torch.float32), ids)
    theirs = logits(AutoModelForCausalLM.from_pretrained(exported(folder, "dense", place, "float32")), ids)
    return [Goal("dense, float32: logits unlike the checkpoint's", 0, int((ours != theirs).sum()), "", at_most=True)]


def vptq(folder: Path, place: Path) -> list[Goal]:
    made = exported(folder, "vptq", place)
    ours, theirs = (tensor_bytes(one) for one in (folder, made))
    goals = [Goal("vptq: bytes of tensors over the checkpoint's, less one", 0.002, abs(theirs / ours - 1), "", True)]
    if find_spec("vptq") is None:
        print("vptq is not installed: its own dequantiser is left out")
        return goals
    from vptq import VQuantLinear

    tensors, said = load_file(made / "model.safetensors"), AutoConfig.from_pretrained(made).quantization_config
    unlike = 0
    for name, weight_OI in weights(folder, torch.float16).items():
        layer = VQuantLinear(**said["config_for_layers"][name], enable_proxy_error=False, dtype=torch.float16)
        layer.load_state_dict({key: tensors[f"{name}.{key}"] for key in ("indices", "centroids.weight")})
        with torch.no_grad():  # one input at a time: nothing is added up
            unlike += not torch.equal(layer(torch.eye(weight_OI.shape[1], dtype=torch.float16)).T, weight_OI)
    return [*goals, Goal("vptq: layers that its package dequantises otherwise", 0, unlike, "", at_most=True)]


def gptq(folder: Path, place: Path, ids: Tensor) -> list[Goal]:
    made, half = exported(folder, "gptq", place), torch.float16
    tensors, said = load_file(made / "model.safetensors"), AutoConfig.from_pretrained(made).quantization_config
    less, shifts, unlike = int(said["checkpoint_format"] == "gptq"), torch.arange(0, 32, said["bits"]), 0
    if 32 % said["bits"] == 0:
        for name, weight_OI in weights(folder, half).items():
            words_WO, zeros_GW = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
            mask, group_I = 2 ** said["bits"] - 1, tensors[f"{name}.g_idx"].long()
            codes_IO = (words_WO[:, None] >> shifts[:, None] & mask).flatten(0, 1)
            zeros_GO = (zeros_GW[..., None] >> shifts & mask).flatten(1) + less
            made_IO = (codes_IO - zeros_GO[group_I]) * tensors[f"{name}.scales"][group_I].float()
            unlike += not torch.equal(made_IO.half().T, weight_OI)
    goals = [Goal("gptq: layers that unpack otherwise", 0, unlike, "", at_most=True)]
    if missing := [name for name in ("optimum", "gptqmodel") if find_spec(name) is None]:
        print(f"{' and '.join(missing)}: not installed, so transformers' own GPTQ is left out")
        return goals
    theirs = AutoModelForCausalLM.from_pretrained(made, device_map="cpu", dtype=half)
    ours, other = perplexity(checkpoint.load(folder, half), ids), perplexity(theirs, ids)
    print(f"  gptq: perplexity {ours:.5f}, as transformers loads it {other:.5f}")
    return [*goals, Goal("gptq: perplexity over the checkpoint's, less one", 1e-3, abs(other / ours - 1), "", True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codebooks", type=Path, help="a checkpoint of method=cluscomp_data_free")
    parser.add_argument("grids", type=Path, help="a checkpoint of method=rtn of 2, 4 or 8 bits")
    parser.add_argument("--windows", type=int, default=4, help=f"of {LENGTH} tokens, for logits and perplexity")
    parser.add_argument("--output", type=Path, default=Path("results/bench/exports.json"))
    options = parser.parse_args()
    began, figures = datetime.now(UTC), dict[str, Any]()
    ids = windows(options.codebooks, options.windows)
    with TemporaryDirectory() as place:
        goals = dense(options.codebooks, Path(place), ids[:1]) + vptq(options.codebooks, Path(place))
        goals += gptq(options.grids, Path(place), ids)
    finish(goals, figures, {"text": f"{options.windows} windows of {LENGTH} tokens"}, options.output, began)


if __name__ == "__main__":
    main()
