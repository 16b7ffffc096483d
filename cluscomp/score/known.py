"""What is known of lm-eval's tasks before a model is asked: their rows, their examples, how much they generate."""

from dataclasses import dataclass
from typing import Any

from cluscomp.errors import InputError
from cluscomp.score.images import hashed, sees
from cluscomp.store.records import content_key

GENERATED = 256  # lm-eval's own number of tokens, for tasks that tell none
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what it is called, first to last


@dataclass(frozen=True)
class Known:
    """Of some tasks: a hash of all rows, whether one asks about images, whether one has an acc.

    Also how many tokens each task generates at most, if any, and the first that has no examples by its own config.
    """

    hash: str
    images: bool
    accuracy: bool
    generated: dict[str, int]
    without_examples: str | None

    def check(self, *, shots: int | None, max_length: int | None, model: str, positions: int | None) -> None:
        """Raise InputError for examples that lm-eval would not show, and where no token is left for a prompt.

        Args:
            shots: tasks.shots.
            max_length: tasks.max_length.
            model: the model's name.
            positions: how many tokens it takes; None: that is not known.
        """
        if shots and self.without_examples is not None:
            raise InputError(
                f"tasks.shots={shots}: '{self.without_examples}' has no examples by its own config; give "
                "tasks.shots=null for it"
            )
        name, most = max(self.generated.items(), key=lambda one: one[1], default=("", 0))
        said = f"'{name}' generates up to {most} tokens (its max_gen_toks)"
        if max_length is not None and most >= max_length:
            raise InputError(f"tasks.max_length={max_length}: {said}, so none is left for the prompt; give more")
        if max_length is None and positions is not None and most >= positions:
            raise InputError(f"tasks.names: {said}, but {model} has {positions} positions; leave this task out")


def known_of(loaded: list[Any], shots: int | None) -> Known:
    """What is known of loaded tasks and groups where so many examples are asked for."""
    tasks = [task for one in loaded for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])]
    return Known(
        hash=content_key([_rows(one, shots) for one in tasks]),
        images=any(map(sees, tasks)),
        accuracy=any("acc" in one.aggregation() for one in tasks),
        generated={one.config.task: _generated(one) for one in tasks if one.OUTPUT_TYPE == "generate_until"},
        without_examples=next((one.config.task for one in tasks if one.config.num_fewshot == 0), None),
    )


def examples(shots: int | None, own: int | None) -> int:
    """How many examples lm-eval shows of a task with its `own` number: a 0 of its own stays."""
    return 0 if own == 0 else shots if shots is not None else own or 0


def _rows(task: Any, shots: int | None) -> list[Any]:
    """Name and rows of a task, with those that its examples are drawn from if there are any; of images their hashes."""
    shown = examples(shots, task.config.num_fewshot)
    rows = [list(task.eval_docs), list(task.fewshot_docs()) if shown else []]
    return [task.config.task, *(hashed(rows) if sees(task) else rows)]


def _generated(task: Any) -> int:
    """How many tokens a task generates at most."""
    told = task.config.generation_kwargs or {}
    keys = LIMITS[:1] if sees(task) else LIMITS  # of tasks about images lm-eval reads the first alone
    return int(next((told[key] for key in keys if told.get(key) is not None), GENERATED))
