"""What stage cluster does: statistics of layers' inputs, block after block compressed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import groupby
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp import ranks
from cluscomp.errors import InputError
from cluscomp.forms.apart import stacks
from cluscomp.forms.layers import put_in
from cluscomp.forms.stored import Stored
from cluscomp.methods import Compressed, Method, Offers
from cluscomp.methods.each_layer import EachLayer
from cluscomp.models.original import block_names, linears
from cluscomp.models.walk import Walk
from cluscomp.plan.meta import MetaModel
from cluscomp.plan.places import Place
from cluscomp.process import Progress, give_memory_back, told
from cluscomp.solve.allocate import Option
from cluscomp.solve.distribution import of_codes, of_entries
from cluscomp.solve.drift import corrected
from cluscomp.solve.layer import Later, Layer, Seen
from cluscomp.stages import Job
from cluscomp.stages import prices as price
from cluscomp.stages.blockwise import Blockwise, embedded, relative_error
from cluscomp.stages.cluster import Cluster
from cluscomp.stages.gating import gated
from cluscomp.stages.menus import Menus, Shares
from cluscomp.stages.observing import Following, observe, seen_first, through

log = logging.getLogger(__name__)


def run(stage: Cluster, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Compress the model block after block; returns and raises as `Cluster.run` says."""
    outline = MetaModel(job.original.config, job.original.dtype, job.original.device.type)
    all_places = outline.places()
    if stays := outline.kept():
        log.info("stay in 16 bits inside the blocks: %s", ", ".join(stays))
    by_block: dict[str, dict[str, Any]] = {}
    prices = _priced(stage, model, job) if stage.price == "loss" else {}
    shares = _shared_out(stage, model, job, all_places, prices) if stage.over_the_model else None
    walk, names = Walk(model, job.original), block_names(model)
    work = Blockwise("cluster", job.folder, model, apart=stage.apart)
    last, chain = work.last, ranks.Chain()
    stream: Sequence[Tensor] = embedded(stage, walk, job) if stage.calibrated and last >= 0 else []
    undrifted = list(stream) if stage.drift else []  # what the original makes of the windows
    for index, block, finished in work.all():  # through finished ones the stream still has to pass
        if not work.mine(index):  # another process walks through it
            continue
        stream = entering = chain.taken(stream) if stage.apart and 0 < index <= last else stream
        name = names[index]
        job.original.load_block(model, index)
        statistics: dict[str, Seen] = {}
        originals: list[dict[str, Tensor]] = []
        if index <= last and undrifted:
            undrifted, originals = through(walk, index, undrifted, keep=not finished)
        look = partial(observe, stage.sees, walk, index, entering, originals=originals, room=stage.room)
        share = None if shares is None else shares.blocks[index]
        if index <= last and (not finished or stage.prefix == "original"):
            stream, statistics = look(
                layers=[] if finished else seen_first(all_places[index], share if stage.drift else None),
                whole=stage.prefix == "original",
                give=chain.give if stage.apart and index < last else None,
            )
        if finished:
            found = work.put_back(index)
        else:
            following = Following(stage.drift, stage.drift_damping, partial(look, whole=False)) if stage.drift else None
            experts = stacks(block).items() if statistics else ()
            tokens = {stack: [statistics[one].own for one in layers if one in statistics] for stack, layers in experts}
            found = compress_block(
                stage.whole, block, name, job.seed, statistics, all_places[index], share, following, prices,
                together=not stage.apart,
            )  # fmt: skip
            found |= {"experts": tokens} if tokens else {}
            originals.clear()  # of the next block there will be as many
            error = relative_error(found["squares"])
            work.finish(index, found, f"relative error {error:.4f}", relative_error=error)
        if index < last and stage.prefix == "compressed":
            stream, _ = look(layers=[])
        block.to("cpu")  # what is finished leaves the GPU
        by_block[name] = found
    ranks.wait()
    if ranks.rank() > 0:
        return {}  # the first process puts together what all have made
    numbers = _reported(by_block := _of_all_ranks(work, walk, job, by_block))
    if shares is not None:
        numbers["shared_out"] = shares.report()
    numbers["method"] = type(stage.method).__module__.rpartition(".")[2]
    if chosen := _of_all(by_block, "chosen"):
        log.info("%s", chosen_table(chosen, names))
        numbers["chosen"] = chosen
    return numbers | ({"calibration": stage.data.text("calibration").describe()} if stage.calibrated else {})


def _of_all_ranks(
    work: Blockwise, walk: Walk, job: Job, by_block: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What was found in each block, by its name; blocks that other processes made are put into the model."""
    names = block_names(walk.model)
    for index, name in enumerate(names):
        if name not in by_block:
            job.original.load_block(walk.model, index)
            by_block[name] = work.put_back(index)
            walk.blocks[index].to("cpu")
    return {name: by_block[name] for name in names}


def _reported(by_block: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Errors, distributions and tokens of experts of the whole model, from what was found in each block."""
    squares = _of_all(by_block, "squares")
    by_layer = {layer: error / size if size else 0.0 for layer, (error, size) in squares.items()}
    numbers = {"relative_error": relative_error(squares), "relative_error_by_layer": by_layer}
    numbers["distribution_by_layer"] = _of_all(by_block, "distributed")
    return numbers | ({"tokens_by_expert": tokens} if (tokens := _of_all(by_block, "experts")) else {})


def _of_all(by_block: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    return {
        f"{name}.{layers}": values for name, found in by_block.items() for layers, values in found.get(key, {}).items()
    }


def _priced(stage: Cluster, model: PreTrainedModel, job: Job) -> dict[str, float]:
    """What errors of the layers cost, by their names."""
    windows = torch.from_numpy(stage.windows(job.original.tokenizer, job.seed)).to(job.original.device)
    walk = Walk(model, job.original)
    return ranks.agreed(lambda: price.prices(walk, [*windows.split(stage.batch_size)], job.folder))


def _shared_out(
    stage: Cluster, model: PreTrainedModel, job: Job, places: list[dict[str, Place]], prices: dict[str, float]
) -> Shares:
    """Go through the original and ask what the layers of each block may have; what is known survives a kill."""
    method = stage.whole
    assert isinstance(method, Offers) and method.bits is not None  # check_method
    walk, names = Walk(model, job.original), block_names(model)
    menus = Menus(job.folder, len(names))
    last, own = menus.last, [index for index in range(menus.last + 1) if ranks.mine(index)]
    progress, chain = Progress("cluster, menus", len(own)), ranks.Chain()
    stream: Sequence[Tensor] = embedded(stage, walk, job) if stage.calibrated and last >= 0 else []
    for index in own:
        stream = entering = chain.taken(stream) if index else stream
        with job.original.block(model, index) as block:
            statistics: dict[str, Seen] = {}
            if stage.calibrated:
                asked, give = [*places[index]] if menus.wants(index) else [], chain.give if index < last else None
                look = partial(observe, method.sees(), walk, index, entering, layers=asked)
                stream, statistics = look(room=stage.room, give=give)
            if menus.wants(index):
                name, at = names[index], places[index]
                new = partial(_layers, block, name, job.seed, statistics, at, prices=prices)
                try:
                    offered = list(method.offers(new()))
                    if stage.gates is not None:
                        apply, made = partial(walk.apply, index), partial(_made, method, new)
                        streams, worth = (entering, stream), prices[name] if prices else 1.0
                        offered = gated(stage.gates, offered, made, apply, block, streams, worth, walk.width)
                except ValueError as error:
                    raise InputError(f"{name}.{error}") from error
                menus.keep(index, offered)
        progress.step("asked what its layers may have")
    ranks.wait()
    menus = Menus(job.folder, len(names))  # with those that other processes asked for
    return menus.share_out(stage.allocation, method.bits)


def _made(method: Method, new: Callable[[], dict[str, Layer]], names: list[str], option: Option) -> dict[str, Tensor]:
    """The dense weights that an option makes of some layers, which are as `new()` has them."""
    layers, weights = new(), dict[str, Tensor]()
    with torch.no_grad():
        for compressed in _compressed(method, {name: layers[name] for name in names}, [(names, option)]):
            weights |= {name: stored(layers[name].weight_OI.dtype) for name, stored in compressed.stored.items()}
    return weights


def compress_block(
    method: Method,
    block: nn.Module,
    name: str,
    seed: int,
    statistics: dict[str, Seen],
    places: dict[str, Place] | None = None,
    share: list[tuple[list[str], Option]] | None = None,
    following: Following | None = None,
    prices: dict[str, float] | None = None,
    together: bool = False,
) -> dict[str, dict[str, Any]]:
    """Replace every linear layer of a block; without `places` each has an input of its own. Uses `statistics` up.

    `share` says what was chosen for its layers where bits are shared out over the model. With `following`, weights are
    corrected for the drift of their inputs: when all layers of an input are compressed, the next is looked at again.
    `prices`: of errors of layers, by their names in the model. `together`: all processes of the run are at this block,
    and share its layers out where the method makes each by itself.
    Returns `squares`, by layer the squared error and squared size of its weight, `distributed`, by layer how its
    entries and codes are, and `chosen`, by the names of layers that go together what the method chose for them.
    """
    layers = _layers(block, name, seed, statistics, places, following, prices)
    squares, distributed, chosen = {}, {}, {}
    waiting: dict[str, Stored] = {}  # until the dense block need not run again to show what enters other layers
    again = following is None and any(isinstance(seen, Later) for seen in statistics.values())
    try:
        parts = _compressed(method, layers, share, together=together, at_once=following is None)
        for compressed in told(parts, len(layers), name, "layer"):
            read = {layers[layer].input for layer in compressed.stored}
            for layer, stored in compressed.stored.items():
                if again:
                    waiting[layer] = stored
                else:
                    put_in(block, layer, stored)
                weight_OI = layers.pop(layer).weight_OI.float()
                statistics.pop(layer, None)  # those of its inputs leave memory with the last layer that reads them
                with torch.no_grad():
                    difference_OI = stored(torch.float32) - weight_OI
                squares[layer] = [float(matrix.double().square().sum()) for matrix in (difference_OI, weight_OI)]
                distributed[layer] = of_entries(weight_OI)
                if (coded := stored.coded()) is not None:
                    distributed[layer] |= of_codes(*coded)
            if compressed.chosen:
                chosen[", ".join(compressed.stored)] = compressed.chosen
            give_memory_back()
            if following is not None and layers and not read & {layer.input for layer in layers.values()}:
                first, number = next((layer, one.input) for layer, one in layers.items())
                after = [layer for layer, one in layers.items() if one.input == number]
                after = next((stack for stack in stacks(block).values() if first in stack), after)
                if not compressed.stored.keys().isdisjoint(after):
                    continue  # experts of one stack: nothing enters them that is not as it was
                seen = following.again(layers=after)[1]
                looked = _layers(block, name, seed, seen, places, following, prices)
                layers |= {layer: looked[layer] for layer in after}
    except ValueError as error:
        raise InputError(f"{name}.{error}") from error
    for layer, stored in waiting.items():
        put_in(block, layer, stored)
    return {"squares": squares, "distributed": distributed, "chosen": chosen}


def _layers(
    block: nn.Module,
    name: str,
    seed: int,
    statistics: dict[str, Seen],
    places: dict[str, Place] | None,
    following: Following | None = None,
    prices: dict[str, float] | None = None,
) -> dict[str, Layer]:
    """The linear layers of a block as methods see them."""
    layers = {}
    corrections: dict[int, Tensor] = {}  # by the statistics' identity
    for number, (layer, dense) in enumerate(linears(block).items()):
        if places is not None and layer not in places:
            continue
        if not bool(dense.weight.isfinite().all()):
            raise InputError(f"{name}.{layer}: NaN or infinity among its weights; the model is damaged")
        generator = torch.Generator().manual_seed(layer_seed(seed, f"{name}.{layer}"))
        input_, stack = (places[layer].input, places[layer].stack) if places else (number, None)
        weight_OI, seen = dense.weight.detach(), statistics.get(layer)
        if following is not None and seen is not None and seen.drift is not None:
            if id(seen) not in corrections:
                corrections[id(seen)] = seen.drift.correction(seen.matrix_II, following.damping)
            weight_OI = corrected(weight_OI, corrections[id(seen)], following.strength)
        price_ = (prices or {}).get(f"{name}.{layer}")
        layers[layer] = Layer(weight_OI, input_, seen, generator, seed, price_, stack)
    return layers


def _compressed(
    method: Method,
    layers: dict[str, Layer],
    share: list[tuple[list[str], Option]] | None,
    *,
    together: bool = False,
    at_once: bool = False,
) -> Iterator[Compressed]:
    """What the method makes of the layers, with the settings that were chosen for some of them, if any were.

    `together`: each process makes some of the layers that read one input, or of all `at_once`, and gets the others.
    """
    together &= ranks.world() > 1
    if share is None and not (together and isinstance(method, EachLayer)):
        yield from method.compress(layers)
        return
    parts: list[tuple[list[str], Method]] = [([name], method) for name in layers]
    if share is not None:
        parts = [(names, replace(method, **option.settings)) for names, option in share]  # type: ignore[type-var]

    def make(part: tuple[list[str], Method]) -> list[Compressed]:
        names, chosen = part
        return list(chosen.compress({name: layers[name] for name in names}))

    if not together:
        yield from (one for part in parts for one in make(part))
        return
    device = next(iter(layers.values())).weight_OI.device
    for _, neighbours in groupby(parts, lambda part: at_once or layers[part[0][0]].input):
        for made in ranks.each(list(neighbours), lambda part: [_moved(one, torch.device("cpu")) for one in make(part)]):
            yield from (_moved(one, device) for one in made)


def _moved(compressed: Compressed, device: torch.device) -> Compressed:
    """The same with its tensors on a device; what was decoded stays behind."""
    for stored in compressed.stored.values():
        stored.forget()
        stored.to(device)
    return compressed


def chosen_table(chosen: dict[str, dict[str, Any]], block_names: list[str]) -> str:
    """What was chosen, as text: for each kind of layers the values, or the least and the most, over the blocks."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layers, values in chosen.items():
        kind = next(layers.removeprefix(f"{name}.") for name in block_names if layers.startswith(f"{name}."))
        kinds.setdefault(kind, []).append(values)
    head = [*next(iter(chosen.values()))]
    rows = [
        [kind, *(_range([one.get(key) for one in found]) for key in head), len(found)] for kind, found in kinds.items()
    ]
    return str(tabulate(rows, ["layers", *head, "blocks"], "github", disable_numparse=True))


def _range(values: list[Any]) -> str:
    """Values as they are told: one, or the least and the most; None is "none" and below all others."""
    ends = sorted(set(values), key=lambda value: (value is not None, value))
    told = [f"{value:.3f}" if isinstance(value, float) else str(value).lower() for value in (ends[0], ends[-1])]
    return " to ".join(dict.fromkeys(told))


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed from the run's seed and its name, so that results do not depend on the order of layers."""
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7])
