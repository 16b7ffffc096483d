"""What tables call a run: its method and stages, as papers do."""

from typing import Any

from cluscomp.store.records import EXTERNAL, ORIGINAL, Record

STAGES = ["cluster", "block_finetune", "recover"]
_CLUSCOMP = ("ClusComp-", "ClusComp", "ClusComp+")
_NAMES = {name: name.upper() for name in ("rtn", "gptq", "awq", "hqq", "gptvq", "aqlm", "qtip", "vptq")}
_NAMES |= {"squeezellm": "SqueezeLLM", "ipq": "iPQ", "water_sic": "WaterSIC", "quip_sharp": "QuIP#"}
_NAMES |= {"nf4": "NF4", "normal_float": "NormalFloat", "onebit": "OneBit", "slim": "SLiM", "slim_quant": "SLiM-Quant"}
# What papers call a method, by its yaml, after the first of STAGES, the first two and all three; and of which kind
SPELLED: dict[str, tuple[tuple[str, ...], str]] = {
    "cluscomp": (_CLUSCOMP, ""),
    "cluscomp_data_free": (_CLUSCOMP, "data-free"),
    "cluscomp_quick": (_CLUSCOMP, "quick"),
    "cluscomp_paper": (_CLUSCOMP, "paper"),
    "cluscomp_paths": (_CLUSCOMP, "paths"),
    "cluscomp_best": (_CLUSCOMP, "best"),
    "autoround": (("RTN", "AutoRound"), ""),
    "omniquant": (("RTN", "OmniQuant"), ""),
} | {name: ((spelled,), "") for name, spelled in _NAMES.items()}
# what a method's yaml chooses of stage cluster: told where it is otherwise
USUAL = {"cluster": "default", "scope": "block", "beside": "none"}
CHOSEN = {
    "cluscomp_best": USUAL | {"cluster": "by_loss", "scope": "model"},
    "slim": USUAL | {"beside": "slim"},
}
COLUMN = {"bits", "vector_dim", "codebook_size", "width", "group"}  # what a table tells in a column: the limit


def method_name(record: Record, after: str) -> str:
    """The method's yaml and the stages up to `after`, as papers call them: ClusComp-, ClusComp, ClusComp+, GPTQ, ...

    In brackets its settings that differ from the yaml, but those of `COLUMN`. A yaml that no paper names is called by
    its own name.
    """
    if after == ORIGINAL:
        return ORIGINAL
    if after == EXTERNAL:
        stated = record.stages[EXTERNAL]["found"]
        return f"{stated['method'].upper()} ({stated['library']}, {EXTERNAL})"
    order = stages_until(record, after)
    if "cut" in order:
        return " + ".join([*order[: order.index("rank")], _cut_name(record), *order[order.index("cut") + 1 :]])
    if "cluster" not in order:
        return " + ".join([ORIGINAL, *order])
    dense, order = order[: order.index("cluster")], order[order.index("cluster") :]
    chosen = record.choices["method"]
    names, kind = SPELLED.get(chosen["yaml"], ((chosen["yaml"],), ""))
    length = max(count for count in range(1, len(names) + 1) if order[:count] == STAGES[:count])
    differs = {key: value for key, value in chosen["differs"].items() if key not in COLUMN}
    usual = CHOSEN.get(chosen["yaml"], USUAL)
    differs |= {key: value for key, value in _of_cluster(record).items() if value != usual.get(key)}
    differs |= {"codes": "moving"} if any(_moves(record, stage) for stage in order[:length]) else {}
    told = ", ".join([*filter(None, [kind]), *_told(differs)])
    rest = [_stage_name(record, stage) for stage in order[length:]]
    return " + ".join([*dense, names[length - 1] + (f" ({told})" if told else ""), *rest])


def _cut_name(record: Record) -> str:
    """What stages rank and cut make: ACIP, or low rank by singular values; and what compresses the factors."""
    stages = record.config["stages"]
    name = "ACIP" if stages["rank"]["rule"] == "masks" else "low rank (singular values)"
    if stages["cut"]["method"] is None:
        return name
    chosen = record.choices["method"]["yaml"]
    (by, *_), _ = SPELLED.get(chosen, ((chosen,), ""))
    return f"{name}, factors by {by}"


def _of_cluster(record: Record) -> dict[str, Any]:
    """What stage cluster's settings make of a method: inputs that it saw, what stands beside it, bits shared out."""
    chosen = record.choices["cluster"]
    allocation = record.config["stages"]["cluster"].get("allocation", {})
    scope = allocation.get("formula", "gates" if "levels" in allocation else allocation.get("scope", "block"))
    told = {key: chosen["differs"][key] for key in ("prefix", "drift", "price", "rotation") if key in chosen["differs"]}
    beside = record.choices.get("beside", {"yaml": "none", "differs": {}})
    told |= {"beside": beside["yaml"], **{f"beside.{key}": value for key, value in beside["differs"].items()}}
    return {"cluster": chosen["yaml"], **told, "scope": scope}


def _stage_name(record: Record, stage: str) -> str:
    learns = record.config["stages"].get(stage, {}).get("learns", "values")
    told = f" (learns={learns})" if learns != "values" else " (codes=moving)" if _moves(record, stage) else ""
    return stage + told


def _moves(record: Record, stage: str) -> bool:
    """Whether codes move in a stage."""
    return bool(record.config["stages"].get(stage, {}).get("codes", "fixed") == "moving")


def _told(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()]


def stages_until(record: Record, after: str) -> list[str]:
    """The stages that made the model that was scored `after`: of the original, or an external model, none."""
    order: list[str] = record.config["order"]
    return order[: order.index(after) + 1] if after in order else []
