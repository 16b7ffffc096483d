"""Where task files define names: in small folders of our own, and in those of the installed lm-eval."""

from pathlib import Path

import pytest
from test_tasks import PLAIN

from cluscomp.errors import InputError
from cluscomp.score.places import named
from cluscomp.score.tasks import Tasks, _manager

lm_eval = pytest.importorskip("lm_eval")
GIVEN = Path(lm_eval.__file__).resolve().parent / "tasks"
FILES = {
    "one/a.yaml": "# a comment\ntask: a\n'tag':\n- shared\n- \"own\"  # another\n"
    "doc_to_text: 'tag: none'\nmetric_list:\n  - acc\n",
    "one/b.yml": 'tag: [shared, in_line]\n"task": "b"\nuntil:\n  - stop\n',
    "two/template": "tag: from_template\noutput_type: multiple_choice\n",
    "two/c.yaml": "include: template\ntask: c\n",
    "three/d.yaml": "include:\n  - ../two/c.yaml\ntask: d\ntag: shared\n",
    "four/all.yaml": "group: all\ngroup_alias: every\ntask:\n  - task: a\n    num_fewshot: 5\n  - inner\n"
    "  - group: said\n    task:\n      - c\n      - task: only_listed\naggregate_metric_list:\n  - metric: acc\n",
    "five/inner.yaml": "group: inner\ntask:\n- shared\n- all\n",
    "top.yaml": "task: top\n",
}


def index(*names: str, **changes):
    return _manager(Tasks(**PLAIN | {"names": [*names]} | changes)).task_index


def folders(found: dict) -> set[str]:
    """The folders of lm-eval that were read."""
    return {entry.yaml_path.relative_to(GIVEN).parts[0] for entry in found.values() if entry.yaml_path}


def test_a_name_is_in_all_folders_that_define_it_and_a_group_needs_its_members(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = named(tmp_path)
    assert found.names == {
        "a", "b", "c", "d", "top", "shared", "own", "in_line", "from_template", "all", "inner", "said", "only_listed",
    }  # fmt: skip

    def needed(*names: str) -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in found.needed(names)}

    assert needed("a") == {"one"} and needed("top") == {"."} and needed("only_listed") == {"four"}
    assert needed("shared") == {"one", "three"} and needed("in_line", "own") == {"one"}
    assert needed("from_template") == {"two", "three"}  # of three by what it includes
    assert needed("all") == needed("inner") == {"one", "two", "three", "four", "five"}


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "piqa", "winogrande", "mmlu", "gsm8k", "lambada_openai"])
def test_of_usual_names_one_folder_is_read(name):
    found = index(name)
    assert name in found and len(folders(found)) == 1


@pytest.mark.parametrize(
    ("name", "folder"), [("arc_challenge", "arc"), ("anli_r1", "anli"), ("bbh_cot_fewshot", "bbh")]
)
def test_a_task_that_groups_of_others_list_is_found_where_it_is_defined(name, folder):
    found = index(name)
    assert name in found and folders(found) == {folder}


def test_a_tag_has_its_tasks_in_all_folders():
    found = index("math_word_problems")
    places = {found[name].yaml_path.relative_to(GIVEN).parts[0] for name in found["math_word_problems"].tags}
    assert places >= {"gsm8k", "hendrycks_math", "mathqa", "minerva_math"} and places == folders(found)


def test_groups_are_read_with_what_they_list(tmp_path):
    members = {"arc_challenge", "hellaswag", "truthfulqa", "mmlu", "winogrande", "gsm8k"}
    found = index("openllm")
    assert found.keys() > members and found["truthfulqa"].tags >= {"truthfulqa_mc2"}
    (tmp_path / "own.yaml").write_text("group: own\ntask:\n  - arc_easy\n  - task: piqa\n    num_fewshot: 1\n")
    own = index("own", include_path=str(tmp_path))
    assert own.keys() > {"own", "arc_easy", "piqa"}
    (tmp_path / "own.yaml").write_text("task: piqa\ntag: math_word_problems\n")  # its own, in place of lm-eval's
    own = index("piqa", "math_word_problems", include_path=str(tmp_path))
    assert own["piqa"].yaml_path == tmp_path / "own.yaml" and own["math_word_problems"].tags == {"piqa"}


def test_an_unknown_name_is_told_with_its_neighbours():
    with pytest.raises(InputError, match=r"no task, group or tag 'arc_challange'; near: arc_challenge"):
        index("arc_challange")
