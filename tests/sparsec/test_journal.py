"""The journal: what was saved comes back bit for bit, and a kill at any moment leaves whole blocks or none."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsec.errors import JournalFailed, OtherRun, SparsecWarning
from sparsec.journal import STATE, Journal

ABOUT = {"model": "m1", "recipe": "r1", "data": "d1"}


def opened(folder: Path, key: str = "k", **about: str) -> Journal:
    return Journal(folder, key, {**ABOUT, **about})


def block(seed: int, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"q.weight": torch.randn(size, size, generator=generator), "q.keep": torch.rand(size, size) > 0.5}


def the_block_file(folder: Path, index: int) -> Path:
    return next((folder / STATE).glob(f"{index:04d}-*"))


def test_a_saved_block_comes_back_bit_for_bit_in_a_new_journal(tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    tensors = {
        "plain": x,
        "transposed": x.t(),
        "slice": x[1:3],
        "half": x.bfloat16(),
        "double": x.double(),
        "mask": x > 0,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "specials": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45]),
    }
    rows = [{"name": "q", "error": 0.1 + 0.2, "shape": (6, 8), "notes": []}]
    opened(tmp_path).save(0, "model.layers.0", tensors, rows)
    again = opened(tmp_path).load(0)
    assert again is not None
    assert set(again[0]) == set(tensors)
    for name, tensor in tensors.items():
        found = again[0][name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype), name
        assert bits(found) == bits(tensor), name
    assert again[1] == [{"name": "q", "error": 0.1 + 0.2, "shape": [6, 8], "notes": []}]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_a_journal_reads_its_own_rows_as_a_later_process_would(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.save(0, "a", block(0), [{"shape": (1, 2)}])
    mine, later = journal.load(0), opened(tmp_path).load(0)
    assert mine is not None
    assert later is not None
    assert mine[1] == later[1] == [{"shape": [1, 2]}]


def test_what_was_not_saved_is_none_and_done_lists_the_rest_in_order(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for index in (10, 2):
        journal.save(index, f"model.layers.{index}", block(index), [])
    assert journal.load(0) is None
    assert list(opened(tmp_path).done.items()) == [(2, "model.layers.2"), (10, "model.layers.10")]


def test_saving_a_block_again_replaces_it(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.save(0, "a", block(0), [])
    journal.save(0, "a", block(1), [{"second": True}])
    found = opened(tmp_path).load(0)
    assert found is not None
    assert torch.equal(found[0]["q.weight"], block(1)["q.weight"])
    assert found[1] == [{"second": True}]


def test_finish_removes_the_state_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    journal = opened(tmp_path)
    journal.save(0, "a", block(0), [])
    assert Journal.held(tmp_path)
    journal.finish()
    journal.finish()
    assert not Journal.held(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("damage", ["a byte is flipped", "the end is cut off", "the file is gone", "it is empty"])
def test_a_damaged_block_is_as_if_it_was_not_there(tmp_path: Path, damage: str) -> None:
    journal = opened(tmp_path)
    for index in range(2):
        journal.save(index, f"b{index}", block(index), [])
    path = the_block_file(tmp_path, 0)
    data = bytearray(path.read_bytes())
    if damage == "a byte is flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "the file is gone":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if "cut" in damage else b"")
    again = opened(tmp_path)
    with pytest.warns(SparsecWarning, match="this block is done again"):
        assert again.load(0) is None
    assert again.load(1) is not None
    again.save(0, "b0", block(0), [])
    assert opened(tmp_path).load(0) is not None


def test_a_damaged_index_starts_the_run_over_with_a_warning(tmp_path: Path) -> None:
    opened(tmp_path).save(0, "a", block(0), [])
    index = tmp_path / STATE / "journal.json"
    index.write_bytes(index.read_bytes()[:-10])
    with pytest.warns(SparsecWarning, match="is damaged"):
        again = opened(tmp_path, key="another")
    assert again.load(0) is None
    assert again.done == {}


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({"model": "m2"}, "another model\\."),
        ({"recipe": "r2"}, "another recipe\\."),
        ({"data": "d2"}, "another data\\."),
        ({"model": "m2", "recipe": "r2"}, "another model and recipe\\."),
        ({"model": "m2", "recipe": "r2", "data": "d2"}, "another model, recipe and data\\."),
        ({"torch": "2.0"}, "another torch\\."),
        ({}, "another run\\."),
    ],
)
def test_another_run_in_the_folder_is_refused_by_what_differs(
    tmp_path: Path, changed: dict[str, str], differs: str
) -> None:
    opened(tmp_path).save(0, "a", block(0), [])
    with pytest.raises(OtherRun, match=differs):
        opened(tmp_path, "k2", **changed)
    assert opened(tmp_path).load(0) is not None


def test_a_full_disk_is_one_sentence_and_keeps_what_was_finished(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.save(0, "first", block(0, 16), [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file that grows beyond it fails as on a full disk
    try:
        with pytest.raises(JournalFailed, match="before second is kept") as caught:
            journal.save(1, "second", block(1, 256), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / STATE).iterdir()) == ["0000-first.safetensors", "journal.json"]
    assert opened(tmp_path).load(0) is not None
    assert opened(tmp_path).load(1) is None
    journal.save(1, "second", block(1, 256), [])
    assert opened(tmp_path).done == {0: "first", 1: "second"}


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(JournalFailed, match="could not be written"):
        opened(tmp_path / "out")


# Saves blocks for ever. Stops for good at the given rename: each save renames a block's file, then the index.
CHILD = """
import os, sys, time
import torch
from sparsec import cache
from sparsec.journal import Journal

folder, stop_at, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
real, count = os.replace, 0

def stopping(source, target):
    global count
    count += 1
    if count == stop_at and when == "before":
        print("now", flush=True); time.sleep(600)
    real(source, target)
    if count == stop_at and when == "after":
        print("now", flush=True); time.sleep(600)

cache.os.replace = stopping
journal = Journal(folder, "k", {"model": "m1", "recipe": "r1", "data": "d1"})
for index in range(1000):
    generator = torch.Generator().manual_seed(index)
    journal.save(index, f"b{index}", {"w": torch.randn(300, 300, generator=generator)}, [{"index": index}])
    print(index, flush=True)
"""


def started(folder: Path, stop_at: int, when: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(stop_at), when],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def killed_at(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdout is not None
    try:
        assert any(said.strip() == line for said in child.stdout)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL


def whole(journal: Journal, index: int) -> bool:
    """Whether a block is there, with the very bits that were saved. Warnings are errors in these tests."""
    found = journal.load(index)
    if found is None:
        return False
    expected = torch.randn(300, 300, generator=torch.Generator().manual_seed(index))
    assert torch.equal(found[0]["w"], expected)
    assert found[1] == [{"index": index}]
    return True


@pytest.mark.parametrize(
    ("stop_at", "when", "there"),
    [
        (6, "before", [0, 1]),  # block 2's file is written, not renamed
        (6, "after", [0, 1]),  # block 2's file is there, the index does not know it
        (7, "before", [0, 1]),  # the index that knows block 2 is written, not renamed
        (7, "after", [0, 1, 2]),
    ],
)
def test_a_kill_in_the_middle_of_save_leaves_whole_blocks_or_none(
    tmp_path: Path, stop_at: int, when: str, there: list[int]
) -> None:
    killed_at(started(tmp_path, stop_at, when), "now")  # rename 1 is the empty index's
    journal = opened(tmp_path)
    assert [index for index in range(4) if whole(journal, index)] == there
    journal.save(2, "b2", {"w": torch.randn(300, 300, generator=torch.Generator().manual_seed(2))}, [{"index": 2}])
    assert [index for index in range(4) if whole(opened(tmp_path), index)] == [0, 1, 2]
    assert not list((tmp_path / STATE).glob(".*"))
    journal.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_whole_blocks(tmp_path: Path) -> None:
    child = started(tmp_path, -1, "never")
    assert child.stdout is not None
    assert next(iter(child.stdout)).strip() == "0"
    time.sleep(0.1)  # somewhere in one of the next saves
    child.send_signal(signal.SIGKILL)
    said = [0, *(int(line) for line in child.stdout.read().split())]
    child.wait(timeout=60)
    child.stdout.close()
    journal = opened(tmp_path)
    assert set(said) <= set(journal.done)
    assert all(whole(journal, index) for index in journal.done)
