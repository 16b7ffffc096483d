"""Which files of a folder are a model's weights."""

import json
from pathlib import Path

from cluscomp.errors import InputError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model's folder that are the model's, as transformers finds them; others may lie beside.

    They are `model.safetensors`, or without it those that its index names; without both all there are. Raises
    InputError for an index that cannot be read, or one that names a file that is not there.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of safetensors ({type(error).__name__}: {error})") from error
    for name, file in zip(names, files):
        if Path(name).name != name:
            raise InputError(f"{index}: names {name}, which is no file of this folder")
        if not file.is_file():
            raise InputError(
                f"{file}: missing, though {index.name} names it; a download or copy stopped early, repeat it"
            )
    return files
