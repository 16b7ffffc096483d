"""What stage block_finetune does: streams through both models, and one block after the other trained between them."""

import logging
import math
import random
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.forms.linear import compressed
from cluscomp.models.original import Original, block_names, norms
from cluscomp.models.walk import Walk
from cluscomp.process import for_tracker
from cluscomp.stages import Job
from cluscomp.stages.block_finetune import ROUNDED, BlockFinetune
from cluscomp.stages.blockwise import Blockwise
from cluscomp.store.records import read_sealed, write_sealed
from cluscomp.train.masters import Trained, by_mean, by_sign, fit, rounding
from cluscomp.train.streams import Streams

log = logging.getLogger(__name__)
MARK = "streams.json"  # which blocks are done, and the hashes of the streams that leave the last of them
ATTEMPTS = 3  # at training a block, each with half the learning rate of the one before


def run(stage: BlockFinetune, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Train block after block; see `BlockFinetune.run`."""
    ids_WT = torch.from_numpy(stage.windows(job.original.tokenizer, job.seed)).to(job.original.device)
    walk, teacher = Walk(model), Walk(job.teacher.model(), job.teacher)
    shape_WTH = (*ids_WT.shape, walk.embed(ids_WT[:1]).shape[2])
    streams = Streams(job.folder, stage.streams, shape_WTH, job.original.dtype, job.original.device)
    student = original = streams.new("student", 0)
    for rows in batches(stage):
        teacher.embed(ids_WT[rows])  # its blocks' arguments
        student[rows] = walk.embed(ids_WT[rows])
    work = Blockwise("block_finetune", job.folder, model)
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
        dense = compressed_weights(stored, index, model, job.original) if stage.learns in ROUNDED else {}
        with rounding(stored, dense, offsets=stage.learns == "rounding") if dense else nullcontext():
            numbers = finetune_block(stage, walk, index, student, targets, leaving, job.seed)
        student = leaving
        done.append(numbers)
        needed = {"student": student} | ({} if stage.target == "same_input" else {"original": original})
        hashes = streams.save(len(done), needed)
        fate = f"attempt {numbers['attempts']}"
        if numbers["kept"]:
            fate = "kept as it was"
        line = f"loss {numbers['before']:.3e} -> {numbers['after']:.3e}"
        line = f"{line}  {fate}" if numbers["reasons"] else line
        work.finish(index, {}, line, **{key: numbers[key] for key in ("before", "after", "attempts")})
        write_sealed(job.folder / MARK, {"done": done, "hashes": hashes})
        streams.drop(but=len(done))
    return {
        "calibration": stage.data.text("calibration").describe(),
        "tokens": ids_WT.numel(),
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

    Outputs and loss are those of what is stored. If a loss or gradient is not finite, or the loss ends no better
    than it began, the block gets back what it had and the learning rate is halved, at most twice; then it keeps
    what it had. Returns the mean squared error `before` and `after`, the target's mean `square`, the `lr` of the
    attempt that counts, the `attempts`, whether the block was `kept` as it was, the `reasons` of failures, how far what
    is stored has `moved` (squared change over squared size), and of each of the `epochs` that count the mean loss that
    was minimised and the mean norm of its gradient.
    """
    block = walk.blocks[index]
    change_gradient = {"rounding": lambda: by_sign, "means": lambda: by_mean(block)}.get(stage.learns, lambda: None)()
    trained = Trained(block, codebooks=True, others=norms(block) if stage.norms else {})
    squares = [float(target_TH.float().square().mean()) for target in targets_WTH for target_TH in target]
    square = sum(squares) / len(squares)
    scale = (square or 1.0) if stage.loss == "relative" else 1.0
    device = walk.device

    def errors(output_BTH: Tensor, rows: Any) -> Tensor:
        ends = [target[rows].to(device).float() for target in targets_WTH]
        return torch.stack([F.mse_loss(output_BTH.float(), end_BTH) for end_BTH in ends]).sum()

    @torch.no_grad()
    def measure() -> float:
        total = 0.0
        for rows in batches(stage):
            output_BTH = walk.apply(index, block, entering_WTH[rows].to(device))
            leaving_WTH[rows] = output_BTH.to(leaving_WTH.device)
            total += float(errors(output_BTH, rows)) * len(output_BTH)
        return total / len(leaving_WTH)

    found = {"before": measure(), "square": square}
    reasons = [] if math.isfinite(found["before"]) else [f"the loss was {found['before']} before"]
    while len(reasons) < ATTEMPTS and math.isfinite(found["before"]):
        lr = stage.lr / 2 ** len(reasons)
        trained.start()
        epochs = Epochs(index, len(batches(stage)), stage.epochs)
        problem = fit(
            trained.parameters,
            lambda rows: errors(walk.apply(index, block, entering_WTH[rows].to(device)), rows) / scale,
            steps(stage, f"{seed} {index}"),
            lr=lr,
            weight_decay=stage.weight_decay,
            schedule=stage.schedule,
            warmup=stage.warmup,
            clip=stage.clip,
            half=leaving_WTH.dtype == torch.float16,
            change_gradient=change_gradient,
            watch=epochs.step,
        )
        unfit = trained.finish()
        problem = problem or unfit
        after = math.nan if problem else measure()
        if after < found["before"]:
            return found | {
                "after": after, "lr": lr, "attempts": len(reasons) + 1, "kept": False, "reasons": reasons,
                "moved": trained.moved(), "epochs": epochs.found,
            }  # fmt: skip
        trained.restore()
        reasons.append(problem or f"the loss ended at {after:.3e}")
        log.warning("block %d: learning rate %.1e: %s (%.3e before)", index, lr, reasons[-1], found["before"])
    log.warning("block %d keeps the codebooks it had: %s", index, reasons[-1])
    after = measure()
    attempts = len(reasons) if math.isfinite(found["before"]) else 0
    return found | {
        "after": after, "lr": None, "attempts": attempts, "kept": True, "reasons": reasons, "moved": 0.0, "epochs": [],
    }  # fmt: skip


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


def batches(stage: BlockFinetune) -> list[slice]:
    """Rows of windows, batch after batch."""
    return [slice(start, start + stage.batch_size) for start in range(0, stage.samples, stage.batch_size)]


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


def _apply(stage: BlockFinetune, walk: Walk, index: int, block: nn.Module, entering: Tensor, leaving: Tensor) -> Tensor:
    for rows in batches(stage):
        leaving[rows] = walk.apply(index, block, entering[rows].to(walk.device)).to(leaving.device)
    return leaving


def _resumed(work: Blockwise, streams: Streams) -> tuple[list[dict[str, Any]], Tensor, Tensor] | None:
    """What a killed run found so far, and both streams where it stopped; None unless all of it is whole."""
    notes = read_sealed(work.folder / MARK)
    if notes is None:
        return None
    done: list[dict[str, Any]] = notes["done"]
    loaded = streams.load(len(done), notes["hashes"])
    if loaded is None or not work.numbers.keys() >= set(range(len(done))):
        log.warning("%s: the state of a killed run is not whole: the stage starts anew", work.folder)
        return None
    return done, loaded["student"], loaded.get("original", loaded["student"])


def compressed_weights(block: nn.Module, index: int, model: PreTrainedModel, original: Original) -> dict[str, Tensor]:
    """The dense weights (O, I) in float32 that the compressed layers of block `index` were made of, by name."""
    names = {f"{block_names(model)[index]}.{name}.weight": name for name in compressed(block)}
    return {names[full]: weight_OI.float() for full, weight_OI in original.tensors(list(names))}
