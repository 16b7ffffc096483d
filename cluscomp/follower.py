"""The processes of one run (torchrun) but the first: they train with it where a stage is `distributed`, else wait."""

import time
from pathlib import Path
from typing import Any

from cluscomp.errors import InputError
from cluscomp.records import read_sealed
from cluscomp.runner import Runner

POLL = 0.2  # seconds between two looks for what the first process writes


class Follower(Runner):
    """A runner that writes nothing: the first process does and writes everything."""

    def stage(self, name: str) -> dict[str, Any]:
        """The metrics of a stage once the first process has written them."""
        from cluscomp.stages import Job

        folder, stage = self._folder(name), self.experiment.stages[name]
        if stage.distributed and not self._whole(folder):
            stage.run(self._model_before(name), Job(folder, self.experiment.seed, self.original))
        while not self._whole(folder):
            time.sleep(POLL)
        return dict(read_sealed(folder / "metrics.json") or {})

    def evaluate(self, name: str) -> dict[str, Any]:
        """The scores once the first process has written them."""
        while (finished := self._finished(self._evaluation_folder(name))) is None:
            time.sleep(POLL)
        return finished

    def _whole(self, folder: Path) -> bool:
        """Whether a stage is finished and its checkpoint as it was written."""
        from cluscomp import checkpoint

        try:
            return self._finished(folder) is not None and bool(checkpoint.verify(folder / "checkpoint"))
        except InputError:
            return False
