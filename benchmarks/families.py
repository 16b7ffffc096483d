"""Every causal family that transformers registers, tiny and random, through a run: docs/models.md says what came of it.

python benchmarks/families.py            # all of them, and the table
python benchmarks/families.py mixtral    # some, with what went wrong in full
"""

import json
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import cluscomp.checkpoint  # noqa: F401
from cluscomp.command.compose import composed
from cluscomp.data.files import FileText
from cluscomp.data.texts import test_windows
from cluscomp.errors import InputError
from cluscomp.models.sources import TinyModel, read_config
from cluscomp.plan.meta import MetaModel
from cluscomp.runs.preparation import planned
from cluscomp.runs.run import Outcome, run
from cluscomp.score.perplexity import continuation

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SECONDS = 300  # that a family may take
OUTCOMES = "exact", "refused", "wrong", "broken", "unknown"
HEAD = """# Models

Every causal family that transformers {version} registers ({families}), as a tiny random model through `make families`:
clustered ({methods}), one step of block_finetune, scored, saved, and loaded in plain transformers.

* exact ({exact}): the original and the compressed model have the perplexity that plain transformers has, to 1e-4, and
  continue a prompt greedily with the same tokens ({silent} families cannot be asked to).
* refused ({refused}): in one sentence, before any work.
* wrong ({wrong}) or broken ({broken}): not so; a fault of ours.
* unknown ({unknown}): no tiny config of it was found that transformers makes and runs, and that is quick enough.

Models that `AutoModelForImageTextToText` opens are compressed in their language part and saved whole; the architectures
in config.json say which of its classes a model is. Tried so, with images: LLaVA-Next, Qwen2-VL, Qwen2.5-VL, Gemma 3.
Those that hear, and those with an encoder for text, are refused.

"""
LENGTH = 32  # tokens of a window
METHODS = "cluscomp", "gptq"
PROMPT, NEW = "Paragraph", 8  # what models continue, with so many tokens
SHORT = [
    "model=hub", "bits=4", "order=[cluster,block_finetune]", "block_finetune=quick", "device=cpu", "dtype=float32",
    f"cluster.length={LENGTH}", "cluster.samples=4", "cluster.batch_size=2", f"block_finetune.length={LENGTH}",
    "block_finetune.samples=1", "block_finetune.batch_size=1", "block_finetune.epochs=1", "block_finetune.held_out=0",
    f"evaluate.context={LENGTH}", "evaluate.limit=2", "data=text",
]  # fmt: skip
WIDTH, INNER, HEADS, KEY_HEADS, LAYERS, EXPERTS, RANK = 32, 48, 4, 2, 2, 4, 16
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim"], WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], INNER),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], LAYERS),
    "encoder_layers": LAYERS,
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], HEADS),
    "encoder_attention_heads": HEADS,
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], KEY_HEADS),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"], 2),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], RANK),
    **dict.fromkeys(["dff", "dim_ff", "feed_forward_size", "ffn_hidden_size", "dense_intermediate_size"], INNER),
    **dict.fromkeys(["shared_experts_intermediate_size", "shared_intermediate_size", "d_inner"], INNER),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "intermediate_size_mlp", "mlp_dim"], INNER),
    **dict.fromkeys(["attention_hidden_size", "embedding_dim", "lru_width", "hidden_size_global"], WIDTH),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size", "out_hidden_size"], WIDTH),
    **dict.fromkeys(["index_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"], HEADS),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["mamba_d_head", "mamba_headdim", "mamba_head_dim"], 2 * WIDTH // HEADS),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 16),
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size", "kv_channels", "dim_head", "swa_head_dim"], 8),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank", "rotary_dim"], 4),
    **dict.fromkeys(["laurel_rank", "hc_lowrank"], RANK),
    **dict.fromkeys(["attention_head_size", "hidden_size_per_layer_input", "o_lora_rank", "d_head", "d_kv"], 8),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "context_length"], 128),
    "head_dim": WIDTH // HEADS, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 12,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "n_ctx": 128, "mamba_d_ssm": 2 * WIDTH,
    "initializer_range": 0.2, "init_std": 0.2, "sliding_window": 16, "attention_window": 16, "sliding_window_size": 16,
    "n_group": 2, "topk_group": 1, "index_n_heads": 2, "index_topk": 8, "router_hidden_size": 16, "zero_expert_num": 2,
    "vocab_size_per_layer_input": 257, "rel_extent": 16, "ngram_vocab_size_base": 101, "split_ngram_parts": 2,
    "ple_embed_dim": 16, "depth": 1, "image_size": 28, "patch_size": 14, "num_position_embeddings": 16,
}  # fmt: skip
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": KEY_HEADS, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS, "n_groups": 2},
    "dots3_note": {
        "text_config": {
            "layer_types": ["indexed_attention"] * 2, "num_hidden_layers": 2, "per_layer_config": {}, "head_dim": 16,
        },
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "ministral": {"head_dim": WIDTH // HEADS},
    "nemotron": {"num_key_value_heads": KEY_HEADS},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS, "n_mamba_heads": 2,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
    },
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


EASIER = {"gemma3n_text": "with num_kv_shared_layers=0; refused where blocks use the keys and values of others"}


def tiny(kind: str) -> dict[str, Any]:
    """Values of a small config of a family, and of the configs in it: those of SIZES, each kind of layer once."""
    return _merged(_small(CONFIG_MAPPING[kind]().to_dict()), OF_A_FAMILY.get(kind, {}))


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(values[key], other) for key, other in others.items() if isinstance(values.get(key), dict)}
    return values | others | both


def _small(default: dict[str, Any]) -> dict[str, Any]:
    found = {key: SIZES[key] for key, value in default.items() if key in SIZES and value is not None}
    if "is_decoder" in default:
        found["is_decoder"] = True
    for key, value in default.items():
        if isinstance(value, dict) and value.get("model_type") in CONFIG_MAPPING:
            found[key] = _small(value) | {"model_type": value["model_type"], "vocab_size": 257} | TOKENS
        elif key == "num_key_value_heads" and "kv_lora_rank" in default:
            found[key] = HEADS
        elif key in ("layer_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))
            found[key] = (kinds * 2)[: max(LAYERS, len(kinds))]
            found["num_hidden_layers"] = len(found[key])
    for key, value in default.items():
        if key not in found and isinstance(value, list) and len(value) == default.get("num_hidden_layers"):
            found[key] = value[: found["num_hidden_layers"]]
    return found


def check(kind: str, folder: Path) -> dict[str, Any]:
    """What became of a family: `outcome` (see HEAD), `why`, and what `stays` in 16 bits."""
    data = FileText(name="text", file=str(folder / "text.txt"), test_file=None)
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {i}: {i * i} is the square of {i}." for i in range(100)))
    try:
        model = TinyModel(architecture=kind, config=tiny(kind), seed=0).folder(folder)
    except InputError as error:
        refused = "no causal language model" in str(error)
        return {"outcome": "refused" if refused else "unknown", "why": str(error)}
    except Exception as error:
        return {"outcome": "unknown", "why": said(error), "trace": traceback.format_exc()}
    found: dict[str, Any] = {"outcome": "exact", "why": EASIER.get(kind, ""), "stays": []}
    places = f"model.id='{model}'", f"data.file='{data.file}'", f"outputs='{folder / 'outputs'}'", f"cache='{folder}'"
    try:
        try:
            reference, text = by_transformers(model, data), greedy(model)
        except Exception as error:  # it takes something else than text, say: then it is to be refused
            why = f"transformers does not run it on text: {said(error)}"
            try:
                planned(composed([*SHORT, f"method={METHODS[0]}", *places]))
            except InputError as refusal:
                why += f"; refused: {str(refusal).replace(f'{model}: ', '')}"
            return {"outcome": "unknown", "why": why[:300], "trace": traceback.format_exc()}
        found["stays"] = MetaModel(read_config(model), torch.float32, "cpu").kept()
        found["silent"] = text is None
        prompt = [] if text is None else [f"evaluate.prompt={PROMPT}", f"evaluate.prompt_tokens={NEW}"]
        for method in METHODS:
            outcome = run(composed([*SHORT, *prompt, f"method={method}", *places]))
            problem = problem_of(outcome, reference, text, data)
            if problem:
                return found | {"outcome": "wrong", "why": f"{method}: {problem}"}
    except InputError as error:
        return found | {"outcome": "refused", "why": str(error).replace(f"{model}/", "")[:300]}
    return found


def problem_of(outcome: Outcome, reference: float, text: str | None, data: FileText) -> str:
    """What is not as plain transformers has it, if anything is."""
    scores = {s.after: s.value for s in outcome.record.scores if s.metric == "perplexity"}
    if not abs(scores["original"] / reference - 1) < 1e-4:
        return f"perplexity of the original {scores['original']:.6g}, by transformers {reference:.6g}"
    assert outcome.checkpoint is not None
    loaded = by_transformers(outcome.checkpoint, data)
    if not abs(scores["block_finetune"] / loaded - 1) < 1e-4:
        return f"perplexity of the compressed model {scores['block_finetune']:.6g}, loaded {loaded:.6g}"
    for after, expected in ("original", text), ("block_finetune", text and greedy(outcome.checkpoint)):
        if outcome.samples.get(after) != expected:
            return f"after {after} it continues {outcome.samples.get(after)!r}, by transformers {expected!r}"
    return ""


def greedy(folder: Path) -> str | None:
    """How plain transformers continues the prompt; None where it cannot generate with such a model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    try:
        return continuation(model, AutoTokenizer.from_pretrained(folder), PROMPT, NEW)
    except Exception:
        return None


@torch.no_grad()
def by_transformers(folder: Path, data: FileText) -> float:
    """The perplexity by plain transformers, of the windows that a run scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = test_windows(data.text("test"), AutoTokenizer.from_pretrained(folder), length=LENGTH, limit=2)
    losses = []
    for row in torch.from_numpy(ids):
        logits = model(row[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), row[1:]))
    return float(torch.stack(losses).mean().exp())


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def child(kind: str, told: Any) -> None:
    """One family in a process of its own."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = check(kind, Path(folder))
        except BaseException as error:
            trace = traceback.format_exc()
            found = {"outcome": "broken", "why": said(error), "trace": trace}
    told.send(found)


def result(kind: str) -> dict[str, Any]:
    """What `check` found, in a process that may take SECONDS; "broken" for one that failed otherwise."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=child, args=(kind, there))
    began = time.time()
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else {"outcome": "unknown", "why": f"took more than {SECONDS} s"}
    except EOFError:
        found = {"outcome": "broken", "why": "the process ended"}
    process.kill()
    process.join()
    return found | {"seconds": round(time.time() - began, 1)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    counted = Counter(found["outcome"] for found in results.values())
    rows = [
        [f"`{kind}`", found["outcome"], ", ".join(f"`{name}`" for name in found.get("stays", [])), found["why"]]
        for kind, found in sorted(results.items())
    ]
    head = ["family (`model_type`)", "", "stays in 16 bits inside the blocks", "why"]
    told = HEAD.format(
        methods=", ".join(f"`method={name}`" for name in METHODS),
        families=len(results),
        version=transformers.__version__,
        silent=sum(found.get("silent", False) for found in results.values()),
        **{key: counted[key] for key in OUTCOMES},
    )
    table = str(tabulate(rows, head, "github", disable_numparse=True))
    return told + re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", table)) + "\n"  # cells are as long as what is in them


def main() -> None:
    asked = sys.argv[1:]
    results = {}
    planned(composed([*SHORT, "model=tiny", f"data.file={__file__}"]))  # imports, once for all
    for kind in asked or sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}):
        results[kind] = found = result(kind)
        print(kind, json.dumps({key: value for key, value in found.items() if key != "trace"}), flush=True)
        if asked and "trace" in found:
            print(found["trace"])
    if not asked:
        TABLE.write_text(table(results))


if __name__ == "__main__":
    main()
