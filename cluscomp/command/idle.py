"""Settings that no stage of this run uses: a warning, or an error where the user would expect them in the result."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluscomp.command.trust import Given
from cluscomp.errors import InputError
from cluscomp.runs.experiment import Experiment

log = logging.getLogger("cluscomp")
# of which a run takes what its stages and evaluate refer to
GROUPS = ("method", "beside", "allocation", "data", "scored", "instructions", "tasks", "bits")


def tell_idle(raw: Any, experiment: Experiment, said: Given) -> None:
    """Warn of what the command line says for stages that are not run, or of groups that none of those run takes.

    `raw` are the settings with their references unresolved.
    """
    order = "evaluate" if experiment.scores_only else ",".join(experiment.order)
    taken = _referred_to(raw, [*experiment.order, "evaluate"])
    for key in sorted(said.keys):
        place = key.rpartition("@")[2].partition(".")[0]
        if place in experiment.stages and place not in experiment.order:
            log.warning("%s has no effect: order=[%s] has no stage %s", key, order, place)
        elif place in GROUPS and place not in taken:
            log.warning("%s has no effect: nothing in order=[%s], nor evaluate, takes %s", key, order, place)


def _referred_to(raw: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The names that these settings refer to, and those that they refer to in turn."""
    found: set[str] = set()
    left = [*names]
    while left:
        text = json.dumps(raw.get(left.pop()), default=str)
        new = {*re.findall(r"\$\{(?:oc\.select:)?(\w+)", text)} - found
        found |= new
        left += new
    return found


def refuse_idle(order: Sequence[str], parts: Mapping[str, Any]) -> None:
    """Raise InputError for what stands beside a method's codes, or shares its bits out, where stage cut uses it."""
    method = getattr(parts.get("cut"), "method", None) if "cut" in order else None
    if method is None:
        return
    if parts["beside"].around(method) is not method:
        raise InputError("cut=by_method has neither masks nor adapters beside a factor's codes: give beside=none")
    if parts["allocation"].scope == "model":
        raise InputError("cut=by_method shares no bits out over the model: give allocation=block")
