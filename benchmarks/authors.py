"""Methods beside their authors' own code on a CPU: layers of one block of SmolLM2-135M, at the same settings.

    python benchmarks/authors.py FOLDER [--pairs NAME ...] [--rounds 3] [--output FILE]

FOLDER has checkouts of their repositories: gptq (IST-DASLab), gptvq (Qualcomm-AI-research), AQLM (Vahe1994),
SqueezeLLM (SqueezeAILab), qtip and quip-sharp (Cornell-RelaxML); HQQ and bitsandbytes (NormalFloat) are packages. What
is not there is left out. Each pair works in a process of its own, on one thread, in turn, on the same weights and
statistics, which are made before and not in the time. The goal is at most 1.1 of their CPU time. Beside it stands the
error of the outputs that each leaves. QTIP's and QuIP#'s Hadamard products run on a GPU alone: they get weights that
ours has turned.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from goals import Goal, finish, paired, show_times
from methods import BITS, composed, looked, places
from torch import Tensor, nn

from cluscomp.forms.rotated import signs_of_inputs, signs_of_outputs, turned_back
from cluscomp.models.original import linears
from cluscomp.solve.layer import Layer
from cluscomp.solve.turned import Turned, start

MOST = 1.1
Layers = dict[str, Layer]
Theirs = Callable[[Layers], dict[str, Tensor]]


@dataclass(frozen=True)
class Pair:
    """Their code, which makes dense weights (O, I) of layers, and our settings that do the same.

    `needs` is a folder's or a package's name; `layers`: None for all of the block.
    """

    theirs: Theirs
    ours: list[str]
    needs: str
    layers: list[str] | None = None


def gptq(layers: Layers) -> dict[str, Tensor]:
    """One grid for each output, inputs of large mean square first."""
    from gptq import GPTQ
    from quant import Quantizer

    made = {}
    for name, layer in layers.items():
        one = GPTQ(_linear(layer))
        one.H, one.quantizer = 2 * layer.show().matrix_II, Quantizer()
        one.quantizer.configure(BITS, perchannel=True, sym=False, mse=False)
        one.fasterquant(percdamp=0.01, groupsize=-1, actorder=True)
        made[name] = one.layer.weight.data
    return made


def gptvq(layers: Layers) -> dict[str, Tensor]:
    """One codebook of 64 pairs for the whole matrix, 20 rounds of K-means and 25 steps to the least output error."""
    from gptq import GPTQ
    from vq_quant import VQQuantizer

    made = {}
    for name, layer in layers.items():
        one = GPTQ(_linear(layer))
        outputs, inputs = layer.weight_OI.shape
        one.H = 2 * layer.show().matrix_II
        one.quantizer = VQQuantizer(vq_dim=2, columns_per_group=inputs, kmeans_iters=20)
        one.quantizer.configure(BITS)
        one.fasterquant(
            percdamp=0.01, groupsize=outputs * inputs, include_m_step=True, use_vq=True, hessian_weighted_lookups=True
        )
        made[name] = one.layer.weight.data
    return made


def aqlm(layers: Layers) -> dict[str, Tensor]:
    """Two codebooks of 256 for 8 inputs, by their defaults, until an epoch gains less than 1 %."""
    from aq_engine import AQEngine

    settings = Namespace(
        devices=[torch.device("cpu")], num_codebooks=2, nbits_per_codebook=8, out_group_size=1, in_group_size=8,
        scale_nbits=0, codebook_value_nbits=16, codebook_value_num_groups=1, init_max_iter=100,
        init_max_points_per_centroid=None, lr=1e-4, beam_size=1, max_epochs=1000, relative_mse_tolerance=0.01,
        steps_per_epoch=100, print_frequency=1000,
    )  # fmt: skip
    made = {}
    for name, layer in layers.items():
        engine = AQEngine(_linear(layer))
        engine.XTX = layer.show().matrix_II.double()
        made[name] = engine.quantize(args=settings, verbose=False)().detach()
    return made


def squeezellm(layers: Layers) -> dict[str, Tensor]:
    """Eight free values for each output, a weight counting by the mean square of its input."""
    if not hasattr(np, "cast"):  # which numpy 2 lacks
        np.cast = {"byte": lambda values: np.asarray(values, np.int8)}  # type: ignore[attr-defined]
    from quantization.nuq import kmeans_fit

    made = {}
    for name, layer in layers.items():
        counts_I, rows = layer.show().diagonal_I.numpy(), []
        for row_I in layer.weight_OI.numpy():
            values, labels = kmeans_fit((row_I.reshape(-1, 1), counts_I, 2**BITS))
            rows.append(values[labels])
        made[name] = torch.from_numpy(np.stack(rows))
    return made


def hqq(layers: Layers) -> dict[str, Tensor]:
    """3 bits in groups of 64."""
    from hqq.core.quantize import Quantizer

    made = {}
    for name, layer in layers.items():
        codes, meta = Quantizer.quantize(
            layer.weight_OI, nbits=BITS, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        made[name] = Quantizer.dequantize(codes, meta)
    return made


def normal_float(layers: Layers) -> dict[str, Tensor]:
    """4 bits in groups of 64, a scale of 8 bits: QLoRA's."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = {}
    for name, layer in layers.items():
        codes, state = quantize_4bit(layer.weight_OI, blocksize=64, compress_statistics=True, quant_type="nf4")
        made[name] = dequantize_4bit(codes, state)
    return made


def qtip(layers: Layers) -> dict[str, Tensor]:
    """Trellises of 12 state bits through tiles of 16 x 16 numbers, computed codes."""
    _stand_in("qtip_kernels", "glog", *[f"lib.utils{part}" for part in ("", ".matmul_had", ".kernel_check")])
    _stand_in("lib.utils.kernel_decompress")
    from lib.algo.ldlq import LDLQ
    from lib.codebook.bitshift import bitshift_codebook

    book = bitshift_codebook(L=12, K=BITS, V=1, decode_mode="1mad")
    settings = Namespace(td_x=16, td_y=16, V=1)
    made = {}
    for name, layer in layers.items():
        turned, lower_II = _turned(layer, settings.td_y)
        scale = turned.weight_OI.square().mean().sqrt() / (book.lut.square().mean().sqrt() * 0.9)
        found_OI, _ = LDLQ(turned.weight_OI / scale, lower_II, book, settings, buf_cols=64, for_kernel=False)
        made[name] = _back(turned, found_OI * scale)
    return made


def quip_sharp(layers: Layers) -> dict[str, Tensor]:
    """Vectors of E8P at 2 bits, without rounds of tuning."""
    _stand_in("quiptools_cuda", "glog", "lib.utils", "lib.utils.matmul_had")
    from lib.algo.quip import LDLQ_buffered
    from lib.codebook.latticee8_padded12 import E8P12_codebook

    book, settings = E8P12_codebook(), Namespace(quip_tune_iters=0, resid_scale_override=-1)
    made = {}
    for name, layer in layers.items():
        turned, lower_II = _turned(layer, book.codesz)
        scale = turned.weight_OI.square().mean().sqrt() / book.opt_scale
        found_OI, _ = LDLQ_buffered(
            turned.weight_OI / scale, turned.moment_II, lower_II, None, book, settings, buf_cols=64
        )
        made[name] = _back(turned, found_OI * scale)
    return made


def _stand_in(*names: str) -> None:
    """What their modules import and do not call here: kernels of a GPU, readers of data."""
    for name in names:
        sys.modules.setdefault(name, MagicMock())


def _turned(layer: Layer, size: int) -> tuple[Turned, Tensor]:
    """A layer in turned coordinates, and its second moment's block LDL without the diagonal (I, I), by their code."""
    path = Path(sys.path[0]) / "lib" / "utils" / "math_utils.py"
    spec = spec_from_file_location("math_utils", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(theirs := module_from_spec(spec))
    turned = start(layer.weight_OI, layer.show().matrix_II, 0.01, layer.generator)
    lower_II, _ = theirs.block_LDL(turned.moment_II.clone(), size)
    lower_II.diagonal().zero_()
    return turned, lower_II


def _back(turned: Turned, found_OI: Tensor) -> Tensor:
    """A weight (O, I) in its own coordinates."""
    found_OI = turned_back(found_OI, signs_of_inputs(turned.seed, found_OI.shape[1]))
    return turned_back(found_OI.T, signs_of_outputs(turned.seed, found_OI.shape[0])).T


def _linear(layer: Layer) -> nn.Linear:
    outputs, inputs = layer.weight_OI.shape
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = layer.weight_OI.clone()
    return linear


FEW = ["self_attn.k_proj", "self_attn.o_proj"]  # of what takes minutes otherwise
BY_HAND = [f"method.width={BITS}", "bits=null"]
PAIRS = {
    "gptq": Pair(gptq, ["method=gptq", *BY_HAND], "gptq"),
    "gptvq": Pair(
        gptvq,
        ["method=gptvq", "bits=null", "method.vector_dim=2", f"method.codebook_size={4**BITS}"],
        "gptvq",
        FEW,
    ),
    "aqlm": Pair(
        aqlm, ["method=aqlm", "bits=null", "method.vector_dim=8", "method.codebook_size=256"], "AQLM", FEW,
    ),
    "qtip": Pair(qtip, ["method=qtip", *BY_HAND], "qtip", FEW),
    "quip_sharp": Pair(quip_sharp, ["method=quip_sharp", "bits=null", "method.width=2"], "quip-sharp"),
    "squeezellm": Pair(squeezellm, ["method=squeezellm", *BY_HAND], "SqueezeLLM"),
    "hqq": Pair(hqq, ["method=hqq", *BY_HAND, "method.group=64"], "hqq"),
    "normal_float": Pair(
        normal_float, ["method=normal_float", "bits=null", "method.width=4", "method.group=64"], "bitsandbytes"
    ),
}  # fmt: skip


def measure(name: str, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Times, and the errors of the outputs, of a pair in this process."""
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # which their code calls without a GPU
    pair = PAIRS[name]
    sys.path.insert(0, str(folder / pair.needs))
    experiment = composed(*pair.ours, "evaluate.texts={}")
    cluster: Any = experiment.stages["cluster"]
    original, block, statistics = looked(experiment)
    _, _, moments = looked(composed("method=gptq", "bits=3"))  # errors of outputs need them, whatever the method sees
    of_block = places(original)
    layers = {
        layer: Layer(dense.weight.detach(), of_block[layer].input, statistics.get(layer), torch.Generator())
        for layer, dense in linears(block).items()
        if pair.layers is None or layer in pair.layers
    }
    found: dict[str, dict[str, Tensor]] = {}

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found["theirs"] = pair.theirs(layers)

    def ours() -> None:
        for layer in layers.values():
            layer.generator.manual_seed(0)
        stored = [one for made in cluster.method.compress(dict(layers)) for one in made.stored.items()]
        found["ours"] = {layer: one(torch.float32) for layer, one in stored}

    times = paired({"theirs": theirs, "ours": ours}, rounds)
    for whose, made in found.items():
        left = size = 0.0
        for layer, dense in layers.items():
            H_II = moments[layer].matrix_II
            for weight_OI, sign in ((made[layer] - dense.weight_OI, 0), (dense.weight_OI, 1)):
                square = float((weight_OI.detach() @ H_II * weight_OI.detach()).sum())
                left, size = (left, size + square) if sign else (left + square, size)
        times[whose]["output_error"] = left / size
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=PAIRS, help="measure this one in this process, and write it to the output")
    parser.add_argument("--output", type=Path, default=Path("results/bench/authors.json"))
    options = parser.parse_args()
    if options.one:
        options.output.write_text(json.dumps(measure(options.one, options.folder, options.rounds)))
        return
    began, goals, figures = datetime.now(UTC), [], {}
    for name in options.pairs:
        needs = PAIRS[name].needs
        if not (options.folder / needs).is_dir() and find_spec(needs) is None:
            print(f"{name}: neither {options.folder / needs} nor a package {needs}")
            continue
        with tempfile.NamedTemporaryFile() as file:
            command = [sys.executable, __file__, str(options.folder), "--one", name, "--output", file.name]
            subprocess.run([*command, "--rounds", str(options.rounds)], check=True)
            rows = json.loads(Path(file.name).read_text())
        show_times(name, rows)
        figures |= {f"{name}, {whose}": row for whose, row in rows.items()}
        ratio = rows["ours"]["cpu_ms"] / rows["theirs"]["cpu_ms"]
        goals.append(Goal(f"{name}: CPU time over that of its authors' code", MOST, ratio, "x", True))
        error = rows["ours"]["output_error"] / rows["theirs"]["output_error"]
        goals.append(Goal(f"{name}: output error over that of its authors' code", None, error))
    finish(goals, figures, {"method": " ".join(__doc__.split())}, options.output, began)


if __name__ == "__main__":
    main()
