"""Stage prepare: the dense model trained for its compression to come (CrAM, Quant-Noise), or plainly."""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cluscomp.errors import InputError
from cluscomp.settings import settings
from cluscomp.stages.from_text import TrainsOnText

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job
    from cluscomp.train.preparing import Prepared


@settings
class Prepare(TrainsOnText):
    """End-to-end training of the linear weights of a dense model, before it is compressed; loss: the next token.

    rule: "plain"; "cram", the gradient at the compression of a step of `rho` times the gradient ahead, with `plus` both
    gradients; "quant_noise", a share `noise` of the sub-vectors compressed in each forward pass (train/preparing.py).
    The gradient ahead is that of the mean loss of a batch, or of a rank's part of it, however many make a step.
    compression: "codebooks", a sub-vector of `vector_dim` outputs becomes the mean of those that share its code, of
    `codebook_size` by K-means of `iterations` rounds on the weights before every `refresh`-th step; or "none", for
    CrAM alone. CrAM goes through the model twice in a step: plain training for as long has twice the `tokens`.

    It changes the original: a model that was prepared is to be compared with this stage's own, and one that was trained
    plainly for as long. What later stages learn from is still the model before all stages.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["original"]] = "original"
    distributed: ClassVar[bool] = True
    rule: Literal["plain", "cram", "quant_noise"]
    rho: float = Field(ge=0)
    plus: bool
    noise: float = Field(ge=0, le=1)
    compression: Literal["codebooks", "none"]
    vector_dim: int = Field(ge=1, le=64)
    codebook_size: int = Field(ge=2, le=65_536)
    iterations: int = Field(ge=1)
    refresh: int = Field(ge=1)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.rule == "quant_noise" and self.compression == "none":
            raise ValueError("rule=quant_noise needs compression=codebooks: without, there is no noise")
        if self._clusters and self.save_every % self.refresh:
            raise ValueError(
                f"save_every={self.save_every} is no multiple of refresh={self.refresh}: a killed run goes on where "
                "codes are found anew"
            )
        return self

    @property
    def _clusters(self) -> bool:
        """Whether sub-vectors are clustered."""
        return self.rule != "plain" and self.compression == "codebooks"

    def without_effect(self) -> set[str]:
        """What changes no result, and what the rule does not look at."""
        of_cram, of_noise = {"rho", "plus"}, {"noise"}
        of_clusters = {"vector_dim", "codebook_size", "iterations", "refresh"}
        idle = {"plain": of_cram | of_noise | {"compression"}, "cram": of_noise, "quant_noise": of_cram}[self.rule]
        return super().without_effect() | idle | (set() if self._clusters else of_clusters)

    def check(self, original: "Original") -> None:
        """Cut the windows. Raises InputError too for a layer that has fewer sub-vectors than centroids."""
        super().check(original)
        if not self._clusters:
            return
        from cluscomp.forms.codebook import num_sub_vectors
        from cluscomp.models.original import block_names, blocks, linears

        model = original.model()
        for name, block in zip(block_names(model), blocks(model)):
            for layer, linear in linears(block).items():
                try:
                    number = num_sub_vectors(linear.out_features, linear.in_features, self.vector_dim, "out")
                except ValueError as error:
                    raise InputError(f"{name}.{layer}: prepare.{error}") from error
                if number < self.codebook_size:
                    raise InputError(
                        f"{name}.{layer}: prepare.codebook_size={self.codebook_size} is more than its {number} "
                        f"sub-vectors of {self.vector_dim}; take fewer"
                    )

    def cost(self, outline: "MetaModel") -> "Cost":
        """The dense model, float32 masters and AdamW's state; K-means is left out. See `Stage.cost`."""
        trained = float(outline.blocks * sum(o * i for o, i in outline.dense.values()))
        passes = 2 if self.rule == "cram" else 1
        found = self.training_cost(outline, trained, passes=passes, by_example=False)
        found.device["gradients ahead"] = 4.0 * trained if self.rule == "cram" else 0.0
        found.device["codes"] = 9.0 * trained / self.vector_dim if self._clusters else 0.0
        return found

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Load all blocks and train their linear weights in place; returns losses, and how often the model was passed.

        `passes`: forward and backward passes of a batch, by which runs are to be compared.
        """
        from cluscomp.train.preparing import prepare

        train, held_out = self.train_and_held_out(job.original.tokenizer, job.seed)
        found = prepare(
            model,
            job.original,
            train,
            held_out,
            self,
            self._objective(job.seed),
            folder=job.folder / "training",
            seed=job.seed,
        )
        return self.told(train, held_out) | found

    def _objective(self, seed: int) -> "Callable[..., Prepared]":
        from cluscomp.train.preparing import Clusters, Cram, Prepared, QuantNoise

        clusters = Clusters(self.vector_dim, self.codebook_size, self.iterations, self.refresh, seed)
        if self.rule == "cram":
            return partial(Cram, rho=self.rho, plus=self.plus, clusters=clusters if self._clusters else None)
        return Prepared if self.rule == "plain" else partial(QuantNoise, share=self.noise, clusters=clusters)
