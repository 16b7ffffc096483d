"""Stage block_finetune: the codebooks of each block learn to reproduce the original block (paper, section 3.3)."""

import logging
import math
import random
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.settings import settings
from cluscomp.stages.from_text import FromText
from cluscomp.store.records import read_sealed, write_sealed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.models.walk import Walk
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job
    from cluscomp.stages.blockwise import Blockwise
    from cluscomp.train.streams import Streams

log = logging.getLogger(__name__)
ROUNDED = ("clipping", "rounding")  # what may be learned so that weights are rounded anew
MARK = "streams.json"  # which blocks are done, and the hashes of the streams that leave the last of them
ATTEMPTS = 3  # at training a block, each with half the learning rate of the one before


@settings
class BlockFinetune(FromText):
    """Block-wise error minimisation: mean squared error between the outputs of the compressed and the original block.

    The compressed block is fed what the compressed model makes of the text. `target` "fp_stream" (the paper) compares
    with what the original model makes of it, "same_input" with the original block fed the same as the compressed one;
    "both" adds the two errors (the paper code's option `aug_loss`). Codes and biases of linear layers stay; `norms`
    lets the block's norms learn, too. `loss` "relative" divides the error by the mean square of the target: the same
    optimum, with gradients of like size in all blocks. `learns` "values": codebooks, or the scales of uniform grids.
    "means": codebooks by plain gradient descent, each centroid by the mean of its weights' gradients (iPQ). On uniform
    grids weights may be rounded anew, from the dense ones: "clipping" learns how far each grid spans (OmniQuant),
    "rounding" also which way each weight is rounded, by the gradient's sign (AutoRound). `order` "fixed" takes the
    windows as they come (the paper code), "shuffled" anew in each epoch. `clip` bounds the norm of the gradient;
    `warmup` is the share of steps in which the learning rate rises. `streams` says where the hidden states are, and
    changes no result. The original block is that of the model before all stages, also after a dense stage, which the
    whole pipeline is to stay close to.
    """

    takes: ClassVar[Literal["compressed"]] = "compressed"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = False
    target: Literal["fp_stream", "same_input", "both"]
    norms: bool
    learns: Literal["values", "means", "clipping", "rounding"]
    loss: Literal["mse", "relative"]
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    order: Literal["fixed", "shuffled"]
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float = Field(ge=0, le=1)
    clip: float | None = Field(gt=0)
    streams: Literal["memory", "disk"]

    def without_effect(self) -> set[str]:
        """Where the streams lie changes no result, nor does `learns` as it was before there was a choice."""
        return {"streams"} | ({"learns"} if self.learns == "values" else set())

    def cost(self, outline: "MetaModel") -> "Cost":
        """The compressed model, the original's frame, streams and the training of one block; see `Stage.cost`."""
        from cluscomp.kernels.work import Work
        from cluscomp.models.original import block_names, blocks
        from cluscomp.plan.cost import Cost, worst
        from cluscomp.train.masters import norms

        if self.norms:
            for name, block in zip(block_names(outline.model), blocks(outline.model)):
                outline.train(f"{name}.{norm}" for norm in norms(block))
        train = outline.training(self.batch_size, self.length)
        once = outline.forward(self.batch_size, self.length)
        self._check_weights(outline)
        trained = outline.codebook_numbers(outline.block)
        sizes = [float(o * i) for o, i in outline.dense.values()]
        of_each = {"clipping": 4.0, "rounding": 12.0}.get(self.learns, 0.0)  # with offsets and their gradients
        rounded = of_each * sum(sizes) + (24.0 * max(sizes) if of_each else 0.0)
        streams = 4 if self.target == "both" else 3
        kept = outline.stream(self.samples, self.length) * (streams if self.streams == "memory" else 0)
        always = {
            "codes and codebooks": outline.stored,
            "embedding, head": outline.outside,
            "those of the original": outline.outside,
            "streams": kept,
        }
        batches = math.ceil(self.samples / self.batch_size)
        work = train.work * (batches * self.epochs) + once.work * (batches * (2 + (streams - 2)))
        work += Work(traffic=40.0 * trained * batches * self.epochs)  # of AdamW
        work += Work(traffic=6.0 * outline.stream(self.samples, self.length))  # hashes and files of streams
        device = worst(
            always | {"a dense block": outline.dense_block, "activations": once.peak},
            always
            | {"one block's training": train.peak, "masters and AdamW's state": 12.0 * trained}
            | {"weights to be rounded": rounded},
            always | {"writing the checkpoint": outline.writing},
            {name: part for name, part in always.items() if name != "streams"} | {"reading": outline.reading},
        )
        relief = "block_finetune.streams=disk or a smaller block_finetune.batch_size"
        read = Work(read=outline.all_numbers * outline.file_bytes + outline.checkpoint_bytes())
        return Cost(device, {}, work * outline.blocks + read, relief)

    def _check_weights(self, outline: "MetaModel") -> None:
        """Raise InputError, naming the layer, if what is to be learned is no part of its stored form."""
        from cluscomp.forms.linear import compressed

        kind = (
            "on uniform grids, such as method=rtn" if self.learns in ROUNDED else "with codebooks, such as method=ipq"
        )
        for name, layer in compressed(outline.model).items():
            if self.learns not in layer.stored.learns:
                raise InputError(
                    f"block_finetune.learns={self.learns} needs a method {kind}: {name} is a "
                    f"{type(layer.stored).__name__}"
                )

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train block after block; the dense original is in memory one block at a time, beside the streams.

        After each block it and the streams are written, so a killed run goes on from there. Returns what text was used
        and, for each block, what `finetune_block` says.
        """
        import torch

        from cluscomp.models.walk import Walk
        from cluscomp.stages.blockwise import Blockwise
        from cluscomp.train.masters import rounding
        from cluscomp.train.streams import Streams

        ids_WT = torch.from_numpy(self.windows(job.original.tokenizer, job.seed)).to(job.original.device)
        walk, teacher = Walk(model), Walk(job.teacher.model(), job.teacher)
        shape_WTH = (*ids_WT.shape, walk.embed(ids_WT[:1]).shape[2])
        streams = Streams(job.folder, self.streams, shape_WTH, job.original.dtype, job.original.device)
        student = original = streams.new("student", 0)
        for rows in self._batches():
            teacher.embed(ids_WT[rows])  # its blocks' arguments
            student[rows] = walk.embed(ids_WT[rows])
        work = Blockwise("block_finetune", job.folder, model)
        done, student, original = self._resumed(work, streams) or ([], student, original)
        work.only_first(len(done))
        for index, stored in work:
            targets: list[Tensor] = []
            with torch.no_grad(), teacher.block(index) as block:
                if self.target != "same_input":
                    original = self._apply(teacher, index, block, original, streams.new("original", index + 1))
                    targets.append(original)
                if self.target != "fp_stream":
                    targets.append(self._apply(teacher, index, block, student, streams.new("target", index + 1)))
            leaving = streams.new("student", index + 1)
            dense = compressed_weights(stored, index, model, job.original) if self.learns in ROUNDED else {}
            with rounding(stored, dense, offsets=self.learns == "rounding") if dense else nullcontext():
                numbers = self.finetune_block(walk, index, student, targets, leaving, job.seed)
            student = leaving
            done.append(numbers)
            needed = {"student": student} | ({} if self.target == "same_input" else {"original": original})
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
            "calibration": self.data.text("calibration").describe(),
            "tokens": ids_WT.numel(),
            "blocks": done,
            "kept": sum(numbers["kept"] for numbers in done),
        }

    def finetune_block(
        self,
        walk: "Walk",
        index: int,
        entering_WTH: "Tensor",
        targets_WTH: "list[Tensor]",
        leaving_WTH: "Tensor",
        seed: int,
    ) -> dict[str, Any]:
        """Train one block; `leaving_WTH` (W, T, H) receives its outputs. Works on float32 masters.

        Outputs and loss are those of what is stored. If a loss or gradient is not finite, or the loss ends no better
        than it began, the block gets back what it had and the learning rate is halved, at most twice; then it keeps
        what it had. Returns the mean squared error `before` and `after`, the target's mean `square`, the `lr` of the
        attempt that counts, the `attempts`, whether the block was `kept` as it was, the `reasons` of failures, and how
        far what is stored has `moved` (squared change over squared size).
        """
        import torch
        import torch.nn.functional as F

        from cluscomp.train.masters import Trained, by_mean, by_sign, fit, norms

        block = walk.blocks[index]
        bend = {"rounding": lambda: by_sign, "means": lambda: by_mean(block)}.get(self.learns, lambda: None)()
        trained = Trained(block, codebooks=True, others=norms(block) if self.norms else {})
        squares = [float(target_TH.float().square().mean()) for target in targets_WTH for target_TH in target]
        square = sum(squares) / len(squares)
        scale = (square or 1.0) if self.loss == "relative" else 1.0
        device = walk.device

        def errors(output_BTH: "Tensor", rows: Any) -> "Tensor":
            ends = [target[rows].to(device).float() for target in targets_WTH]
            return torch.stack([F.mse_loss(output_BTH.float(), end_BTH) for end_BTH in ends]).sum()

        @torch.no_grad()
        def measure() -> float:
            total = 0.0
            for rows in self._batches():
                output_BTH = walk.apply(index, block, entering_WTH[rows].to(device))
                leaving_WTH[rows] = output_BTH.to(leaving_WTH.device)
                total += float(errors(output_BTH, rows)) * len(output_BTH)
            return total / len(leaving_WTH)

        found = {"before": measure(), "square": square}
        reasons = [] if math.isfinite(found["before"]) else [f"the loss was {found['before']} before"]
        while len(reasons) < ATTEMPTS and math.isfinite(found["before"]):
            lr = self.lr / 2 ** len(reasons)
            trained.start()
            problem = fit(
                trained.parameters,
                lambda rows: errors(walk.apply(index, block, entering_WTH[rows].to(device)), rows) / scale,
                self._steps(f"{seed} {index}"),
                lr=lr,
                weight_decay=self.weight_decay,
                schedule=self.schedule,
                warmup=self.warmup,
                clip=self.clip,
                half=leaving_WTH.dtype == torch.float16,
                bend=bend,
            )
            unfit = trained.finish()
            problem = problem or unfit
            after = math.nan if problem else measure()
            if after < found["before"]:
                return found | {
                    "after": after, "lr": lr, "attempts": len(reasons) + 1, "kept": False, "reasons": reasons,
                    "moved": trained.moved(),
                }  # fmt: skip
            trained.restore()
            reasons.append(problem or f"the loss ended at {after:.3e}")
            log.warning("block %d: learning rate %.1e: %s (%.3e before)", index, lr, reasons[-1], found["before"])
        log.warning("block %d keeps the codebooks it had: %s", index, reasons[-1])
        after = measure()
        attempts = len(reasons) if math.isfinite(found["before"]) else 0
        kept = {"after": after, "lr": None, "attempts": attempts, "kept": True, "reasons": reasons, "moved": 0.0}
        return found | kept

    def _batches(self) -> list[slice]:
        """Rows of windows, batch after batch."""
        return [slice(start, start + self.batch_size) for start in range(0, self.samples, self.batch_size)]

    def _steps(self, seed: str) -> "list[Any]":
        """The rows of the batches of all epochs, in the order they are taken."""
        import torch

        if self.order == "fixed":
            return self._batches() * self.epochs
        steps: list[Tensor] = []
        rng = random.Random(seed)
        for _ in range(self.epochs):
            rows = rng.sample(range(self.samples), self.samples)
            steps.extend(torch.tensor(rows).split(self.batch_size))
        return steps

    def _apply(self, walk: "Walk", index: int, block: "nn.Module", entering: "Tensor", leaving: "Tensor") -> "Tensor":
        for rows in self._batches():
            leaving[rows] = walk.apply(index, block, entering[rows].to(walk.device)).to(leaving.device)
        return leaving

    def _resumed(self, work: "Blockwise", streams: "Streams") -> "tuple[list[dict[str, Any]], Tensor, Tensor] | None":
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


def compressed_weights(
    block: "nn.Module", index: int, model: "PreTrainedModel", original: "Original"
) -> "dict[str, Tensor]":
    """The dense weights (O, I) in float32 that the compressed layers of block `index` were made of, by name."""
    from cluscomp.forms.linear import compressed
    from cluscomp.models.original import block_names

    names = {f"{block_names(model)[index]}.{name}.weight": name for name in compressed(block)}
    return {names[full]: weight_OI.float() for full, weight_OI in original.tensors(list(names))}
