"""What tables call a run: its model, its limit of bits, its method and stages, as papers do."""

from typing import Any

from cluscomp.report.published import MODELS
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


def model_name(record: Record, among: list[Record]) -> str:
    """What papers call the model, or its id on the hub, or its file, or how it was made.

    Where records `among` which it stands are of another model with that name, the name ends with a hash of its weights.
    """
    name, weights = _model(record)
    others = {one for other, one in map(_model, among) if other == name and one} - {weights}
    return f"{name}@{weights[:8]}" if others and weights else name


def by_model(records: list[Record]) -> dict[str, list[Record]]:
    """The records of each model by its name."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(model_name(record, records), []).append(record)
    return found


def _model(record: Record) -> tuple[str, str]:
    """A model's name and a hash of its weights; without one where the record is older, or another library's model."""
    model = record.config["model"]
    external = record.stages.get(EXTERNAL, {}).get("found", {}).get("original")
    if external is not None:
        model = {"id": external}
    name = str(model.get("id") or model.get("file") or model.get("architecture"))
    weights = "" if external is not None else record.run.get("weights", "")
    return MODELS.get(name, name.rpartition("/")[2].removesuffix(".gguf")), weights


def limit(record: Record) -> str:
    """The `bits` that were asked for, "-" without a method; of another library's model what it holds or states.

    Where a method's own settings were given in their place: those of `COLUMN` that differ from its yaml, or "by hand".
    """
    if EXTERNAL in record.stages:
        return f"{record.stages[EXTERNAL]['size']['linear_bits_per_weight']:.3g}"
    share = 1.0
    method = record.config["stages"].get("cluster", {}).get("method")
    if "cut" in record.config["order"]:
        share, method = (record.config["stages"]["cut"][key] for key in ("ratio", "method"))
        method = method or {"bits": 16}
    elif "cluster" not in record.config["order"]:
        return "-"
    bits = method.get("bits")
    if bits is None:
        differs = record.choices["method"]["differs"]
        return " ".join(_told({key: differs[key] for key in differs if key in COLUMN - {"bits"}})) or "by hand"
    return str(bits) if isinstance(bits, str) else f"{share * bits:g}"  # from the environment


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
    settings = record.config["stages"].get(stage, {})
    learns = settings.get("learns", "values")
    told = f" (learns={learns})" if learns != "values" else " (codes=moving)" if _moves(record, stage) else ""
    return stage + (" (lora)" if settings.get("trainable") == "lora" else told)


def _moves(record: Record, stage: str) -> bool:
    """Whether codes move in a stage."""
    return bool(record.config["stages"].get(stage, {}).get("codes", "fixed") == "moving")


def _told(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()]


def stages_until(record: Record, after: str) -> list[str]:
    """The stages that made the model that was scored `after`: of the original, or an external model, none."""
    order: list[str] = record.config["order"]
    return order[: order.index(after) + 1] if after in order else []
