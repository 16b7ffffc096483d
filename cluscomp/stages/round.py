"""Stage round: the weights inside the blocks rounded to a few bits, and dense again: the smallest dense stage."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.kernels.work import Work
from cluscomp.plan.cost import Cost, worst
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.meta import MetaModel
    from cluscomp.stages import Job


@settings
class Round:
    """Every linear weight inside the blocks takes the nearest value of a symmetric grid of `width` bits.

    A grid spans `group` neighbouring inputs of an output, or as near to that as groups of equal size come, and its
    scale has 16 bits. The model stays dense, in the dtype of the original's file, to which the values are rounded in
    turn; so no bit is saved. It tells what a stage after it loses on weights that were that coarse before.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["original"]] = "original"
    distributed: ClassVar[bool] = False
    width: int = Field(ge=1, le=8)
    group: int = Field(ge=1)

    def learns_from(self) -> None:
        """None: nothing is read but the model."""
        return

    def without_effect(self) -> set[str]:
        """None of them."""
        return set()

    def check(self, original: "Original") -> None:
        """Any model will do that can be compressed at all."""

    def cost(self, outline: "MetaModel") -> Cost:
        """One dense block, and the grids of one weight spread over it; see `Stage.cost`."""
        sizes = [o * i for o, i in outline.dense.values()]
        always = {"embedding, head": outline.outside}
        device = worst(
            always | {"a dense block": outline.dense_block, "rounding one matrix": 32.0 * max(sizes)},
            always | {"writing the model": outline.writing},
        )
        work = Work(traffic=60.0 * sum(sizes) * outline.blocks, read=outline.all_numbers * outline.file_bytes)
        return Cost(device, {}, work)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Round block after block; each is kept in the job's folder and leaves memory.

        Returns `relative_error`, the squared error over the squared size of all rounded weights, and the same for each
        layer. Raises InputError, naming the layer, for a weight that is not finite or too large for a 16-bit scale.
        """
        from cluscomp.stages.blockwise import change_weights

        return change_weights("round", model, job, self.rounded)

    def rounded(self, weight_OI: "Tensor", dtype: "torch.dtype") -> "Tensor":
        """A weight (O, I) on its grids, as `dtype` holds that, in the weight's own dtype.

        Raises ValueError for one that is not finite or too large for a 16-bit scale.
        """
        from cluscomp.forms.uniform import grids_for, nearest, spread

        values_OI, inputs = weight_OI.float(), weight_OI.shape[1]
        grids = grids_for(values_OI, self.width, -(-inputs // self.group), symmetric=True)
        scales_OI, zeros_OI = (spread(values_OG, inputs) for values_OG in grids)
        numbers_OI = nearest(values_OI, scales_OI, zeros_OI, self.width)
        return ((numbers_OI - zeros_OI) * scales_OI).to(dtype).to(weight_OI.dtype)
