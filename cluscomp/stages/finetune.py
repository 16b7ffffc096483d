"""Stage finetune: the compressed model learns a task (paper, section 4.3), or the original does, to compare with."""

import random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, InstanceOf

from cluscomp.data.instructions import Encoded, Instructions, Tokens
from cluscomp.data.overlap import Learned
from cluscomp.data.texts import Tokenizer
from cluscomp.errors import InputError
from cluscomp.settings import settings
from cluscomp.train.steps import LOGITS, Steps

if TYPE_CHECKING:
    from torch import Tensor
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
        self.check_processes("finetune")
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

    def _cost(self, outline: "MetaModel", trained: float, masters: bool) -> "Cost":
        """As whole-model training on `examples` of full length; the work of all (null) is not known and not counted."""
        from cluscomp.plan.meta import end_to_end

        examples = (self.examples or 0) * self.epochs
        return end_to_end(
            outline,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            length=self.length,
            examples=examples,
            held_out=self.held_out,
            trained=trained,
            logits=LOGITS[outline.device],
            masters=masters,
        )

    def _train(self, model: "PreTrainedModel", job: "Job", trained: "Trained") -> dict[str, Any]:
        from cluscomp.forms.layers import size_of
        from cluscomp.train.whole import Objective, train_whole

        encoded, train, held_out = self._examples(job.original.tokenizer, job.seed)
        first = _Answers(held_out)[0]["input_ids"][None]
        found = train_whole(
            model,
            trained,
            Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=first),
            _Answers(train),
            _Answers(held_out),
            self,
            tokens=sum(len(one.ids) for one in train),
            name="finetune",
            folder=job.folder / "training",
            seed=job.seed,
        )
        return {
            "instructions": self.instructions.name,
            "examples": len(encoded.examples),
            "truncated": encoded.truncated,
            "dropped": encoded.dropped,
            "tokens": sum(len(one.ids) for one in train),
            "deployed_bytes": sum(size_of(model).ledger.values()) // 8,
        } | found


@settings
class Finetune(_Task):
    """Finetuning of a compressed model; codes never change.

    trainable: "codebooks" (the paper; with `norms` the weights of norms, too), or "lora": adapters of `rank` over all
    compressed layers, scaled by `alpha`/`rank`, stored beside the model in 16 bits.
    """

    takes: ClassVar[Literal["compressed"]] = "compressed"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    trainable: Literal["codebooks", "lora"]
    norms: bool
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)

    def without_effect(self) -> set[str]:
        """How often the state is written; and without adapters, their settings."""
        return super().without_effect() | (set() if self.trainable == "lora" else {"rank", "alpha"})

    def cost(self, outline: "MetaModel") -> "Cost":
        """See `Stage.cost`; adapters' activations are left out."""
        from cluscomp.train.masters import norms

        if self.norms:
            outline.train(norms(outline.model))
        trained = outline.codebook_numbers(outline.model)
        if self.trainable == "lora":
            trained = self.rank * outline.blocks * sum(o + i for o, i in outline.dense.values())
        return self._cost(outline, trained, masters=True)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Train codebooks or adapters in place; returns losses, counts and deployed bytes."""
        from cluscomp.forms import adapters
        from cluscomp.train.masters import Trained, norms

        others = norms(model) if self.norms else {}
        if self.trainable == "lora":
            adapters.add(model, rank=self.rank, alpha=self.alpha, seed=job.seed)
            others |= adapters.parameters(model)
        return self._train(model, job, Trained(model, codebooks=self.trainable == "codebooks", others=others))


@settings
class FullFinetune(_Task):
    """Finetuning of all parameters of the original in the dtype it computes in: what the others are compared with.

    It leaves a checkpoint of ours, in which no layer is compressed; so none can be compressed after it.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["compressed"]] = "compressed"

    def cost(self, outline: "MetaModel") -> "Cost":
        """As training of all parameters; see `Stage.cost`."""
        return self._cost(outline, outline.all_numbers, masters=False)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Load all blocks and train every parameter in place; returns losses, counts and deployed bytes."""
        from cluscomp.models.original import blocks
        from cluscomp.train.masters import Trained

        for index in range(len(blocks(model))):
            job.original.load_block(model, index)
        others = dict(model.named_parameters())
        return self._train(model, job, Trained(model, codebooks=False, others=others, masters=False))


class _Answers:
    """Encoded examples as training examples: the label of a token is the next one, if that counts."""

    def __init__(self, examples: list[Tokens]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> "dict[str, Tensor]":
        import torch

        from cluscomp.train.whole import IGNORED

        one = self.examples[index]
        labels = [token if counts else IGNORED for token, counts in zip(one.ids[1:], one.counted[1:])]
        return {"input_ids": torch.tensor(one.ids), "labels": torch.tensor([*labels, IGNORED])}
