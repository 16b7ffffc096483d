"""Tasks of lm-evaluation-harness: its tasks, prompts and metrics, asked of our model object. Settings of conf/tasks.

Everything of lm-eval is imported late. Of its many thousand task files only the folders of what is asked for are read,
which score/places.py finds.
"""

import copy
import difflib
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluscomp.data.mirror import copies_told, own_cache
from cluscomp.errors import InputError
from cluscomp.score.answers import answers_in
from cluscomp.score.images import check_processor
from cluscomp.score.known import Known, examples, known_of
from cluscomp.score.places import named, named_by_lm_eval
from cluscomp.settings import settings
from cluscomp.store.files import file_hash
from cluscomp.store.records import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@plain_dataclass(frozen=True)
class Found:
    """One number of one task or group, over `n` answers, and how it was made."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    version: Any
    shots: Any
    hash: str


@settings
class Tasks:
    """Names of tasks, groups or tags of lm-eval to ask, or [] for none.

    `shots` null takes each task's own number; `limit` asks the first so many rows and marks the scores as partial.
    With `mean` the plain mean of the tasks' acc stands beside them under that name, as papers report it. `bos` null
    leaves BOS to the tokenizer. Task files of one's own are found in `include_path`; with `data_root`, a mirror laid
    out like the hub, rows are read from there.
    """

    names: list[str]
    mean: str | None
    shots: int | None = Field(ge=0)
    limit: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)
    bos: bool | None
    max_length: int | None = Field(ge=2)
    chat_template: bool
    include_path: str | None
    data_root: str | None

    def check(self, folder: Path, tokenizer: "PreTrainedTokenizerBase", positions: int | None = None) -> None:
        """Raise InputError if tokenizer, processor or tasks lack what is asked of them.

        `folder` is the model's, `positions` is how many tokens it takes, where that is known.
        """
        if not self.names:
            return
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tasks.names: the tokenizer of {folder} has no end token, without which lm-eval asks nothing; "
                "name it as eos_token in tokenizer_config.json"
            )
        if self.bos and tokenizer.bos_token_id is None:
            raise InputError(f"tasks.bos=true: the tokenizer of {folder} has no BOS token")
        if self.chat_template and not getattr(tokenizer, "chat_template", None):
            raise InputError(f"tasks.chat_template=true: the tokenizer of {folder} has no chat template")
        known = self._known()
        known.check(shots=self.shots, max_length=self.max_length, model=folder.name, positions=positions)
        if known.images:
            check_processor(folder)
        if self.mean is not None and not known.accuracy:
            raise InputError(
                f"tasks.mean={self.mean}: the mean of the tasks' acc, which none of {', '.join(self.names)} has; "
                "give tasks.mean=null"
            )

    def rows(self) -> str:
        """A hash of all rows that are asked or shown as examples, whichever way they come; a process reads them once.

        Raises InputError for an unknown task, rows that are missing, or if lm-eval is not there.
        """
        return self._known().hash

    def _known(self) -> Known:
        name = repr(self)
        if name not in _KNOWN:
            _KNOWN[name] = known_of(self._load(_manager(self)), self.shots)
        return _KNOWN[name]

    def describe(self) -> dict[str, Any]:
        """The settings that decide the scores, with the content of one's own task files in place of where they lie."""
        values = {key: value for key, value in asdict(self).items() if key not in {"include_path", "data_root"}}
        root = None if self.include_path is None else Path(self.include_path).expanduser()
        own = [] if root is None else [one for one in sorted(root.rglob("*")) if one.is_file() and one.suffix != ".pyc"]
        return values | {"own_files": {path.relative_to(root).as_posix(): file_hash(path) for path in own if root}}

    def ask(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        shared_out: Callable[[type], type] = lambda kind: kind,
    ) -> "tuple[list[Found], list[Any]] | None":
        """What lm-eval finds of a model, and every answer as a plain row. The settings have been checked before.

        `shared_out` gives the kind of lm-eval's models that shares the work out (score/sharing.py). Only the first
        process of a machine gets anything. Where images are asked about, the model's folder gives the tokenizer, with
        what makes its inputs of images.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.hf_vlms import HFMultimodalLM
        from lm_eval.models.huggingface import HFLM

        manager, images = _manager(self), self._known().images
        # a copy: lm-eval gives it a padding token
        kind, own = (HFMultimodalLM, {}) if images else (HFLM, {"tokenizer": copy.deepcopy(tokenizer)})
        lm = shared_out(kind)(
            pretrained=model, batch_size=self.batch_size, add_bos_token=self.bos, max_length=self.max_length, **own
        )
        if self.bos is not None:  # a tokenizer that is given adds none for being asked for special tokens
            lm.tokenizer.add_bos_token = self.bos
        results = simple_evaluate(
            lm, tasks=self._load(manager), num_fewshot=self.shots, limit=self.limit, task_manager=manager,
            batch_size=self.batch_size, apply_chat_template=self.chat_template,
        )  # fmt: skip
        if results is None:
            return None
        for row in (row for rows in results["samples"].values() for row in rows if images):
            row["doc_hash"] = content_key(row["doc"])  # lm-eval's own is of where the image is in memory
        found = list(_numbers(results))
        if self.mean is not None:
            found.append(_mean(self.mean, [one for one in found if one.task in results["n-samples"]]))
        return found, list(answers_in(results["samples"]))

    def _load(self, manager: Any) -> list[Any]:
        """The tasks and groups with their rows, for lm-eval. Raises InputError if one of them cannot be had."""
        loaded: list[Any] = []
        for name in self.names:
            try:
                with copies_told():
                    made = manager.load([name])
            except InputError:
                raise
            except Exception as error:  # whatever a task's own code and datasets make of rows that are not there
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                place = "data_root is not set" if self.data_root is None else f"looked for them in {self.data_root}"
                raise InputError(
                    f"tasks.names: the rows of '{name}' cannot be read ({reason}); {place}. Without network give "
                    "data_root=FOLDER, a mirror laid out like the hub"
                ) from error
            group = made["groups"].get(name)  # else a task, or all of a tag
            loaded += made["tasks"].values() if group is None else [group]
        return loaded


_KNOWN: dict[str, Known] = {}


def _manager(tasks: Tasks) -> Any:
    """lm-eval's index of the folders that name what is asked for. Raises InputError for an unknown name."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._factory import TaskFactory
        from lm_eval.tasks._index import TaskIndex
    except ImportError as error:
        raise InputError("tasks: lm-eval is not installed: pip install 'cluscomp[tasks]'") from error

    own = [] if tasks.include_path is None else [Path(tasks.include_path).expanduser()]
    if own and not own[0].is_dir():
        raise InputError(f"tasks.include_path={tasks.include_path}: there is no such folder")
    given = Path(lm_eval.__file__).parent / "tasks"
    known, ours = named_by_lm_eval(given), [named(folder) for folder in own]
    names = known.names.union(*(one.names for one in ours))
    for name in tasks.names:
        if name not in names:
            near = ", ".join(difflib.get_close_matches(name, names, 3)) or "none"
            raise InputError(f"tasks.names: lm-eval has no task, group or tag '{name}'; near: {near}")
    wanted = {*tasks.names}.union(*(one.names for one in ours)).difference(*(one.places for one in ours))
    index: dict[str, Any] = {}
    for folder in sorted(known.needed(wanted), key=lambda place: f"{place}/"):  # as lm-eval walks through all of them
        for name, entry in TaskIndex.build([folder]).items():
            index.setdefault(name, entry).tags.update(entry.tags)  # a tag's tasks lie in several folders
    index |= TaskIndex.build(own)

    class Local(TaskFactory):  # type: ignore[misc]
        """Reads the rows of every task from `data_root` where that is given."""

        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
            if tasks.data_root is not None and "dataset_path" in config and not config.get("custom_dataset"):
                config |= _local(config, Path(tasks.data_root).expanduser(), tasks.shots)
            return config

    manager = TaskManager(include_defaults=False)
    manager._index, manager._factory = index, Local()
    return manager


def _local(config: dict[str, Any], root: Path, shots: int | None) -> dict[str, Any]:
    """What changes in a task's config when its rows come from `root`. Raises InputError if they are not there."""
    from datasets import get_dataset_split_names

    folder = root / config["dataset_path"]
    if not folder.is_dir():
        raise InputError(f"tasks.names: '{config['task']}' has no rows in data_root: there is no folder {folder}")
    splits = get_dataset_split_names(str(folder), config.get("dataset_name"))
    reading = (config.get("dataset_kwargs") or {}) | {"cache_dir": own_cache(folder)}
    changes: dict[str, Any] = {"dataset_path": str(folder), "dataset_kwargs": reading}
    shown = examples(shots, config.get("num_fewshot"))
    scored = config.get("test_split") or config.get("validation_split")
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = config.get(key)
        if split is None or split in splits:
            continue
        if split == scored or (shown > 0 and key in {"training_split", "fewshot_split"}):
            raise InputError(
                f"tasks.names: '{config['task']}' needs split '{split}', but {folder} has only {', '.join(splits)}"
            )
        changes[key] = None
    return changes


def _numbers(results: Any) -> Iterator[Found]:
    """The numbers of lm-eval's results, groups after tasks."""
    counts = {task: count["effective"] for task, count in results["n-samples"].items()}
    hashes = {task: _hash(rows) for task, rows in results["samples"].items()}
    members = results.get("group_subtasks", {})
    tables = results["results"] | results.get("groups", {})
    for task, values in tables.items():
        leaves = [task] if task in counts else _leaves(task, members)
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_}")
            yield Found(
                task, metric if filter_ == "none" else f"{metric} ({filter_})", float(value),
                error if isinstance(error, float) and math.isfinite(error) else None,
                sum(counts[leaf] for leaf in leaves), results["versions"].get(task), results["n-shot"].get(task),
                "".join(hashes[leaf] for leaf in leaves),
            )  # fmt: skip


def _leaves(group: str, members: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    return [leaf for name in members[group] for leaf in (_leaves(name, members) if members.get(name) else [name])]


def _mean(name: str, found: list[Found]) -> Found:
    """The plain mean of all tasks' acc, its standard error from theirs."""
    parts = [one for one in found if one.metric == "acc"]
    errors = [one.stderr for one in parts]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors if error is not None)) / len(parts)
    return Found(
        name, "acc", sum(one.value for one in parts) / len(parts), stderr, sum(one.n for one in parts),
        [one.version for one in parts], [one.shots for one in parts], "".join(one.hash for one in parts),
    )  # fmt: skip


def _hash(rows: list[dict[str, Any]]) -> str:
    """lm-eval's own hash of a task: of its documents, prompts and targets."""
    from lm_eval.utils import hash_string

    return str(hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)))


def lm_eval_version() -> str | None:
    """The installed lm-eval's version, or None."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        return None
