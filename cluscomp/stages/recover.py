"""Stage recover: the codebooks of all blocks together learn to predict the next token (ClusComp+, paper 3.2.4)."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned
from cluscomp.data.texts import Source, Tokenizer, calibration_windows, split, test_windows
from cluscomp.kernels.work import Work
from cluscomp.settings import settings
from cluscomp.train.steps import LOGITS, Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job

HELD_OUT_SHARE = 0.1  # of the calibration text's characters, from its end


@settings
class Recover(Steps):
    """End-to-end training on `tokens` tokens of the calibration text in random windows of `length`; codes stay.

    loss: next-token cross-entropy ("ce", the paper), KL to the original's predictions ("kl"), or their sum ("ce_kl").
    The original is the model before all stages, also after a dense one. For KL its `teacher_top` likeliest tokens are
    kept on disk while the stage runs: 8 bytes a number. The end of the calibration text is held out: `held_out` windows
    of it are scored before and after, and training that does not lower that loss is taken back.
    """

    takes: ClassVar[Literal["compressed"]] = "compressed"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = True
    data: InstanceOf[Source]
    tokens: int = Field(ge=1)
    length: int = Field(ge=2)
    loss: Literal["ce", "kl", "ce_kl"]
    teacher_top: int = Field(ge=1)
    norms: bool
    held_out: int = Field(ge=1)

    def __post_init__(self) -> None:
        """Raises ValueError if the tokens do not make one step."""
        if self._samples == 0:
            raise ValueError(
                f"tokens={self.tokens} do not make one step of {self.accumulation} x {self.batch_size} windows "
                f"of {self.length} tokens"
            )

    @property
    def _samples(self) -> int:
        """Windows of all steps; what is left of the tokens is not used."""
        return self.tokens // self.length // self.of_a_step * self.of_a_step

    def learns_from(self) -> Learned:
        """The windows it trains on."""
        text = self.data.text("calibration")
        return Learned(
            text.name, self.data.domain, text.sha256, lambda tokenizer, seed: self._windows(tokenizer, seed)[0].tolist()
        )

    def without_effect(self) -> set[str]:
        """How often the state is written, and how much is kept of a teacher that is not asked."""
        return {"save_every"} if "kl" in self.loss else {"save_every", "teacher_top"}

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError if the text is too short or a window longer than the model takes."""
        self.check_processes("recover")
        original.check_length("recover.length", self.length)
        self._windows(original.tokenizer, seed=0)

    def _windows(self, tokenizer: Tokenizer, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows (W, T) to train on, in their order, and held-out ones."""
        text, held_out = split(self.data.text("calibration"), HELD_OUT_SHARE)
        train = calibration_windows(text, tokenizer, samples=self._samples, length=self.length, seed=seed)
        scored = test_windows(held_out, tokenizer, length=self.length, limit=self.held_out)
        return train, scored

    def cost(self, outline: "MetaModel") -> "Cost":
        """The compressed model, masters of its codebooks, the blocks' inputs and one block; see `Stage.cost`."""
        if self.norms:
            outline.train_norms()
        trained = outline.codebook_numbers(outline.model)
        teaching = Work()
        if "kl" in self.loss:
            windows = (self._samples + self.held_out) / self.batch_size
            forward, logits = (
                outline.forward(self.batch_size, self.length),
                outline.logits(self.batch_size, self.length),
            )
            teaching = (forward.work * outline.blocks + logits.work) * windows
        return outline.end_to_end(
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            length=self.length,
            examples=self._samples,
            held_out=self.held_out,
            trained=trained,
            logits=LOGITS[outline.device],
            before=teaching,
        )

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train codebooks, and norms where asked for, in place; codes never change.

        Only codebooks, their optimiser state, the inputs of the blocks and one dense matrix are in memory at once.
        """
        from cluscomp.train.on_text import train_on_text

        train, held_out = self._windows(job.original.tokenizer, job.seed)
        found = train_on_text(
            model,
            train,
            held_out,
            self,
            cross_entropy="ce" in self.loss,
            teacher=job.teacher if "kl" in self.loss else None,
            teacher_top=self.teacher_top,
            norms_too=self.norms,
            folder=job.folder / "training",
            seed=job.seed,
        )
        text = self.data.text("calibration").describe()
        return {"calibration": text, "tokens": train.size, "held_out_tokens": held_out.size} | found
