"""W&B and TensorBoard, read back by their own readers; progress lines; peak memory against a known allocation."""

import json
import logging
import mmap
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pipelines import pipeline, small_run

from cluscomp.errors import InputError
from cluscomp.process import Progress, peak_memory, reset_peak_memory
from cluscomp.runs.trackers import NoTracker, WandbTracker
from cluscomp.store.records import read

TRACK = """
import sys
from pathlib import Path
from cluscomp.runs.trackers import WandbTracker
tracker = WandbTracker(project="tests", entity=None, mode="offline", timeout=30.0)
session = tracker.begin("run-1", {"seed": 3, "method": {"bits": 2.5}}, Path(sys.argv[1]))
session.log("cluster", {"relative_error": 0.25, "seconds": 1.5})
session.log("evaluate_cluster", {"perplexity": 12.5})
session.log("cluster_blocks", {"relative_error": 0.5}, 1)
session.end({"cluster/perplexity": 12.5, "linear_bits_per_weight": 2.5}, {"tables.md": "| a |", "record.json": "{}"})
"""


SHOWN = """
import logging, sys
logging.basicConfig(stream=sys.stdout)
logging.getLogger("cluscomp").setLevel(logging.INFO)
"""


def inspect(forks, folder: Path, *options: str) -> str:
    """What `wandb leet inspect` finds in the one offline run below a folder."""
    (run,) = folder.glob("wandb/offline-run-*")
    done = forks.run("leet", "inspect", *options, "--json", str(run), script="from wandb.cli.cli import cli; cli()")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_offline_holds_config_stages_and_summary(forks, tmp_path):
    pytest.importorskip("wandb")
    done = forks.run(str(tmp_path), script=TRACK, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(inspect(forks, tmp_path, "--summary"))
    summary = found["summary"]
    assert summary["cluster/perplexity"] == 12.5 and summary["linear_bits_per_weight"] == 2.5
    assert "2.5" in json.dumps(found["config"]) and "seed" in json.dumps(found["config"])
    history = inspect(forks, tmp_path)
    assert "cluster/relative_error" in history and "evaluate_cluster/perplexity" in history
    (kept,) = [one["artifact"] for one in map(json.loads, history.splitlines()) if one["type"] == "artifact"]
    assert {one["path"] for one in kept["manifest"]["contents"]} == {"record.json", "tables.md"}


def test_wandbs_own_variables_win_and_the_rest_is_as_its_users_expect(tmp_path, monkeypatch):
    """What is handed to W&B, which is switched off here."""
    wandb = pytest.importorskip("wandb")
    handed = []
    monkeypatch.setattr(wandb, "init", lambda init=wandb.init, **more: handed.append(more) or init(**more))
    tracker = WandbTracker(project="tests", entity=None, mode="offline", timeout=30.0)
    choices = {"method": "gptq", "model": "tiny", "data": "pydoc", "tracker": "wandb"}
    config = {"name": "sweep", "order": ["cluster", "recover"], "choices": choices}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("MODE", "PROJECT", "ENTITY", "RUN_ID", "RUN_GROUP", "JOB_TYPE", "TAGS"):
        monkeypatch.setenv(name, "another's")  # without WANDB_, so of some other program
    session = tracker.begin("run-1", config, tmp_path)
    session.log("cluster_blocks", {"relative_error": 0.5}, 1)
    session.end({}, {})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "night")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    tracker.begin("run-1", config | {"order": []}, tmp_path).end({}, {})
    first, second = handed
    assert first["mode"] == second["mode"] == "disabled" and not list(tmp_path.glob("wandb/*run*"))
    assert (first["project"], first["group"], first["job_type"]) == ("tests", "sweep", "recover")
    assert first["tags"] == ["gptq", "tiny", "pydoc"] and first["id"] == first["name"] == "run-1"
    assert first["entity"] is None
    assert (second["project"], second["group"], second["job_type"]) == ("mine", "night", "evaluate")
    assert second["tags"] == ["a", "b"] and (second["id"], second["name"]) == ("agents", "run-1")
    monkeypatch.setenv("WANDB_MODE", "maybe")
    with pytest.raises(InputError, match="WANDB_MODE=maybe"):
        tracker.begin("run-1", config, tmp_path)


def test_a_run_that_fails_is_not_marked_as_finished(forks, tmp_path):
    """Without end() W&B must see the failure: the exit code in its summary is not 0."""
    pytest.importorskip("wandb")
    failing = TRACK.replace("session.end(", "sys.exit(1)\nsession.end(")
    forks.run(str(tmp_path), script=failing, folder=tmp_path)
    found = json.loads(inspect(forks, tmp_path, "--summary"))
    assert found["exit_code"] == 1


SWEEP = [
    "-m", "model=tiny", "data=text", "method=cluscomp_data_free", "method.vector_dim=4", "method.iterations=2",
    "order=[cluster,block_finetune]", "block_finetune=quick", "block_finetune.length=32", "block_finetune.samples=4",
    "evaluate.context=32", "evaluate.limit=2", "device=cpu", "tracker=wandb",
]  # fmt: skip


def swept(place: Path) -> list[str]:
    """The sweep's arguments for an empty folder."""
    text = place / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says that foxes jumped {7 * i} times." for i in range(60)))
    return [*SWEEP, f"data.file={text}", f"outputs={place / 'outputs'}", f"cache={place / 'cache'}"]


@pytest.mark.slow
def test_what_wandb_holds_of_a_sweep_equals_its_records(forks, tmp_path):
    pytest.importorskip("wandb")
    done = forks.run(*swept(tmp_path), "method.codebook_size=8,16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in tmp_path.glob("outputs/run-*/record.json")]
    assert len(folders) == 2
    for folder in folders:
        record = read(folder / "record.json")
        lines = [json.loads(line) for line in inspect(forks, folder).splitlines()]
        (run,) = [line["run"] for line in lines if line["type"] == "run"]
        config = {key: value for key, value in run["config"]["update"].items() if key != "_wandb"}
        chosen = {group: one["yaml"] for group, one in record.choices.items()}
        assert (
            config == record.config | {"choices": chosen, "commit": record.run["commit"]}
            and run["run_id"] == run["display_name"] == record.run["name"]
        )
        items = [line["history"]["item"] for line in lines if line["type"] == "history"]
        history = [{key: value for key, value in item.items() if key[0] != "_"} for item in items]
        blocks = [row for row in history if "cluster_blocks/step" in row]
        errors = list(record.stages["cluster"]["found"]["relative_error_by_layer"].values())
        assert [row["cluster_blocks/step"] for row in blocks] == [1, 2, 3]
        assert min(errors) < blocks[0]["cluster_blocks/relative_error"] < max(errors)
        losses = [row["block_finetune_blocks/after"] for row in history if "block_finetune_blocks/after" in row]
        assert losses == [found["after"] for found in record.stages["block_finetune"]["found"]["blocks"]]
        history = [row for row in history if not any("_blocks/" in key or "_epochs/" in key for key in row)]
        expected = []
        for step, seconds in record.run["seconds"].items():  # in the order of the run
            if step.startswith("evaluate "):
                rows = [row for row in record.scores if f"evaluate {row.after}" == step]
                name = step.replace(" ", "_")
                expected.append({f"{name}/{row.dataset}/{row.metric}": row.value for row in rows})
            else:
                stage = record.stages[step]
                numbers = stage["found"] | stage["size"] | {"seconds": seconds}
                numbers |= {"peak_ram": record.machine["peak_ram"][step]}
                expected.append({f"{step}/{k}": v for k, v in numbers.items() if isinstance(v, int | float)})
        assert history == expected and len(history) == 5
        summary = json.loads(inspect(forks, folder, "--summary"))["summary"]
        for row in record.scores:
            assert summary[f"{row.after}/{row.dataset}/{row.metric}"] == row.value


class Refusal(BaseHTTPRequestHandler):
    """A server that knows nobody."""

    def do_POST(self) -> None:
        body = b'{"errors": [{"message": "user is not logged in", "code": 401}]}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unusable():
    """Addresses of W&Bs that cannot be used, and the keys for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    refusing = f"http://127.0.0.1:{server.server_port}"
    yield {"no server": (nobody, "0" * 40), "a wrong key": (refusing, "0" * 40), "no key": (refusing, "")}
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_server_that_cannot_be_used_costs_one_warning_and_no_result(forks, tmp_path, unusable):
    """All at once, for they wait."""
    pytest.importorskip("wandb")
    begun = {}
    for name, (base, key) in unusable.items():
        (place := tmp_path / name).mkdir()
        more = ["tracker.mode=online", "tracker.timeout=4.0", "method.codebook_size=8"]
        variables = {"WANDB_BASE_URL": base, "WANDB_API_KEY": key, "HOME": str(place)}
        given = {"errors": place / "errors", "folder": place, "variables": variables}
        begun[name] = forks.start(place / "log", *swept(place), *more, **given)
    for name, pid in begun.items():
        place, (_, key) = tmp_path / name, unusable[name]
        code, out, errors = forks.wait(pid), (place / "log").read_text(), (place / "errors").read_text()
        assert code == 0, errors
        (path,) = place.glob("outputs/run-*/record.json")
        assert read(path).run["status"] == "finished" and len(read(path).scores) > 0
        assert errors.count("is tracked no further") == 1 and "Traceback" not in errors, name
        assert not key or key not in errors + out


def test_without_a_key_that_works_wandb_is_offline_and_says_so(forks, tmp_path):
    pytest.importorskip("wandb")
    script = TRACK.replace('"offline", timeout=30.0', '"auto", timeout=5.0').replace("import sys\n", SHOWN)
    begun = {}
    for name, key in {"no key": "", "a wrong key": "0" * 40}.items():
        (place := tmp_path / name).mkdir()
        variables = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key, "HOME": str(place)}
        given = {"errors": place / "errors", "folder": place, "variables": variables}
        begun[name] = forks.start(place / "log", str(place), script=script, **given)
    for name, pid in begun.items():
        place = tmp_path / name
        assert forks.wait(pid) == 0, (place / "errors").read_text()
        out = (place / "log").read_text()
        assert out.count("W&B  offline") == 1 and out.count("cannot be reached") == (name == "a wrong key")
        assert json.loads(inspect(forks, place, "--summary"))["summary"]["cluster/perplexity"] == 12.5


@pytest.mark.slow
def test_a_recipe_that_no_table_takes_with_one_seed_ends_well_with_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    settings = ["method=cluscomp_paper", "method.vector_dim=4", "method.codebook_size=16", "tracker=tensorboard"]
    run = [one for one in small_run(tmp_path) if not one.startswith(("method=", "bits="))]
    made = pipeline(*run, *settings, "evaluate.limit=2")
    assert read(made.path).scores == made.record.scores and list(made.path.parent.glob("tensorboard/*"))


def test_what_tensorboard_shows_equals_the_record(forks, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = forks.run(*swept(tmp_path), "tracker=tensorboard", "method.codebook_size=8", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("outputs/run-*/record.json")
    record, events = read(path), reading.EventAccumulator(str(path.parent / "tensorboard")).Reload()
    losses = [(point.step, point.value) for point in events.Scalars("block_finetune_blocks/after")]
    found = record.stages["block_finetune"]["found"]["blocks"]
    assert losses == [(i, pytest.approx(block["after"])) for i, block in enumerate(found, 1)]
    for row in record.scores:
        (point,) = events.Scalars(f"evaluate_{row.after}/{row.dataset}/{row.metric}")
        assert point.value == pytest.approx(row.value)


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="mode"):
        WandbTracker(project="tests", entity=None, mode="sometimes", timeout=1.0)


def test_no_tracker_writes_nothing(tmp_path):
    session = NoTracker().begin("run-1", {}, tmp_path)
    session.log("cluster", {"relative_error": 0.25})
    session.end({"a": 1.0}, {})
    assert list(tmp_path.iterdir()) == []


def test_progress_lines_count_blocks_and_say_what_is_left(caplog):
    caplog.set_level(logging.INFO, "cluscomp")
    progress = Progress("cluster", 12)
    progress.skip(10)
    progress.step("relative error 0.5000")
    progress.start -= 90  # as if the step had taken a minute and a half
    progress.step("relative error 0.2500")
    skipped, first, second = (record.getMessage() for record in caplog.records)
    assert skipped == "cluster  10 of 12 blocks were done before"
    assert first.startswith("cluster  block 11/12  relative error 0.5000    0.0 s  ")
    assert first.endswith("GiB  0:00 left")
    assert second.startswith("cluster  block 12/12  relative error 0.2500") and second.endswith("0:00 left")


def test_progress_estimates_from_this_run_alone(caplog):
    caplog.set_level(logging.INFO, "cluscomp")
    progress = Progress("cluster", 14)
    progress.skip(10)
    progress.start -= 90
    progress.step("x")
    assert caplog.records[-1].getMessage().endswith("4:30 left")  # three more at 90 s, whatever the skipped ten took


def test_peak_memory_sees_an_allocation_and_forgets_it():
    reset_peak_memory()
    before = peak_memory()
    with mmap.mmap(-1, 200 << 20) as block:  # fresh pages: an allocator might reuse what it holds
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        after = peak_memory()
    assert 190 << 20 < after - before < 260 << 20
    reset_peak_memory()
    assert peak_memory() < after - (100 << 20)


def test_curves_of_a_stage_that_was_finished_before_are_drawn_again(tmp_path, caplog):
    """And the tables stand beside them."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    caplog.set_level(logging.INFO, "cluscomp")
    settings = small_run(tmp_path)
    pipeline(*settings, "evaluate.limit=2")
    path = pipeline(*settings, "evaluate.limit=3", "tracker=tensorboard").path
    events = reading.EventAccumulator(str(path.parent / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("cluster_blocks/relative_error")] == [1, 2, 3]
    assert "tables.md/text_summary" in events.Tags()["tensors"]
