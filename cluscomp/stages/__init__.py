"""WHEN something is done to the whole model: the Stage protocol, and the job a stage gets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.data.overlap import Learned
    from cluscomp.models.original import Original
    from cluscomp.plan.cost import Cost
    from cluscomp.plan.meta import MetaModel


@dataclass(frozen=True)
class Job:
    """What a stage works with besides the model: its folder (for parts that survive a kill), seed and original."""

    folder: Path
    seed: int
    original: "Original"


class Stage(Protocol):
    """One step of the pipeline: a frozen settings class. Same model in and out, changed; plain numbers back."""

    takes: ClassVar[str]  # "original": a dense model whose blocks are still in the file; or "compressed"
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

    def cost(self, outline: "MetaModel") -> "Cost":
        """What `run` will hold and do, and `outline` changed as `run` will change the model."""
        ...

    def run(self, model: "PreTrainedModel", job: Job) -> dict[str, Any]:
        """Change the model in place and return what happened. Raises InputError if it cannot be done."""
        ...
