"""The codebook layer beside dense layers and beside gather-then-matmul, in one run: one token, and one training step.

    python benchmarks/codebook_linear.py [--size 4096] [--repeats 7] [--output FILE]

Times are milliseconds of process CPU and wall: medians of paired rounds, every contender once a round, in turn. Before
each product of one token the caches are filled with something else: in a model, the weights of a layer are not in
them. Codes are random, which is the worst case. The training step is that of one decoder block of SmolLM2-135M's shape
(transformers' own, its seven linears replaced): 2048 tokens, float32, forward, backward, AdamW on the codebooks.
"""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from goals import Goal, Times, finish, paired, show_times
from torch import nn

from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.linear import CompressedLinear
from cluscomp.kernels import codebook
from cluscomp.kernels.codes import code_bits, pack

GATHER, DENSE16 = "gather, then matmul (torch)", "dense bfloat16 (torch)"
TOKENS, D_TRAINED, K_TRAINED = 2048, 4, 4096


def one_token(size: int, K: int, D: int, threads: int, repeats: int) -> dict[str, Times]:
    g = torch.Generator().manual_seed(0)
    bits = code_bits(K)
    codes = torch.randint(0, K, (size, size // D), generator=g, dtype=torch.int32)
    centroids_KD = torch.randn(K, D, generator=g)
    packed = pack(codes.flatten(), bits)
    x_BI = torch.randn(1, size, generator=g)
    dense_OI = codebook.decode(packed, bits, centroids_KD, size, size).t().contiguous()
    dense16_OI, half_KD = dense_OI.bfloat16(), centroids_KD.half()
    other = torch.zeros(2**24)
    linear, gather = nn.functional.linear, nn.functional.embedding
    contenders: dict[str, Callable[[], Any]] = {
        GATHER: lambda: x_BI @ gather(codes, centroids_KD).view(size, -1),
        "dense float32 (torch)": lambda: linear(x_BI, dense_OI),
        DENSE16: lambda: linear(x_BI.bfloat16(), dense16_OI),
        "multiply": lambda: codebook.multiply(x_BI, packed, bits, centroids_KD, size, threads=threads),
        "multiply, float16 codebook": lambda: codebook.multiply(x_BI, packed, bits, half_KD, size, threads=threads),
    }
    if K <= 256:
        packed_in = pack(codes.t().flatten(), 8)  # the same codes as (I / D, O)
        contenders["tables (axis in)"] = lambda: codebook.multiply_by_tables(
            x_BI[0], packed_in, centroids_KD, size, threads=threads
        )
    rows = paired(contenders, repeats, before=lambda: other.add_(1))
    again = paired({name: call for name, call in contenders.items() if "tables" in name}, repeats)
    return rows | {f"{name}, codes in cache": row for name, row in again.items()}


def whole_matrix(size: int, K: int, D: int, threads: int, repeats: int) -> dict[str, Times]:
    """What training does beside its matrix products: the weight from the codes, and its gradient to the codebook."""
    g = torch.Generator().manual_seed(0)
    bits = code_bits(K)
    codes = torch.randint(0, K, (size * (size // D),), generator=g)
    packed, centroids_KD = pack(codes, bits), torch.randn(K, D, generator=g)
    grad_IO = torch.randn(size, size, generator=g)
    return paired(
        {
            "gather (torch)": lambda: nn.functional.embedding(codes, centroids_KD),
            "decode": lambda: codebook.decode(packed, bits, centroids_KD, size, size, threads=threads),
            "index_add_ (torch)": lambda: torch.zeros(K, D).index_add_(0, codes, grad_IO.view(-1, D)),
            "gradient": lambda: codebook.gradient(grad_IO, packed, bits, K, D, threads=threads),
        },
        repeats,
    )


class GatheredLinear(nn.Module):
    """The layer as the paper's code has it: the codebook indexed by codes, then a dense product, all by autograd."""

    def __init__(self, stored: CodebookWeight) -> None:
        super().__init__()
        self.codebook_KD = nn.Parameter(stored.codebooks.detach()[0].clone())
        self.register_buffer("codes_N", stored.unpacked()[0].long())
        self.in_features = stored.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: (..., I) -> (..., O)."""
        return nn.functional.linear(x, self.codebook_KD[self.codes_N].view(self.in_features, -1).t())


def block(layer_of: Callable[[CodebookWeight], nn.Module]) -> nn.Module:
    """One decoder block of SmolLM2-135M's shape with its linears replaced."""
    from transformers import LlamaConfig, LlamaModel

    g = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
        vocab_size=8,
    )
    model = LlamaModel(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, dense in list(model.layers.named_modules()):
        if isinstance(dense, nn.Linear):
            O, I = dense.weight.shape
            codes_MN = torch.randint(0, K_TRAINED, (1, I * O // D_TRAINED), generator=g)
            books = 0.03 * torch.randn(1, K_TRAINED, D_TRAINED, generator=g)
            stored = CodebookWeight.from_codes(codes_MN, books, out_features=O, in_features=I, axis="out")
            stored.codebooks.data = stored.codebooks.data.float()
            model.layers.set_submodule(name, layer_of(stored))
    return model


def dense_layer(stored: CodebookWeight) -> nn.Linear:
    """Frozen, but its gradient is computed."""
    layer = nn.Linear(stored.in_features, stored.out_features, bias=False)
    layer.weight.data = stored(torch.float32).detach().contiguous()
    return layer


def compressed_layer(stored: CodebookWeight) -> CompressedLinear:
    return CompressedLinear(stored, None, torch.float32)


def training_step(threads: int, repeats: int) -> tuple[dict[str, Times], dict[str, int]]:
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(1)
    x, target = (torch.randn(1, TOKENS, 576, generator=g) for _ in range(2))
    blocks = {"dense": dense_layer, "gathered": GatheredLinear, "ours": compressed_layer}
    steps: dict[str, Callable[[], Any]] = {}
    saved = {}
    for who, layer_of in blocks.items():
        model = block(layer_of)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if who != "dense" else None

        def step(model=model, trained=trained, optimizer=optimizer) -> None:
            nn.functional.mse_loss(model(inputs_embeds=x).last_hidden_state, target).backward()
            if optimizer is not None:
                optimizer.step()
            for parameter in trained:
                parameter.grad = None

        steps[who] = step
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | GatheredLinear | CompressedLinear)]
        saved[who] = sum(bytes_saved(layer) for layer in layers)
    return paired(steps, repeats), saved


def bytes_saved(layer: nn.Module) -> int:
    """Bytes kept from forward to backward besides the layer's input: tensors saved by autograd, and packed codes."""
    x = torch.randn(TOKENS, layer.in_features, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    codes = layer.stored.codes.nbytes if isinstance(layer, CompressedLinear) else 0
    return sum(kept.values()) + codes


def token_goals(figures: dict[str, Any], title: Callable[[int, int, int], str]) -> list[Goal]:
    def ratio(K: int, threads: int, over: str, ours: str, clock: str = "cpu_ms") -> float:
        rows = figures[title(K, 4, threads)]
        return rows[over][clock] / rows[ours][clock]

    large, small = "multiply, float16 codebook", "tables (axis in)"
    goals = []
    for K, ours, gather, dense in ((65500, large, 15, 0.9), (4096, large, None, None), (256, small, None, None)):
        goals += [
            Goal(f"one token, K={K}: {ours} against gather-then-matmul", gather, ratio(K, 1, GATHER, ours)),
            Goal(f"one token, K={K}: {ours} against dense bfloat16", dense, ratio(K, 1, DENSE16, ours)),
        ]
    cached = f"{small}, codes in cache"
    goals.append(Goal(f"one token, K=256: {cached}, against gather-then-matmul", None, ratio(256, 1, GATHER, cached)))
    for K, ours in ((65500, large), (256, small)):
        one, two = figures[title(K, 4, 1)][ours], figures[title(K, 4, 2)][ours]
        wanted = 1.8 if K > 256 else None  # half a millisecond is too short for a second thread to pay
        goals.append(Goal(f"one token, K={K}: two threads against one, wall", wanted, one["wall_ms"] / two["wall_ms"]))
        goals.append(Goal(f"one token, K={K}: CPU time of two threads over one's", None, two["cpu_ms"] / one["cpu_ms"]))
    dense32 = "dense float32 (torch)"
    one, two = (figures[title(65500, 4, threads)][dense32]["wall_ms"] for threads in (1, 2))
    goals.append(Goal("one token, dense float32: two threads against one, wall", None, one / two))
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side of the matrix")
    parser.add_argument("--repeats", type=int, default=9, help="paired rounds")
    parser.add_argument("--output", type=Path, default=Path("results/bench/codebook_linear.json"))
    options = parser.parse_args()
    began = datetime.now(UTC)
    size = options.size

    def title(K: int, D: int, threads: int) -> str:
        return f"one token, {size // D * D} x {size // D * D}, D={D}, K={K}, threads={threads}"

    figures: dict[str, Any] = {}
    for threads, shapes in (
        (1, ((65500, 4), (4096, 4), (256, 4), (65500, 6), (65500, 9))),
        (2, ((65500, 4), (256, 4))),
    ):
        torch.set_num_threads(threads)
        for K, D in shapes:
            name = title(K, D, threads)
            figures[name] = one_token(size // D * D, K, D, threads, options.repeats)
            show_times(name, figures[name])
    goals = token_goals(figures, title)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        name = f"whole matrix, {size} x {size}, D=4, K=65500, threads={threads}"
        rows = figures[name] = whole_matrix(size, 65500, 4, threads, options.repeats)
        show_times(name, rows)
        what = f"codebook gradient, {size * size:,} weights, {threads} thread(s), against index_add_"
        goals.append(
            Goal(what, 3.5 if threads == 1 else None, rows["index_add_ (torch)"]["cpu_ms"] / rows["gradient"]["cpu_ms"])
        )
    for threads in (1, 2):
        name = f"training step, {TOKENS} tokens, D={D_TRAINED}, K={K_TRAINED}, threads={threads}"
        figures[name], saved = training_step(threads, options.repeats)
        show_times(name, figures[name])
        cpu = {who: row["cpu_ms"] for who, row in figures[name].items()}
        what = f"training step of a SmolLM2 block, {threads} thread(s), time over dense"
        goals += [
            Goal(what, 1.25, cpu["ours"] / cpu["dense"], at_most=True),
            Goal(f"{what}: gathered by autograd", None, cpu["gathered"] / cpu["dense"]),
        ]
    figures["bytes kept for backward by the seven linears, besides their inputs"] = saved
    goals.append(
        Goal("bytes kept for backward besides inputs, gathered over ours", 10, saved["gathered"] / saved["ours"])
    )
    notes = {
        "one token": f"{options.repeats} paired rounds; caches filled with other data before each call",
        "training": f"{options.repeats} paired rounds; dense: gradients of all weights computed, none updated",
        "bytes kept": "tensors saved by autograd in the seven linears, and packed codes; inputs of layers not counted",
    }
    finish(goals, figures, notes, options.output, began)


if __name__ == "__main__":
    main()
