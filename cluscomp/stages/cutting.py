"""What stage cut does: the best directions of all layers stay, and a method compresses their factors."""

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.forms.layers import put_in, take_out
from cluscomp.forms.linear import CompressedLinear, compressed
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.ranked import Ranked
from cluscomp.forms.stored import Stored
from cluscomp.kernels.work import Work
from cluscomp.methods import Method
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.models.walk import Walk
from cluscomp.plan import dry
from cluscomp.plan.cost import Cost, worst
from cluscomp.plan.meta import MetaModel
from cluscomp.plan.places import Place
from cluscomp.process import Progress, give_memory_back
from cluscomp.solve import low_rank
from cluscomp.solve.layer import Seen
from cluscomp.stages import Job
from cluscomp.stages.blockwise import embedded
from cluscomp.stages.clustering import compress_block
from cluscomp.stages.cut import Cut
from cluscomp.stages.observing import observe
from cluscomp.stages.ranking import check_reach

SIDES = "right", "left"  # of a weight, in the order that an input goes through


def check_cut(stage: Cut, original: Original) -> None:
    """Raise InputError for a ratio out of reach, and, naming the layer, for factors that the method cannot compress."""
    check_reach("cut.ratio", stage.ratio, original)
    if stage.method is None:
        return
    outline = MetaModel(original.config, original.dtype, original.device.type)
    for name, places in zip(block_names(outline.model), outline.places()):
        _tried(stage.method, name, _factors(places, stage.ratio), outline.dtype)


def _tried(method: Method, block: str, factors: dict[str, Place], dtype: torch.dtype) -> dry.Dry | None:
    """What the method will do to the factors of a block. Raises InputError, naming the layer, for what it cannot do."""
    try:
        return dry.compress(method, factors, dtype)
    except ValueError as error:
        raise InputError(f"{block}.{error}") from error


def _factors(places: dict[str, Place], ratio: float) -> dict[str, Place]:
    """Shapes of the factors of a block's layers, if each of these were cut to the same share."""
    found: dict[str, Place] = {}
    for number, (name, place) in enumerate(places.items()):
        outputs, inputs = place.out_features, place.in_features
        rank = max(1, int(ratio * outputs * inputs / (outputs + inputs)))
        right = place._replace(out_features=rank, input=2 * number)
        found |= {f"{name}.right": right, f"{name}.left": place._replace(in_features=rank, input=2 * number + 1)}
    return found


def cost(stage: Cut, outline: MetaModel) -> Cost | None:
    """What `run` will hold and do, and `outline` changed as `run` will change the model; see `Cut.cost`."""
    before, work, peak = outline.stored, Work(read=float(outline.checkpoint_bytes())), 0.0
    layers = {
        block: {name: Place(one.out_features, one.in_features, 0) for name, one in compressed(block).items()}
        for block in blocks(outline.model)
    }
    observing = 0.0
    if stage.calibrated:
        once = outline.forward(stage.batch_size, stage.length)
        work += once.work * (stage.samples / stage.batch_size * outline.blocks)
        observing = once.peak + 2 * outline.stream(stage.samples, stage.length)
    for full, (block, places) in zip(block_names(outline.model), layers.items()):
        factors = _factors(places, stage.ratio)
        with torch.device("meta"):
            forms: dict[str, Stored] = {
                name: PlainWeight.empty(out_features=place.out_features, in_features=place.in_features)
                for name, place in factors.items()
            }
        if stage.method is not None:
            found = _tried(stage.method, full, factors, outline.dtype)
            if found is None:
                return None
            forms, work, peak = found.forms(), work + found.work, max(peak, found.peak)
        for name in places:
            put_in(block, name, LowRank(forms[f"{name}.left"], forms[f"{name}.right"]))
    outline.exact = False
    always = {"embedding, head": outline.outside}
    device = worst(
        always | {"ranked directions": before, "what stays": outline.stored, "looking at text": observing},
        always | {"ranked directions": before, "what stays": outline.stored, "compressing factors": peak},
        always | {"what stays": outline.stored, "writing the checkpoint": outline.writing},
    )
    return Cost(device, {}, work)


def run(stage: Cut, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Cut the model, and compress its factors block after block; returns and raises as `Cut.run` says."""
    ranked = {name: cast(Ranked, layer.stored) for name, layer in compressed(model).items()}
    shapes = {name: (one.out_features, one.in_features) for name, one in ranked.items()}
    try:
        kept = low_rank.highest({name: one.scores for name, one in ranked.items()}, shapes, stage.ratio)
    except ValueError as error:
        raise InputError(f"cut.ratio={error}; take more") from error
    for name, kept_R in kept.items():
        try:
            put_in(model, name, ranked.pop(name).cut(kept_R).requires_grad_(False))
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    give_memory_back()
    if stage.method is not None:
        _compress_factors(stage, stage.method, model, job)
    ranks = {name: int(kept_R.sum()) for name, kept_R in kept.items()}
    found: dict[str, Any] = {"ratio": low_rank.share(ranks, shapes), "ranks": ranks}
    return found | ({"calibration": stage.data.text("calibration").describe()} if stage.calibrated else {})


def _compress_factors(stage: Cut, method: Method, model: PreTrainedModel, job: Job) -> None:
    """Put in the place of both factors of each layer, or of a dense one, what the method makes of them."""
    walk, names = Walk(model), block_names(model)
    progress = Progress("cut", len(names))
    stream = embedded(stage, walk, job) if stage.calibrated else []
    for index, block in enumerate(blocks(model)):
        layers = [*compressed(block)]
        for name in layers:
            _take_apart(block, name, job.original.dtype)
        dense, sees = linears(block), method.sees()
        stream, statistics = observe(sees, walk, index, stream, layers=[*dense])
        for name in dense.keys() - statistics.keys() if sees else ():  # experts that no token was sent to
            statistics[name] = Seen(sees).filled(Seen(sees), 1, dense[name].in_features, dense[name].weight.device)
        compress_block(method, block, names[index], job.seed, statistics)
        for name in layers:
            _put_together(block, name)
        give_memory_back()
        progress.step("factors compressed")


def _take_apart(block: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Let a layer of low rank be two dense layers, one after the other, and a dense one itself."""
    layer = cast(CompressedLinear, block.get_submodule(name))
    if not isinstance(layer.stored, LowRank):
        take_out(block, name, dtype)
        return
    pair = nn.Sequential(OrderedDict((side, nn.Linear(1, 1, bias=False, device="meta")) for side in SIDES))
    for side in SIDES:
        dense = cast(nn.Linear, pair.get_submodule(side))
        dense.weight = nn.Parameter(layer.stored.get_submodule(side)(dtype), requires_grad=False)
        dense.out_features, dense.in_features = dense.weight.shape
    cast(nn.Linear, pair.left).bias = layer.bias
    block.set_submodule(name, pair)


def _put_together(block: nn.Module, name: str) -> None:
    """Let two compressed layers, one after the other, be one of low rank."""
    pair = block.get_submodule(name)
    if isinstance(pair, nn.Sequential):
        right, left = (cast(CompressedLinear, pair.get_submodule(side)) for side in SIDES)
        block.set_submodule(name, CompressedLinear(LowRank(left.stored, right.stored), left.bias, left.weight.dtype))
