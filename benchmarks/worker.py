"""One engine in one process. In: JSON lines on stdin. Out: JSON lines on what was stdout.

``{"op": "prepare", "case": {...}}`` -> path, error, seconds of one call, or ``declined``;
``{"op": "round", "repeats": r}`` -> seconds per layer; ``{"op": "release"}`` frees the case.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import warnings
from typing import Any

from benchmarks.cases import Case
from benchmarks.engines import ENGINES, Built, Declines


class Worker:
    """Holds what was built for the current case."""

    def __init__(self, name: str) -> None:
        self.engine = ENGINES[name]
        self.case: Case | None = None
        self.built: Built | None = None
        self.key = ""

    def prepare(self, case: Case) -> dict[str, Any]:
        key = case.dense_key if self.engine.dense else case.name
        if self.built is None or key != self.key:
            self.release()
            try:
                self.built, self.key = self.engine.build(case), key
            except Declines as refusal:
                return {"declined": str(refusal)}
        self.case = case
        self.built.call()
        before = time.perf_counter()
        self.built.call()
        once = time.perf_counter() - before
        return {"path": self.built.path, "error": self.built.error, "limit": self.built.limit, "once": once}

    def round(self, repeats: int, warm: bool) -> dict[str, Any]:
        assert self.built is not None
        assert self.case is not None
        call = self.built.call
        if warm:
            call()
        before = time.perf_counter()
        for _ in range(repeats):
            call()
        return {"seconds": (time.perf_counter() - before) / (repeats * self.case.calls)}

    def release(self) -> dict[str, Any]:
        self.built, self.key = None, ""
        gc.collect()
        return {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "prepare":
            return self.prepare(Case(**request["case"]))
        if request["op"] == "round":
            return self.round(request["repeats"], request["warm"])
        return self.release()


def die_with_parent() -> None:
    """A stopped worker would outlive its coordinator for ever (Linux only; elsewhere stdin ends it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.simplefilter("ignore")
    worker = Worker(sys.argv[1])
    with torch.no_grad():
        for line in sys.stdin:
            try:
                reply = worker.answer(json.loads(line))
            except Exception as error:  # an engine that breaks costs its column, not the run
                worker.release()
                text = str(error).strip().splitlines() or [type(error).__name__]
                reply = {"declined": f"{type(error).__name__}: {text[0]}"}
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
