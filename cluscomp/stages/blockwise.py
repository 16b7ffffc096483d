"""A model block by block, as stages work on it that a kill may end: what is finished lies in the stage's folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp import ranks
from cluscomp.checkpoint import stored_state
from cluscomp.data.texts import Tokenizer
from cluscomp.errors import InputError
from cluscomp.models.opened import Opened
from cluscomp.models.original import block_names, blocks, linears
from cluscomp.models.walk import Walk
from cluscomp.process import Progress, give_memory_back
from cluscomp.stages import Job
from cluscomp.stages.parts import put_part, read_part, save_part


class Blockwise:
    """The blocks of a model one after the other: those that an earlier process finished are put back, others yielded.

        for index, block in (work := Blockwise("cluster", folder, model)):
            ...
            work.finish(index, numbers, "what was measured")

    `numbers` holds, by index, what `finish` was given of each finished block. After each block memory is given back.
    Of the ranks of a run the first keeps what is finished; or, with `apart`, each keeps the blocks that are its own.
    Blocks that are `opened` are in memory while they are yielded alone; in the end the first rank has all, in RAM.
    """

    def __init__(
        self, stage: str, folder: Path, model: PreTrainedModel, *, apart: bool = False, opened: Opened | None = None
    ) -> None:
        """Look for finished blocks; one whose file is damaged, which the log tells, is made anew."""
        self.folder, self.blocks, self._apart = folder, blocks(model), apart
        self._model, self._opened = model, opened
        self.numbers = ranks.agreed(self._finished)
        self._progress = Progress(
            stage, sum(index in self.numbers or self.mine(index) for index, _ in enumerate(self.blocks))
        )

    def _finished(self) -> dict[int, dict[str, Any]]:
        parts = {index: read_part(part_of(self.folder, index)) for index in range(len(self.blocks))}
        return {index: part.numbers for index, part in parts.items() if part is not None}

    def mine(self, index: int) -> bool:
        """Whether this process works at a block."""
        return ranks.mine(index) if self._apart else True

    @property
    def last(self) -> int:
        """The last block that is not finished; -1 if there is none."""
        return max(set(range(len(self.blocks))) - self.numbers.keys(), default=-1)

    def only_first(self, count: int) -> None:
        """Let only the first so many blocks count as finished."""
        self.numbers = {index: numbers for index, numbers in self.numbers.items() if index < count}

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        for index, block, finished in self.all():
            if self._opened is None:
                if finished:
                    self.put_back(index)
                else:
                    yield index, block
            elif not finished:
                with self._opened.block(self._model, index):
                    yield index, block
        if self._opened is not None and ranks.rank() == 0:
            for index, _ in enumerate(self.blocks):
                self._opened.load_block(self._model, index, torch.device("cpu"))
                self.put_back(index)

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
        part = read_part(part_of(self.folder, index))
        assert part is not None, f"{part_of(self.folder, index)} was whole when the stage began"
        put_part(self.blocks[index], part)
        return part.numbers

    def finish(self, index: int, numbers: dict[str, Any], line: str, **for_tracker: float) -> None:
        """Keep a block, and plain numbers with it, and log a line of what was measured."""
        if self._apart or ranks.rank() == 0:
            save_part(part_of(self.folder, index), self.blocks[index], numbers)
        self.numbers[index] = numbers
        self._progress.step(line, **for_tracker)


class Looks(Protocol):
    """Settings of a stage that looks at windows of calibration text, `batch_size` of them at once."""

    @property
    def batch_size(self) -> int:
        """How many windows go through a block together."""
        ...

    def windows(self, tokenizer: Tokenizer, seed: int) -> np.ndarray:
        """The windows as token ids, (W, T) int64."""
        ...


def embedded(stage: Looks, walk: Walk, job: Job) -> list[Tensor]:
    """What enters the first block of the windows that a stage looks at, in batches of (B, T, H)."""
    windows_WT = torch.from_numpy(stage.windows(job.original.tokenizer, job.seed)).to(job.original.device)
    return [walk.embed(ids_BT) for ids_BT in windows_WT.split(stage.batch_size)]


def part_of(folder: Path, index: int) -> Path:
    """Where a stage with this folder keeps block `index`."""
    return folder / f"block-{index:03}.safetensors"


def dense_blocks(folder: Path, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block by their name in it: of the model, or, of a block that is not in memory, as kept."""
    for index, block in enumerate(blocks(model)):
        if next(block.parameters()).is_meta:
            part = read_part(part_of(folder, index))
            assert part is not None, f"{part_of(folder, index)} was whole when the stage ended"
            yield part.others
        else:
            yield stored_state(block)


def change_weights(
    stage: str, model: PreTrainedModel, job: Job, change: Callable[[Tensor, torch.dtype], Tensor]
) -> dict[str, Any]:
    """Change the linear weights of a dense model block after block; each is kept in the job's folder, not in memory.

    `change(weight_OI, dtype)` gives the weight (O, I) as it will be, in its own dtype; `dtype` is that of the
    original's file. Returns `relative_error`, the squared change over the squared size of all weights, and the same for
    each layer. Raises InputError, naming the layer, where `change` raises ValueError.
    """
    names = block_names(model)
    work = Blockwise(stage, job.folder, model)
    for index, _, finished in work.all():
        if finished:
            continue
        with job.original.block(model, index) as block:
            squares = {}
            for name, linear in linears(block).items():
                weight_OI = linear.weight.detach()
                full = f"{names[index]}.{name}"
                try:
                    changed_OI = change(weight_OI, job.original.file_dtype(f"{full}.weight"))
                except ValueError as error:
                    raise InputError(f"{full}: {error}") from error
                difference_OI = changed_OI.double() - weight_OI.double()
                squares[name] = [float(difference_OI.square().sum()), float(weight_OI.double().square().sum())]
                linear.weight.data = changed_OI
            lost = relative_error(squares)
            work.finish(index, squares, f"relative error {lost:.2e}", relative_error=lost)
    squares = {
        f"{names[index]}.{name}": pair for index, found in sorted(work.numbers.items()) for name, pair in found.items()
    }
    by_layer = {name: relative_error({name: pair}) for name, pair in squares.items()}
    return {"relative_error": relative_error(squares), "relative_error_by_layer": by_layer}


def relative_error(squares: dict[str, list[float]]) -> float:
    """Squared error over squared size of several layers together, of which both are given by name."""
    error, size = (sum(values) for values in zip(*squares.values()))
    return error / size if size else 0.0
