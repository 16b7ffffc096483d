"""The tensors of a model's files, by the parameters they make: transformers' own rules for old and other names."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from cluscomp.errors import InputError
from cluscomp.models.files import weight_files


@dataclass(frozen=True)
class Source:
    """Tensors of the files that make parameters `made` of a model: one as it is, or several by a rule of transformers.

    `tensors` are names in the files, each with the pattern of the rule that it matched.
    """

    made: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]
    rule: WeightConverter | None

    def convert(self, tensors: dict[str, Tensor], outline: Callable[[], PreTrainedModel]) -> dict[str, Tensor]:
        """The parameters by their names in the model, of the files' tensors by their names there.

        `outline` gives a model as transformers makes it; its shapes are looked at.
        """
        if self.rule is None:
            return {self.made[0]: tensors[self.tensors[0][0]]}
        return _converted(self.rule, self.made[0], self.tensors, outline(), tensors)


class Files:
    """The safetensors of a model's folder; a tensor is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """List the tensors. Raises InputError for a file that cannot be read, and a tensor that is in two of them."""
        self.shards: dict[str, Path] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, "pt") as shard:
                    names = list(shard.keys())
            except SafetensorError as error:
                raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from error
            twice = next((name for name in names if name in self.shards), None)
            if twice is not None:
                raise InputError(f"{path}: {twice} is also in {self.shards[twice].name}; leave one of the files there")
            self.shards |= dict.fromkeys(names, path)

    @property
    def paths(self) -> list[Path]:
        """The files, each once, in order of their names."""
        return sorted(set(self.shards.values()))

    @cached_property
    def heads(self) -> dict[str, tuple[str, list[int]]]:
        """Types, as the files name them, and shapes of all tensors, by name."""
        found: dict[str, tuple[str, list[int]]] = {}
        for path in self.paths:
            with safe_open(path, "pt") as shard:
                parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                found |= {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
        return found

    def read(
        self, wanted: Iterable[Source], outline: Callable[[], PreTrainedModel]
    ) -> Iterator[tuple[Source, dict[str, Tensor]]]:
        """What each of the sources makes, one after the other, as it lies in the files; see `Source.convert`."""
        with ExitStack() as stack:
            opened = cache(lambda path: stack.enter_context(safe_open(path, "pt")))
            for source in sorted(wanted, key=lambda source: self.shards[source.tensors[0][0]]):
                tensors = {name: opened(self.shards[name]).get_tensor(name) for name, _ in source.tensors}
                yield source, source.convert(tensors, outline)

    def sources(self, model: PreTrainedModel) -> dict[str, Source]:
        """By the name of each parameter or buffer of a model as transformers makes it, what it is made of.

        What the files have no tensor for is not among them. Of tied parameters one is enough in the files.
        """
        state: dict[str, Any] = model.state_dict()
        tied = model.all_tied_weights_keys
        if all(name in self.shards or name in tied for name in state):
            found = {name: Source((name,), ((name, name),), None) for name in state if name in self.shards}
        else:
            found = _renamed(model, state, {name: shape for name, (_, shape) in self.heads.items()})
        for name, other in tied.items():
            if other not in found and name in found:  # the files have the head alone, say
                found[other] = Source((other,), found[name].tensors, None)
        return found


def _renamed(model: PreTrainedModel, state: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Source]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, list[tuple[str, str]]] = {}
    chosen: dict[str, WeightConverter | None] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state:  # it has the model's name already, but for the prefix
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            chosen[target] = by_pattern[pattern] if pattern is not None else None
            groups.setdefault(target, []).append((name, pattern or name))
    found: dict[str, Source] = {}
    for target, tensors in groups.items():
        rule = chosen[target]
        made: tuple[str, ...] = (target,)
        if rule is not None:
            empty = {name: torch.empty(shapes[name], device="meta") for name, _ in tensors}
            made = (target, *(one for one in _converted(rule, target, tensors, model, empty) if one != target))
        source = Source(made, tuple(tensors), rule)
        found |= {name: source for name in made if name in state}
    return found


def _converted(
    rule: WeightConverter, target: str, tensors: Any, model: PreTrainedModel, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    one = deepcopy(rule)
    for name, pattern in tensors:
        one.add_tensor(target, name, pattern, values[name])  # type: ignore[arg-type]
    found = one.convert(target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}
