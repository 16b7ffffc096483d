"""The command line: compose, build, run. No Hydra and no `DictConfig` past this file."""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from cluscomp import __version__, commands
from cluscomp.cells import announce, at_work, folder_of, read_cell
from cluscomp.confidential import Discreet, hide, hide_override
from cluscomp.errors import InputError
from cluscomp.experiment import ASIDE, PLACES, Experiment, settings
from cluscomp.files import is_held
from cluscomp.preparation import planned, writable
from cluscomp.records import objective, read
from cluscomp.run import Outcome, run
from cluscomp.steps import rank

HERE = Path(__file__).parent
CONF = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())
STAGES = "cluscomp.stages."  # nodes whose _target_ is here are stages
# used by settings, not by the run itself
SHARED = ("method", "data", "instructions", "tasks", "bits", "data_root", "debug")


def main() -> None:
    """The `cluscomp` command. Exit codes: 0 done, 1 failed, 2 input cannot work, 130 interrupted."""
    arguments = sys.argv[1:]
    plain = {"status": commands.status, "collect": commands.collected, "table": commands.table, "plot": commands.plot}
    command = arguments.pop(0) if arguments and arguments[0] in {"run", "plan", "verify", *plain} else "run"
    if arguments == ["--version"]:
        print(__version__)
        return
    if command == "plan":
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # a plan downloads nothing
    if calibrating := command == "plan" and "--calibrate" in arguments:
        arguments.remove("--calibrate")
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here whole, to be told in a sentence
    with _told_in_a_sentence():
        if command in plain:
            plain[command](arguments)
        elif command == "verify":
            _verify(arguments)
        elif command == "run" and {"-m", "--multirun"} & set(arguments):
            _sweep(arguments)
        else:
            _composed({"run": _run, "plan": _calibrate if calibrating else _plan}[command])


@contextmanager
def _told_in_a_sentence() -> Iterator[None]:
    """Turn an exception into one sentence and an exit code, unless debug=true asks for all of it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if "debug=true" in map(str.lower, sys.argv):
            raise
        message, code = explain(error)
        print(f"cluscomp: {hide(message)}", file=sys.stderr)
        sys.exit(code)


def _composed(command: Callable[[Experiment], float | None]) -> None:
    """Compose the settings (of every cell, with -m) and hand them on; what comes back goes to Hydra's sweeper."""

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def compose(config: DictConfig) -> float | None:
        with _told_in_a_sentence():  # before Hydra sees it, which would add lines of its own
            experiment = build(config)
            _quiet_libraries()
            return command(experiment)
        return None

    compose()


def _run(experiment: Experiment) -> float | None:
    """The score that a search looks at (`objective`), or None if it was not measured."""
    if rank() > 0:
        run(experiment)
        return None
    folder, overrides = _cell(experiment)
    with at_work(folder, overrides, explain) as records:
        outcome = run(experiment, overrides)
        records.append(outcome.path)
    show(outcome)
    return objective(outcome.record, experiment.objective)


def _cell(experiment: Experiment) -> tuple[Path, list[str]]:
    """The folder where this run tells of itself, and the overrides it was started with, but for places."""
    given = HydraConfig.get().overrides.task
    overrides = [hide_override(item) for item in given if item.partition("=")[0] not in ASIDE]
    outputs = writable("outputs", experiment.outputs)
    return folder_of(outputs, experiment.name, settings(experiment)), overrides


def _sweep(arguments: list[str]) -> None:
    """All cells are composed and listed before the first one works; one that fails does not stop the others.

    Cells at which another process is at work are put aside and come last. Of a search (hydra/sweeper=...), which makes
    its cells as it goes, nothing is known before.
    """
    folders: list[Path] = []
    aside: set[Path] = set()

    def list_it(experiment: Experiment) -> None:
        if HydraConfig.get().runtime.choices["hydra/sweeper"] != "basic":
            raise InputError("a search is asked for on the command line: hydra/sweeper=NAME")
        folder, overrides = _cell(experiment)
        announce(folder, overrides)
        folders.append(folder)

    searching = any(re.match(r"\+*hydra/sweeper=(?!basic$)", item) for item in arguments)
    if not searching:
        sys.argv[1:] = [item for item in arguments if not re.match(r"\+*hydra[/.]launcher", item)]
        _composed(list_it)
        sys.argv[1:] = arguments
    try:
        _composed(_run_one_of_many if searching else partial(_run_or_put_aside, aside=aside))
        if aside:
            _composed(partial(_run_what_was_put_aside, aside=aside))
    except Exception as error:  # of a launcher, say of a job that its scheduler ended
        if searching:
            raise
        print(f"cluscomp: {hide(explain(error)[0])}", file=sys.stderr)
    if not searching:
        commands.show_cells({folder: read_cell(folder) for folder in folders})


def _run_or_put_aside(experiment: Experiment, aside: set[Path]) -> float | None:
    """Run a cell, unless another process is at work at it. (A job, which has one cell alone, waits for that one.)

    With `retry` only cells that failed or were interrupted are run.
    """
    folder, _ = _cell(experiment)
    if experiment.retry and read_cell(folder).state not in ("failed", "interrupted"):
        return None
    if HydraConfig.get().runtime.choices["hydra/launcher"] == "basic" and is_held(folder):
        aside.add(folder)
        return None
    return _run_one_of_many(experiment)


def _run_what_was_put_aside(experiment: Experiment, aside: set[Path]) -> float | None:
    return _run_one_of_many(experiment) if _cell(experiment)[0] in aside else None


def _run_one_of_many(experiment: Experiment) -> float | None:
    """A cell's failure is told and written down by itself; to a search it has no score."""
    try:
        return _run(experiment)
    except Exception as error:
        print(f"cluscomp: {hide(explain(error)[0])}", file=sys.stderr)
        return None


def _plan(experiment: Experiment) -> None:
    """Print the plan; what does not fit is told as a run would tell it."""
    found = planned(experiment)
    print(found.table())
    found.refuse()


def _calibrate(experiment: Experiment) -> None:
    from cluscomp.calibrate import measure
    from cluscomp.costs import write_calibration

    path = write_calibration(Path(experiment.cache).expanduser(), measure())
    print(f"measured: {path}")
    _plan(experiment)


def _verify(arguments: list[str]) -> None:
    """Measure a record's models again, or with full=true make them anew, too. Exit code 1 if a score is different."""
    from cluscomp.replay import changed, compare, overrides_of, quoted, scoring_alone, verdict_table, worst

    given = dict(item.partition("=")[::2] for item in arguments[1:])
    if not arguments or "=" in arguments[0]:
        raise InputError("cluscomp verify RECORD [outputs=outputs] [full=true] [SETTINGS]: RECORD is a record's file")
    record, outputs = read(Path(arguments[0])), Path(given.get("outputs", "outputs")).expanduser().absolute()
    full = given.get("full", "false") == "true"
    rest = [item for item in arguments[1:] if item.partition("=")[0] not in {"outputs", "full", "publish"}]
    places = [item for item in rest if item.partition("=")[0] in PLACES]
    overrides = [item for item in rest if item not in places] or overrides_of(record, outputs)
    _quiet_libraries()
    settings_now = settings(_composed_here([*overrides, *places]))
    places += ["publish=null", "tracker=none"]
    overrides = [item for item in overrides if not item.startswith("tracker")]
    with TemporaryDirectory(prefix="verify-", dir=writable("outputs", str(outputs))) as folder:
        places.append(f"outputs={quoted(folder)}")
        again, machine = [], {}
        for after in ["full"] if full else dict.fromkeys(score.after for score in record.scores):
            alone = [] if full else scoring_alone(record, after, outputs)
            kept = [item for item in overrides if not (item.startswith("model") and "model=hub" in alone)]
            made = run(_composed_here([*kept, *alone, *places])).record
            again += made.scores if full else [replace(score, after=after) for score in made.scores]
            machine = made.machine
    print(f"\n{verdict_table(record, again)}\n")
    for line in changed(record, settings_now, machine):
        print(f"not as it was: {line}")
    verdict = worst(compare(record.scores, again))
    print(f"{record.run['name']}: {verdict}")
    sys.exit(int(verdict == "different"))


def _composed_here(overrides: list[str]) -> Experiment:
    """The settings that overrides make, without a run of Hydra's own around them."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return build(hydra.compose("config", overrides=overrides))


def build(config: DictConfig) -> Experiment:
    """The checked, immutable settings of a run. Raises InputError that names key, value and what is allowed."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
    raw: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    evaluate = values["evaluate"]["_target_"]
    stages = [
        key
        for key, value in values.items()
        if isinstance(value, dict) and value.get("_target_", "").startswith(STAGES) and value["_target_"] != evaluate
    ]
    if values["order"] == ["evaluate"]:  # nothing is compressed, so nothing has to be said of how
        values = {key: value for key, value in values.items() if key not in {"method", *stages}}
    shared_first = sorted(values, key=lambda key: key not in SHARED)  # so that an error names the group it stands in
    built = {key: _instantiate(key, values[key], raw) for key in shared_first}
    settings = {key: value for key, value in built.items() if key not in {*SHARED, *stages}}
    try:
        return Experiment(stages={key: built[key] for key in stages if key in built}, **settings)
    except ValidationError as error:
        raise InputError(_told(error, "", raw)) from error


def _instantiate(key: str, value: Any, raw: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return hydra.utils.instantiate(value, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValidationError):
            raise InputError(_told(error.__cause__, key, raw)) from error
        raise


def _told(error: ValidationError, prefix: str, raw: dict[str, Any]) -> str:
    """Each wrong setting as `key = value: what is allowed`; a value taken from another key is named by that key."""
    sentences = []
    for problem in error.errors():
        path = [*filter(None, [prefix]), *map(str, problem["loc"])]
        node: Any = raw
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        taken_from = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        name = taken_from[1] if taken_from else ".".join(path)
        message = problem["msg"].removeprefix("Value error, ")
        whole = problem["type"] in {"value_error", "missing"}
        value = "" if whole else f" = {problem['input']!r}"
        sentences.append(f"{name}{value}: {message}" if name else message)
    return "; ".join(sentences)


def explain(error: BaseException) -> tuple[str, int]:
    """One sentence for an exception, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; finished blocks are kept, the same command goes on from there", 130
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition_problem(error), 2
    if str(error).startswith("Config group override must be"):
        empty = [item for item in sys.argv[1:] if (CONF / item.partition("=")[0]).is_dir()]
        return f"{', '.join(empty)}: a group needs a name; the choices are in --help", 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"failed: {place}{error.strerror or error}", 1
    first_line = (str(error).splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first_line} (debug=true shows where)", 1


def _composition_problem(error: BaseException) -> str:
    """Hydra's complaint in a sentence, with the nearest key that exists."""
    text = str(error)
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        *parents, wrong = override[1].split(".")
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            choices = [item for item in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w/]+", item)]
            groups = [item for item in choices if (CONF / item.split("=")[0]).is_dir()]
            node = hydra.compose("config", overrides=groups)
        for parent in parents:
            node = node.get(parent) if isinstance(node, DictConfig) else None
        keys = sorted(str(key) for key in node) if isinstance(node, DictConfig) else []
        keys = [key for key in keys if key != "_target_"]
        near = difflib.get_close_matches(wrong, keys, 1)
        hint = f"did you mean {'.'.join([*parents, near[0]])}? " if near else ""
        return f"{override[1]}: there is no such setting; {hint}allowed here: {', '.join(keys) or 'nothing'}"
    option = re.search(
        r"Could not find '([\w/]+)/(\w+)'\s+Available options in '[\w/]+':\s+(.*?)\s+Config search", text, re.S
    )
    if option:
        names = option[3].split()
        near = difflib.get_close_matches(option[2], names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{option[1]}={option[2]}: there is no such choice; {hint}allowed here: {', '.join(names)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines).replace("\t", " ")


def _quiet_libraries() -> None:
    """Our own lines on the terminal, from other libraries only errors."""
    import transformers

    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(Discreet("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[terminal])
    logging.getLogger("cluscomp").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def show(outcome: Outcome) -> None:
    """Print a run's table if anything was measured, what the models made of the prompt, and where everything lies."""
    from cluscomp.tables import legend, stage_table, task_table

    records = [outcome.record]
    for table in (stage_table(records), task_table(records)) if outcome.record.scores else ():
        if len(table):
            print(f"\n{table.drop(columns='run').to_markdown(index=False, disable_numparse=True)}\n")
            print("".join(f"{line}\n" for line in legend(table)), end="")
    for name, sample in outcome.samples.items():
        print(f"{name}: {sample!r}")
    if outcome.checkpoint is not None:
        print(f"checkpoint  {outcome.checkpoint}")
    print(f"record      {outcome.path}")


if __name__ == "__main__":
    main()
