"""Tokens a second of `generate` beside the dense twin in the same dtype, in one run.

    python benchmarks/generate.py [--rounds 3] [--tokens 24] [--threads 1] [--gguf FILE ...] [--output FILE]

Models with random numbers, of SmolLM2-135M's shapes and of two blocks of Llama-3.2-1B's: every linear of their blocks
has a codebook of its own and random codes (the worst case for caches), and the dense twin has the same weights;
embeddings and head are dense in both, with numbers that 16 bits hold, as a checkpoint's are. Batches of 1 and 8
sequences, a prompt of 8 tokens each. Medians of paired rounds, in turn. Speed is that of all tokens after the first:
a call for all less one for a single token, so that the prompt does not count. Beside them llama.cpp, where the
package xllamacpp is installed: GGUF files of SmolLM2-135M of any type (`llama-quantize` makes Q4_0 and Q2_K), by
default the demo's original, which is Q4_1.
"""

import argparse
import itertools
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from goals import Goal, Times, finish, paired, show_times
from llama import Llama, files
from transformers import LlamaConfig, LlamaForCausalLM

from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.head import put_head_in
from cluscomp.forms.layers import put_in, take_out
from cluscomp.forms.linear import compressed

PROMPT = 8
SHAPES = ((4, 256), (4, 4096), (6, 4096), (4, 65500))  # D and K
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


SIZES = {
    "smollm2_135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "llama_1b_2_blocks": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 4096,
    },
}  # fmt: skip


def twins(size: str, D: int, K: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A compressed model and a dense one with the same weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size], **tokens, tie_word_embeddings=True))
    linears = [name for name, part in model.model.layers.named_modules() if isinstance(part, torch.nn.Linear)]
    for name in linears:
        O, I = model.model.layers.get_submodule(name).weight.shape
        codes_MN = torch.randint(0, K, (1, I * -(-O // D)), generator=generator)
        books_MKD = 0.03 * torch.randn(1, K, D, generator=generator)
        put_in(
            model.model.layers,
            name,
            CodebookWeight.from_codes(codes_MN, books_MKD, out_features=O, in_features=I, axis="out"),
        )
    embeddings = model.get_input_embeddings().weight
    embeddings.data = embeddings.data.bfloat16().float()  # as a checkpoint holds them
    dense = deepcopy(model)
    for name in compressed(dense):
        take_out(dense, name, torch.float32)
    put_head_in(model)  # as `load` does
    return model.eval(), dense.eval()


def in_dtype(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """A copy that computes in a dtype; what is stored of compressed layers stays, and so do rotary embeddings."""
    model = deepcopy(model)
    inside = tuple(f"{name}.stored." for name in compressed(model))
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            parameter.data = parameter.data.to(dtype)
    return model


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(0, 4096, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


def tokens_a_second(rows: dict[str, Times], tokens: int, batch: int) -> dict[str, float]:
    """From the times of all tokens and of the first alone."""
    ends = (f", {tokens} tokens", ", 1")
    return {
        who: 1000 * batch * (tokens - 1) / (rows[who + ends[0]]["cpu_ms"] - rows[who + ends[1]]["cpu_ms"])
        for who in dict.fromkeys(name.removesuffix(ends[1]) for name in rows if name.endswith(ends[1]))
    }


def of_llama(given: list[Path], batches: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """llama.cpp's figures, one thread."""
    figures: dict[str, Any] = {}
    found, reason = files(given)
    if reason:
        print(reason)
    for file, batch in itertools.product(found, batches):
        model, ids = Llama(file, batch), prompts(batch)
        calls = {
            f"llama.cpp, {told}": lambda model=model, ids=ids, count=count: model.generate(ids, count)
            for count, told in ((tokens, f"{tokens} tokens"), (1, "1"))
        }
        title = f"generate, {file.name}, batch {batch}, threads=1"
        rows = paired(calls, rounds)
        show_times(title, rows)
        speed = tokens_a_second(rows, tokens, batch)
        figures[title] = rows | {"tokens a second": speed}
        print(f"  tokens a second: {speed['llama.cpp']:.1f}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="paired rounds")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="*", default=[f"{D}x{K}" for D, K in SHAPES], help="DxK of codebooks")
    parser.add_argument("--sizes", nargs="*", default=[*SIZES])
    parser.add_argument("--dtypes", nargs="*", default=[*DTYPES])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="files that llama.cpp runs")
    parser.add_argument("--output", type=Path, default=Path("results/bench/generate.json"))
    options = parser.parse_args()
    began = datetime.now(UTC)
    torch.set_num_threads(options.threads)
    figures = of_llama(options.gguf, options.batches, options.tokens, options.rounds)
    goals = []
    for size, shape in itertools.product(options.sizes, options.shapes):
        D, K = map(int, shape.split("x"))
        wide = twins(size, D, K)
        for name in options.dtypes:
            ours, dense = (in_dtype(model, DTYPES[name]) for model in wide)
            for batch in options.batches:
                ids = prompts(batch)

                def made(model: LlamaForCausalLM, tokens: int, ids: torch.Tensor = ids) -> torch.Tensor:
                    return model.generate(ids, max_new_tokens=tokens, do_sample=False)

                calls = {
                    f"{who}, {told}": lambda model=model, count=count: made(model, count)
                    for count, told in ((options.tokens, f"{options.tokens} tokens"), (1, "1"))
                    for who, model in (("ours", ours), ("dense", dense))
                }
                title = f"generate, {size}, D={D}, K={K}, {name}, batch {batch}, threads={options.threads}"
                rows = paired(calls, options.rounds)
                show_times(title, rows)
                speed = tokens_a_second(rows, options.tokens, batch)
                figures[title] = rows | {"tokens a second": speed}
                print(f"  tokens a second: ours {speed['ours']:.1f}, dense {speed['dense']:.1f}", flush=True)
                wanted = {"float32": 1.8, "bfloat16": 1.0}.get(name) if batch == 1 and K <= 4096 else None
                goals.append(Goal(f"{title}: tokens a second over dense", wanted, speed["ours"] / speed["dense"]))
    notes = {"tokens a second": f"{options.rounds} paired rounds, CPU time of the process, without the prompt"}
    finish(goals, figures, notes, options.output, began)


if __name__ == "__main__":
    main()
