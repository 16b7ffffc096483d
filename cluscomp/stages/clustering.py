"""What stage cluster does: the method tried on shapes, statistics of layers' inputs, block after block compressed."""

import logging
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.forms.layers import put_in
from cluscomp.kernels.counting import Count
from cluscomp.kernels.work import Work
from cluscomp.methods import Compressed, Method, Offers
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.models.sources import quantised_types
from cluscomp.models.walk import Walk
from cluscomp.plan import dry
from cluscomp.plan.cost import Cost, worst
from cluscomp.plan.dry import Dry
from cluscomp.plan.meta import MetaModel, Place
from cluscomp.process import Progress, give_memory_back, told
from cluscomp.solve.allocate import Option
from cluscomp.solve.distribution import of_codes, of_entries
from cluscomp.solve.drift import corrected
from cluscomp.solve.layer import Layer, Seen
from cluscomp.stages import Job
from cluscomp.stages import prices as price
from cluscomp.stages.blockwise import Blockwise, relative_error
from cluscomp.stages.cluster import Cluster
from cluscomp.stages.menus import Menus, Shares
from cluscomp.stages.observing import Following, observe, through

log = logging.getLogger(__name__)


def check_method(stage: Cluster, original: Original) -> None:
    """Try the stage's method on every block's shapes. Raises InputError, naming the layer, for what it cannot do."""
    outline = _outline(original)
    tried = _tried(stage.method, outline)
    shares = isinstance(stage.method, Offers) and stage.method.bits is not None
    if stage.over_the_model and not shares:
        raise InputError(
            "allocation.scope=model needs a method whose bits can be shared out (cluscomp, gptvq, aqlm) and bits="
        )
    if stage.price == "loss" and not shares:
        raise InputError(
            "cluster.price=loss needs a method that shares bits out among layers (cluscomp, cluscomp_paths, gptvq) and "
            "bits="
        )
    _check_grids(block_names(outline.model), tried, quantised_types(original.folder))


def _outline(original: Original) -> MetaModel:
    return MetaModel(deepcopy(original.config), original.dtype, original.device.type)


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
    tried = [one for one in _tried(stage.method, outline) if one is not None]
    if len(tried) < outline.blocks:
        return None
    observing = streams = moments = 0.0
    pricing: dict[str, float] = {}
    if stage.calibrated:
        inputs = {place.input: place.in_features for places in outline.places() for place in places.values()}
        streams = 2 * outline.stream(stage.samples, stage.length)
        once = outline.forward(stage.batch_size, stage.length)
        counted, moments, adding = _counting(stage, inputs, outline.dtype)
        captured = stage.batch_size * stage.length * sum(inputs.values()) * outline.dtype.itemsize
        observing = once.peak + captured + adding
        passes = stage.samples / stage.batch_size
        walks = 1 + (stage.prefix == "compressed") + stage.over_the_model
        looks = 1.0 + stage.over_the_model
        if stage.drift:  # the original beside, and a look at each input of the block
            # what was kept of the block before is not free at once (seen with 32 windows)
            streams = 2 * streams + 2 * captured * passes
            walks, looks = walks + len(inputs), looks + 1 - 1 / len(inputs)
        work += once.work * passes * (outline.blocks - 1) * walks
        work += counted * passes * outline.blocks * looks
        if stage.price == "loss":
            inside, logits = outline.training(stage.batch_size, stage.length), outline.logits(1, stage.length)
            work += (once.work + inside.work) * (passes * outline.blocks) + logits.work * (3 * stage.samples)
            inputs_of_all = (outline.blocks + 1) * outline.stream(stage.samples, stage.length)
            pricing = {"inputs of all blocks": inputs_of_all, "inside one block": max(inside.peak, 3 * logits.peak)}
    compared = max(24.0 * o * i for o, i in outline.dense.values())  # error and size of a layer in `compress_block`
    for block, found in zip(blocks(outline.model), tried):
        work += found.work
        outline.exact &= found.exact and not stage.over_the_model and stage.price == "error"
        for layer, stored in found.forms().items():
            put_in(block, layer, stored)
    here = outline.device == "cpu"
    finished = {"codes and codebooks": outline.stored}
    always = {"embedding, head": outline.outside} | (finished if here else {})
    working = {"a dense block": outline.dense_block, "streams": streams, "second moments": moments}
    device = worst(
        always | {"a dense block": outline.dense_block} | pricing,
        always | working | {"activations": observing},
        always | working | {"clustering one matrix": max(compared, *(found.peak for found in tried))},
        always | {"writing the checkpoint": outline.writing},
    )
    relief = "fewer cluster.samples, or method=cluscomp_data_free" if stage.calibrated else ""
    return Cost(device, {} if here else finished, work, relief)


def _counting(stage: Cluster, inputs: dict[int, int], dtype: torch.dtype) -> tuple[Work, float, float]:
    """Work of one batch for the statistics of a block, the bytes they are kept in, and those beside at most."""
    work, kept, most = Work(), 0.0, 0.0
    for size in inputs.values():
        seen = Seen(stage.sees)
        one_1I, all_TI = (
            torch.empty(tokens, size, dtype=dtype, device="meta") for tokens in (1, stage.batch_size * stage.length)
        )
        seen.add(one_1I, one_1I if stage.drift else None)
        with Count() as count:
            seen.add(all_TI, all_TI if stage.drift else None)
        work, kept, most = work + count.work, kept + seen.nbytes, max(most, count.peak)
    return work, kept, most


def run(stage: Cluster, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Compress the model block after block; returns and raises as `Cluster.run` says."""
    squares: dict[str, list[float]] = {}  # by layer: squared error, squared size
    chosen: dict[str, dict[str, Any]] = {}  # by the layers of a block that go together
    distributed: dict[str, dict[str, float]] = {}  # by layer
    all_places = _outline(job.original).places()
    prices = _priced(stage, model, job) if stage.price == "loss" else {}
    shares = _shared_out(stage, model, job, all_places, prices) if stage.over_the_model else None
    work, walk, names = Blockwise("cluster", job.folder, model), Walk(model, job.original), block_names(model)
    last = work.last
    stream = _embedded(stage, walk, job) if stage.calibrated and last >= 0 else []
    undrifted = list(stream) if stage.drift else []  # what the original makes of the windows
    for index, block, finished in work.all():  # through finished ones the stream still has to pass
        name, entering = names[index], stream
        job.original.load_block(model, index)
        statistics: dict[str, Seen] = {}
        originals: list[dict[str, Tensor]] = []
        if index <= last and undrifted:
            undrifted, originals = through(walk, index, undrifted, keep=not finished)
        look = partial(observe, stage.sees, walk, index, entering, originals=originals)
        if index <= last and (not finished or stage.prefix == "original"):
            stream, statistics = look(layers=[] if finished else [*linears(block)])
        if finished:
            found = work.put_back(index)
        else:
            share = None if shares is None else shares.blocks[index]
            following = Following(stage.drift, stage.drift_damping, look) if stage.drift else None
            found = compress_block(
                stage.method, block, name, job.seed, statistics, all_places[index], share, following, prices
            )
            originals.clear()  # of the next block there will be as many
            error = relative_error(found["squares"])
            work.finish(index, found, f"relative error {error:.4f}", relative_error=error)
        if index < last and stage.prefix == "compressed":
            stream, _ = look(layers=[])
        block.to("cpu")  # what is finished leaves the GPU
        squares |= {f"{name}.{layer}": numbers for layer, numbers in found["squares"].items()}
        chosen |= {f"{name}.{layers}": values for layers, values in found["chosen"].items()}
        distributed |= {f"{name}.{layer}": values for layer, values in found.get("distributed", {}).items()}
    by_layer = {layer: error / size if size else 0.0 for layer, (error, size) in squares.items()}
    numbers = {"relative_error": relative_error(squares), "relative_error_by_layer": by_layer}
    numbers["distribution_by_layer"] = distributed
    if shares is not None:
        numbers["shared_out"] = shares.report()
    numbers["method"] = type(stage.method).__module__.rpartition(".")[2]
    if chosen:
        log.info("%s", chosen_table(chosen, names))
        numbers["chosen"] = chosen
    return numbers | ({"calibration": stage.data.text("calibration").describe()} if stage.calibrated else {})


def _priced(stage: Cluster, model: PreTrainedModel, job: Job) -> dict[str, float]:
    """What errors of the layers cost, by their names."""
    windows = torch.from_numpy(stage.windows(job.original.tokenizer, job.seed)).to(job.original.device)
    return price.prices(Walk(model, job.original), [*windows.split(stage.batch_size)], job.folder)


def _shared_out(
    stage: Cluster, model: PreTrainedModel, job: Job, places: list[dict[str, Place]], prices: dict[str, float]
) -> Shares:
    """Go through the original and ask what the layers of each block may have; what is known survives a kill."""
    method = stage.method
    assert isinstance(method, Offers) and method.bits is not None  # check_method
    walk, names = Walk(model, job.original), block_names(model)
    menus, progress = Menus(job.folder, len(names)), Progress("cluster, menus", len(names))
    stream = _embedded(stage, walk, job) if stage.calibrated and menus.last >= 0 else []
    for index in range(menus.last + 1):
        with job.original.block(model, index) as block:
            statistics: dict[str, Seen] = {}
            if stage.calibrated:
                asked = [] if menus.has(index) else [*linears(block)]
                stream, statistics = observe(method.sees(), walk, index, stream, layers=asked)
            if not menus.has(index):
                layers = _layers(block, names[index], job.seed, statistics, places[index], prices=prices)
                try:
                    menus.ask(index, method, layers)
                except ValueError as error:
                    raise InputError(f"{names[index]}.{error}") from error
        progress.step("asked what its layers may have")
    return menus.share_out(method.bits)


def _embedded(stage: Cluster, walk: Walk, job: Job) -> list[Tensor]:
    windows = torch.from_numpy(stage.windows(job.original.tokenizer, job.seed)).to(job.original.device)
    return [walk.embed(ids_BT) for ids_BT in windows.split(stage.batch_size)]


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
) -> dict[str, dict[str, Any]]:
    """Replace every linear layer of a block; without `places` each has an input of its own.

    `share` says what was chosen for its layers where bits are shared out over the model. With `following`, weights are
    corrected for the drift of their inputs: when all layers of an input are compressed, the next is looked at again.
    `prices`: of errors of layers, by their names in the model.
    Returns `squares`, by layer the squared error and squared size of its weight, `distributed`, by layer how its
    entries and codes are, and `chosen`, by the names of layers that go together what the method chose for them.
    """
    layers = _layers(block, name, seed, statistics, places, following, prices)
    squares, distributed, chosen = {}, {}, {}
    try:
        for compressed in told(_compressed(method, layers, share), len(layers), name, "layer"):
            read = {layers[layer].input for layer in compressed.stored}
            for layer, stored in compressed.stored.items():
                put_in(block, layer, stored)
                weight_OI = layers.pop(layer).weight_OI.float()
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
                first = next(iter(layers.values())).input
                after = [layer for layer, one in layers.items() if one.input == first]
                again = _layers(block, name, seed, following.again(layers=after)[1], places, following, prices)
                layers |= {layer: again[layer] for layer in after}
    except ValueError as error:
        raise InputError(f"{name}.{error}") from error
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
        if not bool(dense.weight.isfinite().all()):
            raise InputError(f"{name}.{layer}: NaN or infinity among its weights; the model is damaged")
        generator = torch.Generator().manual_seed(layer_seed(seed, f"{name}.{layer}"))
        input_ = places[layer].input if places else number
        weight_OI, seen = dense.weight.detach(), statistics.get(layer)
        if following is not None and seen is not None and seen.drift is not None:
            if id(seen) not in corrections:
                corrections[id(seen)] = seen.drift.correction(seen.matrix_II, following.damping)
            weight_OI = corrected(weight_OI, corrections[id(seen)], following.strength)
        layers[layer] = Layer(weight_OI, input_, seen, generator, seed, (prices or {}).get(f"{name}.{layer}"))
    return layers


def _compressed(
    method: Method, layers: dict[str, Layer], share: list[tuple[list[str], Option]] | None
) -> Iterator[Compressed]:
    """What the method makes of the layers, with the settings that were chosen for some of them, if any were."""
    if share is None:
        yield from method.compress(layers)
        return
    for names, option in share:
        chosen = replace(method, **option.settings)  # type: ignore[type-var]
        yield from chosen.compress({name: layers[name] for name in names})


def chosen_table(chosen: dict[str, dict[str, Any]], block_names: list[str]) -> str:
    """What was chosen, as text: for each kind of layers and each choice, in how many blocks."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for layers, values in chosen.items():
        kind = next(layers.removeprefix(f"{name}.") for name in block_names if layers.startswith(f"{name}."))
        counts[kind, *(f"{value:.3f}" if isinstance(value, float) else value for value in values.values())] += 1
    head = ["layers", *next(iter(chosen.values())), "blocks"]
    rows = [[*row, count] for row, count in counts.items()]
    return str(tabulate(rows, head, "github", disable_numparse=True))


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed from the run's seed and its name, so that results do not depend on the order of layers."""
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7])
