"""Stage finetune: the compressed model learns a task (paper, section 4.3), or the original does, to compare with."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, InstanceOf

from cluscomp.data.instructions import Encoded, Instructions, Tokens
from cluscomp.data.overlap import Learned
from cluscomp.data.texts import Tokenizer
from cluscomp.errors import InputError
from cluscomp.process import processes
from cluscomp.settings import settings
from cluscomp.train.steps import LOGITS, Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job
    from cluscomp.train.masters import Trained


@settings
class _Task(Steps):
    """`epochs` over the examples of `instructions`, cut to `length` tokens, but for `held_out` of them, drawn by seed.

    Of the others at most `examples` are trained on (null: all). Only answers count. The held-out examples are scored
    before and after, and training that does not lower their loss is taken back. Examples that do not fill a last step
    are left out.
    """

    distributed: ClassVar[bool] = True
    instructions: InstanceOf[Instructions]
    length: int = Field(ge=2)
    examples: int | None = Field(ge=1)
    epochs: int = Field(ge=1)
    held_out: int = Field(ge=1)

    def learns_from(self) -> Learned:
        """The examples it trains on, each of them once."""
        told = self.instructions

        def windows(tokenizer: Tokenizer, seed: int) -> list[list[int]]:
            _, train, _ = self._examples(tokenizer, seed)
            return list({id(one): one.ids for one in train}.values())

        return Learned(told.name, told.domain, told.fingerprint(), windows)

    def check(self, original: "Original") -> None:
        """Encode the examples. Raises InputError if they are too few, of another form, or too long for the model."""
        self.check_processes(processes())
        original.check_length("finetune.length", self.length)
        self._examples(original.tokenizer, seed=0)

    def _examples(self, tokenizer: Tokenizer, seed: int) -> tuple[Encoded, list[Tokens], list[Tokens]]:
        """All examples, those of all steps in their order, and those held out."""
        encoded = self.instructions.encode(tokenizer, self.length)
        rng = random.Random(seed)
        shuffled = rng.sample(encoded.examples, len(encoded.examples))
        train, held_out = shuffled[self.held_out :][: self.examples], shuffled[: self.held_out]
        steps = len(train) * self.epochs // self.of_a_step
        if steps == 0:
            raise InputError(
                f"{self.instructions.name}: {len(encoded.examples)} examples (and {encoded.dropped} without an answer "
                f"in their first {self.length} tokens) are too few for finetune.held_out={self.held_out}, "
                f"finetune.examples={self.examples} and a step of {self.of_a_step}"
            )
        order = [one for _ in range(self.epochs) for one in rng.sample(train, len(train))]
        return encoded, order[: steps * self.of_a_step], held_out

    def _cost(self, outline: "MetaModel", trained: float, by_example: bool) -> "Cost":
        """As whole-model training on `examples` of full length; of all (null), whose number is not known, at least.

        Raises InputError if so many ranks cannot share a batch.
        """
        self.check_processes(outline.ranks)
        examples = (self.examples or 0) * self.epochs
        together, state = self.own(outline.ranks), 16.0
        if by_example:
            together = self.together(outline.device, 1, outline.ranks)  # the shorter they are, the more
            state = self.state(together, outline.ranks)
        cost = outline.end_to_end(
            together=together,
            of_a_step=self.of_a_step,
            length=self.length,
            examples=examples,
            held_out=self.held_out,
            trained=trained,
            state=state * trained,
            logits=LOGITS[outline.device],
            again=self.gradient_checkpointing,
        )
        return replace(cost, least=self.examples is None)

    def _train(
        self, model: "PreTrainedModel", job: "Job", learns: "Callable[[], Trained]", by_example: bool
    ) -> dict[str, Any]:
        from cluscomp.train.on_answers import train_on_answers

        encoded, train, held_out = self._examples(job.original.tokenizer, job.seed)
        found = train_on_answers(
            model, learns, train, held_out, self,
            by_example=by_example, opened=job.opened, folder=job.folder / "training", seed=job.seed,
        )  # fmt: skip
        return {
            "instructions": self.instructions.name,
            "examples": len(encoded.examples),
            "truncated": encoded.truncated,
            "dropped": encoded.dropped,
        } | found


@settings
class Finetune(_Task):
    """Finetuning of a compressed model; codes never change.

    trainable: "codebooks" (the paper; with `norms` the weights of norms, too), or "lora": adapters of `rank` over all
    compressed layers, scaled by `alpha`/`rank`, stored beside the model in 16 bits. `start`: adapters begin at "zero",
    or "loftq", with what is nearest to the error of the compressed weights (LoftQ's first round; what is below stays).
    """

    takes: ClassVar[Literal["compressed"]] = "compressed"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    shards: ClassVar[bool] = True
    trainable: Literal["codebooks", "lora"]
    norms: bool
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    start: Literal["zero", "loftq"]

    def without_effect(self) -> set[str]:
        """How often the state is written; and without adapters, their settings."""
        idle = super().without_effect() | ({"start"} if self.start == "zero" else set())
        return idle | (set() if self.trainable == "lora" else {"rank", "alpha", "start"})

    def cost(self, outline: "MetaModel") -> "Cost":
        """See `Stage.cost`; adapters' activations are left out."""
        if self.norms:
            outline.train_norms()
        trained = float(outline.codebook_numbers(outline.model))
        if self.trainable == "lora":
            trained = outline.add_adapters(self.rank)
        return self._cost(outline, trained, by_example=True)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train codebooks or adapters in place; returns losses, counts and deployed bytes."""
        from cluscomp.train.on_answers import with_adapters, with_codebooks

        if self.trainable == "codebooks":
            learns = partial(with_codebooks, model, norms_too=self.norms)
        else:
            dense = job.original if self.start == "loftq" else None
            learns = partial(
                with_adapters, model, norms_too=self.norms, rank=self.rank, alpha=self.alpha, dense=dense, seed=job.seed
            )
        return self._train(model, job, learns, by_example=True)


@settings
class FullFinetune(_Task):
    """Finetuning of all parameters of the original, as float32 masters: what the others are compared with.

    It leaves a checkpoint of ours, in which no layer is compressed; so none can be compressed after it.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["compressed"]] = "compressed"

    def cost(self, outline: "MetaModel") -> "Cost":
        """As training of all parameters; see `Stage.cost`."""
        return self._cost(outline, outline.all_numbers, by_example=False)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Load all blocks and train every parameter in place; returns losses, counts and deployed bytes."""
        from cluscomp.train.on_answers import with_everything

        return self._train(model, job, partial(with_everything, model, job.original), by_example=False)
