"""Stage round: the weights inside the blocks rounded to a few bits, and dense again: the smallest dense stage."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
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

    def cost(self, outline: "MetaModel") -> "Cost":
        """One dense block, and the grids of one weight spread over it; see `Stage.cost`."""
        from cluscomp.kernels.work import Work
        from cluscomp.plan.cost import Cost, worst

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
        from cluscomp.models.original import block_names, linears
        from cluscomp.stages.blockwise import Blockwise

        names = block_names(model)
        work = Blockwise("round", job.folder, model)
        for index, _, finished in work.all():
            if finished:
                continue
            with job.original.block(model, index) as block:
                squares = {}
                for name, linear in linears(block).items():
                    weight_OI = linear.weight.detach()
                    full = f"{names[index]}.{name}"
                    try:
                        rounded_OI = self.rounded(weight_OI, job.original.file_dtype(f"{full}.weight"))
                    except ValueError as error:
                        raise InputError(f"{full}: {error}") from error
                    difference_OI = rounded_OI.double() - weight_OI.double()
                    squares[name] = [float(difference_OI.square().sum()), float(weight_OI.double().square().sum())]
                    linear.weight.data = rounded_OI
                lost = ratio(squares)
                work.finish(index, squares, f"relative error {lost:.2e}", relative_error=lost)
        squares = {
            f"{names[index]}.{name}": pair
            for index, found in sorted(work.numbers.items())
            for name, pair in found.items()
        }
        by_layer = {name: ratio({name: pair}) for name, pair in squares.items()}
        return {"relative_error": ratio(squares), "relative_error_by_layer": by_layer}

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


def ratio(squares: dict[str, list[float]]) -> float:
    """Squared error over squared size of several layers together."""
    error, size = (sum(values) for values in zip(*squares.values()))
    return error / size if size else 0.0
