"""A tokenizer as GGUF holds it: byte-level BPE ("gpt2"), or BPE made from SentencePiece ("llama")."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from cluscomp.errors import InputError

# how text is cut before BPE: llama.cpp's name for what tokenizer.json says
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    LLAMA3: "llama-bpe",
    LLAMA3.replace("{1,3}", ""): "qwen2",
    "Digits ByteLevel": "smollm",
    "ByteLevel": "gpt-2",
}


def add_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Put a tokenizer, filled up to `size` tokens, into a file; returns, in sentences, what is lost.

    Raises InputError for a kind of tokenizer that it does not know.
    """
    said: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = said.get("model", {"type": "slow"})
    if model["type"] != "BPE":
        raise InputError(f"format=gguf: knows tokenizers of type BPE, not {model['type']}")
    pieces = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    from_pieces = bool(model.get("byte_fallback"))
    special = {one["content"]: one["special"] for one in said["added_tokens"]}
    ranks = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(pieces)])}
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    writer.add_tokenizer_model("llama" if from_pieces else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([_kind(text, number in texts, special) for number, text in enumerate(tokens)])
    lost = []
    if from_pieces:
        writer.add_token_scores([ranks.get(text, 0.0) for text in tokens])
    else:
        writer.add_token_merges([" ".join(pair) for pair in pieces])
        cut = _cut(said["pre_tokenizer"] or {})
        writer.add_tokenizer_pre(CUTS.get(cut, "default"))
        if cut not in CUTS:
            lost.append(f"how text is cut before BPE ({cut}) has no name known here: tokenizer.ggml.pre is 'default'")
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return lost


def _kind(text: str, known: bool, special: dict[str, bool]) -> int:
    """The kind of a token: special (by its text), of a byte, ordinary, or filled in."""
    if not known:
        return TokenType.UNUSED
    if text in special:
        return TokenType.CONTROL if special[text] else TokenType.USER_DEFINED
    return TokenType.BYTE if text.startswith("<0x") and text.endswith(">") and len(text) == 6 else TokenType.NORMAL


def _cut(pre_tokenizer: dict[str, Any]) -> str:
    """What says how text is cut before BPE: a pattern, or the types of the steps."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    return patterns[0] if patterns else " ".join(str(step.get("type")) for step in steps)
