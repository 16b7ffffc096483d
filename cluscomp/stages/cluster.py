"""Stage cluster: every linear layer inside the blocks is compressed by the method (paper, section 3.2)."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, InstanceOf, model_validator

from cluscomp.data.overlap import Learned
from cluscomp.methods import Method
from cluscomp.methods.beside import Beside
from cluscomp.methods.turned import Turned
from cluscomp.settings import settings
from cluscomp.stages.allocation import Allocation, ByGates
from cluscomp.stages.from_text import FromText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job


@settings
class Cluster(FromText):
    """Compress block after block. Embeddings, head, norms and biases stay as they are.

    `beside` is what stands beside the method's codes: a mask, an adapter of low rank, or (as usual) nothing.

    A method that asks for a statistic of the layers' inputs gets it from `samples` windows of `length` tokens of the
    calibration text, as the blocks before leave them: those of the original or the `prefix` that is already compressed.
    Without such a method nothing is read but the model, and these settings mean nothing.

    With `drift` above 0 and a compressed prefix, each layer's weight is first brought this share of the way to the one
    that makes of its inputs, as they are by then, what the original's weight makes of the original's; `drift_damping`,
    in mean squares of an input, holds it back (solve/drift.py). It costs no bits.

    `price` is what counts where a method shares bits out among layers: "error", relative errors as the method weighs
    them, or "loss", these times what they cost the model's predictions on the same windows (stages/prices.py).

    `statistics`: GiB that those of experts may take at once. What has no room is gathered when its turn comes, in
    passes of its own through the block; nothing else changes by that.

    `rotation`: the sides of each weight that are turned by random signs and a Hadamard transform before the method sees
    it, and turned back where the weight is used (methods/turned.py).
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = True
    method: InstanceOf[Method]
    beside: InstanceOf[Beside]
    allocation: InstanceOf[Allocation]
    batch_size: int = Field(ge=1)
    prefix: Literal["original", "compressed"]
    drift: float = Field(ge=0, le=1)
    drift_damping: float = Field(gt=0)
    price: Literal["error", "loss"]
    statistics: float = Field(gt=0)
    rotation: Literal["none", "inputs", "outputs", "both"]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.drift and self.prefix == "original":
            raise ValueError(f"drift={self.drift} needs prefix=compressed: behind the original nothing drifts")
        self.whole.sees()
        share, beside = getattr(self.method, "share", "none"), self.beside
        if share != "none" and beside.adapted:
            adapter = f"rank_share={beside.rank_share}" if beside.rank is None else f"rank={beside.rank}"
            raise ValueError(
                f"method.share={share} does not go with beside.{adapter}: layers that share a codebook cannot have "
                "adapters of their own; take method.share=none, or no adapter"
            )
        if getattr(self.method, "post_norm", False) and self.whole is not self.method:
            raise ValueError("method.post_norm=true: nothing can stand beside or around what normalises; set it false")
        return self

    @property
    def whole(self) -> Method:
        """The method, on rotated weights if that is asked for, with what stands beside its codes."""
        turned = self.method if self.rotation == "none" else Turned.around(self.method, self.rotation)
        return self.beside.around(turned)

    @property
    def calibrated(self) -> bool:
        """Whether the stage looks at calibration text."""
        return bool(self.whole.sees()) or self.drift > 0 or self.price == "loss" or self.gates is not None

    @property
    def sees(self) -> frozenset[str]:
        """What is gathered of each layer's inputs."""
        return self.whole.sees() | ({"moment"} if self.drift else set())

    @property
    def apart(self) -> bool:
        """Whether no block looks at what was made of the others, so that several processes share them out."""
        return self.prefix == "original" or not self.calibrated

    @property
    def room(self) -> float:
        """Bytes that the statistics of experts may take at once."""
        return self.statistics * 2**30

    @property
    def over_the_model(self) -> bool:
        """Whether bits are shared out over the whole model."""
        return self.allocation.scope == "model"

    @property
    def gates(self) -> ByGates | None:
        """The allocation, if it learns gates."""
        return self.allocation if isinstance(self.allocation, ByGates) else None

    def learns_from(self) -> Learned | None:
        """The calibration windows, if the method looks at any."""
        return super().learns_from() if self.calibrated else None

    def without_effect(self) -> set[str]:
        """The settings of calibration, if the method looks at no text."""
        idle = {"statistics"} | (set() if self.drift else {"drift", "drift_damping"})
        idle |= {"price"} if self.price == "error" else set()
        idle |= {"rotation"} if self.rotation == "none" else set()
        idle |= {"beside"} if self.beside.around(self.method) is self.method else set()
        return idle if self.calibrated else {"data", "samples", "length", "batch_size", "prefix"} | idle

    def check(self, original: "Original") -> None:
        """Try the method on every block's shapes, and cut windows. Raises InputError that names the layer."""
        from cluscomp.stages.foreseeing import check_method

        check_method(self, original)
        if self.calibrated:
            super().check(original)

    def cost(self, outline: "MetaModel") -> "Cost | None":
        """One dense block, statistics and streams; on a GPU the finished blocks are in RAM. See `Stage.cost`."""
        from cluscomp.stages.foreseeing import cost

        return cost(self, outline)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Compress the model; finished blocks lie in the job's folder and survive a kill.

        Returns `relative_error`, the squared error over the squared size of all compressed weights, the same for each
        layer, how its entries and codes are distributed (solve/distribution.py), what the method chose for it, if
        anything, and the method's name. Raises InputError, naming the layer, if a weight is not finite or the method
        refuses it.
        """
        from cluscomp.stages.clustering import run

        return run(self, model, job)
