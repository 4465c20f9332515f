"""``sparsec bench``: what to time comes in, records come out; the timing itself happens in ``bench_worker``.

Each model and thread count gets a fresh process, because a thread pool keeps what it was at its first use. Inside
one, the dense model (Inductor) and the sparse one are timed in turns, so the two rows of a test share every drift.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from sparsec import errors
from sparsec.errors import BadOptionValue, InputError, SparsecError

Step = Callable[[int, int, str], None]
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
MOST_VALUES = 1000  # of one flag; more is a typing mistake


@dataclass(frozen=True)
class BenchRequest:
    """What to time. ``prompts`` None: 512, or the model's context where that is shorter. 0 threads: torch's default."""

    models: tuple[str, ...]
    prompts: tuple[int, ...] | None = None
    gens: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (0,)
    rounds: int = 5
    warmup: bool = True
    dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchRecord:
    """One row: one engine on one test. Times in nanoseconds, rates in ``unit`` per second, as llama-bench has them.

    ``backend``: ``inductor`` (dense; ``eager`` where no compiler is found) or ``sparsec``. ``speedup``: times faster
    than the dense row of the same run, median over rounds with a 95 % interval. ``path``: layers by the format they
    ran. ``difference``: largest difference from the dense row's output, relative to its largest value.
    """

    sparsec_version: str
    build_commit: str
    torch_version: str
    cpu_info: str
    isa: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    zeros: float
    dtype: str
    backend: str
    n_threads: int
    n_batch: int
    n_prompt: int
    n_gen: int
    test: str
    unit: str
    test_time: str
    avg_ns: float
    stddev_ns: float
    avg_ts: float
    stddev_ts: float
    speedup: float
    speedup_low: float
    speedup_high: float
    path: str
    difference: float
    notes: str = ""
    samples_ns: tuple[float, ...] = ()
    samples_ts: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What a record of another run must share to be compared with this one."""
        return (self.model_filename, self.dtype, self.backend, self.n_threads, self.n_batch, self.test)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> BenchRecord:
        """Read what ``to_dict`` wrote, also by another version: unknown keys are dropped. Raises TypeError."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in said.items() if k in cls.__dataclass_fields__
        }
        return cls(**known)


def parse_numbers(flag: str, said: Sequence[str], least: int = 1) -> tuple[int, ...]:
    """Read ``1,4``, ``1-8``, ``1-16*2``, ``10-20+5``, each also repeated. Raises BadOptionValue."""
    found: list[int] = []
    for text in (part.strip() for value in said for part in value.split(",")):
        match = _RANGE.fullmatch(text)
        if not match:
            raise BadOptionValue(key=flag, value=text, expected="numbers are written 1,4 or 1-8 or 1-16*2 or 10-20+5")
        first, last = int(match[1]), int(match[2] or match[1])
        step, times = int(match[4] or 1), match[3] == "*"
        if last < first or step < 1 or (times and (step < 2 or first < 1)):
            raise BadOptionValue(key=flag, value=text, expected="a range must grow towards its end")
        while first <= last:
            found.append(first)
            if len(found) > MOST_VALUES:
                raise BadOptionValue(key=flag, value=text, expected=f"at most {MOST_VALUES} values are taken")
            first = first * step if times else first + step
    if any(number < least for number in found):
        raise BadOptionValue(key=flag, value=min(found), expected=f"it must be at least {least}")
    return tuple(dict.fromkeys(found))


def bench(request: BenchRequest, step: Step | None = None) -> Iterator[BenchRecord]:
    """Time every model, thread count and test; yields two records a test (dense, sparsec) as they are done.

    Raises ModelNotFound, BadModelFile, BadOptionValue and their kin, as the worker found them.
    """
    runs = [(model, threads) for model in request.models for threads in request.threads]
    for number, (model, threads) in enumerate(runs):
        job = {**asdict(replace(request, models=(model,), threads=(threads,))), "commit": commit()}
        shown = f"{model}, {threads} threads" if threads else model

        def tell(done: int, total: int, what: str, number: int = number, shown: str = shown) -> None:
            if step:
                step(number * total + done, len(runs) * total, f"{shown}: {what}")

        yield from _one_process(job, threads, tell)


def commit() -> str:
    """The commit of the sparsec that runs, or "" where it was installed from a wheel."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for one sample)."""
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


def _one_process(job: Mapping[str, Any], threads: int, step: Step) -> Iterator[BenchRecord]:
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "sparsec.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("SPARSEC_DEBUG") else log,
            text=True,
            env=environment,
        )
        assert worker.stdin
        assert worker.stdout
        try:
            worker.stdin.write(json.dumps(job))
            worker.stdin.close()
            yield from _events(worker.stdout, step)
            _check_end(worker.wait(), log)
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            worker.stdout.close()


def _events(lines: IO[str], step: Step) -> Iterator[BenchRecord]:
    for line in lines:
        event = json.loads(line)
        if event["event"] == "progress":
            step(event["done"], event["total"], event["what"])
        elif event["event"] == "record":
            yield BenchRecord.from_dict(event["record"])
        else:
            kind = getattr(errors, event["error"], None)
            if not isinstance(kind, type) or not issubclass(kind, SparsecError):
                raise RuntimeError(event["detail"])
            raise kind(**event["fields"])


def _check_end(code: int, log: IO[str]) -> None:
    if code == 0:
        return
    if code == -signal.SIGKILL:
        raise InputError(
            detail="the timing process was killed, most likely for memory; try a smaller -b or -p, or bf16"
        )
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    raise RuntimeError(f"the timing process ended with code {code}: {lines[-1] if lines else 'no message'}")
