"""What stage decompose does: what enters and leaves the parts of a block, and the block cut by that."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.checkpoint import CompressedConfig
from cluscomp.errors import InputError
from cluscomp.kernels.work import Work
from cluscomp.models.original import Original, block_names
from cluscomp.models.smaller import ATTENTION, Heads, Smaller, frequencies, smaller
from cluscomp.models.walk import Walk
from cluscomp.plan.cost import Cost, worst
from cluscomp.plan.meta import MetaModel
from cluscomp.process import Progress
from cluscomp.solve import modular
from cluscomp.solve.layer import Seen
from cluscomp.stages import Job
from cluscomp.stages.blockwise import Blockwise, embedded
from cluscomp.stages.decompose import Decompose
from cluscomp.store.records import read_sealed, write_sealed

PAIRS, INFLUENCE = "pairs.json", "influence.json"  # in the stage's folder: what a killed run need not find again
QUERY, KEY, VALUE, OUTPUT = ATTENTION


def check_cut(stage: Decompose, original: Original) -> None:
    """Raise InputError for a model that cannot be cut so."""
    cut = smaller(original.config, stage.units, stage.heads)
    if _differ(stage) and stage.units < 1 - modular.MOST:
        raise InputError(
            f"decompose.units={stage.units}: with decompose.widths=influence no MLP loses more than {modular.MOST:.0%} "
            f"of its units; take {1 - modular.MOST:.1f} or more, or widths=uniform ({cut.units} units everywhere)"
        )


def _differ(stage: Decompose) -> bool:
    """Whether blocks are cut to widths of their own."""
    return stage.units < 1 and stage.widths == "influence"


def cost(stage: Decompose, outline: MetaModel) -> Cost:
    """What `run` will hold and do, and `outline` changed as `run` will change the model; see `Decompose.cost`."""
    cut = smaller(outline.config, stage.units, stage.heads)
    work = Work(read=outline.all_numbers * outline.file_bytes)
    once, passes = outline.forward(stage.batch_size, stage.length), stage.samples / stage.batch_size
    walks = 1 + (cut.heads is not None) + _differ(stage)
    width = outline.dense[cut.reads][1] if cut.units is not None else 0
    tokens = stage.samples * stage.length
    work += once.work * (passes * outline.blocks * walks)
    work += Work(flops=(2.0 * tokens + 4.0 * width) * width**2 * outline.blocks, traffic=4.0 * width**2)
    always = {"embedding, head": outline.outside}
    working = {"a dense block": outline.dense_block, "streams": 2 * outline.stream(stage.samples, stage.length)}
    captured = stage.batch_size * stage.length * (outline.hidden + width) * outline.dtype.itemsize
    device = worst(
        always | working | {"second moments": 4.0 * width**2, "activations": once.peak + captured},
        always | working | {"second moments": 4.0 * width**2, "inverting one": 4 * 8.0 * width**2},
        always | {"writing the model": outline.writing},
    )
    outline.become(cut.config)
    outline.exact &= not _differ(stage)
    return Cost(device, {}, work, "fewer decompose.samples")


def run(stage: Decompose, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Cut the model block after block; returns and raises as `Decompose.run` says."""
    cut = smaller(job.original.config, stage.units, stage.heads)
    walk, names = Walk(model, job.original), block_names(model)
    kept_P = None if cut.heads is None else _kept_pairs(stage, cut.heads, walk, job)
    influences = _influences(stage, walk, job) if _differ(stage) else []
    widths: list[int] = []
    if cut.units is not None and influences:
        widths = modular.widths(influences, cut.width, cut.units, stage.temperature)
    work = Blockwise("decompose", job.folder, model)
    last = work.last
    stream = embedded(stage, walk, job) if last >= 0 else []
    for index, _, finished in work.all():
        if index > last:
            continue
        asked = [*([cut.reads] if cut.units else []), *([VALUE] if cut.heads else [])]
        with job.original.block(model, index) as block:
            seen = _look(walk, index, block, stream, {} if finished else dict.fromkeys(asked, "moment"))
            if not finished:
                numbers: dict[str, float] = {}
                into = _Into(block, names[index], job.original)
                try:
                    if cut.units is not None:
                        own = replace(cut, units=widths[index]) if widths else cut
                        numbers |= _cut_mlp(into, own, seen[cut.reads], stage.ridge)
                    if cut.heads is not None and kept_P is not None:
                        numbers |= _cut_heads(into, cut.heads, seen[VALUE], kept_P)
                except ValueError as error:
                    raise InputError(f"{names[index]}: {error}") from error
                told = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
                work.finish(index, numbers, f"loses {told}" if told else "as it was", **numbers)
    turning_P = frequencies(model)
    model.config = cut.config if kept_P is None or turning_P is None else cut.with_frequencies(turning_P[kept_P])
    if widths:
        model.config.quantization_config = CompressedConfig({}, shapes=_shapes(cut, walk, widths)).to_dict()
    blocks_ = [work.numbers[index] for index in range(len(names))]
    means = {name: sum(block[name] for block in blocks_) / len(blocks_) for name in blocks_[0]}
    heads = None if cut.heads is None else cut.heads.kept
    calibration = stage.data.text("calibration").describe()
    differing = {"widths": widths, "influence": influences} if widths else {}
    return differing | {"units": cut.units, "heads": heads, "pairs": None if kept_P is None else kept_P.tolist()} | {
        "means": means, "blocks": blocks_, "calibration": calibration,
    }  # fmt: skip


def _look(walk: Walk, index: int, block: nn.Module, stream: list[Tensor], asked: dict[str, str]) -> dict[str, Seen]:
    """Bring the stream (batches of (B, T, H)) through a block, and gather the statistics that are asked for, by layer.

    Of what the layers of attention give, and of what enters others.
    """
    seen = {name: Seen({statistic}) for name, statistic in asked.items()}
    for number, hidden_BTH in enumerate(stream):
        stream[number], inputs = walk.observe(index, block, hidden_BTH, list(asked))
        for name, statistic in seen.items():
            x = inputs[name]
            statistic.add(block.get_submodule(name)(x) if name in ATTENTION else x)
    return seen


def _kept_pairs(stage: Decompose, heads: Heads, walk: Walk, job: Job) -> Tensor:
    """Which pairs of dimensions stay, (P,), by their part in the scores of all blocks' attention."""
    known = read_sealed(job.folder / PAIRS)
    if known is None:
        stream, total_P = embedded(stage, walk, job), torch.zeros(heads.dims // 2, dtype=torch.float64)
        progress = Progress("decompose, pairs", len(walk))
        for index in range(len(walk)):
            with walk.block(index) as block:
                seen = _look(walk, index, block, stream, {QUERY: "diagonal", KEY: "diagonal"})
            squares = [seen[name].diagonal_I.unflatten(0, (-1, heads.dims)) for name in (QUERY, KEY)]
            total_P += modular.pairs(*squares).cpu()
            progress.step("asked which pairs count")
        known = {"pairs": total_P.topk(heads.kept // 2).indices.sort().values.tolist()}
        write_sealed(job.folder / PAIRS, known)
    return torch.tensor(known["pairs"])


def _influences(stage: Decompose, walk: Walk, job: Job) -> list[float]:
    """How far each block turns what enters it."""
    known = read_sealed(job.folder / INFLUENCE)
    if known is None:
        stream, found, progress = embedded(stage, walk, job), [], Progress("decompose, influence", len(walk))
        for index in range(len(walk)):
            entering = [*stream]
            with walk.block(index) as block:
                _look(walk, index, block, stream, {})
            hidden = ((x[..., : walk.width], y[..., : walk.width]) for x, y in zip(entering, stream))
            each = [modular.influence(*both) * len(both[0]) for both in hidden]
            found.append(sum(each) / sum(map(len, stream)))
            progress.step(f"influence {found[-1]:.4f}")
        known = {"influence": found}
        write_sealed(job.folder / INFLUENCE, known)
    return list(known["influence"])


def _shapes(cut: Smaller, walk: Walk, widths: Sequence[int]) -> dict[str, list[int]]:
    """The shapes [O, I] of the layers of MLPs with these units, by their names in the model."""
    shapes = {}
    for name, block, units in zip(block_names(walk.model), walk.blocks, widths):
        for layer in (*cut.makes, cut.reads):
            linear = cast(nn.Linear, block.get_submodule(layer))
            shape = [linear.out_features, units] if layer == cut.reads else [units, linear.in_features]
            shapes[f"{name}.{layer}"] = shape
    return shapes


@dataclass(frozen=True)
class _Into:
    """A block whose layers get other weights, in the dtype that they have in the original's file."""

    block: nn.Module
    name: str
    original: Original

    def layer(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.block.get_submodule(name))

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        layer = self.layer(name)
        return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()

    def put(self, name: str, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        layer = self.layer(name)
        for key, values in (("weight", weight_OI), ("bias", bias_O)):
            if values is not None:
                dtype = self.original.file_dtype(f"{self.name}.{name}.{key}")
                getattr(layer, key).data = values.to(dtype).to(getattr(layer, key).dtype)


def _cut_mlp(into: _Into, cut: Smaller, seen: Seen, ridge: float) -> dict[str, float]:
    """Let some units of an MLP stay; returns what its output loses, and what it would without a correction."""
    assert cut.units is not None
    moment_WW, weight_OW = seen.matrix_II, into.layer(cut.reads).weight.detach()
    kept_K = modular.units(moment_WW, cut.units, ridge)
    reading_OK = modular.nystrom(weight_OW, moment_WW, kept_K)
    for name in cut.makes:
        weight_WI, bias_W = into.of(name)
        into.put(name, weight_WI[kept_K], None if bias_W is None else bias_W[kept_K])
    into.put(cut.reads, reading_OK, None)
    corrected_OW, dropped_OW = weight_OW.double(), weight_OW.double()  # what is left out of them
    corrected_OW[:, kept_K] -= reading_OK
    dropped_OW[:, kept_K] = 0
    whole = modular.energy(weight_OW, moment_WW)
    lost = [modular.energy(each_OW, moment_WW) / whole if whole else 0.0 for each_OW in (corrected_OW, dropped_OW)]
    return dict(zip(("mlp", "mlp_dropped"), lost))


def _cut_heads(into: _Into, heads: Heads, seen: Seen, kept_P: Tensor) -> dict[str, float]:
    """Let some dimensions of each head stay; returns what the output layer loses of the values it reads."""
    size = heads.dims
    kept_K = torch.cat([kept_P, kept_P + size // 2])
    for name in (QUERY, KEY):
        weight_QI, bias_Q = into.of(name)
        bias = None if bias_Q is None else _by_head(bias_Q, size)[:, kept_K].flatten()
        into.put(name, _by_head(weight_QI, size)[:, kept_K].flatten(0, 1), bias)
    weight_VI, bias_V = into.of(VALUE)
    weights_GDI, outputs_OGQD = _by_head(weight_VI, size), into.of(OUTPUT)[0].unflatten(1, (heads.keys, -1, size))
    values, biases, outputs, lost, whole = [], [], [], 0.0, 0.0
    for group in range(heads.keys):
        own = slice(group * size, (group + 1) * size)
        moment_DD, outputs_OQD = seen.matrix_II[own, own], outputs_OGQD[:, group].double()
        making_KD, again_DK = modular.common(moment_DD, outputs_OQD.flatten(0, 1), heads.kept)
        values.append(making_KD @ weights_GDI[group].double())
        biases += [] if bias_V is None else [making_KD @ bias_V[own].double()]
        outputs.append(outputs_OQD @ again_DK)
        whole += modular.energy(outputs_OQD.flatten(0, 1), moment_DD)
        lost += modular.energy((outputs_OQD - outputs[-1] @ making_KD).flatten(0, 1), moment_DD)
    into.put(VALUE, torch.cat(values), torch.cat(biases) if biases else None)
    into.put(OUTPUT, torch.stack(outputs, 1).flatten(1), None)
    return {"values": lost / whole if whole else 0.0}


def _by_head(rows: Tensor, size: int) -> Tensor:
    """The rows of a weight or bias, by head: (N D, ...) -> (N, D, ...)."""
    return rows.view(-1, size, *rows.shape[1:])
