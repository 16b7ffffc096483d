"""Which windows a block is trained and judged on, in which order, and which of them are this rank's."""

import math
import random
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cluscomp import ranks
from cluscomp.stages.block_finetune import JUDGED, BlockFinetune


def batches(stage: BlockFinetune) -> list[slice]:
    """Rows of the windows that are learned from, batch after batch."""
    return _rows(0, stage.samples, stage.batch_size)


def judged(stage: BlockFinetune) -> list[slice]:
    """Rows of the first of them, on which losses before and after are compared."""
    return batches(stage)[: math.ceil(JUDGED / stage.batch_size)]


def held_out(stage: BlockFinetune) -> list[slice]:
    """Rows of the windows that are held out, batch after batch."""
    return _rows(stage.samples, stage.samples + stage.held_out, stage.batch_size)


def _rows(first: int, end: int, size: int) -> list[slice]:
    return [slice(*pair) for pair in pairwise([*range(first, end, size), end])]


def all_batches(stage: BlockFinetune) -> list[slice]:
    """Rows of all windows, batch after batch."""
    return batches(stage) + held_out(stage)


def steps(stage: BlockFinetune, seed: str) -> list[Any]:
    """The rows of the batches of all epochs, in the order they are taken."""
    if stage.order == "fixed":
        return batches(stage) * stage.epochs
    found: list[Tensor] = []
    rng = random.Random(seed)
    for _ in range(stage.epochs):
        rows = rng.sample(range(stage.samples), stage.samples)
        found.extend(torch.tensor(rows).split(stage.batch_size))
    return found


def own_windows(rows: Any) -> list[tuple[slice, float]]:
    """The windows of a batch (a slice, or numbers) that this rank learns from, each with its share of the batch's loss.

    Each is one by itself: what a matrix product gives depends on the rows beside. All of a batch come to all ranks
    together, so that steps, and what is learned, are those of one process to the bit.
    """
    numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    own = numbers.tensor_split(ranks.world())[ranks.rank()]
    return [(slice(number, number + 1), 1 / len(numbers)) for number in own.tolist()]


def spread(stream_WTH: Tensor, parts: list[slice]) -> None:
    """Give all ranks the rows of a stream (W, T, H), each part of which one rank has made."""
    for number, rows in enumerate(parts):
        ranks.spread(stream_WTH[rows], number)
