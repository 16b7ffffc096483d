"""What cells of a sweep tell of themselves: states, also of killed processes, the table, and what may be collected."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time

import pytest

from cluscomp.errors import InputError
from cluscomp.runs import cells
from cluscomp.runs.cells import announce, at_work, collect, folder_of, read_cell, read_cells, status_table
from cluscomp.store.files import is_held
from cluscomp.store.records import SCHEMA, Record, read, write


def told(error):
    return f"told: {error}", 1


def record(path, **run):
    """A record as a run leaves it, with nothing measured."""
    values = {"name": "bits", "key": path.parent.name, "commit": "abc", "dirty": False} | run
    write(Record(schema=SCHEMA, run=values, config={}, choices={}, scores=[], size={}, machine={}, stages={}), path)
    return path


def finish(outputs, name, number, **run):
    folder = folder_of(outputs, name, {"seed": number})
    again = (folder / "cell.json").exists() and read_cell(folder).state == "finished"
    with at_work(folder, [f"seed={number}", "bits=3"], told) as records:
        assert read_cell(folder).state == ("finished" if again else "running")  # looked at again, it stays finished
        records.append(record(outputs / f"run-{number}" / "record.json", **run))
    return folder


def hold(folder):
    with at_work(folder, ["seed=5", "bits=3"], told):
        time.sleep(600)


def test_a_cell_waits_works_and_finishes(tmp_path):
    folder = folder_of(tmp_path, "bits", {"seed": 1})
    announce(folder, ["seed=1"])
    assert read_cell(folder).state == "waiting"
    assert finish(tmp_path, "bits", 1) == folder
    cell = read_cell(folder)
    assert (cell.state, cell.problem, str(os.getpid()) in cell.place) == ("finished", "", True)
    assert (folder / cell.record).resolve() == (tmp_path / "run-1" / "record.json").resolve()
    announce(folder, ["seed=1"])
    assert read_cell(folder).state == "finished"


def test_a_record_that_cannot_be_read_leaves_the_table_as_it_is(tmp_path):
    """As of an earlier schema, or damaged: `status` tells of all cells; who needs the record says what is wrong."""
    for number in (1, 2):
        finish(tmp_path, "bits", number)
    (tmp_path / "run-1" / "record.json").write_text("{")
    table = status_table(read_cells(tmp_path, "bits"))
    assert list(table["state"]) == ["finished", "finished"]


def test_a_failure_is_told_in_a_sentence_with_all_of_it_in_the_log(tmp_path):
    folder = folder_of(tmp_path, "bits", {"seed": 1})
    with pytest.raises(ValueError, match="nothing"), at_work(folder, ["seed=1"], told):
        raise ValueError("nothing to do")
    assert (read_cell(folder).state, read_cell(folder).problem) == ("failed", "told: nothing to do")
    assert "Traceback" in (folder / "log.txt").read_text()
    with pytest.raises(KeyboardInterrupt), at_work(folder, ["seed=1"], told):
        raise KeyboardInterrupt
    assert read_cell(folder).state == "interrupted"


def test_a_job_that_is_queued_again_was_interrupted(tmp_path):
    """As submitit ends one that its scheduler warned."""
    folder = folder_of(tmp_path, "bits", {"seed": 1})
    with pytest.raises(SystemExit), at_work(folder, ["seed=1"], told):
        sys.exit(-1)
    assert (read_cell(folder).state, read_cell(folder).problem) == ("interrupted", "")


def test_of_a_killed_process_the_cell_says_it_was_interrupted(tmp_path):
    folder = folder_of(tmp_path, "bits", {"seed": 5})
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(folder,))
    process.start()
    while not (folder / "cell.json").exists():
        assert process.is_alive()
        time.sleep(0.05)
    assert read_cell(folder).state == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert read_cell(folder).state == "interrupted"
    finish(tmp_path, "bits", 5)
    assert read_cell(folder).state == "finished"


def test_a_cell_that_ends_while_it_is_looked_at_was_not_interrupted(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "bits", {"seed": 5})
    work = at_work(folder, ["seed=5"], told)
    work.__enter__().append(record(tmp_path / "run-5" / "record.json"))

    def held_until_now(place):
        work.__exit__(None, None, None)
        return is_held(place)

    monkeypatch.setattr(cells, "is_held", held_until_now)
    assert read_cell(folder).state == "finished"


def test_the_table_shows_what_differs_and_where_each_stands(tmp_path):
    finish(tmp_path, "bits", 2)
    folder = folder_of(tmp_path, "bits", {"seed": 1})
    with pytest.raises(ValueError, match="x"), at_work(folder, ["seed=1", "bits=3"], told):
        raise ValueError("x")
    waiting = folder_of(tmp_path, "bits", {"seed": 3})
    announce(waiting, ["seed=3", "bits=3"])
    (waiting / "log.txt").write_text("2026-01-01 10:00:00,123 cluster  block 3/30  0:10 left\n")
    table = status_table(read_cells(tmp_path, "bits"))
    assert table["cell"].tolist() == ["seed=1", "seed=2", "seed=3"]
    assert table["state"].tolist() == ["failed", "finished", "waiting"]
    assert table["where it stands"].tolist() == ["told: x", "", "cluster block 3/30 0:10 left"]
    with pytest.raises(InputError, match="there are: bits"):
        read_cells(tmp_path, "bit")


def test_only_whole_sweeps_from_clean_commits_are_collected(tmp_path):
    first, second = (finish(tmp_path, "bits", number) for number in (1, 2))
    paths = collect(read_cells(tmp_path, "bits"), tmp_path / "results" / "bits")
    assert sorted(path.name for path in paths) == ["run-1.json", "run-2.json"]
    assert [read(path).run["key"] for path in paths] == [path.stem for path in paths]
    finish(tmp_path, "bits", 2, commit=None, dirty=None)  # as a wheel leaves it
    assert len(collect(read_cells(tmp_path, "bits"), tmp_path / "wheel")) == 2
    finish(tmp_path, "bits", 2, dirty=True)
    with pytest.raises(InputError, match="changes that are in no commit"):
        collect(read_cells(tmp_path, "bits"), tmp_path / "again")
    announce(folder_of(tmp_path, "bits", {"seed": 3}), ["seed=3"])
    with pytest.raises(InputError, match=r"1 of 3 cells .* \(seed=3 is waiting\).*or remove \S+/cells/bits/"):
        collect(read_cells(tmp_path, "bits"), tmp_path / "again")
    assert not (tmp_path / "again").exists() and first != second


def test_log_lines_of_a_cell_are_on_disk_and_end_with_it(tmp_path):
    folder = folder_of(tmp_path, "bits", {"seed": 1})
    before = logging.getLogger("cluscomp").handlers.copy()
    with at_work(folder, ["seed=1"], told) as records:
        logging.getLogger("cluscomp").warning("hello")
        assert "hello" in (folder / "log.txt").read_text()
        records.append(record(tmp_path / "run-1" / "record.json"))
    assert logging.getLogger("cluscomp").handlers == before
    assert json.loads((folder / "cell.json").read_text())["state"] == "finished"
