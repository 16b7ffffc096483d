"""WHEN something is done to the whole model: the Stage protocol, and the job a stage gets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.data.overlap import Learned
    from cluscomp.models.opened import Opened
    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel


@dataclass(frozen=True)
class Job:
    """What a stage works with besides the model: its folder (for parts that survive a kill), seed and original.

    `original` is what weights are read from: the model before all stages, or what the last dense stage made of it.
    `first` is the model before all stages (None: `original` is). With `opened` the compressed model's blocks are not in
    memory: it reads them, and whoever works at one drops it afterwards.
    """

    folder: Path
    seed: int
    original: "Original"
    first: "Original | None" = None
    opened: "Opened | None" = None

    @property
    def teacher(self) -> "Original":
        """The model before all stages: what compressed models learn to do again, whatever dense stages did to it."""
        return self.first or self.original


class Stage(Protocol):
    """One step of the pipeline: a frozen settings class. Same model in and out, changed; plain numbers back.

    One that says `shards: ClassVar[bool] = True` works with `Job.opened`, too.

    `takes` and `gives` say what the model is before and after, from which alone follows in what order stages can stand.
    "original": a dense model, whose blocks are still in a file (`Job.original`). "compressed": a model whose layers are
    of ours, in memory; "ranked": one of these, whose layers can be cut to any size (`forms.ranked`). A stage that gives
    "original" leaves each block in memory or, so that the dense model never is there as a whole, in its folder
    (stages/blockwise.py); from what it leaves an ordinary folder is made, from which the next stage reads.
    """

    takes: ClassVar[Literal["original", "ranked", "compressed"]]
    gives: ClassVar[Literal["original", "ranked", "compressed"]]
    distributed: ClassVar[bool]  # whether all processes of a run (torchrun) work on it together

    def learns_from(self) -> "Learned | None":
        """What `run` learns from besides model and settings, or None if from nothing.

        Its hash is part of the stage's key; by name and windows scores on what was seen before are marked.
        """
        ...

    def without_effect(self) -> set[str]:
        """Names of settings that do not decide the result as things stand, and so are no part of the stage's key."""
        ...

    def check(self, original: "Original") -> None:
        """Raise InputError for what cannot work with this model, before any long work starts."""
        ...

    def cost(self, outline: "MetaModel") -> "Cost | None":
        """What `run` will hold and do, and `outline` changed as `run` will change the model; None if not known."""
        ...

    def run(self, model: "PreTrainedModel", job: Job) -> dict[str, Any]:
        """Change the model in place and return what happened. Raises InputError if it cannot be done."""
        ...
