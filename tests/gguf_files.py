"""Small real GGUF files: a Llama of one block and six tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "▁"]
MATRICES = [f"attn_{part}" for part in ("q", "k", "v", "output")] + [f"ffn_{part}" for part in ("gate", "up", "down")]


def ones(rows: int, width: int, name: str) -> tuple[np.ndarray, None]:
    """A matrix of ones in float32."""
    return np.ones((rows, width), dtype=np.float32), None


def llama(
    path: Path,
    width: int = 32,
    matrix: Callable[[int, int, str], tuple[np.ndarray, GGMLQuantizationType | None]] = ones,
    say: Callable[[GGUFWriter], None] = lambda _: None,
) -> Path:
    """Write a Llama to `path`.

    Args:
        path: the file.
        width: of all its matrices.
        matrix: (rows, width, name) -> the numbers of a matrix, or its bytes, (rows, bytes a row), and their type.
        say: writes more of the file's metadata.
    """
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 32, "embedding_length": width, "block_count": 1, "feed_forward_length": width,
        "head_count": 2, "head_count_kv": 2, "rope_dimension_count": width // 2, "layer_norm_rms_eps": 1e-5,
        "vocab_size": len(TOKENS), "tokenizer_model": "llama", "token_list": TOKENS,
        "token_scores": [0.0] * len(TOKENS), "token_types": [2, 3, 3, 1, 1, 1], "bos_token_id": 1, "eos_token_id": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    say(writer)
    rows = {f"blk.0.{name}": width for name in MATRICES} | dict.fromkeys(("token_embd", "output"), len(TOKENS))
    for name, count in rows.items():
        values, kind = matrix(count, width, name)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
