"""What `cluscomp ...` does, without the process around it."""

import hydra

from cluscomp.command.compose import CONF, build
from cluscomp.runs.experiment import Experiment
from cluscomp.runs.run import Outcome, run


def composed(*overrides: str) -> Experiment:
    """The settings that the command line would build."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return build(hydra.compose("config", overrides=list(overrides)))


def pipeline(*overrides: str) -> Outcome:
    """The finished run."""
    return run(composed(*overrides))
