"""Stage block_finetune: the codebooks of each block learn to reproduce the original block (paper, section 3.2)."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cluscomp.data.texts import Tokenizer, calibration_windows, split
from cluscomp.errors import InputError
from cluscomp.kernels.work import Work
from cluscomp.plan.cost import Cost, worst
from cluscomp.settings import settings
from cluscomp.stages.from_text import HELD_OUT_SHARE, FromText

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from cluscomp.forms.codebook import CodebookWeight
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job

ROUNDED = ("clipping", "rounding", "weights")  # what may be learned so that weights are rounded anew
JUDGED = 16  # windows whose loss tells whether a block got better; to walk all of them before is an eighth of the time
CHECKS = 4  # of the held-out loss while a block is trained, at even distances


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
    "rounding" also which way each weight is rounded, by the gradient's sign (AutoRound), "weights" the dense weights
    themselves, at the rate `weights_lr`, with scales and zeros at `lr` (EfficientQAT); for OneBit the dense weights
    behind the signs learn too; their rate is relative to the stored scale. `order` "fixed" takes the windows as they
    come (the paper code), "shuffled" anew in each epoch. `clip` bounds the norm of the gradient; `warmup` is the share
    of steps in which the learning rate rises. `streams` says where the hidden states are, and changes no result. The
    original block is that of the model before all stages, also after a dense stage, which the whole pipeline is to
    stay close to.

    `codes` "moving" (PV-Tuning): beside the codebooks each sub-vector learns where it wants to be, at the rate
    `codes_lr` in units of its weight's standard deviation, and after each step the share `moves` of them that want it
    most take the nearest centroids. `skip` leaves the first tokens of every window out of the loss: the first one draws
    much attention, and its large outputs count most of a squared error. With `held_out` so many windows of the end of
    the calibration text, of which no step learns, decide which state of the training is kept, if any.
    """

    takes: ClassVar[Literal["compressed"]] = "compressed"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    target: Literal["fp_stream", "same_input", "both"]
    norms: bool
    learns: Literal["values", "means", "clipping", "rounding", "weights"]
    codes: Literal["fixed", "moving"]
    moves: float = Field(ge=0, le=1)
    codes_lr: float = Field(gt=0)
    weights_lr: float = Field(gt=0)
    held_out: int = Field(ge=0)
    skip: int = Field(ge=0)
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

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.codes == "moving" and self.learns != "values":
            raise ValueError(f"codes=moving needs learns=values (here {self.learns})")
        if self.skip >= self.length:
            raise ValueError(f"skip={self.skip} leaves nothing of windows of {self.length} tokens")
        return self

    def without_effect(self) -> set[str]:
        """Where the streams lie changes no result, nor do choices as things were before there was one."""
        idle = {"streams"}
        idle |= {"learns"} if self.learns == "values" else set()
        idle |= {"weights_lr"} if self.learns != "weights" else set()
        idle |= {"codes", "moves", "codes_lr"} if self.codes == "fixed" else set()
        return idle | {name for name in ("held_out", "skip") if getattr(self, name) == 0}

    def windows(self, tokenizer: Tokenizer, seed: int) -> np.ndarray:
        """The windows as token ids, (W, T) int64: those of the steps, then those held out. Raises InputError."""
        if self.held_out == 0:
            return super().windows(tokenizer, seed)
        parts = zip(split(self.data.text("calibration"), HELD_OUT_SHARE), (self.samples, self.held_out))
        return np.concatenate(
            [
                calibration_windows(text, tokenizer, samples=samples, length=self.length, seed=seed)
                for text, samples in parts
            ]
        )

    def cost(self, outline: "MetaModel") -> Cost:
        """The compressed model, the original's frame, streams and the training of one block; see `Stage.cost`."""
        if self.norms:
            outline.train_norms(outside=False)
        train, own = outline.training(1, self.length), math.ceil(self.batch_size / outline.ranks)
        once = outline.forward(self.batch_size, self.length)
        self._check_weights(outline)
        trained = outline.codebook_numbers(outline.block)
        sizes = [float(o * i) for o, i in outline.dense.values()]
        of_each = {"clipping": 4.0, "rounding": 12.0, "weights": 20.0}.get(self.learns, 0.0)  # with what it learns by
        of_each = 16.0 if self.codes == "moving" else of_each
        sums = 8.0 if own > 1 else 0.0  # of a number's gradients over the windows of a batch
        besides = (of_each + sums) * sum(sizes) if of_each else 0.0
        besides += 24.0 * (sum(sizes) if outline.rebuilt else max(sizes)) if of_each else 0.0
        besides += (4.0 * trained + (4.0 * sum(sizes) if of_each else 0.0)) if self.held_out else 0.0  # the best state
        streams = 4 if self.target == "both" else 3
        windows = self.samples + self.held_out
        kept = outline.stream(windows, self.length) * (streams if self.streams == "memory" else 0)
        always = outline.in_turn | {
            "embedding, head": outline.outside,
            "those of the original": outline.outside,
            "streams": kept,
        }
        batches, scored = math.ceil(self.samples / self.batch_size), math.ceil(self.held_out / self.batch_size)
        before = min(batches, math.ceil(JUDGED / self.batch_size))
        passes = batches * (streams - 1) + before + scored * (streams + CHECKS)
        work = train.work * (own * batches * self.epochs) + once.work * (passes / outline.ranks)
        apart = sum(sizes) if self.learns == "weights" or self.codes == "moving" else 0.0  # at a rate of their own
        work += Work(traffic=40.0 * (trained + apart) * batches * self.epochs)  # of AdamW
        if self.learns in ROUNDED:
            work += Work(traffic=60.0 * sum(sizes) * batches * self.epochs)  # of rounding, twice a step, and back
        if self.codes == "moving":
            work += self._moving(outline, batches * self.epochs)
        files = outline.stream(windows, self.length)  # of two streams, which are hashed and written by the processor
        work += Work(read=4.0 * files) if outline.device == "cuda" else Work(traffic=6.0 * files)
        here = outline.device == "cpu"
        device = worst(
            always | {"a dense block": outline.dense_block, "activations": once.peak},
            always
            | {"one block's training": train.peak, "masters and AdamW's state": (12.0 + sums) * trained}
            | {"dense weights": outline.rebuilt, "what learns besides": besides},
            always | (outline.in_the_end if here else {}) | {"writing the checkpoint": outline.writing},
            {name: part for name, part in always.items() if name != "streams"} | {"reading": outline.reading},
        )
        relief = "block_finetune.streams=disk or a smaller block_finetune.batch_size"
        read = Work(read=outline.all_numbers * outline.file_bytes + outline.checkpoint_bytes())
        return Cost(device, {} if here else outline.in_the_end, work * outline.blocks + read, relief)

    def _moving(self, outline: "MetaModel", steps: int) -> Work:
        """Of all layers of a block: sorting their shifts out, and the nearest centroids of those that may move."""
        work = Work()
        for one in codebooks(outline.block):
            number, size, dim = one.codebooks.shape
            tried = self.moves * one.num_codes * number * size
            work += Work(flops=2.0 * tried * dim, traffic=one.num_codes * (8.0 * dim + 16.0 * number))
        return work * steps

    def _check_weights(self, outline: "MetaModel") -> None:
        """Raise InputError, naming the layer, if what is to be learned is no part of its stored form."""
        kind = (
            "on uniform grids, such as method=rtn" if self.learns in ROUNDED else "with codebooks, such as method=ipq"
        )
        kind += ", or of signs, method=onebit" if self.learns == "weights" else ""
        for name, stored in outline.forms().items():
            if self.learns not in stored.learns:
                raise InputError(
                    f"block_finetune.learns={self.learns} needs a method {kind}: {name} is a {type(stored).__name__}"
                )
            if self.codes == "moving" and not codebooks(stored):
                raise InputError(
                    f"block_finetune.codes=moving needs a method with codebooks: {name} is a {type(stored).__name__}"
                )

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train block after block; the dense original is in memory one block at a time, beside the streams.

        After each block it and the streams are written, so a killed run goes on from there. Returns what text was used
        and, for each block, what `block_finetuning.finetune_block` says.
        """
        from cluscomp.stages.block_finetuning import run

        return run(self, model, job)


def codebooks(module: "nn.Module") -> "list[CodebookWeight]":
    """All codebook weights in a form or block."""
    from cluscomp.forms.codebook import CodebookWeight

    return [one for one in module.modules() if isinstance(one, CodebookWeight)]
