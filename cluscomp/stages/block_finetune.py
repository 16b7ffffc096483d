"""Stage block_finetune: the codebooks of each block learn to reproduce the original block (paper, section 3.3)."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.kernels.work import Work
from cluscomp.plan.cost import Cost, worst
from cluscomp.settings import settings
from cluscomp.stages.from_text import FromText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job

ROUNDED = ("clipping", "rounding")  # what may be learned so that weights are rounded anew


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

    def cost(self, outline: "MetaModel") -> Cost:
        """The compressed model, the original's frame, streams and the training of one block; see `Stage.cost`."""
        if self.norms:
            outline.train_norms(outside=False)
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
        files = outline.stream(
            self.samples, self.length
        )  # of two streams, which are hashed and written by the processor
        work += Work(read=4.0 * files) if outline.device == "cuda" else Work(traffic=6.0 * files)
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
        kind = (
            "on uniform grids, such as method=rtn" if self.learns in ROUNDED else "with codebooks, such as method=ipq"
        )
        for name, stored in outline.forms().items():
            if self.learns not in stored.learns:
                raise InputError(
                    f"block_finetune.learns={self.learns} needs a method {kind}: {name} is a {type(stored).__name__}"
                )

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train block after block; the dense original is in memory one block at a time, beside the streams.

        After each block it and the streams are written, so a killed run goes on from there. Returns what text was used
        and, for each block, what `block_finetuning.finetune_block` says.
        """
        from cluscomp.stages.block_finetuning import run

        return run(self, model, job)
