"""Which files of a folder are a model's, and the hash of all of them."""

import hashlib
import json
import re
from pathlib import Path

from cluscomp.errors import InputError
from cluscomp.store.files import file_hash


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


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model folder's config, tokenizer and weights: the identity of an original model."""
    return combined(file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model folder that decides what the model is, by name.

    Tokenizers of text files count where there is no tokenizer.json, which goes before them. In Hugging Face's cache a
    weight file is a link to a file named by its own hash, which saves reading it.
    """
    found, weights = {}, weight_files(folder)
    texts = set() if (folder / "tokenizer.json").is_file() else {"merges.txt", "vocab.txt"}
    for path in sorted(folder.iterdir()):
        if path in weights or path.suffix in {".json", ".model", ".jinja"} or path.name in texts:
            stored_name = path.resolve().name
            found[path.name] = stored_name if re.fullmatch("[0-9a-f]{64}", stored_name) else file_hash(path)
    return found


def combined(hashes: dict[str, str]) -> str:
    """SHA-256 over files' names and hashes."""
    return hashlib.sha256("".join(f"{name}:{value}\n" for name, value in hashes.items()).encode()).hexdigest()
