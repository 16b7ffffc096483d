"""What stage block_finetune does: streams through both models, and one block after the other trained between them."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp import ranks
from cluscomp.forms.linear import compressed, rebuilt
from cluscomp.models.original import Original, block_names, norms
from cluscomp.models.walk import Walk
from cluscomp.process import for_tracker
from cluscomp.stages import Job
from cluscomp.stages.block_finetune import CHECKS, ROUNDED, BlockFinetune
from cluscomp.stages.block_windows import all_batches, batches, held_out, judged, own_windows, spread, steps
from cluscomp.stages.blockwise import Blockwise
from cluscomp.store.records import read_sealed, write_sealed
from cluscomp.train.masters import Group, State, Trained, by_mean, by_sign, fit, moving, rounding
from cluscomp.train.moving import MovingCodes
from cluscomp.train.rounding import LearnedSigns, LearnedWeights
from cluscomp.train.streams import Streams

log = logging.getLogger(__name__)
MARK = "streams.json"  # which blocks are done, and the hashes of the streams that leave the last of them
PV_BETAS = 0.0, 0.95  # of Adam over what moves codes: no momentum (PV-Tuning's)
ATTEMPTS = 3  # at training a block, each with half the learning rate of the one before


def run(stage: BlockFinetune, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Train block after block; see `BlockFinetune.run`."""
    ids_WT = torch.from_numpy(stage.windows(job.original.tokenizer, job.seed)).to(job.original.device)
    walk, teacher = Walk(model, job.opened), Walk(job.teacher.model(), job.teacher)
    shape_WTH = (len(ids_WT), *walk.embed(ids_WT[:1]).shape[1:])
    own = job.folder if ranks.rank() == 0 else job.folder / f"rank-{ranks.rank()}"  # for what the first does not see
    own.mkdir(exist_ok=True)
    streams = Streams(own, stage.streams, shape_WTH, job.original.dtype, job.original.device)
    student = original = streams.new("student", 0)
    for rows in all_batches(stage):
        teacher.embed(ids_WT[rows])  # its blocks' arguments
        student[rows] = walk.embed(ids_WT[rows])
    work = Blockwise("block_finetune", job.folder, model, opened=job.opened)
    done, student, original = _resumed(work, streams) or ([], student, original)
    work.only_first(len(done))
    for index, stored in work:
        targets: list[Tensor] = []
        with torch.no_grad(), teacher.block(index) as block:
            if stage.target != "same_input":
                original = _apply(stage, teacher, index, block, original, streams.new("original", index + 1))
                targets.append(original)
            if stage.target != "fp_stream":
                targets.append(_apply(stage, teacher, index, block, student, streams.new("target", index + 1)))
        leaving = streams.new("student", index + 1)
        with _learning(stage, stored, index, model, job.original):
            numbers = finetune_block(stage, walk, index, student, targets, leaving, job.seed)
        student = leaving
        done.append(numbers)
        needed = {"student": student} | ({} if stage.target == "same_input" else {"original": original})
        hashes = streams.save(len(done), needed) if ranks.rank() == 0 else {}
        fate = f"attempt {numbers['attempts']}"
        if numbers["kept"]:
            fate = "kept as it was"
        line = f"loss {numbers['before']:.3e} -> {numbers['after']:.3e}"
        line = f"{line}  {fate}" if numbers["reasons"] else line
        work.finish(index, {}, line, **{key: numbers[key] for key in ("before", "after", "attempts")})
        if ranks.rank() == 0:
            write_sealed(job.folder / MARK, {"done": done, "hashes": hashes})
        streams.drop(but=len(done))
    return {
        "calibration": stage.data.text("calibration").describe(),
        "tokens": stage.samples * stage.length,
        "blocks": done,
        "kept": sum(numbers["kept"] for numbers in done),
    }


def finetune_block(
    stage: BlockFinetune,
    walk: Walk,
    index: int,
    entering_WTH: Tensor,
    targets_WTH: list[Tensor],
    leaving_WTH: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Train one block; `leaving_WTH` (W, T, H) receives its outputs. Works on float32 masters.

    Outputs and loss are those of what is stored, the loss that of the first `JUDGED` windows. If a loss or gradient is
    not finite, or the loss ends no better than it began, the block gets back what it had and the learning rates are
    halved, at most twice; then it keeps what it had. With windows held out theirs is the loss that decides, and the
    best state of `CHECKS` is taken. Returns
    the mean squared error `before` and `after`, `held_out_before` and `held_out_after` where there are such windows,
    the target's mean `square`, the `lr` of the attempt that counts, the `attempts`, whether the block was `kept` as it
    was, the `reasons` of failures, how far what is stored has `moved` (see `Trained.moved`), the share of
    codes that `codes_moved` where they may, and of each of the `epochs` that count the mean loss that was minimised and
    the mean norm of its gradient.
    """
    block = walk.blocks[index]
    codes = {one: one.unpacked() for one in block.modules() if isinstance(one, MovingCodes)}
    change_gradient = {"rounding": lambda: by_sign, "means": lambda: by_mean(block)}.get(stage.learns, lambda: None)()
    trained = Trained(block, codebooks=True, others=norms(block) if stage.norms else {})
    squares = [
        float(target_TH[stage.skip :, : walk.width].float().square().mean())
        for target in targets_WTH
        for target_TH in target[: stage.samples]
    ]
    square = sum(squares) / len(squares)
    scale = (square or 1.0) if stage.loss == "relative" else 1.0
    device = walk.device

    def errors(output_BTH: Tensor, rows: Any) -> Tensor:
        ends = [target[rows, stage.skip :, : walk.width].to(device).float() for target in targets_WTH]
        found_BTH = output_BTH[:, stage.skip :, : walk.width].float()
        return torch.stack([F.mse_loss(found_BTH, end_BTH) for end_BTH in ends]).sum()

    mean_error = partial(_mean_error, walk, index, entering_WTH, leaving_WTH, errors)

    def share_of_loss(part: tuple[slice, float]) -> Tensor:
        row, share = part
        return errors(walk.apply(index, block, entering_WTH[row].to(device)), row) * share / scale

    def measure(when: str) -> dict[str, float]:
        found = {when: mean_error(judged(stage))}
        if when == "after":  # of the others, too, it is to be known what leaves the block
            mean_error(batches(stage)[len(judged(stage)) :])
        return found | ({f"held_out_{when}": mean_error(held_out(stage))} if stage.held_out else {})

    decides = "held_out_" if stage.held_out else ""
    found = measure("before") | {"square": square}
    start = found[f"{decides}before"]
    reasons = [] if math.isfinite(start) else [f"the loss was {start} before"]
    while len(reasons) < ATTEMPTS and math.isfinite(start):
        share = 1 / 2 ** len(reasons)
        lr = stage.lr * share
        trained.start()
        epochs = Epochs(index, len(batches(stage)), stage.epochs)
        all_steps = steps(stage, f"{seed} {index}")
        groups = own_rates(stage, block, share)
        apart = {id(parameter) for group in groups for parameter in group.parameters}
        best = Best(trained, start, len(all_steps), lambda: mean_error(held_out(stage)))

        def after_step(step: int, best: Best = best) -> None:
            for one in codes:
                one.move(stage.moves)
            if stage.held_out:
                best.look(step)

        problem = fit(
            [parameter for parameter in trained.parameters if id(parameter) not in apart],
            share_of_loss,
            all_steps,
            lr=lr,
            parts=partial(_windows, block, leaving_WTH.dtype),
            weight_decay=stage.weight_decay,
            schedule=stage.schedule,
            warmup=stage.warmup,
            clip=stage.clip,
            half=leaving_WTH.dtype == torch.float16,
            groups=groups,
            change_gradient=change_gradient,
            watch=epochs.step,
            after=after_step,
        )
        if best.state is not None:
            trained.return_to(best.state)
        unfit = trained.finish()
        problem = problem or unfit
        after = {f"{decides}after": math.nan} if problem else measure("after")
        if after[f"{decides}after"] < start:
            return found | after | {
                "lr": lr, "attempts": len(reasons) + 1, "kept": False, "reasons": reasons,
                "moved": trained.moved(), **codes_moved(codes), "epochs": epochs.found,
            }  # fmt: skip
        trained.restore()
        reasons.append(problem or f"the loss ended at {after[f'{decides}after']:.3e}")
        log.warning("block %d: learning rate %.1e: %s (%.3e before)", index, lr, reasons[-1], start)
    log.warning("block %d keeps the codebooks it had: %s", index, reasons[-1])
    attempts = len(reasons) if math.isfinite(start) else 0
    return found | measure("after") | {
        "lr": None, "attempts": attempts, "kept": True, "reasons": reasons,
        "moved": 0.0, **codes_moved(codes), "epochs": [],
    }  # fmt: skip


def _windows(block: nn.Module, dtype: torch.dtype, rows: Any) -> Iterator[tuple[slice, float]]:
    """The windows of a batch that are this rank's, and their shares of its loss, while weights stay rebuilt."""
    with rebuilt(block, dtype, learning=True):
        yield from own_windows(rows)


@torch.no_grad()
def _mean_error(
    walk: Walk,
    index: int,
    entering_WTH: Tensor,
    leaving_WTH: Tensor,
    errors: Callable[[Tensor, Any], Tensor],
    parts: list[slice],
) -> float:
    """The mean of `errors(output_BTH, rows)` over parts of the windows, whose outputs go into `leaving_WTH`."""

    def error(rows: slice) -> float:
        output_BTH = walk.apply(index, walk.blocks[index], entering_WTH[rows].to(walk.device))
        leaving_WTH[rows] = output_BTH.to(leaving_WTH.device)
        return float(errors(output_BTH, rows)) * len(output_BTH)

    with rebuilt(walk.blocks[index], leaving_WTH.dtype):
        found: float = math.fsum(ranks.each(parts, error))
    spread(leaving_WTH, parts)
    return found / max(1, sum(int(rows.stop - rows.start) for rows in parts))


def own_rates(stage: BlockFinetune, block: nn.Module, share: float) -> list[Group]:
    """What of a block learns at another rate than `lr`, each rate times `share`."""
    weights = [one.weight for one in block.modules() if isinstance(one, LearnedWeights | LearnedSigns)]
    found = [Group(weights, stage.weights_lr * share)] if weights else []
    for one in block.modules():
        if isinstance(one, MovingCodes):
            with torch.no_grad():
                std = float(one(torch.float32).std())
            found.append(Group([one.shift], stage.codes_lr * std * share, betas=PV_BETAS))
    return found


def codes_moved(before: dict[MovingCodes, Tensor]) -> dict[str, float]:
    """The share of sub-vectors whose codes are not those of before; nothing where no codes may move."""
    changed = [(one.unpacked() != codes_MN).any(0) for one, codes_MN in before.items()]
    return {"codes_moved": float(torch.cat(changed).float().mean())} if changed else {}


class Best:
    """The state of a block's training with the least held-out loss so far, if that is less than at the start."""

    def __init__(self, trained: Trained, start: float, steps: int, loss_of: Callable[[], float]) -> None:
        self.state: State | None = None
        self._trained, self._least, self._loss_of = trained, start, loss_of
        self._at = {round(steps * (number + 1) / CHECKS) for number in range(CHECKS)}

    def look(self, step: int) -> None:
        """After a step: take the loss if it is time."""
        if step in self._at and (loss := self._loss_of()) < self._least:
            self._least, self.state = loss, self._trained.state()


class Epochs:
    """The mean loss and gradient norm of each epoch of a block's training; of several, each has a line in the log."""

    def __init__(self, block: int, steps: int, epochs: int) -> None:
        self.found: list[dict[str, float]] = []
        self._block, self._steps, self._epochs = block, steps, epochs
        self._losses: list[float] = []
        self._norms: list[float] = []

    def step(self, loss: float, norm: float) -> None:
        """One more step was made."""
        self._losses.append(loss)
        self._norms.append(norm)
        if len(self._losses) < self._steps:
            return
        numbers = {"loss": sum(self._losses) / self._steps, "gradient": sum(self._norms) / self._steps}
        self.found.append(numbers)
        self._losses, self._norms = [], []
        if self._epochs > 1:
            done = len(self.found)
            log.info(
                "block_finetune  epoch %d/%d of block %d  loss %.3e",
                done, self._epochs, self._block + 1, numbers["loss"],
                extra=for_tracker("block_finetune epochs", numbers, self._block * self._epochs + done),
            )  # fmt: skip


def _apply(stage: BlockFinetune, walk: Walk, index: int, block: nn.Module, entering: Tensor, leaving: Tensor) -> Tensor:
    parts = all_batches(stage)
    for number, rows in enumerate(parts):
        if ranks.mine(number):
            leaving[rows] = walk.apply(index, block, entering[rows].to(walk.device)).to(leaving.device)
    spread(leaving, parts)
    return leaving


def _resumed(work: Blockwise, streams: Streams) -> tuple[list[dict[str, Any]], Tensor, Tensor] | None:
    """What a killed run found so far, and both streams where it stopped; None unless all of it is whole."""
    notes = ranks.agreed(lambda: read_sealed(work.folder / MARK))
    if notes is None:
        return None
    done: list[dict[str, Any]] = notes["done"]
    loaded = streams.load(len(done), notes["hashes"], work.folder)
    if not all(ranks.gathered(loaded is not None)) or not work.numbers.keys() >= set(range(len(done))):
        log.warning("%s: the state of a killed run is not whole: the stage starts anew", work.folder)
        return None
    assert loaded is not None  # gathered
    return done, loaded["student"], loaded.get("original", loaded["student"])


@contextmanager
def _learning(
    stage: BlockFinetune, block: nn.Module, index: int, model: PreTrainedModel, original: Original
) -> Iterator[None]:
    """Put in what learns besides values: dense weights that are rounded anew, or codes that move."""
    if stage.learns in ROUNDED:
        learns = cast(Literal["clipping", "rounding", "weights"], stage.learns)
        with rounding(block, compressed_weights(block, index, model, original), learns):
            yield
    elif stage.codes == "moving":
        with moving(block):
            yield
    else:
        yield


def compressed_weights(block: nn.Module, index: int, model: PreTrainedModel, original: Original) -> dict[str, Tensor]:
    """The dense weights (O, I) in float32 that the compressed layers of block `index` were made of, by name."""
    names = {f"{block_names(model)[index]}.{name}.weight": name for name in compressed(block)}
    return {names[full]: weight_OI.float() for full, weight_OI in original.tensors(list(names))}
