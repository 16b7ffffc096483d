"""A local mirror of the hub, as `datasets` reads it."""

import hashlib
import json
from pathlib import Path


def own_cache(folder: Path) -> str:
    """Where `datasets` is to keep its copy of a local folder's rows: elsewhere once a file there is another one.

    By itself it tells folders with a README apart by their last name and that README: it would give the rows that a
    file had before, or those of another folder.
    """
    from datasets.config import HF_DATASETS_CACHE

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return str(Path(HF_DATASETS_CACHE) / f"cluscomp-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}")
