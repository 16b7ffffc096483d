"""The plan of a run: bits, bytes and what each stage will need, from the model's shapes alone, before any work."""

import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import PreTrainedConfig

from cluscomp.errors import InputError
from cluscomp.forms.layers import Size
from cluscomp.models.original import check_dense
from cluscomp.plan.cost import Cost
from cluscomp.plan.machine import GIB, Limits, Machine, limits
from cluscomp.plan.meta import MetaModel
from cluscomp.process import processes, resident

CONTEXT = 0.5 * GIB  # of GPU memory, that CUDA itself takes
LIBRARIES = 1.2 * GIB  # of RAM, that CUDA, its libraries and Triton take (0.9 to 1.8 were seen)
STARTED = 0.08 * GIB  # of RAM, that tokenizer, texts and the first matrix products leave behind (0.05 to 0.1 were seen)


@dataclass(frozen=True)
class Row:
    """One stage or evaluation: peak bytes of RAM and of GPU memory (None without one), work, seconds."""

    name: str
    ram: float
    vram: float | None
    flops: float
    seconds: float
    parts: dict[str, float]
    relief: str
    least: bool = False  # whether there is more work than that


@dataclass(frozen=True)
class Plan:
    """What a run will need; of several `ranks`, the one that needs most.

    `exact` tells whether size and bytes are those of the file or the likeliest ones: weights that have a say in their
    stored form, and 32-bit numbers that may fit 16 bits, are not known before they are read. `unknown` names stages and
    evaluations of which nothing is known, as a stage does not say what it costs; size and bytes are None where it may
    change them.
    """

    rows: list[Row]
    size: Size | None
    checkpoint_bytes: int | None
    exact: bool
    limits: Limits
    machine: str
    unknown: tuple[str, ...] = ()
    ranks: int = 1

    def predicted(self) -> dict[str, Any]:
        """What the record stores of it."""
        figures = ("linear_bits_per_weight", "paper_bits_per_weight", "model_bits_per_weight")
        return {
            "size": None if self.size is None else {key: asdict(self.size)[key] for key in figures},
            "checkpoint_bytes": self.checkpoint_bytes,
            "exact": self.exact,
            "calibrated": self.limits.calibrated,
            "peak_ram": {row.name: round(row.ram) for row in self.rows},
            "peak_vram": {row.name: round(row.vram) for row in self.rows if row.vram is not None},
            "seconds": {row.name: round(row.seconds, 1) for row in self.rows if not row.least},
        }

    def refuse(self) -> None:
        """Raise InputError for the first stage that does not fit, with what it needs most of and what would help."""
        for row in self.rows:
            for what, needed, most in (("RAM", row.ram, self.limits.ram), ("GPU memory", row.vram, self.limits.vram)):
                if needed is not None and most is not None and needed > most:
                    largest = sorted(row.parts.items(), key=lambda item: -item[1])[:4]
                    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest if size)
                    help_ = f"{row.relief}; " if row.relief else ""
                    raise InputError(
                        f"{row.name} would need {needed / GIB:.1f} GiB of {what}, {most / GIB:.1f} can be had "
                        f"({parts}). What helps: {help_}force=true runs it all the same"
                    )

    def table(self) -> str:
        """The plan as text."""
        gpu = any(row.vram is not None for row in self.rows)
        lines = [
            [
                row.name, f"{row.ram / GIB:.2f}", *([f"{(row.vram or 0) / GIB:.2f}"] if gpu else []),
                *(f"{'over ' * row.least}{work}" for work in (f"{row.flops / 1e12:.3g}", duration(row.seconds))),
                largest(row.parts),
            ]
            for row in self.rows
        ]  # fmt: skip
        lines += [[name, *["not known"] * (4 + gpu), ""] for name in self.unknown]
        head = ["stage", "RAM", *(["GPU"] if gpu else []), "TFLOP", "time", "most of it (all in GiB)"]
        widths = [None] * (len(head) - 1) + [23 if gpu else 30]  # what the others leave of 80
        sure = "" if self.exact else "about "
        had = f"RAM {self.limits.ram / GIB:.1f} GiB" + (
            f", GPU {self.limits.vram / GIB:.1f} GiB" if self.limits.vram is not None else ""
        )
        rates = "measured" if self.limits.calibrated else "assumed: times are rough"
        each = f"for each of {self.ranks} ranks, " if self.ranks > 1 else ""
        size = "not known"
        if self.size is not None and self.checkpoint_bytes is not None:
            size = (
                f"{sure}{self.size.linear_bits_per_weight:.3f} bits per weight of the linears as stored, "
                f"{self.size.paper_bits_per_weight:.3f} as the paper counts, {self.size.model_bits_per_weight:.3f} of "
                f"the whole model; {sure}{self.checkpoint_bytes / 1e6:.1f} MB"
            )
        return "\n".join(
            [
                tabulate([head, *lines], tablefmt="plain", disable_numparse=True, maxcolwidths=widths),
                textwrap.fill(f"size      {size}", 80, subsequent_indent=" " * 10),
                f"machine   {each}{self.machine}: {had}; speed {rates}",
            ]
        )


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def largest(parts: dict[str, float]) -> str:
    """The two largest parts, in GiB."""
    first = sorted(parts.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in first if size)


def plan(experiment: Any, config: PreTrainedConfig, dtype: torch.dtype, device: str, products: float = 1.0) -> Plan:
    """Fold the stages of an experiment over the outline of its model. Raises InputError for what cannot be planned.

    `products`: how many times as long as in float32 matrix products take in `dtype` here.
    """
    if not experiment.scores_only:
        check_dense(config)
    machine: Machine = experiment.machine
    can = limits(machine, device, Path(experiment.cache).expanduser())
    can = replace(can, rates=can.rates | {"flops": can.rates["flops"] / products})
    outline = MetaModel(config, dtype, device)
    outline.ranks, outline.shard = experiment.ranks or processes(), experiment.shard
    costs: dict[str, Cost | None] = {}
    known = True  # whether the outline is that of the model
    for name in ["original", *experiment.order]:
        if name != "original":
            stage = experiment.stages[name]
            costs[name] = stage.cost(outline) if known else None
            known &= costs[name] is not None or stage.takes == stage.gives
        if name in experiment.measured:
            costs[f"evaluate {name}"] = experiment.evaluate.cost(outline) if known else None
    base = resident() + STARTED  # the walks above have brought in nearly all libraries

    def row(name: str, cost: Cost) -> Row:
        here, there = sum(cost.host.values()), sum(cost.device.values())
        parts = cost.device | {f"{part} (RAM)": size for part, size in cost.host.items()}
        ram, vram = (base + here + there, None) if device == "cpu" else (base + LIBRARIES + here, CONTEXT + there)
        return Row(name, ram, vram, cost.work.flops, can.seconds(cost.work), parts, cost.relief, cost.least)

    rows = [row(name, cost) for name, cost in costs.items() if cost is not None]
    unknown = tuple(name for name, cost in costs.items() if cost is None)
    size, bytes_ = (outline.size(), outline.checkpoint_bytes()) if known else (None, None)
    exact = outline.exact and not unknown
    return Plan(rows, size, bytes_, exact, can, machine.name, unknown, outline.ranks)
