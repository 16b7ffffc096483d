"""What stage rank does: every weight taken apart into its directions, which learn what they are worth."""

from typing import Any

import torch
from transformers import PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.forms.layers import put_in
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.ranked import Ranked
from cluscomp.forms.stored import in_16_bits
from cluscomp.kernels.counting import Count
from cluscomp.kernels.work import Work
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.plan.cost import Cost, worst
from cluscomp.plan.meta import MetaModel
from cluscomp.process import Progress, give_memory_back
from cluscomp.solve import low_rank
from cluscomp.stages import Job
from cluscomp.stages.rank import Rank
from cluscomp.train.ranking import Directions, rank_directions


def check_reach(key: str, ratio: float, original: Original) -> None:
    """Raise InputError, naming the setting, if not even one direction of each matrix has so few numbers."""
    outline = MetaModel(original.config, original.dtype, original.device.type)
    names = block_names(outline.model)
    shapes = {
        f"{name}.{layer}": place[:2] for name, places in zip(names, outline.places()) for layer, place in places.items()
    }
    try:
        low_rank.check_share(ratio, shapes)
    except ValueError as error:
        raise InputError(f"{key}={error}; take more") from error


def cost(stage: Rank, outline: MetaModel) -> Cost:
    """What `run` will hold and do, and `outline` changed as `run` will change the model; see `Rank.cost`."""
    work, trained, factors, peak = Work(read=outline.all_numbers * outline.file_bytes), 0, 0.0, 0.0
    for block, places in zip(blocks(outline.model), outline.places()):
        for layer, (outputs, inputs, *_) in places.items():
            size = min(outputs, inputs)
            with Count() as count, torch.device("meta"):
                low_rank.directions(torch.empty(outputs, inputs), None)
            work, peak = work + count.work, max(peak, count.peak)
            factors += 4.0 * size * (outputs + inputs)
            trained += size + stage.adapter_rank * (outputs + 2 * size + inputs)
            with torch.device("meta"):
                parts = {"left": PlainWeight.empty(out_features=outputs, in_features=size)}
                parts |= {"right": PlainWeight.empty(out_features=size, in_features=inputs)}
                put_in(block, layer, Ranked(**parts, scores=torch.empty(size)))
    always = {"embedding, head": outline.outside, "directions": outline.stored}
    if not stage.trains:
        return Cost(worst(always | {"taking one apart": peak}, always | {"writing": outline.writing}), {}, work)
    found = stage.training_cost(outline, trained, before=work)
    found.device["factors"] = factors
    return found


def run(stage: Rank, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Take the weights apart, and train; returns and raises as `Rank.run` says."""
    outline = MetaModel(job.original.config, job.original.dtype, job.original.device.type)
    names = block_names(model)
    progress = Progress("rank", len(names))
    learning: dict[str, Directions] = {}
    for index, (block, places) in enumerate(zip(blocks(model), outline.places())):
        job.original.load_block(model, index)
        layers = linears(block)
        for layer in places:
            name = f"{names[index]}.{layer}"
            try:
                found = low_rank.directions(layers[layer].weight.detach(), None)
                left_OR, right_RI = found.left_OR.float(), found.right_RI.float()
                factors = PlainWeight(in_16_bits(left_OR)), PlainWeight(in_16_bits(right_RI))
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error
            stored = Ranked(*factors, found.energies_R.sqrt().float())
            stored.requires_grad_(False)
            put_in(block, layer, stored)
            if stage.trains:
                learning[name] = Directions(
                    left_OR, right_RI, stored, start=stage.start, rank=stage.adapter_rank, alpha=stage.alpha,
                    seed=(job.seed + len(learning)) % 2**64,
                )  # fmt: skip
        give_memory_back()
        progress.step("taken apart")
    if not stage.trains:
        return {"tokens": 0}
    train, held_out = stage.train_and_held_out(job.original.tokenizer, job.seed)
    numbers = rank_directions(
        model,
        learning,
        train,
        held_out,
        stage,
        price=stage.price,
        rise=stage.rise,
        until=stage.until,
        folder=job.folder / "training",
        seed=job.seed,
    )
    return stage.told(train, held_out) | numbers
