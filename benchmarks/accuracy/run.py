"""Measures row by row into a file of JSON lines, and goes on where the last run stopped.

A line is one row of one draw of one model, or the facts of a model. Lines with another fixture key or recipe are of
another benchmark and stay unread; of lines for the same the last counts. A line that a kill cut short is no line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sparsec
from benchmarks.accuracy.fixture import Fixture, trigram
from benchmarks.accuracy.grid import Row
from sparsec.cache import digest
from sparsec.errors import SparsecError

Line = dict[str, Any]
Step = Callable[[int, int, str], None]
MOST_TEXT = 4_000_000  # characters that the trigram model reads


@dataclass(frozen=True)
class Task:
    """A row to measure; ``order``: what comes first tells most a second."""

    fixture: Fixture
    row: Row
    draw: int

    @property
    def order(self) -> tuple[int, int, int, int]:
        other = self.fixture.kind != "causal"
        return self.row.tier + 2 * self.draw + 3 * other, self.row.tier, int(other), self.draw

    @property
    def key(self) -> tuple[str, str, int, str]:
        about = digest(json.dumps([self.row.recipe, self.row.samples, self.row.planted], sort_keys=True))[:12]
        return self.fixture.key, self.row.name, self.draw, about


def tasks(fixtures: Sequence[Fixture], rows: Sequence[Row], draws: int) -> list[Task]:
    """All of them, most telling first; rows that no draw changes are measured once."""
    made = [
        Task(fixture, row, draw)
        for fixture in fixtures
        for row in rows
        if (fixture.suits or fixture.kind) in row.models
        for draw in range(draws if row.draws_differ else 1)
    ]
    return sorted(made, key=lambda task: task.order)


def key_of(line: Line) -> tuple[str, str, int, str]:
    return line["fixture"], line["row"], line["draw"], line["recipe"]


def read(path: Path) -> list[Line]:
    """Every whole line; what a kill left half-written is not one."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "fixture" in line:
            found.append(line)
    return found


def append(path: Path, line: Line) -> None:
    """One more line, on a line of its own even after one that was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def done(lines: Sequence[Line]) -> dict[tuple[str, str, int, str], Line]:
    """What was measured, the last of each."""
    return {key_of(line): line for line in lines if "costs" in line}


def run(
    wanted: Sequence[Task], path: Path, *, minutes: float = 0.0, fresh: bool = False, step: Step | None = None
) -> Iterator[Line]:
    """Measure what ``path`` does not hold, until ``minutes`` are over (0: to the end); gives each new line.

    ``fresh``: also what other sources of sparsec than these measured. A row that sparsec refuses is a line with its
    sentence, and is tried again by the next run.
    """
    lines = read(path)
    there = {key for key, line in done(lines).items() if not fresh or line["code"] == code()}
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    known = {line["fixture"] for line in lines if "facts" in line}
    todo = [task for task in wanted if task.key not in there]
    for number, task in enumerate(todo):
        if time.monotonic() >= until:
            return
        if step:
            step(number, len(todo), f"{task.fixture.name} {task.row.name}, draw {task.draw}")
        if task.fixture.key not in known:
            known.add(task.fixture.key)
            append(path, facts(task.fixture))
        line = measured(task)
        append(path, line)
        yield line


def measured(task: Task) -> Line:
    key, row, draw, recipe = task.key
    line: Line = {
        "fixture": key,
        "model": task.fixture.name,
        "row": row,
        "draw": draw,
        "recipe": recipe,
        "code": code(),
    }
    try:
        return {**line, **task.fixture.measure(task.row, task.draw)}
    except SparsecError as error:
        return {**line, "error": str(error)}


def facts(fixture: Fixture) -> Line:
    """What the gates and the report need to know of a model besides its rows."""
    said: Line = {
        "model": fixture.name,
        "kind": fixture.kind,
        "calib": fixture.calib.name,
        "test": fixture.test.name,
        "windows": len(fixture.windows),
        "tokens": sum(map(len, fixture.windows)),
        "seqlen": fixture.settings.seqlen,
        "samples": fixture.settings.samples,
        "weights": fixture.loaded.weights,
    }
    if isinstance(fixture.dense, list):
        text = fixture.calib.read_text(encoding="utf-8")[:MOST_TEXT]
        ids = fixture.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        said["dense"] = round(statistics.fmean(fixture.dense), 5)
        said["trigram"] = round(trigram(ids, fixture.windows, fixture.loaded.config.vocab_size), 5)
    return {"fixture": fixture.key, "model": fixture.name, "facts": said}


@cache
def code() -> str:
    """A hash of the sources that can change a mask or a weight."""
    root = Path(sparsec.__file__).parent
    files = [f for folder in ("masks", "reparam", "gates") for f in sorted((root / "passes" / folder).rglob("*.py"))]
    files += [
        root / f"{name}.py"
        for name in ("blockwise", "calibration", "gradients", "sparsify_run", "sparsify_gates", "stages")
    ]
    return digest(*(file.read_bytes() for file in files if file.is_file()))[:12]
