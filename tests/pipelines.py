"""What `cluscomp ...` does, without the process around it."""

from cluscomp.command import compose
from cluscomp.runs.experiment import Experiment
from cluscomp.runs.run import Outcome, run


def composed(*overrides: str) -> Experiment:
    """The settings that the command line would build."""
    return compose.composed(list(overrides))


def pipeline(*overrides: str) -> Outcome:
    """The finished run."""
    return run(composed(*overrides))
