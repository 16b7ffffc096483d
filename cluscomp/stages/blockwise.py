"""A model block by block, as stages work on it that a kill may end: what is finished lies in the stage's folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp import checkpoint
from cluscomp.models.original import blocks
from cluscomp.process import Progress, give_memory_back


class Blockwise:
    """The blocks of a model one after the other: those that an earlier process finished are put back, others yielded.

        for index, block in (work := Blockwise("cluster", folder, model)):
            ...
            work.finish(index, numbers, "what was measured")

    `numbers` holds, by index, what `finish` was given of each finished block. After each block memory is given back.
    """

    def __init__(self, stage: str, folder: Path, model: PreTrainedModel) -> None:
        """Look for finished blocks; one whose file is damaged, which the log tells, is made anew."""
        self.folder, self.blocks = folder, blocks(model)
        self.numbers: dict[int, dict[str, Any]] = {}
        for index in range(len(self.blocks)):
            part = checkpoint.read_part(part_of(folder, index))
            if part is not None:
                self.numbers[index] = part.numbers
        self._progress = Progress(stage, len(self.blocks))

    @property
    def last(self) -> int:
        """The last block that is not finished; -1 if all are."""
        return max((index for index in range(len(self.blocks)) if index not in self.numbers), default=-1)

    def only_first(self, count: int) -> None:
        """Let only the first so many blocks count as finished."""
        self.numbers = {index: numbers for index, numbers in self.numbers.items() if index < count}

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        for index, block, finished in self.all():
            if finished:
                self.put_back(index)
            else:
                yield index, block

    def all(self) -> Iterator[tuple[int, nn.Module, bool]]:
        """Every block as it is, and whether it is finished; who asks for all puts back what is finished."""
        finished = set(self.numbers)
        if finished:
            self._progress.skip(len(finished))
        for index, block in enumerate(self.blocks):
            yield index, block, index in finished
            give_memory_back()

    def put_back(self, index: int) -> dict[str, Any]:
        """Make a finished block what it was when it was finished; returns its numbers."""
        part = checkpoint.read_part(part_of(self.folder, index))
        assert part is not None, f"{part_of(self.folder, index)} was whole when the stage began"
        checkpoint.put_part(self.blocks[index], part)
        return part.numbers

    def finish(self, index: int, numbers: dict[str, Any], line: str, **for_tracker: float) -> None:
        """Keep a block, and plain numbers with it, and log a line of what was measured."""
        checkpoint.save_part(part_of(self.folder, index), self.blocks[index], numbers)
        self.numbers[index] = numbers
        self._progress.step(line, **for_tracker)


def part_of(folder: Path, index: int) -> Path:
    """Where a stage with this folder keeps block `index`."""
    return folder / f"block-{index:03}.safetensors"


def dense_blocks(folder: Path, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block by their name in it: of the model, or, of a block that is not in memory, as kept."""
    for index, block in enumerate(blocks(model)):
        if next(block.parameters()).is_meta:
            part = checkpoint.read_part(part_of(folder, index))
            assert part is not None, f"{part_of(folder, index)} was whole when the stage ended"
            yield part.others
        else:
            yield checkpoint.stored_state(block)
