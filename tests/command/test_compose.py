"""Choices: the yaml of each group, and the settings that differ from it, however they were given."""

import io
import json
from dataclasses import fields
from pathlib import Path

import hydra
import pytest
from pipelines import composed
from pydantic import ValidationError

from cluscomp.command.compose import CONF, told_in_a_sentence
from cluscomp.command.convert import converted
from cluscomp.command.records import parsed
from cluscomp.errors import InputError
from cluscomp.runs.experiment import Experiment, config_of

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_in_a_yaml_is_no_difference():
    """Bits, data and seed reach the groups by interpolation; the values of presets are those of their whole chain."""
    found = composed("bits=3", "seed=7", "method=autoround", "evaluate=gptq_2048", "experiment=sharing").choices
    assert {name: one["yaml"] for name, one in found.items()}.items() >= {
        "method": "autoround", "block_finetune": "autoround_quick", "evaluate": "gptq_2048", "experiment": "sharing",
        "data@evaluate.texts.c4": "c4", "cluster": "default",
    }.items()  # fmt: skip
    assert not any(one["differs"] for one in found.values())  # evaluate's is the yaml that was said, all of it
    assert composed("bits=3", "experiment=sharing").choices["evaluate"] == {"yaml": "quick", "differs": {}}
    of_experiment = composed("bits=3", "experiment=zeroshot", "evaluate=gptq_2048").choices["evaluate"]
    assert of_experiment == {"yaml": "gptq_2048", "differs": {"after": ["original", "block_finetune"]}}


def test_what_differs_from_a_yaml_is_told_as_it_is_resolved():
    given = ["bits=3", "method.floor=0.5", "cluster.samples=${seed}", "seed=9", "+data@evaluate.texts.more=ptb"]
    found = composed(*given, "evaluate.texts.more.test=other").choices
    assert found["method"] == {"yaml": "cluscomp", "differs": {"floor": 0.5}}
    assert found["cluster"]["differs"] == {"samples": 9} and found["evaluate"]["differs"] == {}
    assert found["data@evaluate.texts.more"] == {"yaml": "ptb", "differs": {"test": "other"}}


def test_a_run_that_compresses_nothing_has_no_method():
    assert not {"method", "cluster"} & composed("order=[evaluate]").choices.keys()


FINETUNED = ["experiment=demo", "method=cluscomp", "order=[cluster,block_finetune]", "block_finetune=quick"]


@pytest.mark.parametrize("given", [["method=gptq"], ["method=omniquant"], [*FINETUNED, "method.floor=0.5"]])
def test_a_record_of_schema_1_is_converted_to_what_a_run_writes(given):
    """Of choices those of stages that are run; of others the yaml that differs least need not be the one chosen."""
    experiment = composed("bits=3", *given)

    def without_classes(value):
        if not isinstance(value, dict):
            return value
        return {key: without_classes(part) for key, part in value.items() if key != "class"}

    config = config_of(experiment)
    for later in ("allocation", "beside"):  # which records of schema 1 do not have
        del config["stages"]["cluster"][later]
    old = {"schema": 1, "run": {}, "config": without_classes(config), "scores": []}
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        found = converted(json.loads(json.dumps(old)))
    assert list(found) == ["schema", "run", "config", "choices", "scores"] and found["schema"] == 2
    assert found["config"] == config
    same = {"method", *experiment.order}
    for later in ("allocation", "beside"):
        found["choices"]["cluster"]["differs"].pop(later, None)
    assert {name: found["choices"][name] for name in same} == {name: experiment.choices[name] for name in same}


def test_a_name_cannot_leave_its_folder():
    """Runs, and the commands that take NAME."""
    made = composed("bits=3", f"seed={2**64 - 1}", "name=v1.5_a-b")
    values = {field.name: getattr(made, field.name) for field in fields(made)}
    for name in (".", "..", "...", ".hidden", "a/b", "a\n", "", "a" * 300):
        with pytest.raises(ValidationError, match="name"):
            Experiment(**values | {"name": name})
        with pytest.raises(InputError, match="NAME is the `name` of an experiment"):
            parsed("table", [name if len(name) < 9 else ".."], {})


def test_a_terminal_that_lacks_a_letter_shows_it_otherwise(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    with told_in_a_sentence():
        print("caf\u00e9 \u6771")
    shown.flush()
    assert shown.buffer.getvalue() == b"caf\\xe9 \\u6771\n"
