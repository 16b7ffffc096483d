"""The settings of a run, and the keys of its stages.

A stage's key is a hash of all that decides its result: the key before it, its settings, the model, the texts, the seed
and the format version. So runs that share a beginning share its result, changed settings never re-use old state, and
two configs never overwrite each other.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, InstanceOf, field_validator, model_validator

from cluscomp.plan.machine import Machine
from cluscomp.settings import described, settings
from cluscomp.store.records import NAME, content_key

PLACES = ("outputs", "cache", "publish", "data_root")  # settings that say where things lie, of texts and tasks, too
# and settings that never change a result: number of processes, what to run again, which yaml was chosen
ASIDE = (*PLACES, "ranks", "shard", "retry", "fresh", "choices", "from_environment")

TAKEN = {  # what a stage takes, in words
    "original": "one that is not compressed yet",
    "ranked": "what stage 'rank' leaves",
    "compressed": "a compressed model",
}
METRICS = ("perplexity", "bits_per_byte", "kl", "top1_agreement")  # what is measured without tasks, which have others


@settings
class Experiment:
    """The settings of a run. `order` names the stages to run, each one of `stages`; `evaluate` measures after them.

    "evaluate" may stand last in `order`, to say so; [evaluate] alone scores the model as it is. `choices` tells which
    yaml of each group was chosen, and in which settings this run differs from it; see `Record`. `from_environment`
    holds, by its place, what the yaml says of each setting that was read from the environment: that is written, never
    the value; keys, which are hashes, are those of the values.
    """

    name: str = Field(pattern=NAME, max_length=200)
    model: Any
    stages: dict[str, Any]
    order: list[str]
    evaluate: Any
    tracker: Any
    machine: InstanceOf[Machine]
    seed: int = Field(ge=0, lt=2**64)
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    outputs: str
    cache: str
    publish: str | None
    ranks: int | None = Field(ge=1)
    shard: bool
    force: bool
    retry: bool
    fresh: bool
    objective: str = Field(min_length=1)
    choices: dict[str, dict[str, Any]]
    from_environment: dict[tuple[str, ...], str]

    @field_validator("order", mode="after")
    @classmethod
    def _stages_alone(cls, order: list[str]) -> list[str]:
        if not order:
            raise ValueError("no stage is named; order=[evaluate] scores the model as it is")
        return order[:-1] if order[-1] == "evaluate" else order

    @model_validator(mode="after")
    def _stages_fit(self) -> "Experiment":
        model, left_by = "original", ""
        for number, name in enumerate(self.order):
            if name not in self.stages:
                raise ValueError(f"order: there is no stage '{name}'; stages: {', '.join(sorted(self.stages))}")
            if name in self.order[:number]:
                raise ValueError(f"order: stage '{name}' is named twice")
            if self.stages[name].takes != model:
                where = f"after '{left_by}'" if left_by else "first"
                other = TAKEN[self.stages[name].takes]
                raise ValueError(f"order: stage '{name}' cannot come {where}: it takes {other}")
            model, left_by = self.stages[name].gives, name
        if self.objective not in METRICS and not self.evaluate.tasks.names:
            raise ValueError(f"objective: '{self.objective}' is none of {', '.join(METRICS)}, and no tasks are asked")
        unknown = [name for name in self.measured if name != "original" and name not in self.order]
        if unknown:
            raise ValueError(f"evaluate.after: '{unknown[0]}' is not 'original' or a stage in order {self.order}")
        return self

    @property
    def scores_only(self) -> bool:
        """Whether no stage is run, and the model scored as it is: order=[evaluate], which leaves `order` empty."""
        return not self.order

    @property
    def measured(self) -> list[str]:
        """After what the model is scored: "original" and names of stages, in the order of the run."""
        places = ["original", *self.order]
        return places if self.evaluate.after is None else self.evaluate.after


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """The resolved settings and their classes as plain values, by which cells are told apart: all but `ASIDE`."""
    return _without(ASIDE, described(experiment))


def config_of(experiment: Experiment) -> dict[str, Any]:
    """`settings_of` as they stand in the record: without places on this machine and values of its environment."""
    values = settings_of(experiment)
    for place, said in experiment.from_environment.items():
        put(values["stages"] if place[0] in experiment.stages else values, place, said)
    return without_places(values)


def put(values: Any, place: tuple[str, ...], said: str) -> None:
    """Let what was said stand at a place of plain values, if it is there."""
    for key in place[:-1]:
        values = values[int(key)] if isinstance(values, list) else values.get(key, {})
    if isinstance(values, list):
        values[int(place[-1])] = said
    elif place[-1] in values:
        values[place[-1]] = said


def without_places(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values without those of `ASIDE`, and of each whole path its last part."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(part) for key, part in value.items()}
        if isinstance(value, list):
            return [short(part) for part in value]
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

    return dict(short(_without(ASIDE, values)))


def _without(names: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Values without those of some names, and inside them without `PLACES`: a method may call a setting `ranks`."""
    return {
        key: _without(PLACES, part) if isinstance(part, dict) else part
        for key, part in values.items()
        if key not in names
    }


def stage_keys(experiment: Experiment, root: dict[str, Any]) -> dict[str, str]:
    """The key of the original, whose identity is `root`, and of each stage: a hash of all that decides its result."""
    keys = {"original": content_key(root)}
    for before, name in zip(["original", *experiment.order], experiment.order):
        stage = experiment.stages[name]
        learned = stage.learns_from()
        text = None if learned is None else learned.sha256
        keys[name] = content_key([keys[before], name, experiment.seed, key_settings(stage), text])
    return keys


def key_settings(stage: Any) -> dict[str, Any]:
    """A stage's class, and what of its settings decides its result.

    A text counts by its hash (`Stage.learns_from`), not by where it lies.
    """
    values = {key: value for key, value in described(stage).items() if key not in stage.without_effect()}
    for name, part in values.items():  # a method may say so of its own settings
        if idle := getattr(getattr(stage, name, None), "without_effect", None):
            values[name] = {key: value for key, value in part.items() if key not in idle()}
    return values | {part: values[part]["name"] for part in ("data", "instructions") if part in values}
