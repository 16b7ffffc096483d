"""What is trained of a model, as float32 masters, and the fit loop of training block by block."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.linear import compressed
from cluscomp.forms.signs import SignWeight
from cluscomp.forms.uniform import UniformWeight
from cluscomp.process import told
from cluscomp.train.moving import MovingCodes
from cluscomp.train.rounding import LearnedRounding, LearnedSigns, LearnedWeights, RoundedAnew
from cluscomp.train.sums import Sums

Schedule = Literal["constant", "linear", "cosine"]
State = list[dict[str, Tensor]]
Kind = TypeVar("Kind", bound=Tensor)


class Trained:
    """What is trained of a model: the codebooks of stored weights, and other parameters by their name in the model.

    Between `start` and `finish` they are float32 copies that may change: stored weights cast theirs to what they
    compute in by themselves, other modules by parametrisation. `restore` puts all back.
    """

    def __init__(self, model: nn.Module, *, codebooks: bool, others: dict[str, Parameter]) -> None:
        self._model, self._others = model, others
        self._weights = [layer.stored for layer in compressed(model).values()] if codebooks else []
        self._states = [_held(weight.state_dict()) for weight in self._weights]
        self._data = {name: parameter.data for name, parameter in others.items()}
        cast_ = {id(parameter): parameter for parameter in others.values() if parameter.dtype != torch.float32}
        self._cast = [  # a head and an embedding may be one
            (module, attribute, cast_[id(parameter)])
            for module in (model.modules() if cast_ else ())
            for attribute, parameter in module._parameters.items()
            if id(parameter) in cast_
        ]

    @property
    def parameters(self) -> list[Parameter]:
        """All that is trained: the same objects before, during and after."""
        stored = (_held(dict(weight.named_parameters())).values() for weight in self._weights)
        parts = [*(part for parts in stored for part in parts), *self._others.values()]
        return list({id(part): part for part in parts}.values())  # weights may share a codebook

    def start(self) -> None:
        """Make the copies. Of all else in the model no gradient is taken: that of a head is as large as the head."""
        trained = {id(parameter) for parameter in self.parameters}
        for parameter in self._model.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)
        for weight in self._weights:
            weight.to_masters()
        for module, attribute, parameter in self._cast:
            parametrize.register_parametrization(module, attribute, _Cast(parameter.dtype), unsafe=True)
        for name, parameter in self._others.items():
            parameter.data = self._data[name].to(torch.float32, copy=True)
            parameter.requires_grad_(True)

    def finish(self) -> str | None:
        """Round what was trained to what it is stored in, 16 bits or a codebook's own storage.

        Returns what is wrong, if a number is not finite or does not fit; then `restore` must follow.
        """
        self._end()
        for name, parameter in self._others.items():
            dtype = self._data[name].dtype
            parameter.data = parameter.data.to(dtype if dtype.itemsize == 2 else torch.float16).to(dtype)
        try:
            for weight in self._weights:
                weight.to_storage()
        except ValueError as error:
            return str(error)
        return None

    def state(self) -> State:
        """A copy of all as it now is, for `return_to`."""
        found = [{name: tensor.clone() for name, tensor in weight.state_dict().items()} for weight in self._weights]
        return [*found, {name: parameter.detach().clone() for name, parameter in self._others.items()}]

    def return_to(self, state: State) -> None:
        """Put back what `state` copied since `start`."""
        for weight, tensors in zip(self._weights, state):
            for name, parameter in weight.named_parameters():
                parameter.data = tensors[name]
            for name, _ in weight.named_buffers():
                place, _, attribute = name.rpartition(".")
                setattr(weight.get_submodule(place), attribute, tensors[name])
        for name, parameter in self._others.items():
            parameter.data = state[-1][name]

    def moved(self) -> float:
        """How far codebooks (or grids) went until now: squared change over squared size before.

        Of weights that are rounded anew it is how far the dense weights went that they stand for.
        """
        change = size = 0.0
        for before, now in self._compared():
            change += float((now.float() - before.float()).square().sum())
            size += float(before.float().square().sum())
        return change / size if size else 0.0

    @torch.no_grad()
    def _compared(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One after the other what tells how far weights went, as it was at first and as it is now."""
        for weight, before in zip(self._weights, self._states):
            if isinstance(weight, RoundedAnew):  # what it learns by is no part of what is stored
                yield weight.first(torch.float32), weight(torch.float32)
            else:
                yield from ((before[name], now.detach()) for name, now in weight.named_parameters() if name in before)

    def restore(self) -> None:
        """Put back what was there at first."""
        for weight, state in zip(self._weights, self._states):
            weight.restore(state)
        for name, parameter in self._others.items():
            parameter.data = self._data[name]

    def _end(self) -> None:
        for parameter in self._others.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for module, attribute, parameter in self._cast:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            module._parameters[attribute] = parameter


def _held(tensors: dict[str, Kind]) -> dict[str, Kind]:
    """Those tensors of a stored weight, by name, that no processes hold in parts (train/sharding.py)."""
    return {name: tensor for name, tensor in tensors.items() if "parametrizations." not in name}


def by_sign(parameter: Tensor) -> None:
    """The gradient's sign alone: each number moves by the learning rate (AutoRound, arXiv 2309.05516); see `fit`."""
    assert parameter.grad is not None
    parameter.grad.sign_()


def by_mean(model: nn.Module) -> Callable[[Tensor], None]:
    """The mean of the gradients of all that a centroid stands for, not their sum (iPQ, arXiv 2004.07320); see `fit`."""
    uses: dict[int, Tensor] = {}
    for layer in compressed(model).values():
        weight = cast(CodebookWeight, layer.stored)
        size = weight.codebooks.shape[1]
        counts_MK = torch.stack([codes_N.bincount(minlength=size) for codes_N in weight.unpacked()])
        key = id(weight.codebooks)  # which several weights may share
        uses[key] = uses.get(key, 0) + counts_MK.to(weight.codebooks.device)

    def change_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if id(parameter) in uses:
            parameter.grad /= uses[id(parameter)].clamp(min=1)[:, :, None]

    return change_gradient


@contextmanager
def rounding(
    block: nn.Module, dense: dict[str, Tensor], learns: Literal["clipping", "rounding", "weights"]
) -> Iterator[None]:
    """Let the weights of a block, uniform or of signs, be rounded anew from the `dense` ones (by layer)."""
    layers = compressed(block)
    for name, layer in layers.items():
        stored = layer.stored
        if isinstance(stored, SignWeight):
            layer.stored = LearnedSigns(dense[name], stored)
        elif learns == "weights":
            layer.stored = LearnedWeights(dense[name], cast(UniformWeight, stored))
        else:
            layer.stored = LearnedRounding(dense[name], cast(UniformWeight, stored), offsets=learns == "rounding")
    try:
        yield
    finally:
        for layer in layers.values():
            layer.stored = cast(RoundedAnew[Any], layer.stored).stored


@contextmanager
def moving(block: nn.Module) -> Iterator[None]:
    """Let the codes of a block's codebook weights move, also of those inside other forms."""
    found = {name: MovingCodes(one) for name, one in block.named_modules() if isinstance(one, CodebookWeight)}
    for name, one in found.items():
        block.set_submodule(name, one)
    try:
        yield
    finally:
        for name, one in found.items():
            block.set_submodule(name, one.give_back())


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


class Group(NamedTuple):
    """Parameters with a learning rate and betas of their own."""

    parameters: Sequence[Tensor]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


def fit(
    parameters: Sequence[Tensor],
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[Any],
    *,
    lr: float,
    weight_decay: float,
    schedule: Schedule,
    warmup: float,
    clip: float | None,
    half: bool,
    parts: Callable[[Any], Iterable[Any]] = lambda batch: (batch,),
    groups: Sequence[Group] = (),
    change_gradient: Callable[[Tensor], None] | None = None,
    watch: Callable[[float, float], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> str | None:
    """Minimise the loss of a batch over the float32 `parameters` with AdamW (torch's betas), one step for each batch.

    It is the sum of `loss_of(part)`, each computed alone, over the parts of a batch, of which `parts(batch)` gives this
    rank's own (see `Sums`).

    `groups` learn with them, without decay. With `change_gradient`, which changes a parameter's gradient in place, it
    is plain gradient descent instead, without decay or groups.

    The learning rate is `lr` times `rate(...)`; `clip` bounds the norm of the gradients of `parameters` together;
    `half` scales the loss as computing in float16 needs; `watch` is told the loss and that norm in each step, `after`
    called with the number of each step that was made, from 1. Stops at the first loss or gradient that is not finite,
    with the parameters as they then are, and returns what it was, in words; otherwise None.
    """
    others: list[dict[str, Any]] = [
        {"params": one.parameters, "lr": one.lr, "betas": one.betas, "weight_decay": 0.0} for one in groups
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        [{"params": parameters}, *others], lr=lr, weight_decay=weight_decay
    )
    if change_gradient is not None:
        optimizer = torch.optim.SGD(parameters, lr=lr)
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=half)
    sums = Sums([one for group in optimizer.param_groups for one in group["params"]])
    for step, batch in enumerate(told(batches, len(batches), "steps of this block", "step")):
        for group, full in zip(optimizer.param_groups, [lr, *(one.lr for one in groups)]):
            group["lr"] = full * rate(schedule, step, len(batches), warmup)
        optimizer.zero_grad(set_to_none=True)
        for part in parts(batch):
            loss = loss_of(part)
            scaler.scale(loss).backward()
            sums.add(loss)
        loss = sums.total()
        scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = loss.isfinite() if half else loss.isfinite() & norm.isfinite()  # else the scaler's to mend
        if not bool(finite) or (half and scaler.get_scale() < 1):
            return f"step {step + 1} of {len(batches)}: loss {float(loss):.3g}, gradient {float(norm):.3g}"
        if watch is not None:
            watch(float(loss), float(norm))
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        if change_gradient is not None:
            for parameter in (one for one in parameters if one.grad is not None):
                change_gradient(parameter)
        scaler.step(optimizer)
        scaler.update()
        if after is not None:
            after(step + 1)
    return None


def rate(schedule: Schedule, step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step, counted from 0: a linear rise, then "constant" or down to 0.

    The rise takes the share `warmup` of all steps.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    part = (step - rise) / (steps - rise)
    return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[schedule]
