"""The model card of a checkpoint: what it was made of and how, what it stores, and how it is loaded."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig

from cluscomp import __version__
from cluscomp.forms.layers import Size
from cluscomp.forms.multimodal import opener
from cluscomp.models.sources import HubModel
from cluscomp.runs.experiment import Experiment, without_places
from cluscomp.store.secrets import hide

TEXT = """---
{base}library_name: transformers
pipeline_tag: {task}
tags: [cluscomp, compressed]
---

# {name}, {bits:.2f} bits per weight

Compressed with cluscomp {version}: {method}, stages {stages}, seed {seed}. cluscomp.json holds a hash of each file.

| | bits per weight, as stored |
|:---|---:|
| compressed linear layers | {bits:.3f} |
| whole model | {model_bits:.3f} |

    pip install cluscomp

    from cluscomp import load
    model = load("FOLDER")  # FOLDER: this one

or, where hashes need not be compared, as any model of transformers after one import:

    import cluscomp.checkpoint
    from transformers import {opener}
    model = {opener}.from_pretrained("FOLDER")

`cluscomp export FOLDER format=dense output=OTHER` writes an ordinary dense model; format= takes others, too.
"""


def card(experiment: Experiment, stage: str, size: Size, config: PreTrainedConfig) -> str:
    """The text of README.md beside the model after a stage; places on this machine and secrets are not in it.

    `config` is the original's."""
    stages = experiment.order[: experiment.order.index(stage) + 1]
    source, chosen = experiment.model, without_places(experiment.choices)
    base = source.id if isinstance(source, HubModel) and not Path(source.id).expanduser().exists() else None
    how = {key: chosen[key] for key in ("method", "cut") if key == "method" or key in stages if key in chosen}
    told = [
        f"{key} {one['yaml']}" + (f" ({differs})" if (differs := _told(one["differs"])) else "")
        for key, one in how.items()
    ]
    return hide(
        TEXT.format(
            base=f"base_model: {base}\n" if base else "",
            name=base or _name(experiment),
            bits=size.linear_bits_per_weight,
            model_bits=size.model_bits_per_weight,
            version=__version__,
            method=", ".join(told) or "no method",
            stages=", ".join(stages),
            seed=experiment.seed,
            opener=opener(config).__name__,
            task="text-generation" if opener(config) is AutoModelForCausalLM else "image-text-to-text",
        )
    )


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _name(experiment: Experiment) -> str:
    """What a model that is not of the hub is called: its file's or folder's own name, or its architecture."""
    source = experiment.model
    place = next((getattr(source, key) for key in ("id", "file", "architecture") if hasattr(source, key)), "model")
    return Path(place).name
