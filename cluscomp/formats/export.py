"""A checkpoint in another library's format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats import aqlm, compressed_tensors, dense, gguf, gptq, vptq
from cluscomp.forms import adapters
from cluscomp.forms.linear import compressed
from cluscomp.forms.multimodal import copy_processor
from cluscomp.store.files import new_folder

Write = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], list[str]]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Format:
    """`write` puts a model into a folder and returns, in sentences, what is lost.

    It raises InputError for a layer that the format cannot hold. `dtypes` are those that numbers outside of the
    format's own layers may have; the first is taken by default ("auto": the one that config.json names).
    """

    write: Write
    dtypes: tuple[str, ...] = ("float16",)  # what the kernels of most formats compute in


FORMATS = {
    "dense": Format(dense.write, DTYPES),
    "gguf": Format(gguf.write, DTYPES),
    "vptq": Format(vptq.write),
    "gptq": Format(gptq.write),
    "compressed-tensors": Format(compressed_tensors.write),
    "aqlm": Format(aqlm.write),
}


def export(folder: str | Path, *, format: str, output: str | Path, dtype: str = "auto") -> list[str]:
    """Write a checkpoint in another format into a new or empty folder; returns, in sentences, what is lost.

    The folder appears whole or not at all.

    Args:
        folder: the checkpoint.
        format: a name of `FORMATS`.
        output: where to.
        dtype: of dense and gguf the type of numbers; "auto" is the one in which the original is stored.

    Raises InputError if the format cannot hold the checkpoint, or there is something in `output`; OSError if that
    cannot be written.
    """
    found = FORMATS.get(format)
    if found is None:
        raise InputError(f"format={format}: there is no such format; allowed here: {', '.join(FORMATS)}")
    if dtype not in (*found.dtypes, "auto"):
        raise InputError(f"dtype={dtype}: allowed for format={format}: {', '.join(found.dtypes)}")
    folder, target = Path(folder).expanduser(), Path(output).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"output={output}: there is something already; give a new or an empty folder")
    chosen = found.dtypes[0] if dtype == "auto" else dtype
    model = checkpoint.load(folder, None if chosen == "auto" else getattr(torch, chosen))
    if shapes := checkpoint.shapes_of(model.config):
        raise InputError(
            f"{folder}: {next(iter(shapes))} and others have other shapes than config.json gives them, "
            f"which format={format} has no place for"
        )
    if adapters.parameters(model):
        raise InputError(f"{folder}: has LoRA adapters, which format={format} has no place for")
    if any(layer.stored.post_norm for layer in compressed(model).values()):
        raise InputError(f"{folder}: its layers normalise what they give (post_norm), which format={format} does not")
    with new_folder(target) as unfinished, torch.no_grad():
        copy_processor(folder, unfinished)
        return found.write(model, AutoTokenizer.from_pretrained(folder), unfinished)
