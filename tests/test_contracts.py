"""Contracts that new yaml, methods, stages, notebooks and modules meet without an edit here.

Fields against yaml keys, stored bits against tensors, docstrings and re-exports by reading the source, names between
rooms against each other.
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from layers import made_by, statistic_of
from omegaconf import OmegaConf
from pipelines import composed

from cluscomp.command.compose import CONF
from cluscomp.forms.layers import KINDS
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.signs import SignWeight
from cluscomp.plan import dry
from cluscomp.plan.places import Place
from cluscomp.stages.foreseeing import SHARING

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cluscomp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NODES = {
    str(path.relative_to(CONF)): node
    for path in sorted(CONF.rglob("*.yaml"))
    if path.relative_to(CONF).parts[0] != "hydra"  # Hydra's own settings
    and "_target_" in (node := yaml.safe_load(path.read_text()))
}
GROUPS = sorted({name.split("/")[0] for name in NODES})
VARIANTS = {  # choices that say only what is other than in another choice of their group
    str(path.relative_to(CONF)): node
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if "_target_" not in (node := yaml.safe_load(text := path.read_text())) and "_global_" not in text
}
METHODS = {name: node for name, node in NODES.items() if name.startswith("method/")}
METHODS |= {
    name: METHODS[f"method/{node['defaults'][0]}.yaml"] | {key: node[key] for key in node if key != "defaults"}
    for name, node in VARIANTS.items()
    if name.startswith("method/")
}
STAGES = [name for name, node in NODES.items() if ".stages." in node["_target_"] and "allocation" not in name]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "analysis").glob("*.ipynb"))
SMALLER = {"codebook_size": 16, "bits": 3.0}  # what a method's own values become on a tiny weight


def target(node: dict) -> type:
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


# yaml


def test_yaml_keys_are_the_fields_of_the_settings_class():
    for name, node in NODES.items():
        keys = node.keys() - {"_target_", "defaults"}
        assert keys == {field.name for field in dataclasses.fields(target(node))}, name


def test_a_variant_sets_fields_of_the_choice_it_builds_on():
    for name, node in VARIANTS.items():
        group, base = name.partition("/")[0], node
        while "defaults" in base and "_target_" not in base:  # which may build on another one in turn
            (other,) = (entry for entry in base["defaults"] if isinstance(entry, str) and entry != "_self_")
            base = (NODES | VARIANTS)[f"{group}/{other}.yaml"]
        assert node.keys() - {"defaults"} < base.keys() - {"_target_"}, name


def test_settings_classes_are_strict_frozen_and_without_defaults():
    """Values live in yaml, types and ranges in the class."""
    for settings in {target(node) for node in NODES.values()}:
        config = settings.__pydantic_config__
        assert config["extra"] == "forbid" and config["strict"] is True and settings.__dataclass_params__.frozen
        for field in dataclasses.fields(settings):
            default = field.default
            required = default is dataclasses.MISSING or getattr(default, "is_required", lambda: False)()
            assert required and field.default_factory is dataclasses.MISSING, (settings, field.name)


def choices(group: str) -> list[list[str]]:
    """What chooses each option of a group in turn, with a value for what has none."""
    found = []
    for name, node in (NODES | VARIANTS).items():
        if name.startswith(f"{group}/"):
            option = name.removesuffix(".yaml").partition("/")[2]
            found.append([f"{group}={option}", *(f"{group}.{key}=given" for key in node if node[key] == "???")])
    return found


def test_every_choice_of_every_group_composes_and_builds():
    """One of each group at a time; some methods need a limit of bits."""
    for together in itertools.zip_longest(*map(choices, GROUPS), fillvalue=[]):
        overrides = list(itertools.chain(*together))
        method = "".join(one for one in overrides if one.startswith("method="))
        bits = [] if METHODS.get(f"{method.replace('=', '/')}.yaml", {}).get("bits", "") is None else ["bits=3"]
        assert composed(*bits, *overrides).order == ["cluster"], together


def test_every_experiment_composes_and_builds_under_its_own_name():
    for name in EXPERIMENTS:
        written = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
        chosen = [group for entry in written["defaults"] if isinstance(entry, dict) for group in entry.values()]
        papers = "paper" in written["defaults"] or "cluscomp_paper" in chosen
        bits = [] if "bits" in written or papers else ["bits=3"]
        needed = ["model.file=some.gguf"] if "gguf" in chosen else []
        assert composed(f"experiment={name}", *bits, *needed).name == name


# methods


@pytest.mark.parametrize(("name", "learns"), [("autoround", "rounding"), ("omniquant", "clipping")])
def test_methods_that_are_mostly_training_choose_it(name, learns):
    found = composed(f"method={name}", "bits=3", "experiment=methods")
    assert found.order == ["cluster", "block_finetune"] and found.stages["block_finetune"].learns == learns
    assert found.stages["cluster"].method == composed("method=rtn", "bits=3").stages["cluster"].method
    given = composed(f"method={name}", "bits=3", f"block_finetune={name}")
    assert given.stages["block_finetune"] != found.stages["block_finetune"]


def test_a_refusal_names_all_methods_whose_bits_can_be_shared_out():
    named = {target(METHODS[f"method/{name}.yaml"]) for name in SHARING}
    assert named == {target(node) for node in METHODS.values() if hasattr(target(node), "offers")}


def test_ours_at_its_best_chooses_what_stage_cluster_looks_at():
    found = composed("method=cluscomp_best", "bits=3").stages["cluster"]
    assert (found.prefix, found.drift, found.price, found.allocation.scope) == ("compressed", 0.3, "loss", "model")
    paths = composed("method=cluscomp_paths", "bits=3", "method.floor=0.5").stages["cluster"].method
    assert found.method == paths


@pytest.fixture(params=METHODS)
def method(request):
    """Each method with the values of its yaml, made small enough for a tiny weight."""
    node = OmegaConf.create({"bits": None, "method": METHODS[request.param]})
    given = OmegaConf.to_container(OmegaConf.create({"bits": 3.0, "method": node.method}), resolve=True)["method"]
    given |= {key: value for key, value in SMALLER.items() if given.get(key) is not None}
    return hydra.utils.instantiate(given, _convert_="all")


def gaussian(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


def compress(method, weight_OI: torch.Tensor, seed: int = 0):
    """What a method makes of a weight whose inputs, where it asks for them, hang together as a layer's do."""
    generator = torch.Generator().manual_seed(5)
    in_features = weight_OI.shape[1]
    mixing_II = torch.eye(in_features) + torch.rand(in_features, in_features, generator=generator)
    x_TI = torch.randn(4 * in_features, in_features, generator=generator) @ mixing_II
    seen = statistic_of(x_TI, *method.sees()) if method.sees() else None
    return made_by(method, weight_OI, seen, torch.Generator().manual_seed(seed))


SHAPES = [(32, 48), (33, 47), (64, 17)]  # the last two are no multiples of a sub-vector


@functools.cache
def compressed(method, shape):
    """For all tests that only read it."""
    return compress(method, gaussian(*shape))


def test_a_compressed_weight_is_finite_of_its_shape_and_near_the_dense_one(method):
    for shape in SHAPES:
        weight_OI, stored = gaussian(*shape), compressed(method, shape)
        dense_OI = stored(torch.float32).detach()
        assert dense_OI.shape == weight_OI.shape and dense_OI.dtype == torch.float32
        assert bool(dense_OI.isfinite().all())
        assert float((dense_OI - weight_OI).square().sum()) < 0.9 * float(weight_OI.square().sum())
        assert stored(torch.bfloat16).dtype == torch.bfloat16


def test_inputs_that_are_zero_on_all_text_are_no_obstacle(method):
    """As behind a pruned or zeroed layer: of all inputs, or of all but a few."""
    for seen in (0, 1):
        x_TI = torch.zeros(128, 48)
        x_TI[:, :seen] = torch.randn(128, seen, generator=torch.Generator().manual_seed(1))
        statistic = statistic_of(x_TI, *method.sees()) if method.sees() else None
        stored = made_by(method, gaussian(32, 48), statistic, torch.Generator().manual_seed(0))
        assert bool(stored(torch.float32).isfinite().all())


def test_the_ledger_counts_every_stored_bit_and_no_other(method):
    for shape in SHAPES:
        stored = compressed(method, shape)
        ledger = stored.ledger()
        assert all(type(part) is str and type(bits) is int and bits >= 0 for part, bits in ledger.items())
        assert sum(ledger.values()) == sum(t.numel() * t.element_size() * 8 for t in stored.state_dict().values())
        if getattr(method, "bits", None) is not None:
            assert sum(ledger.values()) <= method.bits * shape[0] * shape[1]


def test_compression_depends_on_weight_and_generator_alone(method):
    weight_OI = gaussian(32, 48)
    kept = weight_OI.clone()
    torch.manual_seed(1)
    first = compress(method, weight_OI).state_dict()
    torch.manual_seed(2)
    second = compress(method, weight_OI).state_dict()
    assert torch.equal(weight_OI, kept)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stored_weight_comes_back_from_its_spec_and_tensors(method):
    stored = compressed(method, (33, 47))
    assert type(stored) in KINDS.values()
    spec = json.loads(json.dumps(stored.spec()))
    again = type(stored).empty(**spec)
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again(torch.float32), stored(torch.float32))
    assert again.spec() == stored.spec() and again.ledger() == stored.ledger()
    assert (again.out_features, again.in_features) == (33, 47)


def test_gradients_reach_every_parameter(method):
    stored = compress(method, gaussian(32, 48))
    stored.to_masters()
    stored(torch.float32).square().sum().backward()
    parameters = dict(stored.named_parameters())
    assert parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name


def test_a_method_is_planned_by_its_own_code_on_weights_without_numbers(method):
    for shape in SHAPES:
        stored, tried = compressed(method, shape), dry.compress(method, {"layer": Place(*shape, 0)}, torch.float32)
        form = tried.stored["layer"]
        assert type(form) is type(stored) and all(part.is_meta for part in form.state_dict().values())
        if tried.exact:
            assert form.spec() == stored.spec() and form.ledger() == stored.ledger()
        if getattr(method, "bits", None) is not None:
            assert sum(form.ledger().values()) <= method.bits * shape[0] * shape[1]
        amounts = dataclasses.asdict(tried.work).values()
        assert all(math.isfinite(amount) and amount >= 0 for amount in amounts) and tried.work.traffic > 0
        assert tried.peak > 4 * shape[0] * shape[1]


def test_training_moves_masters_and_can_be_taken_back(method):
    """What stages do with any stored form: float32 masters, rounded at the end or put back."""
    stored = compress(method, gaussian(32, 48))
    state, before = stored.state_dict(), {name: tensor.clone() for name, tensor in stored.state_dict().items()}
    dense_OI = stored(torch.float32).detach()
    stored.to_masters()
    parameters = list(stored.parameters())
    assert parameters and all(part.dtype == torch.float32 and part.requires_grad for part in parameters)
    torch.testing.assert_close(stored(torch.float32).detach(), dense_OI)
    with torch.no_grad():
        for part in parameters:
            part.mul_(1.25)
    factors = (3 if isinstance(stored.left, SignWeight) else 2) if isinstance(stored, LowRank) else 1
    factors = 2 if isinstance(stored, SignWeight) else factors
    moved_OI = 1.25**factors * dense_OI  # two factors, or two or three scales of signs, multiply each other
    torch.testing.assert_close(stored(torch.float32).detach(), moved_OI)
    stored.to_storage()
    assert stored.spec() == compress(method, gaussian(32, 48)).spec()
    assert not any(part.requires_grad for part in stored.parameters())
    torch.testing.assert_close(stored(torch.float32), moved_OI, rtol=2e-2, atol=2e-2)
    stored.restore(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.state_dict().items())


def test_what_cannot_be_compressed_is_refused_in_words(method):
    for weight_OI in (gaussian(1, 1), torch.full((32, 48), torch.nan), gaussian(32, 48) * 1e9):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            compress(method, weight_OI)


# stages


def test_every_stage_keeps_the_protocol():
    for name in STAGES:
        stage = target(NODES[name])
        if hasattr(stage, "evaluate"):  # it measures and changes nothing
            continue
        assert {stage.takes, stage.gives} <= {"original", "ranked", "compressed"}, name
        assert type(stage.distributed) is bool, name
        for part in ("learns_from", "without_effect", "check", "cost", "run"):
            assert callable(getattr(stage, part)), (name, part)


# source


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def public(path: Path) -> list[tuple[str, ast.AST]]:
    """The public classes, functions and methods of a module by their dotted name."""
    found = []
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                found += [(f"{node.name}.{part.name}", part) for part in methods if not part.name.startswith("_")]
    return found


JAXTYPING = re.compile(r"\b(Float|Int|UInt8|Bool)\[")
SUFFIXED = re.compile(r"\b[a-z_]+_[BTHOINDKMWV]+\b")


def test_every_module_says_what_it_is():
    assert not [str(path) for path in SOURCES if not ast.get_docstring(tree(path))]


def problem(node: ast.AST) -> str | None:
    """What is missing in the docstring of a public name."""
    text = ast.get_docstring(node)
    if not text or len(text.split()) < 3:
        return "says too little"
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations = [ast.unparse(part) for part in [*(a.annotation for a in arguments), node.returns] if part]
        shapes = any(map(JAXTYPING.search, annotations)) or any(SUFFIXED.search(argument.arg) for argument in arguments)
        if shapes and not ("(" in text or SUFFIXED.search(text)):
            return f"takes or gives tensors of certain shapes, but says nothing of them: {text}"
    return None


def test_every_public_name_says_what_it_does_and_in_which_shapes():
    found = {f"{path.relative_to(PACKAGE)}:{name}": problem(node) for path in SOURCES for name, node in public(path)}
    assert len(found) > 500
    assert {name: told for name, told in found.items() if told} == {}


def test_init_files_define_protocols_or_a_version_and_export_nothing_else():
    inits = [path for path in SOURCES if path.name == "__init__.py"]
    assert len(inits) > 10
    for node in itertools.chain(*(tree(path).body for path in inits)):
        if isinstance(node, ast.ImportFrom | ast.Import):  # for the definitions below, nothing of our own
            assert "cluscomp" not in ast.unparse(node)
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING"
        elif isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) == "__version__"
        elif isinstance(node, ast.FunctionDef):  # loads modules when they are named
            assert node.name == "__getattr__"
        else:
            assert isinstance(node, ast.ClassDef) or isinstance(node.value, ast.Constant), ast.unparse(node)


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports, by dotted name; of `from cluscomp.x import y` both x and x.y."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


@functools.cache
def late() -> list[tuple[str, int, list[str]]]:
    """(file, line, modules) of every import that stands inside a function."""
    return [
        (str(path.relative_to(PACKAGE)), node.lineno, imported(node))
        for path in SOURCES
        for node in {
            node
            for function in ast.walk(tree(path))
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if imported(node)
        }
    ]


OPTIONAL = re.compile(r"cluscomp\.kernels\.(\w+_triton|_native)$")  # Triton, or a compiler, may not be there
WHY = {  # libraries that may be imported late, and why
    "datasets": "slow, and only some texts need it",
    "faiss": "optional",
    "filelock": "slow, and only runs hold locks",
    "gguf": "optional",
    "aqlm": "optional",
    "compressed_tensors": "optional",
    "gptqmodel": "optional",
    "vptq": "optional",
    "huggingface_hub": "slow, and only models of the hub need it",
    "jinja2": "slow, and only chat templates need it",
    "lm_eval": "optional",
    "matplotlib": "slow, and only figures need parts of it",
    "pandas": "slow, and only tables need it",
    "peft": "slow, and only adapters need it",
    "pydoc_data": "slow, and only one text needs it",
    "resource": "not on every system",
    "tokenizers": "slow, and only models made in code need it",
    "torch": "slow, and not needed to check settings",
    "transformers": "slow, and not needed to check settings",
    "mlflow": "optional",
    "trackio": "optional",
    "wandb": "optional",
}


def test_imports_stand_at_the_top_but_for_commands_and_settings_that_work():
    own = [(name, line, modules) for name, line, modules in late() if modules[0].split(".")[0] == "cluscomp"]
    settings = {  # files of settings that are checked before torch is loaded
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if "\n@settings\n" in (text := path.read_text()) and "\nimport torch\n" not in text
    }
    counted = [one for one in own if not any(map(OPTIONAL.match, one[2]))]
    elsewhere = [one for one in counted if not one[0].startswith("command/") and one[0] not in settings]
    assert not elsewhere
    assert len(counted) <= 40, counted


def test_libraries_are_imported_late_for_a_reason():
    libraries = {modules[0].split(".")[0] for _, _, modules in late()} - {"cluscomp"}
    assert libraries == WHY.keys()


def test_a_file_can_be_read_in_one_sitting():
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count >= 350} == {}


def test_rooms_have_a_reason_to_exist():
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "core", "common", "helpers", "registry", "factory", "misc", "base"}


# names across rooms


def stems(folder: str, pattern: str) -> list[str]:
    """The names behind the number of a room's files: 01-demo.md -> demo."""
    found = [path.stem for path in (ROOT / folder).glob(pattern) if path.stem != "README"]
    assert all(re.match(r"\d\d-", stem) for stem in found), found
    return [stem[3:] for stem in found]


def results() -> set[str]:
    """Experiments with records; results/bench holds what the benchmarks wrote."""
    return {path.parent.name for path in (ROOT / "results").glob("*/*.json")} - {"bench"}


def test_every_result_has_its_experiment_notebook_and_page():
    assert results() <= set(EXPERIMENTS)
    assert results() <= set(stems("analysis", "*.ipynb"))
    assert results() <= set(stems("experiments", "*.md"))


def test_every_notebook_and_page_has_its_experiment():
    numbers = [path.stem for pattern in ("analysis/*.ipynb", "experiments/*-*.md") for path in ROOT.glob(pattern)]
    assert len({stem[:2] for stem in numbers}) == len(set(numbers))  # a number means one experiment in all rooms
    assert set(stems("analysis", "*.ipynb")) <= set(EXPERIMENTS)
    assert set(stems("experiments", "*.md")) <= set(EXPERIMENTS)


def test_notebooks_are_thin_and_hold_no_outputs():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert len(cells) <= 10 and code, path
        for cell in code:
            assert cell["outputs"] == [] and cell["execution_count"] is None, path
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.For | ast.While), path


@pytest.fixture(scope="module")
def records_of_all(tmp_path_factory):
    """A copy of results/ in which experiments without records have some of others, with what those do not tell yet."""
    place = tmp_path_factory.mktemp("notebooks")
    for path in (ROOT / "results").glob("*/*.json"):
        (place / "results" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (place / "results" / path.parent.name / path.name).write_text(path.read_text())
    told = {"kurtosis": 4.5, "outliers": 1e-4, "centroids": 256, "dead": 0.01, "rare": 0.02, "entropy": 7.5}
    for name in [path.stem[3:] for path in NOTEBOOKS if path.stem[3:] not in results()]:
        (place / "results" / name).mkdir()
        for method, path in zip(("rtn", "cluscomp"), sorted((ROOT / "results" / "recovery").glob("*.json"))):
            record = json.loads(path.read_text())
            found = record["stages"]["cluster"]["found"]
            record["choices"]["method"] = {"yaml": method, "differs": {}}
            found["distribution_by_layer"] = dict.fromkeys(found["relative_error_by_layer"], told)
            (place / "results" / name / path.name).write_text(json.dumps(record))
    return place


@pytest.mark.slow
def test_notebooks_run_on_records(records_of_all):
    """All in one kernel, which forgets every name in between."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    together, titles = nbformat.v4.new_notebook(), []
    for path in NOTEBOOKS:
        code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        together.cells += [nbformat.v4.new_code_cell("%reset -f"), *code]
        titles += [path.stem] * (1 + len(code))
    nbclient.NotebookClient(together, timeout=120, resources={"metadata": {"path": str(records_of_all)}}).execute()
    shown = {path.stem: 0 for path in NOTEBOOKS}
    for title, cell in zip(titles, together.cells):
        last = cell.source.rstrip().splitlines()[-1]
        shown[title] += bool(cell.outputs) and last.endswith(")")
        if last.startswith("plots."):
            assert "image/png" in cell.outputs[-1].data, title
        if "_table(found)" in last and "=" not in last:
            assert "text/html" in cell.outputs[-1].data, title
    assert all(shown.values()), shown
