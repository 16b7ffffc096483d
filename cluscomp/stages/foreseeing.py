"""What stage cluster will do, from shapes alone: what it refuses, and what it costs."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from cluscomp.errors import InputError
from cluscomp.forms.layers import put_in
from cluscomp.kernels.counting import Count
from cluscomp.kernels.work import Work
from cluscomp.methods import Method, Offers
from cluscomp.methods.each_layer import EachLayer
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.models.sources import quantised_types
from cluscomp.plan import dry
from cluscomp.plan.cost import Cost, worst
from cluscomp.plan.dry import Dry
from cluscomp.plan.meta import MetaModel
from cluscomp.plan.places import Place
from cluscomp.solve.layer import Seen
from cluscomp.stages.cluster import Cluster
from cluscomp.stages.observing import bytes_of, in_turn

# Methods that say `offers`, by their yaml; so do the presets of these
SHARING = ("cluscomp", "cluscomp_paths", "gptvq", "aqlm", "vptq", "water_sic", "low_rank", "low_rank_binary")


def check_method(stage: Cluster, original: Original) -> None:
    """Try the stage's method on every block's shapes. Raises InputError, naming the layer, for what it cannot do."""
    outline = MetaModel(original.config, original.dtype, original.device.type)
    tried = _tried(stage.whole, outline)
    shares = isinstance(stage.whole, Offers) and stage.whole.bits is not None
    asked = {"allocation.scope=model": stage.over_the_model, "cluster.price=loss": stage.price == "loss"}
    for setting, needed in asked.items():
        if needed and not shares:
            raise InputError(
                f"{setting} needs a method whose bits can be shared out ({', '.join(SHARING)}), bits=, and nothing "
                "beside or around it (beside=none cluster.rotation=none)"
            )
    _check_grids(block_names(outline.model), tried, quantised_types(original.folder))


def _tried(method: Method, outline: MetaModel) -> list[Dry | None]:
    """What the method will do to each block. Raises InputError, naming the layer, for what it cannot do."""
    found = []
    for name, places in zip(block_names(outline.model), outline.places()):
        try:
            found.append(dry.compress(method, places, outline.dtype))
        except ValueError as error:
            raise InputError(f"{name}.{error}") from error
    return found


def _check_grids(names: list[str], tried: list[Dry | None], origin: list[str]) -> None:
    """Raise InputError for 4 bits in groups of 32 or a divisor if the original comes from such a file (GGUF's Q4).

    Its weights lie on that grid, so next to nothing would be lost, and the score say nothing about the method.
    """
    if not any(kind.startswith("Q4") for kind in origin):
        return
    for name, block in zip(names, tried):
        for layer, stored in block.stored.items() if block is not None else ():
            if stored.lies_on(width=4, group=32):
                raise InputError(
                    f"{name}.{layer}: 4 bits in {stored.groups} groups of its {stored.in_features} inputs "
                    f"would be void: the original comes from a file of 4 bits in groups of 32 "
                    f"({', '.join(origin)}), and lies on that grid. Take other bits, or method.group=64"
                )


def cost(stage: Cluster, outline: MetaModel) -> Cost | None:
    """What `run` will hold and do, and `outline` changed as `run` will change the model; see `Cluster.cost`."""
    work = Work(read=outline.all_numbers * outline.file_bytes)
    tried = [one for one in _tried(stage.whole, outline) if one is not None]
    if len(tried) < outline.blocks:
        return None
    observing = streams = moments = of_experts = 0.0
    own, making = _of_one_rank(stage, outline)
    menus = stage.over_the_model * (1.0 if stage.apart else 1 / outline.ranks)  # whose menus it asks for
    pricing, gating = dict[str, float](), dict[str, float]()
    if stage.calibrated:
        looking = _looking(stage, outline)
        moments, of_experts = looking.kept, looking.of_experts
        streams = 2 * outline.stream(stage.samples, stage.length)
        once = outline.forward(stage.batch_size, stage.length)
        observing = once.peak + looking.captured + looking.added
        passes = stage.samples / stage.batch_size
        walks, looks = 1.0 + (stage.prefix == "compressed") + menus, 1.0 + menus
        if looking.turns > 1:
            sweeps = 1 + (isinstance(stage.whole, Offers) and stage.whole.bits is not None)
            walks, looks = walks + looking.turns * (1 + sweeps) - 1, looks + sweeps
        if stage.drift:  # the original beside, and a look at each input of the block
            # what was kept of the block before is not free at once (seen with 32 windows)
            streams = 2 * streams + 2 * looking.captured * passes
            again = looking.inputs - 1  # passes that end at an input, half way on the average
            walks, looks = walks + 1 + again / 2, looks + again / looking.inputs
            if stage.over_the_model and looking.turns == 0:  # at first one input alone is looked at
                walks, looks = walks - menus, looks - menus * again / looking.inputs
        work += once.work * passes * (outline.blocks - 1) * walks * own
        work += looking.work * passes * outline.blocks * looks * own
        if stage.price == "loss":
            inside, logits = outline.training(stage.batch_size, stage.length), outline.logits(1, stage.length)
            work += (once.work + inside.work) * (passes * outline.blocks) + logits.work * (3 * stage.samples)
            inputs_of_all = (outline.blocks + 1) * outline.stream(stage.samples, stage.length)
            pricing = {"inputs of all blocks": inputs_of_all, "inside one block": max(inside.peak, 3 * logits.peak)}
    if stage.gates is not None:  # a block's layers at all levels, and gradients to them
        levels, inside = stage.gates.levels, outline.training(stage.batch_size, stage.length)
        for found in tried:
            work += found.work * levels
        work += inside.work * (stage.gates.steps * outline.blocks)
        gating = {"layers at all levels": (levels + 3) * outline.dense_block, "inside one block": inside.peak}
    compared = max(24.0 * o * i for o, i in outline.dense.values())  # error and size of a layer in `compress_block`
    for block, found in zip(blocks(outline.model), tried):
        work += found.work * making
        outline.exact &= found.exact and not stage.over_the_model and stage.price == "error"
        for layer, stored in found.forms().items():
            put_in(block, layer, stored)
    finished = {"codes and codebooks": outline.stored}
    always = {"embedding, head": outline.outside} | (finished if outline.device == "cpu" else {})
    working = {"a dense block": outline.dense_block, "streams": streams, "second moments": moments}
    compared += moments - of_experts
    at_one = {"second moments": of_experts, "one matrix and what is seen": max(compared, *(one.peak for one in tried))}
    device = worst(
        always | {"a dense block": outline.dense_block} | pricing,
        always | working | {"activations": observing},
        always | working | gating,
        always | working | at_one,
        always | {"writing the checkpoint": outline.writing},
    )
    in_ram = finished | ({"streams on their way": streams / 2} if own < 1 else {})
    relief = "fewer cluster.samples, or method=cluscomp_data_free"
    return Cost(device, {} if outline.device == "cpu" else in_ram, work, relief if stage.calibrated else "")


def _of_one_rank(stage: Cluster, outline: MetaModel) -> tuple[float, float]:
    """What share of the walks through blocks, and of the making of layers, is one rank's.

    A rank has blocks of its own; or, where a block looks at what was made of others, layers of each: of those that read
    one input if the next one's are looked at again, else of all.
    """
    if stage.apart:
        return 1 / outline.ranks, 1 / outline.ranks
    if not (stage.over_the_model or isinstance(stage.whole, EachLayer)):
        return 1.0, 1.0
    inputs = [place.input if stage.drift else "" for place in outline.places()[0].values()]
    return 1.0, sum(math.ceil(count / outline.ranks) for count in Counter(inputs).values()) / len(inputs)


@dataclass(frozen=True)
class Looking:
    """What it takes to see what enters the layers of a block, of one batch of windows.

    Bytes are of the inputs that are `captured`, of statistics that are `kept` at once, among them those `of_experts`,
    and of what is `added` to these at most. Statistics of experts are gathered in so many `turns`; `inputs` come one
    after the other where the weights of each follow what is before it.
    """

    work: Work
    captured: float
    kept: float
    of_experts: float
    added: float
    turns: int
    inputs: int


def _looking(stage: Cluster, outline: MetaModel) -> Looking:
    """Of the block with most of it."""
    kinds = {tuple(places.items()): places for places in outline.places()}.values()
    return max((_looking_at(stage, places, outline.dtype) for places in kinds), key=lambda one: one.kept + one.captured)


def _looking_at(stage: Cluster, places: dict[str, Place], dtype: torch.dtype) -> Looking:
    work, most, captured = Work(), 0.0, 0.0
    kept: dict[str | None, list[int]] = {}  # bytes of each input's statistics, by stack
    for place in {place.input: place for place in places.values()}.values():
        tokens = math.ceil(stage.batch_size * stage.length * place.share)
        one_1I, all_TI = (torch.empty(rows, place.in_features, dtype=dtype, device="meta") for rows in (1, tokens))
        seen, followed = Seen(stage.sees), stage.drift > 0 and place.stack is None
        seen.add(one_1I, one_1I if followed else None)
        with Count() as count:
            seen.add(all_TI, all_TI if followed else None)
        work, most, captured = work + count.work, max(most, count.peak), captured + all_TI.nbytes
        kept.setdefault(place.stack, []).append(seen.nbytes)
    dense = kept.pop(None, [])
    turns = in_turn({name: one.in_features for name, one in places.items() if one.stack}, stage.sees, stage.room)
    at_once = max((sum(bytes_of(stage.sees, places[name].in_features) for name in turn) for turn in turns), default=0)
    together = sum(max(stack) for stack in kept.values())
    of_experts = at_once + together
    return Looking(work, captured, sum(dense) + of_experts, of_experts, most, len(turns), len(dense) + len(kept))
