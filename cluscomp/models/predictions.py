"""What the original model predicts for each token of a text, kept on disk in checked parts.

A row of logits is as long as the vocabulary. To train on, only the `top` largest log-probabilities of a token are kept,
8 bytes each; what is left of the probability is one more outcome. To compare with exactly, the hidden states after the
last block are kept, of which the original's norm and head make all logits again.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from cluscomp import ranks
from cluscomp.errors import InputError
from cluscomp.models.walk import Walk
from cluscomp.store.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)
TOKENS_OF_A_PART = 2**16  # whose hidden states are in memory at once, and which a killed run loses
Keep = Callable[[Walk, Tensor, Tensor], dict[str, Tensor]]


class Predictions:
    """Something of what the original makes of windows of token ids (W, T), written once, read window by window.

    `keep` says what: (walk, hidden states (B, T, H) after the last block, ids (B, T)) -> tensors by name, a row each
    window. Part after part of the text goes through the original's blocks, one block in memory at a time. The
    ranks of a run share the parts out. A part that is damaged is made anew.
    """

    def __init__(self, folder: Path, windows_WT: Int[Tensor, "W T"], keep: Keep) -> None:
        self.folder, self.windows_WT, self.keep = folder, windows_WT, keep
        self.of_a_part = max(1, TOKENS_OF_A_PART // windows_WT.shape[1])

    def write(self, walk: Walk, *, batch_size: int) -> None:
        """Write the parts that are missing, those of this process, and wait for the others."""
        parts = self.windows_WT.split(self.of_a_part)
        for number, part_WT in enumerate(parts):
            path = self._part(number)
            if ranks.mine(number) and read_tensors(path) is None:
                write_tensors(path, self._predict(walk, part_WT, batch_size), {})
                log.info("original's predictions  part %d/%d", number + 1, len(parts))
        ranks.wait()

    def window(self, index: int) -> dict[str, Tensor]:
        """What was kept of window `index`, by name."""
        number, row = divmod(index, self.of_a_part)
        with safe_open(self._part(number), "pt") as part:
            return {name: part.get_slice(name)[row] for name in part.keys()}  # noqa: SIM118

    def _part(self, number: int) -> Path:
        return self.folder / f"teacher-{number:05}.safetensors"

    def _look(self, walk: Walk, index: int, hidden_BTH: Tensor) -> None:
        """Is shown what each block makes of each batch, with all that travels behind the hidden states."""

    @torch.no_grad()
    def _predict(self, walk: Walk, windows_WT: Tensor, batch_size: int) -> dict[str, Tensor]:
        batches = [batch_BT.to(walk.device) for batch_BT in windows_WT.split(batch_size)]
        hidden = walk.through(batches, "original's predictions", partial(self._look, walk))
        found = [self.keep(walk, hidden_BTH, ids_BT) for hidden_BTH, ids_BT in zip(hidden, batches)]
        return {name: torch.cat([kept[name] for kept in found]).cpu() for name in found[0]}


class Teacher(Predictions):
    """The original's `top` likeliest next tokens for each token of the windows (W, T).

    With `hidden` also what each block but the last makes of it, as a vector of length 1 in float16; `write` raises
    InputError for a model whose blocks have other positions than tokens.
    """

    def __init__(self, folder: Path, windows_WT: Int[Tensor, "W T"], top: int, *, hidden: bool = False) -> None:
        super().__init__(folder, windows_WT, partial(likeliest, top=top))
        self.hidden = hidden
        self._between: dict[int, list[Tensor]] = {}

    def window(self, index: int) -> dict[str, Tensor]:
        """The `top` token ids (T, top) and their log-probabilities (T, top) of window `index`, likeliest first.

        With `hidden` the blocks' outputs, too: (T, blocks - 1, H).
        """
        kept = super().window(index)
        found = {"top": kept["top"].long(), "top_log": kept["log"]}
        return found | ({"hidden": kept["hidden"].transpose(0, 1)} if self.hidden else {})

    def write(self, walk: Walk, *, batch_size: int) -> None:
        """As `Predictions.write`; hidden states of all blocks make parts shorter."""
        if self.hidden:
            self.of_a_part = max(1, self.of_a_part // len(walk))
        super().write(walk, batch_size=batch_size)

    def _look(self, walk: Walk, index: int, hidden_BTH: Tensor) -> None:
        if self.hidden:
            if hidden_BTH.shape[1] != self.windows_WT.shape[1]:
                raise InputError(
                    f"{type(walk.model).__name__}: its blocks have {hidden_BTH.shape[1]} positions for "
                    f"{self.windows_WT.shape[1]} tokens, so their hidden states are not those of tokens; "
                    "give recover.hidden=0"
                )
            self._between.setdefault(index, []).append(direction(hidden_BTH[..., : walk.width]).half().cpu())

    def _predict(self, walk: Walk, windows_WT: Tensor, batch_size: int) -> dict[str, Tensor]:
        self._between = {}
        found = super()._predict(walk, windows_WT, batch_size)
        if self.hidden:
            between = [torch.cat(self._between[index]) for index in range(len(walk) - 1)]
            found["hidden"] = torch.stack(between, 1)
        return found


def direction(hidden_BTH: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
    """Hidden states (..., H) as vectors of length 1, in float32."""
    return torch.nn.functional.normalize(hidden_BTH.float(), dim=-1)


def likeliest(walk: Walk, hidden_BTH: Tensor, ids_BT: Tensor, top: int) -> dict[str, Tensor]:
    """The likeliest next tokens after each, (B, T, top) int32, and their log-probabilities, (B, T, top) float32."""
    found = []
    for logits_TV in walk.logits(hidden_BTH, ids_BT):
        found.append(logits_TV.float().log_softmax(-1).topk(min(top, logits_TV.shape[-1])))
    return {
        "top": torch.stack([one.indices for one in found]).int(),
        "log": torch.stack([one.values for one in found]),
    }


def last_hidden(walk: Walk, hidden_BTH: Tensor, ids_BT: Tensor) -> dict[str, Tensor]:  # noqa: ARG001
    """The hidden states (B, T, H) themselves: norm and head make all logits of them again, at H numbers a token."""
    return {"hidden": hidden_BTH}


def divergence(
    logits_NV: Float[Tensor, "N V"], top_NK: Int[Tensor, "N K"], top_log_NK: Float[Tensor, "N K"]
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats, summed over N tokens, the tokens outside the teacher's top K being one outcome.

    Shapes: student's logits (N, V), the teacher's likeliest ids (N, K) and their log-probabilities (N, K). Merging
    outcomes never raises a divergence (the log-sum inequality), so this is a lower bound, exact for K = V.
    """
    normaliser_N1 = logits_NV.logsumexp(-1, keepdim=True)
    student_NK = logits_NV.gather(-1, top_NK) - normaliser_N1
    found = (top_log_NK.exp() * (top_log_NK - student_NK)).sum()
    if top_NK.shape[1] == logits_NV.shape[1]:
        return found
    rest_N = (1 - top_log_NK.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)
    others_N1 = logits_NV.scatter(-1, top_NK, -torch.inf).logsumexp(-1, keepdim=True) - normaliser_N1
    return found + (rest_N * (rest_N.log() - others_N1.squeeze(-1))).sum()
