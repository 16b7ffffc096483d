"""The record: the one JSON file a finished run leaves. Schema, write, read."""

import json
import logging
import math
import re
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from cluscomp.errors import InputError
from cluscomp.store.files import new_file
from cluscomp.store.secrets import unread

log = logging.getLogger(__name__)
SCHEMA = 2
ORIGINAL = "original"  # the model before all stages, where scores are named
EXTERNAL = "external"  # what made a model that another library compressed, where scores and stages are named
NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"  # of experiments, stages and keys, which name files: never . or ..
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Score:
    """One number with all that defines it.

    `after` is "original" or the stage after which it was measured; `n` counts what the metric averages over (tokens
    for perplexity); `stderr` is the standard error of `value`; `protocol` is what `protocol()` returns. `seen` tells,
    for each stage before that learned from text, its name (`text`), whether it is of the test text's own domain
    (`in_domain`), and the share of the test text's 13-word sequences that stand in it (`overlap`; not known of what
    another library did). It says something of the model, not of the measurement, so it is no part of the protocol.
    """

    after: str
    metric: str
    dataset: str
    value: float
    stderr: float | None
    n: int
    protocol: dict[str, Any]
    seen: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("protocol")
    @classmethod
    def _unaltered(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError unless the hash is that of the fields: a protocol is never changed after it was made."""
        if protocol(**{key: value for key, value in fields.items() if key != "hash"}) != fields:
            raise ValueError("protocol: its hash is not that of its fields")
        return fields


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Record:
    """What a run did and found.

    run: name, experiment, key, date, seconds per stage (on the clock; of all cores together), status, commit of the
    code and of each stage, `dirty` (some of it was computed by code that no commit holds), `weights` (a hash of the
    original's weight files: which model it was).
    config: the resolved settings, under "class" the class of each part.
    choices: for each group of yaml files the one that was chosen (`yaml`), and the settings of this run that differ
    from what it says, by dotted name (`differs`).
    size: `paper_bits_per_weight` (16-bit codes), `linear_bits_per_weight` (as stored), `linear_bits_in_memory` (with
    what stays decoded; not in older records), `model_bits_per_weight`, `checkpoint_bytes`, `ledger` (bits by part).
    machine: device, versions, which kernels, peak memory per stage in bytes, and what the plan had predicted.
    stages: what each stage reported.
    """

    schema: int
    run: dict[str, Any]
    config: dict[str, Any]
    choices: dict[str, dict[str, Any]]
    scores: list[Score]
    size: dict[str, Any]
    machine: dict[str, Any]
    stages: dict[str, dict[str, Any]]


def protocol(**fields: Any) -> dict[str, Any]:
    """A score's protocol: the fields and, under "hash", a hash of them all. Equal hashes mean comparable scores."""
    fields = {key: unread(value) if key == "text" else value for key, value in fields.items()}
    return fields | {"hash": content_key(fields)}


def differences(first: dict[str, Any], second: dict[str, Any]) -> tuple[list[str], list[str]]:
    """In what two protocols differ: as `key=value`, what the first has and what the second has."""
    keys = [key for key in sorted((first.keys() | second.keys()) - {"hash"}) if first.get(key) != second.get(key)]
    return [f"{key}={first.get(key)}" for key in keys], [f"{key}={second.get(key)}" for key in keys]


def objective(record: Record, metric: str) -> float | None:
    """A record as one number: the metric's mean over texts or tasks after the last stage measured; None without it."""
    rows = [score for score in record.scores if score.metric == metric]
    values = [score.value for score in rows if score.after == rows[-1].after]
    return sum(values) / len(values) if values else None


def content_key(content: Any) -> str:
    """16 hexadecimal digits that name a JSON value by its content."""
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def to_json(value: Any) -> str:
    """JSON of a value; numbers that are not finite become the strings "nan" and "inf", which `read` takes back."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(key): plain(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [plain(item) for item in part]
        return str(part) if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=1, default=str, allow_nan=False)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as JSON with a hash of them, whole or not at all. Raises OSError if that cannot be done."""
    values = unread(values)
    seal = sha256(to_json(values).encode()).hexdigest()
    with new_file(path) as unfinished:
        unfinished.write_text(to_json(values | {"sha256": seal}) + "\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote, or None: without a word if there is no file, with a line in the log if it was altered.

    Numbers that were not finite come back as strings.
    """
    try:
        values = json.loads(path.read_text())
        if values.pop("sha256") != sha256(to_json(values).encode()).hexdigest():
            raise ValueError("its hash is wrong")
        return dict(values)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        log.warning("%s is damaged (%s); it is made anew", path, error)
        return None


def write(record: Record, path: Path) -> None:
    """Write a record as JSON, whole or not at all. Raises OSError if that cannot be done."""
    with new_file(path) as unfinished:
        unfinished.write_text(to_json(unread(asdict(record))) + "\n")


def read(path: Path) -> Record:
    """Read and check a record. Raises InputError, naming file and key, if it is damaged or of another schema."""
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values.get("schema", SCHEMA) != SCHEMA:
            raise InputError(
                f"{path}: schema {values['schema']}; this version reads {SCHEMA} (python -m cluscomp.command.convert "
                f"{path.parent} brings records of schema 1 there)"
            )
        record = TypeAdapter(Record).validate_python(values)
        _check_names(record)
        return record
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "the file"
        raise InputError(f"{path}: not a record: {place}: {wrong['msg']}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a record: {error}") from error


def _check_names(record: Record) -> None:
    """Raise ValueError for a name that could leave its folder, and for stages of which the record tells nothing."""
    named = {f"run.{key}": record.run[key] for key in ("name", "experiment", "key") if key in record.run}
    for place, name in [*named.items(), *(("stages", name) for name in record.stages)]:
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise ValueError(f"{place}: {name!r} is no name; allowed are letters, digits, _ . and -")
    order = record.config.get("order", [])
    after = [score.after for score in record.scores]
    for place, name in [*(("config.order", name) for name in order), *(("scores", name) for name in after)]:
        if name not in {ORIGINAL, *record.stages}:
            known = ", ".join(record.stages) or "none"
            raise ValueError(f"{place}: there is no stage {name!r} in it; its stages: {known}")


def read_folder(folder: Path) -> list[Record]:
    """All records of a folder, in the order of their file names. Raises InputError if there is none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no records in it")
    return [read(path) for path in paths]


def read_tree(results: Path) -> list[Record]:
    """All records of all experiments in a folder. Raises InputError as `read`."""
    return [read(path) for path in sorted(results.glob("*/*.json")) if path.parent.name != "bench"]
