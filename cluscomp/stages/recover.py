"""Stage recover: the codebooks of all blocks together learn to predict the next token (ClusComp+, paper 3.2.4)."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned
from cluscomp.data.texts import Source, Tokenizer, calibration_windows, split, test_windows
from cluscomp.process import processes, rank
from cluscomp.settings import settings
from cluscomp.train.steps import LOGITS, Steps

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.models.predictions import Teacher
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

    def _windows(self, tokenizer: Tokenizer, seed: int) -> "tuple[Tensor, Tensor]":
        """Windows (W, T) to train on, in their order, and held-out ones."""
        import torch

        text, held_out = split(self.data.text("calibration"), HELD_OUT_SHARE)
        train = calibration_windows(text, tokenizer, samples=self._samples, length=self.length, seed=seed)
        scored = test_windows(held_out, tokenizer, length=self.length, limit=self.held_out)
        return torch.from_numpy(train), torch.from_numpy(scored)

    def cost(self, outline: "MetaModel") -> "Cost":
        """The compressed model, masters of its codebooks, the blocks' inputs and one block; see `Stage.cost`."""
        from cluscomp.kernels.work import Work
        from cluscomp.plan.meta import end_to_end
        from cluscomp.train.masters import norms

        if self.norms:
            outline.train(norms(outline.model))
        trained = outline.codebook_numbers(outline.model)
        teaching = Work()
        if "kl" in self.loss:
            windows = (self._samples + self.held_out) / self.batch_size
            forward, logits = (
                outline.forward(self.batch_size, self.length),
                outline.logits(self.batch_size, self.length),
            )
            teaching = (forward.work * outline.blocks + logits.work) * windows
        return end_to_end(
            outline,
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
        import torch

        from cluscomp.train.masters import Trained, norms
        from cluscomp.train.whole import Objective, train_whole

        train, held_out = self._windows(job.original.tokenizer, job.seed)
        teacher = self._teacher(job, torch.cat([train, held_out])) if "kl" in self.loss else None
        trained = Trained(model, codebooks=True, others=norms(model) if self.norms else {})
        objective = Objective(
            model, trained.parameters, cross_entropy="ce" in self.loss, kl="kl" in self.loss, ids_BT=held_out[:1]
        )
        found = train_whole(
            model,
            trained,
            objective,
            _Windows(train, teacher, 0),
            _Windows(held_out, teacher, len(train)),
            self,
            tokens=train.numel(),
            name="recover",
            folder=job.folder / "training",
            seed=job.seed,
        )
        text = self.data.text("calibration").describe()
        return {"calibration": text, "tokens": train.numel(), "held_out_tokens": held_out.numel()} | found

    def _teacher(self, job: "Job", windows_WT: "Tensor") -> "Teacher":
        from cluscomp.models.predictions import Teacher
        from cluscomp.models.walk import Walk

        teacher = Teacher(job.folder / "training", windows_WT, self.teacher_top)
        walk = Walk(job.teacher.model(), job.teacher)
        teacher.write(walk, batch_size=self.batch_size, rank=rank(), world=processes())
        return teacher


class _Windows:
    """Windows (W, T) as training examples, with the teacher's predictions from its window `first` on."""

    def __init__(self, windows_WT: "Tensor", teacher: "Teacher | None", first: int) -> None:
        self.windows_WT, self.teacher, self.first = windows_WT, teacher, first

    def __len__(self) -> int:
        return len(self.windows_WT)

    def __getitem__(self, index: int) -> "dict[str, Tensor]":
        import torch.nn.functional as F

        from cluscomp.train.whole import IGNORED

        ids_T = self.windows_WT[index]
        predictions = {} if self.teacher is None else self.teacher.window(self.first + index)
        return {"input_ids": ids_T, "labels": F.pad(ids_T[1:], (0, 1), value=IGNORED)} | predictions
