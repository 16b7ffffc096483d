"""Training of a whole model on instructions, of which the answers count; and what of a model learns from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cluscomp.data.instructions import Tokens
from cluscomp.forms import adapters
from cluscomp.forms.layers import size_of
from cluscomp.forms.linear import compressed
from cluscomp.forms.multimodal import for_text
from cluscomp.models.opened import Opened
from cluscomp.models.original import Original, blocks, norms
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.sharding import gathered, sharded
from cluscomp.train.steps import Steps
from cluscomp.train.whole import Example, train_whole


def with_codebooks(model: PreTrainedModel, *, norms_too: bool) -> Trained:
    """The codebooks of a compressed model learn, and the weights of norms where asked for."""
    return Trained(model, codebooks=True, others=norms(model) if norms_too else {})


def with_adapters(
    model: PreTrainedModel, *, norms_too: bool, rank: int, alpha: float, dense: Original | None, seed: int
) -> Trained:
    """New adapters of `rank` over all compressed layers learn, scaled by `alpha`/`rank`, and norms where asked for.

    With `dense`, which the layers were made of, they begin with what is left out of its weights, one read at a time.
    """
    others = norms(model) if norms_too else {}
    layers = {f"{name}.weight": name for name in compressed(model)}
    adapters.add(model, rank=rank, alpha=alpha, seed=seed)
    for full, weight_OI in () if dense is None else dense.tensors(list(layers)):
        with gathered(model, layers[full]):
            adapters.start_from(model, layers[full], weight_OI)
    return Trained(model, codebooks=False, others=others | adapters.parameters(model))


def with_everything(model: PreTrainedModel, original: Original) -> Trained:
    """All blocks are read, and every parameter of the dense model that is for text learns."""
    for index in range(len(blocks(model))):
        original.load_block(model, index)
    return Trained(model, codebooks=False, others=for_text(model))


def train_on_answers(
    model: PreTrainedModel,
    learns: Callable[[], Trained],
    train: list[Tokens],
    held_out: list[Tokens],
    settings: Steps,
    *,
    by_example: bool,
    opened: Opened | None,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Train what `learns` of a model in place; returns counts, deployed bytes, and what `train_whole` does.

    Args:
        model: the model.
        learns: says what of it learns, and makes ready what is new.
        train: the examples of all steps, in their order.
        held_out: examples that are scored before and after.
        settings: batches, learning rate and so on.
        by_example: whether gradients are sums of those of single examples, see `Objective`.
        opened: what reads the model's blocks, where they are not in memory (train/sharding.py).
        folder: where the state lies that a killed run goes on from.
        seed: of dropout.
    """
    first = Answers(held_out)[0]["input_ids"][None]
    tokens = sum(len(one.ids) for one in train)
    with sharded(model, opened):
        trained = learns()
        found = train_whole(
            model,
            trained,
            Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=first, by_example=by_example),
            Answers(train),
            Answers(held_out),
            settings,
            tokens=tokens,
            name="finetune",
            folder=folder,
            seed=seed,
        )
    return {"tokens": tokens, "deployed_bytes": sum(size_of(model).ledger.values()) // 8} | found


class Answers:
    """Encoded examples as training examples: the label of a token is the next one, if that counts."""

    def __init__(self, examples: list[Tokens]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        one = self.examples[index]
        labels = [token if counts else IGNORED for token, counts in zip(one.ids[1:], one.counted[1:])]
        return {"input_ids": torch.tensor(one.ids), "labels": torch.tensor([*labels, IGNORED])}
