"""Where the CPU seconds of a run go: cluster, block_finetune and evaluate on the first blocks of SmolLM2-135M, by part.

    python benchmarks/run.py [--blocks 4] [--rounds 2] [--output FILE] [OVERRIDE ...]

The run has the defaults at 3 bits and block_finetune=quick, a model of fewer blocks, and is in this process and on one
thread. A part is a function of ours, or one of torch's, and its seconds are its own: those of a part within it are that
one's. What no part covers is "other". Of several rounds the one of fewest seconds counts. Seconds in proportion to the
blocks are told for all 30 as well.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from goals import Goal, finish
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cluscomp import checkpoint
from cluscomp.command.compose import composed
from cluscomp.forms import codebook
from cluscomp.models.original import Original
from cluscomp.models.walk import Walk
from cluscomp.runs import runner
from cluscomp.runs.run import run
from cluscomp.score import evaluation, perplexity
from cluscomp.solve import allocate, along_outputs, groups
from cluscomp.solve.layer import Seen
from cluscomp.stages import blockwise, clustering, evaluate
from cluscomp.train.streams import Streams

MODEL_BLOCKS = 30
RUN = ["bits=3", "order=[cluster,block_finetune]", "block_finetune=quick", "evaluate.context=512"]
ONCE = {  # parts whose seconds are the same for any number of blocks
    "norm and head", "losses", "prompt continued", "overlap and bytes of the text", "reading a checkpoint",
}  # fmt: skip


def products() -> str:
    return "blocks, forward to learn" if torch.is_grad_enabled() else "blocks, forward"


PARTS: list[tuple[str | Callable[[], str], Any, str]] = [  # what it is called, where it is, its name there
    (products, Walk, "apply"),
    ("blocks read", Original, "load_block"),
    ("inputs' statistics", Seen, "add"),
    ("shapes measured", allocate, "menu"),
    ("K-means", groups, "kmeans"),
    ("inverse of second moments", along_outputs, "inverse_factor"),
    ("codes with feedback", groups, "feedback_codes"),
    ("codebooks by least squares", groups, "least_squares_codebook"),
    ("distribution of entries and codes", clustering, "of_entries"),
    ("distribution of entries and codes", clustering, "of_codes"),
    ("blocks, backward", torch.Tensor, "backward"),
    ("weights rebuilt", codebook, "rebuild"),
    ("optimiser", torch.optim.AdamW, "step"),
    ("streams hashed and written", Streams, "save"),
    ("blocks written", blockwise, "save_part"),
    ("checkpoint written and hashed", checkpoint, "save"),
    ("checkpoint written and hashed", checkpoint, "checkpoint_hash"),
    ("reading a checkpoint", checkpoint, "load"),
    ("norm and head", Walk, "logits"),
    ("losses", perplexity, "window_losses"),
    ("prompt continued", perplexity, "continuation"),
    ("overlap and bytes of the text", evaluate, "overlap"),
    ("overlap and bytes of the text", evaluation, "scored_bytes"),
]
STAGES = "_stage", "_evaluate"  # of Runner


class Clock:
    """CPU seconds by (stage, part), each without those of parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._open = [("set-up", "other")]
        self._since = time.process_time()

    @contextmanager
    def part(self, stage: str | None, name: str) -> Iterator[None]:
        """Count what is done within as this part, of the open stage or of a new one."""
        self._turn()
        self._open.append((stage or self._open[-1][0], name))
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Let the parts be counted."""
    before = [(owner, name, getattr(owner, name)) for _, owner, name in PARTS]
    before += [(runner.Runner, name, getattr(runner.Runner, name)) for name in STAGES]

    def counted(called: Callable[..., Any], label: str | Callable[[], str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.part(None, label if isinstance(label, str) else label()):
                return called(*args, **kwargs)

        return call

    def staged(called: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, name: str, *args: Any) -> Any:
            stage = f"evaluate {name}" if called.__name__ == "_evaluate" else name
            with clock.part(stage, "other"):
                return called(self, name, *args)

        return call

    try:
        for (label, owner, name), (_, _, called) in zip(PARTS, before):
            setattr(owner, name, counted(called, label))
        for owner, name, called in before[len(PARTS) :]:
            setattr(owner, name, staged(called))
        yield
    finally:
        for owner, name, called in before:
            setattr(owner, name, called)


def with_fewer_blocks(blocks: int, folder: Path) -> Path:
    """SmolLM2-135M without its later blocks."""
    source = composed(["experiment=demo"]).model.folder(Path("~/.cache/cluscomp").expanduser())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def measured(model: Path, overrides: list[str]) -> tuple[Clock, dict[str, float]]:
    """The seconds of a run, and its perplexities by stage."""
    with tempfile.TemporaryDirectory() as outputs:
        given = [*RUN, "model=hub", f"model.id={model}", f"outputs={outputs}", *overrides]
        experiment, clock = composed(given), Clock()
        with watched(clock):
            record = run(experiment).record
    return clock, {score.after: score.value for score in record.scores if score.metric == "perplexity"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/run.json"))
    parser.add_argument("overrides", nargs="*", help="settings of the run, behind --")
    options = parser.parse_args()
    began = datetime.now(UTC)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = with_fewer_blocks(options.blocks, Path(folder))
        found = [measured(model, options.overrides) for _ in range(options.rounds)]
    clock, perplexities = min(found, key=lambda one: sum(one[0].seconds.values()))
    share = MODEL_BLOCKS / options.blocks
    stages: dict[str, dict[str, float]] = {}
    for (stage, part), seconds in clock.seconds.items():
        stages.setdefault(stage, {})[part] = seconds
    goals, whole = [], {}
    for stage, parts in stages.items():
        whole[stage] = sum(
            seconds * (1 if part in ONCE or stage == "set-up" else share) for part, seconds in parts.items()
        )
        goals.append(Goal(f"{stage}: {options.blocks} blocks", None, sum(parts.values()), "s"))
        goals.append(Goal(f"{stage}: as of {MODEL_BLOCKS} blocks", None, whole[stage], "s"))
        for part, seconds in sorted(parts.items(), key=lambda pair: -pair[1]):
            goals.append(Goal(f"{stage}: {part}", None, seconds, "s"))
    goals.append(Goal(f"all: as of {MODEL_BLOCKS} blocks", None, sum(whole.values()), "s"))
    goals += [Goal(f"perplexity after {name}", None, value, "") for name, value in perplexities.items()]
    notes = {
        "method": " ".join(__doc__.split()),
        "settings": " ".join(options.overrides),
        "rounds": str(options.rounds),
    }
    finish(goals, {"seconds": stages, "perplexity": perplexities}, notes, options.output, began)


if __name__ == "__main__":
    main()
