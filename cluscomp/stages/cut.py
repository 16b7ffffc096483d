"""Stage cut: of ranked directions as many stay as a size allows; any size from one ranking (ACIP)."""

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, InstanceOf, model_validator

from cluscomp.data.overlap import Learned
from cluscomp.methods import Method
from cluscomp.settings import settings
from cluscomp.stages.from_text import FromText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job


@settings
class Cut(FromText):
    """Leave out the directions with the lowest scores of all, until a share `ratio` of the dense numbers is left.

    At most that share, and less by no more than one direction. A matrix keeps its best direction at the least; one
    whose two factors would have more numbers than it has is stored dense, of the directions that stay.

    Numbers have 16 bits, so 16 `ratio` bits a weight; or each factor is compressed by the `method`, whose `bits` are
    those of a factor's number, so `ratio` times as many a weight. What the method sees of a factor's inputs comes from
    `samples` windows of `length` tokens of the calibration text, as blocks that are cut leave them.
    """

    takes: ClassVar[Literal["ranked"]] = "ranked"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = False
    ratio: float = Field(gt=0, le=1)
    method: InstanceOf[Method] | None
    batch_size: int = Field(ge=1)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if getattr(self.method, "post_norm", False):
            raise ValueError("method.post_norm=true: a factor cannot normalise what it gives; set it false")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the stage looks at calibration text."""
        return self.method is not None and bool(self.method.sees())

    def learns_from(self) -> Learned | None:
        """The calibration windows, if the method looks at any."""
        return super().learns_from() if self.calibrated else None

    def without_effect(self) -> set[str]:
        """The settings of calibration, if no method looks at text."""
        return set() if self.calibrated else {"data", "samples", "length", "batch_size"}

    def check(self, original: "Original") -> None:
        """Cut windows. Raises InputError too for a ratio out of reach, and for what the method cannot compress."""
        self._work.check_cut(self, original)
        if self.calibrated:
            super().check(original)

    def cost(self, outline: "MetaModel") -> "Cost | None":
        """What was ranked and what is left of it; as if all matrices were cut alike. See `Stage.cost`."""
        found: Cost | None = self._work.cost(self, outline)
        return found

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Cut all layers in place.

        Returns `ratio`, the share of the dense numbers that is left, and the rank that each layer keeps. Raises
        InputError, naming the layer, if the method refuses a factor.
        """
        found: dict[str, Any] = self._work.run(self, model, job)
        return found

    @property
    def _work(self) -> ModuleType:
        """What is done, which needs torch."""
        from cluscomp.stages import cutting

        return cutting
