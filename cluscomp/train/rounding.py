"""A weight on uniform grids, or of signs, whose grids, rounding or dense weights are still being learned."""

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cluscomp.forms.signs import SignWeight
from cluscomp.forms.stored import Stored, in_16_bits
from cluscomp.forms.uniform import UniformWeight, bounds, divisor, middle, spread

START = 4.0  # of what a sigmoid makes of it: 0.982 of the range
EDGE = 0.499  # of a step: how far a dense weight may begin from the number that is stored of it
LEAST, FAR = 1e-3, 4.0  # sizes that a dense weight may begin with, in those that are stored for its sign
Form = TypeVar("Form", bound=Stored)


class RoundedAnew(Stored, Generic[Form]):
    """In the place of a stored weight while it is trained: a dense weight, rounded anew in every pass.

    Gradients pass rounding unchanged, or nearly. Until `to_masters` and after `to_storage` or `restore` it stands for
    what is stored, `stored`.
    """

    form: ClassVar[type[Stored]]  # of what is stored

    def __init__(self, stored: Form) -> None:
        """The stored weight, whose shapes it keeps."""
        super().__init__()
        self.out_features, self.in_features = stored.out_features, stored.in_features
        self.post_norm = stored.post_norm
        self._loose = False
        self._versions = [stored]  # what was stored at first, and is now; in a list, as its values are not trained

    @abstractmethod
    def begin(self) -> None:
        """Give the parameters the values that learning begins with."""

    @abstractmethod
    def learned(self) -> Form:
        """What was learned as it is stored. Raises ValueError if it is not finite or does not fit."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "O I"]:
        """The weight (O, I) as learned so far, in float32."""

    @property
    def first(self) -> Form:
        """What was stored at first."""
        return self._versions[0]

    @property
    def stored(self) -> Form:
        """What is stored as things are."""
        return self._versions[-1]

    @classmethod
    def empty(cls, *args: Any, **spec: Any) -> Stored:
        """What it stands for; see `Stored.empty`."""
        return cls.form.empty(*args, **spec)

    @classmethod
    def bits(cls, *args: Any, **spec: Any) -> dict[str, int]:
        """Stored bits of what it stands for."""
        return cls.form.bits(*args, **spec)

    def spec(self) -> dict[str, Any]:
        """That of what it stands for."""
        return self.stored.spec()

    def to_masters(self) -> None:
        """Begin to learn."""
        self.begin()
        self._loose = True
        self.requires_grad_(True)

    def to_storage(self) -> None:
        """Store what was learned. Raises ValueError if it is not finite or does not fit."""
        self._still()
        found = self.learned()
        found.requires_grad_(False)
        self._versions = [self._versions[0], found]

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Take back what was stored at first."""
        self._still()
        self._versions = self._versions[:1]

    def _still(self) -> None:
        self._loose = False
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.grad = None

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (O, I) in `dtype`; `inputs` is all of them (see `tiles`)."""
        return self.dense().to(dtype) if self._loose else self.stored(dtype, inputs)


class OnGrids(RoundedAnew[UniformWeight]):
    """A weight on uniform grids, rounded anew."""

    form = UniformWeight

    def __init__(self, weight_OI: Float[Tensor, "O I"], stored: UniformWeight) -> None:
        """The dense weight (O, I), and the stored one whose width, groups and kind of zeros it keeps."""
        super().__init__(stored)
        weight_OI = weight_OI.detach().float()
        self._weight_OI = weight_OI if stored.inputs is None else weight_OI / stored.inputs.float()

    @abstractmethod
    def grids(self) -> tuple[Float[Tensor, "O G"], Float[Tensor, "O G"]]:
        """Scales and zeros (O, G) as learned so far."""

    @abstractmethod
    def unrounded(self, scales_OG: Tensor, zeros_OG: Tensor) -> Float[Tensor, "O I"]:
        """What is rounded to the numbers (O, I) of these grids."""

    def learned(self) -> UniformWeight:
        """Numbers and grids as they are stored; see `RoundedAnew.learned`."""
        scales_OG, zeros_OG = (in_16_bits(values_OG).float() for values_OG in self.grids())  # whole zeros fit, too
        codes_OI = self._steps(scales_OG, zeros_OG).int()
        zeros = {"none": None, "whole": zeros_OG.int(), "float16": zeros_OG}[self.stored.kind_of_zeros]
        return UniformWeight.from_codes(codes_OI, scales_OG, zeros, self.stored.width, self.stored.inputs)

    def dense(self) -> Float[Tensor, "O I"]:
        """The weights (O, I) on the grids as learned so far."""
        scales_OG, zeros_OG = self.grids()
        steps_OI = self._steps(scales_OG, zeros_OG) - spread(zeros_OG, self.in_features)
        dense_OI = steps_OI * spread(scales_OG, self.in_features)
        return dense_OI if self.stored.inputs is None else dense_OI * self.stored.inputs.float()

    def _in_steps(self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        """A dense weight (O, I) in steps of these grids."""
        return weight_OI / spread(divisor(scales_OG), self.in_features) + spread(zeros_OG, self.in_features)

    def _steps(self, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        """The numbers (O, I) that the weights are rounded to."""
        return _rounded(self.unrounded(scales_OG, zeros_OG)).clamp(0, 2**self.stored.width - 1)


class LearnedRounding(OnGrids):
    """Grids that learn how far they span, and with `offsets` which way each weight is rounded.

    Each group's grid spans from its least to its largest weight (and 0), both times a factor that is learned:
    OmniQuant's learnable weight clipping (arXiv 2308.13137), by sigmoids. With `offsets` each weight also learns what
    is added to it before it is rounded, at most half a step to either side, and the factors lie between 0 and 1:
    AutoRound (arXiv 2309.05516).
    """

    def __init__(self, weight_OI: Float[Tensor, "O I"], stored: UniformWeight, *, offsets: bool) -> None:
        """As `OnGrids`."""
        super().__init__(weight_OI, stored)
        self.offsets = offsets
        parts = [self._weight_OI[:, group] for group in bounds(self.in_features, stored.groups)]
        self._low_OG = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0)
        self._high_OG = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0)
        self._mean_OG = torch.stack([part.abs().mean(1) for part in parts], 1)
        self.low = nn.Parameter(torch.empty_like(self._low_OG), requires_grad=False)
        self.high = nn.Parameter(torch.empty_like(self._low_OG), requires_grad=False)
        self.offset = nn.Parameter(torch.empty_like(self._weight_OI), requires_grad=False) if offsets else None

    def begin(self) -> None:
        """With nearly the whole range, and no offsets."""
        for factor in (self.low, self.high):
            factor.data.fill_(1.0 if self.offsets else START)
        if self.offset is not None:
            self.offset.data.zero_()

    def grids(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros (O, G) as the factors have it."""
        low_OG, high_OG = (v.clamp(0, 1) if self.offsets else v.sigmoid() for v in (self.low, self.high))
        width = self.stored.width
        levels = 2**width - 1
        if self.stored.kind_of_zeros == "none":
            size_OG = torch.maximum(-low_OG * self._low_OG, high_OG * self._high_OG)
            size_OG = (low_OG + high_OG) / 2 * self._mean_OG if width == 1 else size_OG
            return 2 * size_OG / levels, torch.full_like(size_OG, middle(width))
        low_OG, high_OG = low_OG * self._low_OG, high_OG * self._high_OG
        scales_OG = (high_OG - low_OG) / levels
        zeros_OG = -low_OG / divisor(scales_OG)
        whole = self.stored.kind_of_zeros == "whole"
        return scales_OG, _rounded(zeros_OG).clamp(0, levels) if whole else zeros_OG

    def unrounded(self, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        """The dense weights (O, I) in steps of the grids, with their offsets."""
        steps_OI = self._in_steps(self._weight_OI, scales_OG, zeros_OG)
        return steps_OI if self.offset is None else steps_OI + self.offset.clamp(-0.5, 0.5)


class LearnedWeights(OnGrids):
    """The dense weights themselves learn, with the scales and zeros of their grids: EfficientQAT (arXiv 2407.11062).

    The grids begin as they are stored. So do the numbers: where a method stored another one than the nearest, as GPTQ
    does, the dense weight begins at the edge of that number's range.
    """

    def __init__(self, weight_OI: Float[Tensor, "O I"], stored: UniformWeight) -> None:
        """As `OnGrids`."""
        super().__init__(weight_OI, stored)
        scales_OG, zeros_OG = stored.scales.float(), stored.offsets()
        numbers_OI, last = stored.unpacked().float(), 2**stored.width - 1
        low_OI = (numbers_OI - EDGE).where(numbers_OI > 0, -torch.inf)
        high_OI = (numbers_OI + EDGE).where(numbers_OI < last, torch.inf)
        steps_OI = self._in_steps(self._weight_OI, scales_OG, zeros_OG)
        outside_OI = (steps_OI < low_OI) | (steps_OI > high_OI)
        inside_OI = steps_OI.clamp(low_OI, high_OI) - spread(zeros_OG, self.in_features)
        self._weight_OI = (inside_OI * spread(scales_OG, self.in_features)).where(outside_OI, self._weight_OI)
        self.weight = nn.Parameter(self._weight_OI, requires_grad=False)
        self.scales = nn.Parameter(scales_OG.detach(), requires_grad=False)
        learned = stored.zeros is not None
        self.zeros = nn.Parameter(zeros_OG, requires_grad=False) if learned else None

    def begin(self) -> None:
        """With the weights as they were, and grids as they are stored."""
        self.weight.data = self._weight_OI.clone()
        self.scales.data = self.stored.scales.detach().float()
        if self.zeros is not None:
            self.zeros.data = self.stored.offsets().clone()

    def grids(self) -> tuple[Tensor, Tensor]:
        """Scales, none below 0, and zeros (O, G), rounded where they are stored as whole numbers."""
        scales_OG = self.scales.clamp(min=0)
        if self.zeros is None:
            return scales_OG, self.stored.offsets()
        whole = self.stored.kind_of_zeros == "whole"
        return scales_OG, _rounded(self.zeros).clamp(0, 2**self.stored.width - 1) if whole else self.zeros

    def unrounded(self, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        """The weights (O, I) in steps of the grids."""
        return self._in_steps(self.weight, scales_OG, zeros_OG)


class LearnedSigns(RoundedAnew[SignWeight]):
    """The dense weights of which the signs are stored learn, with the values of outputs and inputs (OneBit).

    In units of what is stored of them: that the gradient of a sign, which passes less to large weights (arXiv
    2402.11295, the authors' code), is the same for all outputs. The signs begin as they are stored.
    """

    form = SignWeight

    def __init__(self, weight_OI: Float[Tensor, "O I"], stored: SignWeight) -> None:
        """The dense weight (O, I), and the stored one."""
        super().__init__(stored)
        sizes_OI = stored(torch.float32).detach().abs()
        signs_OI = stored.signs(torch.float32)
        along_OI = signs_OI * weight_OI.detach().float() / divisor(sizes_OI)
        self._weight_OI = signs_OI * along_OI.clamp(min=LEAST, max=FAR)
        self.weight = nn.Parameter(self._weight_OI, requires_grad=False)
        self.scales = nn.Parameter(stored.scales.detach().float(), requires_grad=False)

    def begin(self) -> None:
        """With the weights as they were, and values as they are stored."""
        self.weight.data = self._weight_OI.clone()
        self.scales.data = self.stored.scales.detach().float()

    def learned(self) -> SignWeight:
        """Signs and values as they are stored; see `RoundedAnew.learned`."""
        return SignWeight.from_signs(self.weight, *self.stored.split(self.scales), self.post_norm)

    def dense(self) -> Float[Tensor, "O I"]:
        """The signs (O, I) times the values."""
        return self.stored.scaled(_Sign.apply(self.weight), self.scales)


class _Sign(torch.autograd.Function):
    """Signs (O, I), -1 and 1, with the gradient of what is a sign nearly: times 1.001 - tanh(w)^2."""

    @staticmethod
    def forward(ctx, weight_OI):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight_OI)
        return torch.where(weight_OI > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad_OI):  # type: ignore[no-untyped-def]
        return grad_OI * (1.001 - ctx.saved_tensors[0].tanh().square())


def _rounded(values: Tensor) -> Tensor:
    """Rounded, with the gradient of what is not."""
    return values + (values.round() - values).detach()
