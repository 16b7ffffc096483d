"""`from cluscomp import compress, load, export`: what the command does, from Python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluscomp.checkpoint import load
from cluscomp.command.compose import CONF, composed, quiet_libraries
from cluscomp.command.sweep import run_cell
from cluscomp.formats.export import export
from cluscomp.runs.run import Outcome
from cluscomp.runs.verify import quoted

__all__ = ["compress", "export", "load"]


def compress(
    model: str | Path, *, bits: float | None = None, output_dir: str | Path = "outputs", **more: Any
) -> Outcome:
    """Compress a model and score it: the run of `cluscomp model=... bits=... outputs=...`, with its keys and record.

    The same call again re-uses what is finished, and after an interruption goes on where it stopped.

    Args:
        model: a folder, an id of the Hugging Face hub, a GGUF file, or the name of a choice in conf/model.
        bits: most stored bits per weight of the linear layers, 1 to 8 for most methods; None where `more` gives a shape
            by hand.
        output_dir: where stages, checkpoints and the record go: each in a folder named by its key.
        more: other settings by their names on the command line: order=["cluster", "block_finetune"], seed=1,
            method="gptq", block_finetune={"epochs": 2}, **{"method.width": 4}.

    Returns what the run left: `checkpoint`, the folder of the model after the last stage, an ordinary Hugging Face
    folder; `path` of its record, and the `record`. Raises InputError, before any long work, for a setting that cannot
    work.
    """
    given = [*_chosen(model), *_overrides({"bits": bits} if bits is not None else {}), *_overrides(more)]
    given.append(f"outputs={quoted(str(output_dir))}")
    experiment = composed(given)
    quiet_libraries()
    return run_cell(experiment, given)


def _chosen(model: str | Path) -> list[str]:
    """The overrides that choose a model."""
    place = Path(model).expanduser()
    if place.is_file():
        return ["model=gguf", f"model.file={quoted(str(model))}"]
    if not place.is_dir() and (CONF / "model" / f"{model}.yaml").is_file():
        return [f"model={model}"]
    return ["model=hub", f"model.id={quoted(str(model))}"]


def _overrides(settings: dict[str, Any], place: str = "") -> Iterator[str]:
    """Settings as they are typed on the command line; dictionaries hold settings below a name."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _overrides(value, f"{place}{key}.")
        else:
            yield f"{place}{key}={_typed(value)}"


def _typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int | float) else quoted(str(value))
