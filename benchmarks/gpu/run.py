"""Rows in, results out, whatever happens to the process that measures them: it is started anew without what broke it.

A worker that says nothing for ``SILENT_S`` hangs in a kernel and is ended. The contender that was tried last is left
out of the second attempt at its row.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.gpu.rows import Row

SILENT_S = 100.0  # Inductor may tune for long without a word
ATTEMPTS = 3


class WorkerGone(Exception):
    """The worker ended, hung, or lost its device."""


class Worker(Protocol):
    said: dict[str, Any]  # its environment

    def measure(self, row: Row, skip: tuple[str, ...], inductor_s: float, until: float) -> dict[str, Any]:
        """Raises WorkerGone, and TimeoutError where ``until`` comes first."""
        ...

    def end(self) -> None: ...

    @property
    def last(self) -> str:
        """What it tried last."""
        ...


@dataclass
class ProcessWorker:
    """A worker in a process of its own, spawned, because CUDA does not survive a fork."""

    configs: int
    said: dict[str, Any] = field(default_factory=dict)
    last: str = ""

    def __post_init__(self) -> None:
        from benchmarks.gpu.worker import serve

        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.configs))
        self._process.start()
        theirs.close()
        self.said = self._answer("ready", time.monotonic() + 2 * SILENT_S)

    def measure(self, row: Row, skip: tuple[str, ...], inductor_s: float, until: float) -> dict[str, Any]:
        self._pipe.send((asdict(row), skip, inductor_s))
        found: dict[str, Any] = self._answer("row", until)
        return found

    def _answer(self, wanted: str, until: float) -> Any:
        while True:
            patience = min(SILENT_S, until - time.monotonic())
            if not self._pipe.poll(max(patience, 0.0)):
                if time.monotonic() >= until:
                    raise TimeoutError
                raise WorkerGone(f"nothing happened for {SILENT_S:.0f} s")
            try:
                kind, said = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise WorkerGone("its process ended") from None
            if kind == wanted:
                return said
            if kind in ("lost", "failed"):
                raise WorkerGone(said)
            self.last = said

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join(10)


def run(
    rows: Sequence[Row],
    start: Callable[[], Worker],
    until: float,
    inductor_s: float,
    on_start: Callable[[dict[str, Any]], None] = lambda said: None,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[dict[str, Any]]:
    """Measure row after row; none is started after ``until``. Raises WorkerGone where no worker starts at all."""
    worker: Worker | None = None
    try:
        for row in rows:
            skip: list[str] = []
            lost: list[str] = []
            while True:
                if now() >= until:
                    return
                try:
                    if worker is None:
                        worker = start()
                        on_start(worker.said)
                    found = worker.measure(row, tuple(skip), inductor_s, until)
                except TimeoutError:
                    return
                except WorkerGone as gone:
                    if worker is None:
                        raise
                    lost.append(f"{worker.last}: {gone}")
                    skip.append(worker.last)
                    worker.end()
                    worker = None
                    if len(lost) < ATTEMPTS:
                        continue
                    found = {"name": row.name, **asdict(row), "failed": "; ".join(lost)}
                inductor_s = found.pop("inductor_left", inductor_s)
                found["notes"] = [*lost, *found.get("notes", ())]
                yield found
                break
    finally:
        if worker is not None:
            worker.end()
