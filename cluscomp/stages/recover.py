"""Stage recover: the codebooks of all blocks together learn to predict the next token (ClusComp+, paper 3.2.4)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.kernels.work import Work
from cluscomp.plan.cost import worst
from cluscomp.settings import settings
from cluscomp.stages.from_text import TrainsOnText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job


@settings
class Recover(TrainsOnText):
    """End-to-end training of a compressed model; codes stay.

    loss: next-token cross-entropy ("ce", the paper), KL to the original's predictions ("kl"), or their sum ("ce_kl").
    The original is the model before all stages, also after a dense one. For KL its `teacher_top` likeliest tokens are
    kept on disk while the stage runs: 8 bytes a number.

    hidden: weight of a further loss, how far what each block but the last gives points from where the original's does
    (OneBit, arXiv 2402.11295); 0: none. For that 2 bytes of each number of these are kept on disk, too.
    """

    takes: ClassVar[Literal["compressed"]] = "compressed"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    loss: Literal["ce", "kl", "ce_kl"]
    teacher_top: int = Field(ge=1)
    hidden: float = Field(ge=0)
    norms: bool

    def without_effect(self) -> set[str]:
        """What changes no result, and how much is kept of a teacher that is not asked."""
        idle = super().without_effect() | (set() if "kl" in self.loss else {"teacher_top"})
        return idle if self.hidden else idle | {"hidden"}

    def check(self, original: "Original") -> None:
        """See `Stage.check`. Raises InputError for hidden states of a model that has one block alone."""
        super().check(original)
        if self.hidden and getattr(original.config.get_text_config(), "num_hidden_layers", None) == 1:
            raise InputError(
                f"recover.hidden={self.hidden}: {original.folder.name} has one block, and the last one's hidden states "
                "do not count; give recover.hidden=0"
            )

    @property
    def taught(self) -> bool:
        """Whether the original's predictions or hidden states are to be met."""
        return "kl" in self.loss or self.hidden > 0

    def cost(self, outline: "MetaModel") -> "Cost":
        """The compressed model, masters of its codebooks, the blocks' inputs and one block; see `Stage.cost`."""
        if self.norms:
            outline.train_norms()
        trained = outline.codebook_numbers(outline.model)
        work, teaching = Work(), dict[str, float]()
        if self.taught:
            windows = self.samples + self.held_out
            forward = outline.forward(self.batch_size, self.length)
            logits = outline.logits(self.batch_size, self.length)
            work = (forward.work * outline.blocks + logits.work) * (windows / self.batch_size)
            teaching = outline.in_turn | {
                "embedding, head": outline.outside,
                "those of the original, a block": outline.outside + outline.dense_block,
                "original's hidden states": outline.part_of_stream(windows, self.length),
                "original's logits": logits.peak,
            }
        training = self.training_cost(outline, trained, before=work)
        return replace(training, device=worst(training.device, teaching))

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train codebooks, and norms where asked for, in place; codes never change.

        Only codebooks, their optimiser state, the inputs of the blocks and one dense matrix are in memory at once.
        """
        from cluscomp.train.on_text import train_on_text

        train, held_out = self.train_and_held_out(job.original.tokenizer, job.seed)
        found = train_on_text(
            model,
            train,
            held_out,
            self,
            opened=job.opened,
            cross_entropy="ce" in self.loss,
            kl="kl" in self.loss,
            teacher=job.teacher if self.taught else None,
            teacher_top=self.teacher_top,
            hidden=self.hidden,
            norms_too=self.norms,
            folder=job.folder / "training",
            seed=job.seed,
        )
        return self.told(train, held_out) | found
