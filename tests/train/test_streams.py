"""Streams come back as they were saved, from memory or disk, or not at all; files of other blocks go."""

import pytest
import torch

from cluscomp.train.streams import Streams

SHAPE = (3, 4, 5)
CPU = torch.device("cpu")


def saved(folder, place, dtype=torch.float32, index=2):
    """Two filled streams of a stage, and their hashes."""
    store = Streams(folder, place, SHAPE, dtype, CPU)
    filled = {}
    for number, name in enumerate(("student", "original")):
        filled[name] = store.new(name, index)
        filled[name].copy_(torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)))
    return store, filled, store.save(index, filled)


@pytest.mark.parametrize("first", ["memory", "disk"])
@pytest.mark.parametrize("second", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_one_process_saves_another_loads_wherever_its_streams_are(tmp_path, first, second, dtype):
    _, filled, hashes = saved(tmp_path, first, dtype)
    loaded = Streams(tmp_path, second, SHAPE, dtype, CPU).load(2, hashes)
    assert loaded.keys() == filled.keys()
    for name, stream in filled.items():
        assert torch.equal(loaded[name], stream) and loaded[name].dtype == dtype
        assert (tmp_path / f"{name}-002.stream").read_bytes() == stream.view(torch.uint8).numpy().tobytes()


def test_the_hashes_are_those_of_the_numbers_alone(tmp_path):
    for place in ("memory", "disk"):
        (tmp_path / place).mkdir()
    hashes = [saved(tmp_path / place, place)[2] for place in ("memory", "disk")]
    assert hashes[0] == hashes[1] and hashes[0]["student"] != hashes[0]["original"]


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1] + bytes([content[-1] ^ 128]),
        lambda content: bytes(len(content)),
        None,
    ],
)
def test_a_file_that_is_missing_cut_or_altered_is_told_and_nothing_is_loaded(tmp_path, place, damage, caplog):
    path = tmp_path / "original-002.stream"
    store, filled, hashes = saved(tmp_path, place)
    content = path.read_bytes()
    filled.clear()  # a mapped stream must not outlive its file's contents
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    assert store.load(2, hashes) is None
    assert "original-002.stream" in caplog.text


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_files_of_other_blocks_are_removed(tmp_path, place):
    store, _, _ = saved(tmp_path, place, index=2)
    saved(tmp_path, place, index=3)
    (tmp_path / "metrics.json").touch()
    store.drop(but=3)
    assert {path.name for path in tmp_path.iterdir()} == {"student-003.stream", "original-003.stream", "metrics.json"}


def test_a_stream_on_disk_takes_its_space_at_once(tmp_path):
    """A full disk is met when the stream is made, as an error, not later by a mapped page, as a signal."""
    store = Streams(tmp_path, "disk", SHAPE, torch.float32, CPU)
    store.new("student", 0)
    status = (tmp_path / "student-000.stream").stat()
    assert status.st_size == 3 * 4 * 5 * 4 and status.st_blocks > 0
    with pytest.raises(OSError, match=r"[Nn]o space|too large"):
        Streams(tmp_path, "disk", (2**20, 2**20, 2**10), torch.float32, CPU).new("student", 1)
