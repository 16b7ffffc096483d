"""Stage cluster: every linear layer inside the blocks is compressed by the method (paper, section 3.2)."""

import logging
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, InstanceOf

from cluscomp.data.overlap import Learned
from cluscomp.errors import InputError
from cluscomp.methods import BlockMethod, ByLayer, Compressed, Method
from cluscomp.models.sources import quantised_types
from cluscomp.settings import settings
from cluscomp.solve.layer import Layer, Place
from cluscomp.stages.from_text import FromText

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cluscomp.models.original import Original
    from cluscomp.models.walk import Walk
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel
    from cluscomp.solve.layer import SecondMoment
    from cluscomp.stages import Job

log = logging.getLogger(__name__)


@settings
class Cluster(FromText):
    """Compress block after block. Embeddings, head, norms and biases stay as they are.

    A method that asks for a statistic of the layers' inputs gets it from `samples` windows of `length` tokens of the
    calibration text, as the blocks before leave them: those of the original or the `prefix` that is already compressed.
    Without such a method nothing is read but the model, and these settings mean nothing.
    """

    takes: ClassVar[Literal["original"]] = "original"
    gives: ClassVar[Literal["compressed"]] = "compressed"
    distributed: ClassVar[bool] = False
    method: InstanceOf[Method]
    batch_size: int = Field(ge=1)
    prefix: Literal["original", "compressed"]

    @property
    def exact(self) -> bool:
        """Whether the stored form follows from a weight's shape alone."""
        return self.method.exact

    @property
    def _calibrated(self) -> bool:
        return self.method.statistic() is not None

    def learns_from(self) -> Learned | None:
        """The calibration windows, if the method looks at any."""
        return super().learns_from() if self._calibrated else None

    def without_effect(self) -> set[str]:
        """The settings of calibration, if the method looks at no text."""
        return set() if self._calibrated else {"data", "samples", "length", "batch_size", "prefix"}

    def check(self, original: "Original") -> None:
        """Ask the method about every linear layer's shape, and cut windows. Raises InputError that names the layer."""
        model = original.model()
        self._check_shapes(model, self._places(original))
        self._check_grids(model, quantised_types(original.folder))
        if self._calibrated:
            super().check(original)

    def _check_shapes(self, model: "PreTrainedModel", places: "list[dict[str, Place]]") -> None:
        """Raise InputError, naming the layer, for a shape that the method cannot compress."""
        from cluscomp.models.original import block_names

        for name, layers in zip(block_names(model), places):
            if isinstance(self.method, BlockMethod):
                try:
                    self.method.check_block(layers)
                except ValueError as error:
                    raise InputError(f"{name}.{error}") from error
                continue
            for layer, place in layers.items():
                try:
                    self.method.check(place.out_features, place.in_features)
                except ValueError as error:
                    raise InputError(f"{name}.{layer}: {error}") from error

    def _check_grids(self, model: "PreTrainedModel", origin: list[str]) -> None:
        """Raise InputError for 4 bits in groups of 32 or a divisor if the original comes from such a file (GGUF's Q4).

        Its weights lie on that grid, so next to nothing would be lost, and the score say nothing about the method.
        """
        import torch

        from cluscomp.forms.uniform import PackedWeight
        from cluscomp.models.original import block_names, blocks, linears

        if not any(kind.startswith("Q4") for kind in origin):
            return
        for name, block in zip(block_names(model), blocks(model)):
            for layer, dense in linears(block).items():
                with torch.device("meta"):
                    stored = self.method.outline(dense.out_features, dense.in_features)
                if isinstance(stored, PackedWeight) and stored.lies_on(width=4, group=32):
                    raise InputError(
                        f"{name}.{layer}: 4 bits in {stored.groups} groups of its {stored.in_features} inputs "
                        f"would be void: the original comes from a file of 4 bits in groups of 32 "
                        f"({', '.join(origin)}), and lies on that grid. Take other bits, or method.group=64"
                    )

    def _places(self, original: "Original") -> "list[dict[str, Place]]":
        """The linear layers of each block."""
        from cluscomp.plan.meta import MetaModel

        return places(MetaModel(deepcopy(original.config), original.dtype, original.device.type))

    def cost(self, outline: "MetaModel") -> "Cost":
        """One dense block, statistics and streams; on a GPU the finished blocks are in RAM. See `Stage.cost`."""
        import torch

        from cluscomp.forms.layers import put_in
        from cluscomp.kernels.work import Work
        from cluscomp.models.original import blocks
        from cluscomp.plan.cost import Cost, worst

        all_places = places(outline)
        places_ = all_places[blocks(outline.model).index(outline.block)]
        self._check_shapes(outline.model, all_places)
        observing, work = 0.0, Work(read=outline.all_numbers * outline.file_bytes)
        streams = moments = 0.0
        statistic = self.method.statistic()
        if statistic is not None:
            inputs = {place.input: place.in_features for place in places_.values()}
            moments = sum(4.0 * (size * size if statistic.full else size) for size in inputs.values())
            streams = 2 * outline.stream(self.samples, self.length)
            once = outline.forward(self.batch_size, self.length)
            tokens, widest = self.batch_size * self.length, max(inputs.values())
            captured = tokens * (sum(inputs.values()) * outline.dtype.itemsize + 4.0 * widest)
            observing = once.peak + captured + (4.0 * widest**2 if statistic.full else 0)
            passes = self.samples / self.batch_size * (outline.blocks - 1) * (1 + (self.prefix == "compressed"))
            squares = sum(2.0 * size * (size if statistic.full else 1) for size in inputs.values())
            work += once.work * passes + Work(flops=squares * self.samples * self.length * outline.blocks)
        copies = 4.0 if outline.dtype.itemsize < 4 else 0.0  # of a weight in 32 bits
        compressing = max((copies + 24.0) * o * i for o, i in outline.dense.values())  # what `compress_block` compares
        if isinstance(self.method, BlockMethod):
            work += self.method.work_block(places_) * outline.blocks
            largest = max(copies * o * i for o, i in outline.dense.values())
            compressing = max(compressing, largest + self.method.scratch_block(places_))
        else:
            for name, method in self._by_layer(places_).items():
                o, i = outline.dense[name]
                work += method.work(o, i) * outline.blocks
                compressing = max(compressing, copies * o * i + method.scratch(o, i))
        with torch.device("meta"):
            for block, layers in zip(blocks(outline.model), all_places):
                for name, stored in self._outlined(layers).items():
                    put_in(block, name, stored)
        here = outline.device == "cpu"
        finished = {"codes and codebooks": outline.stored}
        always = {"embedding, head": outline.outside} | (finished if here else {})
        working = {"a dense block": outline.dense_block, "streams": streams, "second moments": moments}
        device = worst(
            always | working | {"activations": observing},
            always | working | {"clustering one matrix": compressing},
            always | {"writing the checkpoint": outline.writing},
        )
        relief = "fewer cluster.samples, or method=cluscomp_data_free" if self._calibrated else ""
        return Cost(device, {} if here else finished, work, relief)

    def _outlined(self, layers: "dict[str, Place]") -> "dict[str, nn.Module]":
        if isinstance(self.method, BlockMethod):
            return self.method.outline_block(layers)
        methods = self._by_layer(layers)
        return {name: methods[name].outline(place.out_features, place.in_features) for name, place in layers.items()}

    def _by_layer(self, layers: "dict[str, Place]") -> dict[str, Method]:
        """The method with the settings for each layer of a block."""
        if isinstance(self.method, ByLayer):
            return self.method.by_layer({name: (one.out_features, one.in_features) for name, one in layers.items()})
        return dict.fromkeys(layers, self.method)

    def run(self, model: "PreTrainedModel", job: "Job") -> dict[str, Any]:
        """Compress the model; finished blocks lie in the job's folder and survive a kill.

        Returns `relative_error`, the squared error over the squared size of all compressed weights, the same for each
        layer, how its entries and codes are distributed (solve/distribution.py), what the method chose for it, if
        anything, and the method's name. Raises InputError, naming the layer, if
        a weight is not finite or the method refuses it.
        """
        from cluscomp.models.original import block_names
        from cluscomp.models.walk import Walk
        from cluscomp.stages.blockwise import Blockwise

        squares: dict[str, list[float]] = {}  # by layer: squared error, squared size
        chosen: dict[str, dict[str, Any]] = {}  # by the layers of a block that go together
        distributed: dict[str, dict[str, float]] = {}  # by layer
        work, walk, names = Blockwise("cluster", job.folder, model), Walk(model), block_names(model)
        last = work.last
        stream = self._embedded(walk, job) if self._calibrated and last >= 0 else []
        all_places = self._places(job.original)
        for index, block, finished in work.all():  # through finished ones the stream still has to pass
            name, entering = names[index], stream
            job.original.load_block(model, index)
            statistics: dict[str, SecondMoment] = {}
            if index <= last and (not finished or self.prefix == "original"):
                stream, statistics = self.observe(walk, index, entering, count=not finished)
            if finished:
                found = work.put_back(index)
            else:
                found = self.compress_block(block, name, job.seed, statistics, all_places[index])
                error = _ratio(found["squares"])
                work.finish(index, found, f"relative error {error:.4f}", relative_error=error)
            if index < last and self.prefix == "compressed":
                stream, _ = self.observe(walk, index, entering, count=False)
            block.to("cpu")  # what is finished leaves the GPU
            squares |= {f"{name}.{layer}": numbers for layer, numbers in found["squares"].items()}
            chosen |= {f"{name}.{layers}": values for layers, values in found["chosen"].items()}
            distributed |= {f"{name}.{layer}": values for layer, values in found.get("distributed", {}).items()}
        by_layer = {layer: error / size if size else 0.0 for layer, (error, size) in squares.items()}
        numbers = {"relative_error": _ratio(squares), "relative_error_by_layer": by_layer}
        numbers["distribution_by_layer"] = distributed
        numbers["method"] = type(self.method).__module__.rpartition(".")[2]
        if chosen:
            log.info("%s", chosen_table(chosen, names))
            numbers["chosen"] = chosen
        return numbers | ({"calibration": self.data.text("calibration").describe()} if self._calibrated else {})

    def _embedded(self, walk: "Walk", job: "Job") -> "list[Tensor]":
        import torch

        windows = torch.from_numpy(self.windows(job.original.tokenizer, job.seed)).to(job.original.device)
        return [walk.embed(ids_BT) for ids_BT in windows.split(self.batch_size)]

    def observe(
        self, walk: "Walk", index: int, entering: "list[Tensor]", *, count: bool
    ) -> "tuple[list[Tensor], dict[str, SecondMoment]]":
        """What a block makes of its inputs (batches of (B, T, H)), and with `count` each linear layer's statistic.

        Layers with one input share one statistic.
        """
        from cluscomp.models.original import linears

        block, stream = walk.blocks[index], []
        shared: dict[tuple[str, ...], SecondMoment] = {}
        for hidden_BTH in entering:
            output_BTH, inputs = walk.observe(index, block, hidden_BTH, list(linears(block)) if count else [])
            stream.append(output_BTH)
            groups: dict[int, list[str]] = {}
            for layer, x in inputs.items():
                groups.setdefault(id(x), []).append(layer)
            for layers in groups.values():
                statistic = shared.setdefault(tuple(layers), self.method.statistic())  # type: ignore[arg-type]
                statistic.add(inputs[layers[0]])
        return stream, {layer: statistic for layers, statistic in shared.items() for layer in layers}

    def compress_block(
        self,
        block: "nn.Module",
        name: str,
        seed: int,
        statistics: "dict[str, SecondMoment]",
        places: dict[str, Place] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Replace every linear layer of a block; without `places` each has an input of its own.

        Returns `squares`, by layer the squared error and squared size of its weight, `distributed`, by layer how its
        entries and codes are, and `chosen`, by the names of layers that go together what the method chose for them.
        """
        import torch

        from cluscomp.forms.codebook import CodebookWeight
        from cluscomp.forms.layers import put_in
        from cluscomp.models.original import linears
        from cluscomp.process import give_memory_back
        from cluscomp.solve.distribution import of_codes, of_entries

        layers = {}
        for number, (layer, dense) in enumerate(linears(block).items()):
            if not bool(dense.weight.isfinite().all()):
                raise InputError(f"{name}.{layer}: NaN or infinity among its weights; the model is damaged")
            generator = torch.Generator().manual_seed(layer_seed(seed, f"{name}.{layer}"))
            place = places[layer] if places else Place(dense.out_features, dense.in_features, number)
            layers[layer] = Layer(place, dense.weight.detach(), statistics.get(layer), generator)
        squares, distributed, chosen = {}, {}, {}
        try:
            for compressed in self._compressed(layers):
                for layer, stored in compressed.stored.items():
                    put_in(block, layer, stored)
                    weight_OI = layers.pop(layer).weight_OI.float()
                    with torch.no_grad():
                        difference_OI = stored(torch.float32) - weight_OI
                    squares[layer] = [float(matrix.double().square().sum()) for matrix in (difference_OI, weight_OI)]
                    distributed[layer] = of_entries(weight_OI)
                    if isinstance(stored, CodebookWeight):
                        distributed[layer] |= of_codes(stored.unpacked(), stored.codebooks.shape[1])
                if compressed.chosen:
                    chosen[", ".join(compressed.stored)] = compressed.chosen
                give_memory_back()
        except ValueError as error:
            raise InputError(f"{name}.{error}") from error
        return {"squares": squares, "distributed": distributed, "chosen": chosen}

    def _compressed(self, layers: dict[str, Layer]) -> Iterator[Compressed]:
        """What the method makes of the layers; those that were taken back may be removed. Errors begin with a name."""
        if isinstance(self.method, BlockMethod):
            yield from self.method.compress_block(layers)
            return
        for name, method in self._by_layer({name: layer.place for name, layer in layers.items()}).items():
            layer = layers[name]
            try:
                stored = method.compress(layer.weight_OI.float(), layer.statistic, layer.generator)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            yield Compressed({name: stored}, {})


def places(outline: "MetaModel") -> list[dict[str, Place]]:
    """The linear layers of each block of a model that is not compressed yet."""
    from cluscomp.models.original import blocks, linears

    return [
        {name: Place(dense.out_features, dense.in_features, inputs[name]) for name, dense in linears(block).items()}
        for block, inputs in zip(blocks(outline.model), outline.inputs())
    ]


def chosen_table(chosen: dict[str, dict[str, Any]], block_names: list[str]) -> str:
    """What was chosen, as text: for each kind of layers and each choice, in how many blocks."""
    from tabulate import tabulate

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


def _ratio(squares: dict[str, list[float]]) -> float:
    """Squared error over squared size of several layers together."""
    error, size = (sum(values) for values in zip(*squares.values()))
    return error / size if size else 0.0
