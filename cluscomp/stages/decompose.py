"""Stage decompose: blocks with fewer units, and dense again (MoDeGPT, arXiv 2408.09632)."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.settings import settings
from cluscomp.stages.from_text import FromText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job


@settings
class Decompose(FromText):
    """Leave out units of MLPs and dimensions of heads, and let the layers that read them make up for it.

    Of each MLP the share `units` stays, those with the largest ridge leverage scores (`ridge` as a share of their mean
    square), and its last layer is the best for them (Nystrom). Of each head the share `heads` of its dimensions stays:
    of query and key the pairs of one rotation that add most to the scores of attention, of value and output the best
    common dimensions, of all query heads that share a key head. What is best is told by `samples` windows of `length`
    tokens of the calibration text, as the original's blocks see them. Nothing is trained.

    With `widths` "uniform" MLPs are all cut to one width, as the configs of transformers have one: an ordinary dense
    model results, in the dtype of the original's file. With "influence" those keep more that turn what enters their
    block further, and `units` is what stays on average: `temperature` above the influences means alike (MoDeGPT's
    allocation). Of that model config.json tells the shapes, and it loads after `import cluscomp.checkpoint`.

    Heads are all cut to one width, and pairs are chosen for the whole model, as it has one list of frequencies. Heads
    differ in which pairs they need, so `heads` below 1 loses far more than MoDeGPT's choice for each key head, which
    transformers could not load. Unlike there, too: value and output are solved for together also where heads share a
    key head.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["original"]] = "original"
    distributed: ClassVar[bool] = False
    batch_size: int = Field(ge=1)
    units: float = Field(gt=0, le=1)
    heads: float = Field(gt=0, le=1)
    ridge: float = Field(gt=0)
    widths: Literal["uniform", "influence"]
    temperature: float = Field(gt=0)

    def without_effect(self) -> set[str]:
        """What is said of MLPs, if none is cut, and of influence, if it has no say."""
        if self.units == 1:
            return {"ridge", "widths", "temperature"}
        return {"widths", "temperature"} if self.widths == "uniform" else set()

    def check(self, original: "Original") -> None:
        """Cut the config, and windows. Raises InputError that names why for a model that cannot be cut so."""
        from cluscomp.stages.decomposing import check_cut

        check_cut(self, original)
        super().check(original)

    def cost(self, outline: "MetaModel") -> "Cost":
        """One dense block, its second moments and streams; see `Stage.cost`."""
        from cluscomp.stages.decomposing import cost

        return cost(self, outline)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Cut block after block; each is kept in the job's folder and leaves memory.

        Returns, by block, what the outputs of its MLP lose relative to their square (`mlp`, and without the correction
        `mlp_dropped`) and those of values (`values`); the widths that are left, and of each block with its influence
        where they differ; and the mean loss of the MLPs.
        """
        from cluscomp.stages.decomposing import run

        return run(self, model, job)
