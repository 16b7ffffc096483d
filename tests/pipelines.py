"""What `cluscomp ...` does, without the process around it."""

from pathlib import Path

from cluscomp.command import compose
from cluscomp.runs.experiment import Experiment
from cluscomp.runs.run import Outcome, run


def composed(*overrides: str) -> Experiment:
    """The settings that the command line would build."""
    return compose.composed(list(overrides))


def pipeline(*overrides: str) -> Outcome:
    """The finished run."""
    return run(composed(*overrides))


def small_run(folder: Path) -> list[str]:
    """The settings of a run of seconds, all of whose files are in a folder, on a text that is written there."""
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {i} says that foxes jumped." for i in range(60)))
    return [
        "model=tiny", "data=text", f"data.file={folder / 'text.txt'}", f"cache={folder / 'cache'}", "seed=3",
        f"outputs={folder / 'outputs'}", "order=[cluster]", "method=rtn", "bits=4", "evaluate.context=32",
    ]  # fmt: skip
