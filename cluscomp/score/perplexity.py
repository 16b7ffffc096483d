"""What a model is worth: (model, windows) -> numbers that own their counts."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp import ranks
from cluscomp.models.predictions import Predictions
from cluscomp.models.walk import Walk, not_finite

FEW_TOKENS = 64  # whose logits, in float32, are worked on at a time: all of a window's are larger than any cache


@dataclass(frozen=True)
class Mean:
    """A mean over `count` things, with its standard error.

    The standard error comes from the spread between windows, and is None for a single one.
    """

    value: float
    stderr: float | None
    count: int

    def exp(self) -> "Mean":
        """exp of the mean, its standard error to first order; infinite instead of an overflow."""
        value = math.exp(self.value) if self.value < 700 else math.inf
        return Mean(value, None if self.stderr is None else self.stderr * value, self.count)

    def per(self, count: int, unit: float = 1.0) -> "Mean":
        """The same sum over another count, in another unit: nats a token become bits a byte."""
        factor = self.count / (count * unit)
        return Mean(self.value * factor, None if self.stderr is None else self.stderr * factor, count)


def mean_of(sums_W: Float[Tensor, " W"], tokens: int) -> Mean:
    """The mean over the tokens of all windows, from each window's sum over its `tokens` tokens: (W,) -> Mean."""
    count = tokens * len(sums_W)
    stderr = float((sums_W / tokens).std()) / math.sqrt(len(sums_W)) if len(sums_W) > 1 else None
    return Mean(float(sums_W.sum()) / count, stderr, count)


class Reference:
    """The original's logits, made again from its last hidden states on disk; of its model only norm and head are used.

    `walk` is the original's, `kept` holds "hidden" of the windows that are scored (`predictions.last_hidden`).
    """

    def __init__(self, walk: Walk, kept: Predictions) -> None:
        self.walk, self.kept = walk, kept

    def hidden(self, rows: range) -> Float[Tensor, "B T H"]:
        """What the original's last block made of these windows: (B, T, H)."""
        return torch.stack([self.kept.window(row)["hidden"] for row in rows]).to(self.walk.device)


@torch.no_grad()
def window_scores(
    walk: Walk, windows_WT: Int[Tensor, "W T"], *, batch_size: int, label: str, reference: Reference | None = None
) -> dict[str, Float[Tensor, " W"]]:
    """Sums over the T - 1 predicted tokens of each window of token ids (W, T), T >= 2: (W,) float64 by name.

    "loss" is the negative log-likelihood in nats, taken in float32. The convention of GPTQ and after: no overlap
    between windows, the first token of a window is context only. With a `reference` also "kl", KL(original || model)
    in nats, and "top1_agreement", how often both find the same next token the likeliest. The ranks of a run share the
    batches out. Raises InputError, naming where it arises, if one of them is not a finite number.
    """
    of_all = windows_WT.split(batch_size)
    own = [number for number in range(len(of_all)) if ranks.mine(number)]
    batches = [of_all[number].to(walk.device) for number in own]
    rows = [range(number * batch_size, number * batch_size + len(of_all[number])) for number in own]
    if reference is not None and walk is reference.walk:
        hidden = [reference.hidden(part) for part in rows]
    else:
        hidden = walk.through(batches, f"perplexity of {label}")
    found: dict[int, dict[str, Tensor]] = {}
    for number, part, hidden_BTH, ids_BT in zip(own, rows, hidden, batches):
        logits_BTV = walk.logits(hidden_BTH, ids_BT)
        scores = {"loss": window_losses(logits_BTV, ids_BT)}
        if reference is not None:
            scores |= window_distances(reference.walk.logits(reference.hidden(part), ids_BT), logits_BTV)
        for sums_B in scores.values():
            if not bool(sums_B.isfinite().all()):
                raise not_finite("the head", logits_BTV.dtype)
        found[number] = scores
        del logits_BTV  # before those of the next batch are made
    parts = {number: scores for one in ranks.gathered(found) for number, scores in one.items()}
    return {name: torch.cat([parts[number][name] for number in range(len(of_all))]) for name in parts[0]}


def window_distances(original_BTV: Tensor, logits_BTV: Tensor) -> dict[str, Tensor]:
    """Two models' logits (B, T, V) -> "kl" and "top1_agreement", summed over tokens 1..T-1 of each window: (B,)."""
    divergences, agreements = [], []
    for original_TV, logits_TV in zip(original_BTV, logits_BTV):  # one window at a time: the logits are large
        log_TV, other_TV = (part[:-1].float().log_softmax(-1) for part in (original_TV, logits_TV))
        divergences.append((log_TV.exp() * (log_TV - other_TV)).sum(-1).double().sum())
        agreements.append((log_TV.argmax(-1) == other_TV.argmax(-1)).sum().double())
    return {"kl": torch.stack(divergences).cpu(), "top1_agreement": torch.stack(agreements).cpu()}


def window_losses(logits_BTV: Tensor, ids_BT: Int[Tensor, "B T"]) -> Tensor:
    """Negative log-likelihood of tokens 1..T-1 of each window, summed: (B, T, V), (B, T) -> (B,) float64."""
    losses = []
    for logits_TV, ids_T in zip(logits_BTV, ids_BT):
        pairs = zip(logits_TV[:-1].split(FEW_TOKENS), ids_T[1:].split(FEW_TOKENS))
        parts = [F.cross_entropy(part_TV.float(), ids, reduction="none") for part_TV, ids in pairs]
        losses.append(torch.cat(parts).double().sum())
    return torch.stack(losses).cpu()


def scored_bytes(tokenizer: PreTrainedTokenizerBase, windows_WT: Int[Tensor, "W T"]) -> int:
    """Bytes (UTF-8) of the text that tokens 1..T-1 of all windows (W, T) stand for.

    Where a window begins or ends inside a character, that counts as the 3 bytes of the replacement character.
    """

    def size(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())  # type: ignore[union-attr]

    return sum(size(ids) - size(ids[:1]) for ids in windows_WT.tolist())


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """The prompt and what the model makes of it, greedily, at most `tokens` long: to look at, not to score."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    end = model.generation_config.eos_token_id
    made: Tensor = model.generate(  # type: ignore[operator]
        encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=tokens, do_sample=False,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )  # fmt: skip
    return str(tokenizer.decode(made[0], skip_special_tokens=True))
