"""A checkpoint in another library's format."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats import aqlm, compressed_tensors, dense, gguf, gptq, vptq
from cluscomp.forms import adapters
from cluscomp.forms.apart import parts_of
from cluscomp.forms.linear import compressed
from cluscomp.forms.multimodal import copy_processor
from cluscomp.forms.stored import Stored
from cluscomp.store.files import new_folder

log = logging.getLogger(__name__)
Write = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], list[str]]
ReadBack = Callable[[Path, Iterable[str]], Iterator[tuple[str, Tensor]]]
ROUNDING = 2e-3  # of a weight's largest number: some packages multiply in float16
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Format:
    """`write` puts a model into a folder and returns, in sentences, what is lost.

    It raises InputError for a layer that the format cannot hold. `read_back` gives the weights (O, I) of layers by
    name, as the code of `package` rebuilds them from the folder. `dtypes` are those that numbers outside of the
    format's own layers may have; the first is taken by default ("auto": the one that config.json names). `linear`:
    its readers put their layers in the place of linear ones alone, not of stacked experts and of transposed layers.
    """

    write: Write
    read_back: ReadBack
    package: str
    dtypes: tuple[str, ...] = ("float16",)  # what the kernels of most formats compute in
    linear: bool = True


FORMATS = {
    "dense": Format(dense.write, dense.read_back, "safetensors", DTYPES, linear=False),
    "gguf": Format(gguf.write, gguf.read_back, "gguf", DTYPES, linear=False),
    "vptq": Format(vptq.write, vptq.read_back, "vptq"),
    "gptq": Format(gptq.write, gptq.read_back, "gptqmodel"),
    "compressed-tensors": Format(compressed_tensors.write, compressed_tensors.read_back, "compressed-tensors"),
    "aqlm": Format(aqlm.write, aqlm.read_back, "aqlm"),
}


def export(folder: str | Path, *, format: str, output: str | Path, dtype: str = "auto") -> list[str]:
    """Write a checkpoint in another format into a new or empty folder; returns, in sentences, what is lost.

    The folder appears whole or not at all. Before it does, the weights of all layers are compared with those that the
    format's own package rebuilds from it, where that is installed; the log says so.

    Args:
        folder: the checkpoint.
        format: a name of `FORMATS`.
        output: where to.
        dtype: of dense and gguf the type of numbers; "auto" is the one in which the original is stored.

    Raises InputError if the format cannot hold the checkpoint, or there is something in `output`; OSError if that
    cannot be written; RuntimeError if the package rebuilds other weights.
    """
    found = FORMATS.get(format)
    if found is None:
        raise InputError(f"format={format}: there is no such format; allowed here: {', '.join(FORMATS)}")
    if dtype not in (*found.dtypes, "auto"):
        raise InputError(f"dtype={dtype}: allowed for format={format}: {', '.join(found.dtypes)}")
    folder, target = Path(folder).expanduser(), Path(output).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"output={output}: there is something already; give a new or an empty folder")
    if target.resolve() == Path.cwd():
        raise InputError(f"output={output}: is the folder that this runs in; give a new one")
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
    if found.linear and (parts := parts_of(model)):
        raise InputError(
            f"{next(iter(parts)).removesuffix('.weight')}: no linear layer in transformers' own model, but one of a "
            f"stack or a transposed one, which readers of format={format} do not know; format=dense holds all"
        )
    forms = {name: layer.stored for name, layer in compressed(model).items()}
    with new_folder(target) as unfinished, torch.no_grad():
        copy_processor(folder, unfinished)
        lost = found.write(model, AutoTokenizer.from_pretrained(folder), unfinished)
        log.info("%s", _compared(found, unfinished, forms))
    return lost


@torch.no_grad()
def _compared(format: Format, folder: Path, forms: dict[str, Stored]) -> str:
    """What a comparison of these weights with those in a folder shows.

    Raises RuntimeError if one is another, or not there.
    """
    read = format.read_back(folder, forms)
    furthest, missing = 0.0, set(forms)
    while True:
        try:
            name, weight_OI = next(read)
        except StopIteration:
            break
        except ImportError:
            return f"not compared with what {format.package} reads: pip install {format.package}"
        except Exception as error:  # other people's code, which changes
            return f"not compared with what {format.package} reads: {type(error).__name__}: {error}"
        expected_OI = forms[name](weight_OI.dtype).float()
        off = float((weight_OI.float() - expected_OI).abs().max() / expected_OI.abs().max().clamp_min(1e-30))
        if not off <= ROUNDING:
            raise RuntimeError(f"{name}: {format.package} reads weights that are off by {off:.2g} of the largest")
        furthest = max(furthest, off)
        missing.remove(name)
    if missing:
        raise RuntimeError(f"{min(missing)}: has no weight in the files ({len(missing)} of {len(forms)} have none)")
    how = "bit by bit" if furthest == 0 else f"to {furthest:.1e} of the largest"
    return f"compared: {len(forms)} layers are what {format.package} reads, {how}"
