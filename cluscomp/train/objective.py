"""The loss that training of the whole model minimises, batch by batch, and what float16 needs for its gradients."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint as rematerialised
from transformers import PreTrainedModel

from cluscomp.models.predictions import divergence
from cluscomp.train.steps import LOGITS

FEW = 16  # tokens on which the head is tried
AS_OF = 16  # in float16 gradients are as large as in a step of so many tokens
IGNORED = -100  # label of a token whose prediction does not count


class Objective(nn.Module):
    """The loss of a batch, with the trained parameters alone as its own, so that Trainer sees and saves no others.

    `cross_entropy` and `kl` are the weights of both losses: next-token cross-entropy, and KL to the teacher's
    predictions that the batch brings. Logits exist for a few tokens at a time, and only where a label is.

    `by_example`: gradients of a step are sums of those of its examples, see `SummingTrainer`. They cannot be where
    something is drawn for a whole batch, and take as much room again.
    """

    accepts_loss_kwargs = True  # Trainer hands over `num_items_in_batch`, the labels of a whole step

    def __init__(
        self,
        model: PreTrainedModel,
        trained: list[Parameter],
        *,
        cross_entropy: float,
        kl: float,
        ids_BT: Tensor,
        by_example: bool = True,
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self.cross_entropy, self.kl, self.by_example = cross_entropy, kl, by_example
        self._dtype, self._scale = model.dtype, 1.0
        self._model = (model,)  # in a tuple, or it would be a part of this module
        self._head = self._separate_head(ids_BT[:1, :FEW].to(model.device))

    @torch.no_grad()
    def _separate_head(self, ids_BT: Tensor) -> tuple[nn.Module, ...]:
        """The head, if logits are the head of the last hidden state and nothing else (Gemma 2 caps them), or ().

        Also () where transformers finds no model without the head (Llama 4, which has it under another name than told).
        """
        (model,) = self._model
        if model.base_model is model:
            return ()
        head = model.get_output_embeddings()
        hidden_BTH = model.base_model(ids_BT, use_cache=False).last_hidden_state.to(self._dtype)
        logits_BTV = model(ids_BT, use_cache=False).logits
        same = torch.allclose(head(hidden_BTH).to(logits_BTV.dtype), logits_BTV, rtol=1e-3, atol=1e-4)
        return (head,) if same else ()

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **more: Tensor
    ) -> dict[str, Tensor]:
        """The loss () of a batch, whose step has `num_items_in_batch` labels; None: as many as the batch has."""
        of_step = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": self.scaled(self.loss(input_ids, labels, of_step, **more), of_step)}

    def scaled(self, loss: Tensor, of_step: Tensor | int) -> Tensor:
        """The loss; in float16 gradients are those of a larger one on their way through the model; see `learning`.

        A step's many labels leave each so little that float16 has no number for it.
        """
        if self._dtype == torch.float16 and loss.requires_grad:
            self._scale = scale = 2.0 ** max(0, math.floor(math.log2(int(of_step) / AS_OF)))
            loss.register_hook(lambda gradient: gradient * scale)
        return loss

    @contextmanager
    def learning(self) -> Iterator[None]:
        """What learns gets the gradients of the loss as it is: float32 holds them."""
        masters = self.trained if self._dtype == torch.float16 else ()
        handles = [one.register_hook(lambda gradient: gradient / self._scale) for one in masters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        of_step: Tensor | int,
        *,
        top: Tensor | None = None,
        top_log: Tensor | None = None,
    ) -> Tensor:
        """The loss summed over tokens with a label, divided by `of_step`: ()."""
        (model,) = self._model
        counted = labels != IGNORED
        values_BTX = self.values(input_ids)
        columns = [values_BTX[counted], labels[counted]]
        if self.kl:
            assert top is not None and top_log is not None
            columns += [top[counted], top_log[counted]]
        at_once = max(1, LOGITS[model.device.type] // model.config.get_text_config().vocab_size)
        losses = [
            rematerialised(self._summed, *part, use_reentrant=False)
            for part in zip(*(c.split(at_once) for c in columns))
        ]
        total = torch.stack(losses).sum() if losses else values_BTX.sum() * 0
        return total / of_step

    def values(self, ids_BT: Tensor) -> Tensor:
        """What logits are made of: the last hidden states (B, T, H), or the logits themselves; see `_separate_head`."""
        (model,) = self._model
        if self._head:
            hidden_BTH = model.base_model(ids_BT, use_cache=False).last_hidden_state
            return hidden_BTH.to(self._dtype)  # type: ignore[no-any-return]  # of Mamba it is float32
        return model(ids_BT, use_cache=False).logits  # type: ignore[no-any-return]

    def _summed(self, values_NX: Tensor, labels_N: Tensor, *teacher: Tensor) -> Tensor:
        logits_NV = (self._head[0](values_NX) if self._head else values_NX).float()
        total = logits_NV.new_zeros(())
        if self.cross_entropy:
            total = total + self.cross_entropy * F.cross_entropy(logits_NV, labels_N, reduction="sum")
        if self.kl:
            total = total + self.kl * divergence(logits_NV, *teacher)
        return total
