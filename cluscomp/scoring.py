"""What a model is worth: (model, windows) -> numbers that own their counts."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.blocks import Walk


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` predicted tokens, with its standard error.

    The standard error comes from the spread between windows, and is None for a single one.
    """

    value: float
    stderr: float | None
    tokens: int


@torch.no_grad()
def perplexity(walk: Walk, windows_WT: Int[Tensor, "W T"], *, batch_size: int, label: str) -> Perplexity:
    """Perplexity over windows of token ids, (W, T), T >= 2: in each, T - 1 tokens are predicted.

    The convention of GPTQ and after: no overlap between windows, the first token of a window is context only, the mean
    runs over tokens. One block is in memory at a time; the log-likelihood is taken in float32 and summed in float64.
    """
    device = walk.device
    batches = [batch_BT.to(device) for batch_BT in windows_WT.split(batch_size)]
    hidden = [walk.embed(ids_BT) for ids_BT in batches]
    for index in tqdm(range(len(walk)), desc=f"perplexity of {label}", unit="block", leave=False, disable=None):
        with walk.block(index) as block:
            for number, hidden_BTH in enumerate(hidden):
                hidden[number] = walk.apply(index, block, hidden_BTH)
    sums_W = torch.cat([window_losses(walk.logits(h, ids), ids) for h, ids in zip(hidden, batches)])
    predicted = windows_WT.shape[1] - 1
    mean = float(sums_W.sum()) / (predicted * len(windows_WT))
    value = math.exp(mean) if mean < 700 else math.inf
    stderr = float((sums_W / predicted).std()) / math.sqrt(len(sums_W)) * value if len(sums_W) > 1 else None
    return Perplexity(value, stderr, predicted * len(windows_WT))


def window_losses(logits_BTV: Tensor, ids_BT: Int[Tensor, "B T"]) -> Tensor:
    """Negative log-likelihood of tokens 1..T-1 of each window, summed: (B, T, V), (B, T) -> (B,) float64."""
    losses = []
    for logits_TV, ids_T in zip(logits_BTV, ids_BT):  # one window at a time: the logits are large
        losses.append(F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none").double().sum())
    return torch.stack(losses).cpu()


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
