"""A mask and an adapter of low rank beside what any method stores: SLiM's parts (arXiv 2410.09615)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self, cast

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.errors import named
from cluscomp.methods import Compressed, Method
from cluscomp.settings import settings

if TYPE_CHECKING:
    from torch import Size, Tensor

    from cluscomp.forms.low_rank import LowRank
    from cluscomp.forms.stored import Stored
    from cluscomp.solve.layer import Layer


MOST_BITS = 8.0  # that every method's `bits` may be


@settings
class Beside:
    """What is stored beside a method's codes: W ~ M * Q(W - L R) + L R.

    Of each output's weights a share `keep` is kept, those of most saliency: of every `of` neighbouring inputs (0.5 of 4
    is 2:4), or of all (null). The others are 0. The kept ones are packed together, which is what the method compresses;
    so it must not look at inputs. The mask takes a bit a weight. An adapter L R of `rank`, or of a share `rank_share`
    of a matrix's smaller side, in numbers of `adapter_bits`, takes up what is lost as well as its rank can; what it
    takes is then left out of the weight, and this compressed again with the same mask.

    `saliency` says by what weights and losses count: "none", their sizes; "diagonal" (SLiM), these times the root mean
    square of an input; "full", weights likewise and losses by what the layer's output loses (`damping` is added to the
    diagonal of the second moment, as a share of its mean). With a method's `bits` all of it together stays within them.

    Unlike the authors': adapters of 4 bits have levels of their own (K-means) and are turned at random; no finetuning
    here (a stage of its own).
    """

    keep: float = Field(gt=0, le=1)
    of: int | None = Field(ge=2)
    rank: int | None = Field(ge=1)
    rank_share: float | None = Field(gt=0, lt=1)
    saliency: Literal["none", "diagonal", "full"]
    adapter_bits: Literal[4, 16]
    damping: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.rank is not None and self.rank_share is not None:
            raise ValueError(f"give beside.rank or beside.rank_share, not both (here {self.rank}, {self.rank_share})")
        return self

    @property
    def masked(self) -> bool:
        """Whether some weights are left out."""
        return self.keep < 1

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter."""
        return self.rank is not None or self.rank_share is not None

    def around(self, method: Method) -> Method:
        """The method with these beside it; itself if there are none."""
        return _Around(method, self) if self.masked or self.adapted else method

    def rank_of(self, outputs: int, inputs: int) -> int | None:
        """The rank of the adapter of a weight (O, I), if there is one. Raises ValueError if it is too large."""
        most = min(outputs, inputs)
        if self.rank is not None and self.rank > most:
            raise ValueError(f"beside.rank={self.rank} is more than a {outputs} x {inputs} matrix has: {most} at most")
        return self.rank if self.rank_share is None else -int(-self.rank_share * most // 1)


@dataclass(frozen=True)
class _Around:
    """A method with a mask or an adapter beside what it stores; see `Beside`."""

    inner: Method
    beside: Beside

    def sees(self) -> frozenset[str]:
        own = {"none": (), "diagonal": ("diagonal",), "full": ("moment",)}[self.beside.saliency]
        return self.inner.sees() | frozenset(own)

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Layer after layer, or all together where the method looks at them so; twice if there is an adapter."""
        for names in [[*layers]] if self._together else [[name] for name in layers]:
            masks, adapters = {}, {}
            for name in names:
                with named([name]):
                    masks[name] = self._mask(layers[name])
            inner = self._within({name: layers[name].weight_OI.shape for name in names})
            kept = _Kept(self, layers, names, masks, {})
            for found in inner.compress(cast("dict[str, Layer]", kept)) if self.beside.adapted else ():
                for name, form in found.stored.items():
                    with named([name]):
                        adapters[name] = self._adapter(layers[name], solve.beside.whole(form, masks[name]))
            left = replace(kept, adapters=adapters)
            for found in inner.compress(cast("dict[str, Layer]", left)):
                stored = {
                    name: solve.beside.whole(form, masks[name], adapters.get(name))
                    for name, form in found.stored.items()
                }
                yield Compressed(stored, found.chosen)

    @property
    def _together(self) -> bool:
        """Whether the method shares bits or a codebook out among layers, also of turned weights."""
        method = getattr(self.inner, "method", self.inner)
        return getattr(method, "allocation", "uniform") == "fill" or getattr(method, "share", "none") != "none"

    def _mask(self, layer: "Layer") -> "Tensor | None":
        """What is kept of a layer's weights (O, I), if not all. Raises ValueError if the method cannot be masked."""
        if not self.beside.masked:
            return None
        if self.inner.sees():
            raise ValueError(
                f"beside.keep={self.beside.keep} packs the weights that are kept, so it needs a method that does not "
                f"look at inputs, such as slim_quant, rtn or cluscomp_data_free; {type(self.inner).__name__} does"
            )
        scores_OI = layer.weight_OI.float().abs()
        if self.beside.saliency != "none":
            scores_OI = scores_OI * solve.beside.sizes_of(layer.show().diagonal_I)
        return solve.beside.largest(scores_OI, self.beside.keep, self.beside.of)

    def _within(self, shapes: "dict[str, Size]") -> Method:
        """The method at what a limit of bits leaves it. Raises ValueError, naming a layer, if that is too little."""
        limit: float | None = getattr(self.inner, "bits", None)
        total = beside = kept = 0
        for name, (outputs, inputs) in shapes.items():
            with named([name]):
                rank = self.beside.rank_of(outputs, inputs)
                beside += solve.beside.bits_beside(
                    outputs, inputs, masked=self.beside.masked, rank=rank, bits=self.beside.adapter_bits
                )
                total += outputs * inputs
                kept += outputs * solve.beside.kept_inputs(inputs, self.beside.keep, self.beside.of)
        if limit is None:
            return self.inner
        left = (limit * total - beside) / kept
        try:
            return replace(self.inner, bits=min(left, max(limit, MOST_BITS)))  # type: ignore[type-var]
        except ValueError as error:
            raise ValueError(
                f"{next(iter(shapes))}: bits={limit} is out of reach: mask and adapter take {beside / total:.3f} of it "
                f"and leave {left:.3f} a kept weight; take a smaller beside.rank, or beside.adapter_bits=4"
            ) from error

    def _adapter(self, layer: "Layer", form: "Stored") -> "LowRank":
        """What is nearest to what a form leaves out of a layer's weight."""
        import torch

        error_OI = layer.weight_OI.float() - form(torch.float32).detach()
        by: dict[str, Tensor] = {}
        if self.beside.saliency == "diagonal":
            by = {"sizes_I": solve.beside.sizes_of(layer.show().diagonal_I)}
        if self.beside.saliency == "full":
            by = {"moment_II": solve.along_outputs.damped(layer.show().matrix_II, self.beside.damping)}
        rank = self.beside.rank_of(*error_OI.shape)
        assert rank is not None  # there is an adapter
        factors = solve.beside.nearest_of_rank(error_OI, rank, **by)
        return solve.beside.adapter(*factors, self.beside.adapter_bits, layer.generator)


@dataclass(frozen=True)
class _Kept(Mapping[str, "Layer"]):
    """Some layers as the method inside sees them: without what adapters take, and what masks leave out.

    Each is made when it is asked for, as the stage may change a layer until its turn comes.
    """

    around: _Around
    layers: "dict[str, Layer]"
    names: list[str]
    masks: "dict[str, Tensor | None]"
    adapters: "dict[str, LowRank]"

    def __getitem__(self, name: str) -> "Layer":
        layer = self.layers[name]
        weight_OI, beside = layer.weight_OI.float(), self.around.beside
        number = solve.beside.kept_inputs(weight_OI.shape[1], beside.keep, beside.of)
        weight_OI = solve.beside.kept(weight_OI, self.masks[name], number, self.adapters.get(name))
        return replace(layer, weight_OI=weight_OI, seen=layer.seen if self.around.inner.sees() else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
