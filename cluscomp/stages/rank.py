"""Stage rank: all singular directions of all weights in one order, from which stage cut makes any size (ACIP)."""

from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.data.overlap import Learned
from cluscomp.settings import settings
from cluscomp.stages.from_text import TrainsOnText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job


@settings
class Rank(TrainsOnText):
    """Take each weight apart into U diag(m) V, all of its singular directions, and give each of these a score.

    rule: "masks" (ACIP, arXiv 2502.01717), by end-to-end training: a number m for each direction, which begins at
    `start` and leaves when it comes to 0, and adapters of `adapter_rank`, scaled by `alpha`/`adapter_rank`, learn to
    predict the next token at a `price` for every m, which rises in each step by the factor `rise`. A direction's score
    is its m, or, once it left, the worse the earlier that was. When a share `until` of the dense matrices' numbers is
    left, adapters learn alone. Or "values": its singular value, which is what training is compared with; no text.

    Both leave one model, larger than the original, of which stage cut makes smaller ones, as many as are asked for. Its
    layers compute with all directions. Training is judged at the size `until`, and taken back if singular values rank
    no worse.

    Unlike the authors': adapters change the factors U and V, so that they go into them and take no bytes; theirs stand
    beside a layer. No dropout. Training ends after `tokens`, whatever size was reached by then.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["ranked"]] = "ranked"
    distributed: ClassVar[bool] = True
    rule: Literal["masks", "values"]
    until: float = Field(gt=0, le=1)
    price: float = Field(gt=0)
    rise: float = Field(ge=1)
    start: float = Field(gt=0)
    adapter_rank: int = Field(ge=1)
    alpha: float = Field(gt=0)

    @property
    def trains(self) -> bool:
        """Whether scores are learned."""
        return self.rule == "masks"

    def learns_from(self) -> Learned | None:
        """The windows it trains on, if it does; see `Stage.learns_from`."""
        return super().learns_from() if self.trains else None

    def without_effect(self) -> set[str]:
        """What changes no result; and all of training, if there is none."""
        return super().without_effect() if self.trains else {field.name for field in fields(self)} - {"rule"}

    def check(self, original: "Original") -> None:
        """Cut the windows, if it trains. Raises InputError too for a size that cannot be reached."""
        if self.trains:
            self._work.check_reach("rank.until", self.until, original)
            super().check(original)

    def cost(self, outline: "MetaModel") -> "Cost":
        """All directions of all weights, masters of what learns, the blocks' inputs and one block; see `Stage.cost`."""
        found: "Cost" = self._work.cost(self, outline)
        return found

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Load all blocks, take their weights apart and train in place.

        Returns losses, which are those at the size `until`, and `open`, the share that is left by scores above 0.
        Raises InputError, naming the layer, for a weight that is not finite or does not fit 16 bits.
        """
        found: dict[str, Any] = self._work.run(self, model, job)
        return found

    @property
    def _work(self) -> ModuleType:
        """What is done, which needs torch."""
        from cluscomp.stages import ranking

        return ranking
