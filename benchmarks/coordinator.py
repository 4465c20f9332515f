"""Hands out rounds: all engines prepare a case, then take turns; whoever is not on turn is stopped by a signal.

Stopping (not only waiting) matters: thread pools spin for a while after their work and would slow the next engine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.cases import Case
from benchmarks.engines import ENGINES, Engine
from sparsec.timing import Ratio, Samples, speedup

MIN_ROUND_S = 2e-3  # shorter calls are repeated inside a round
WARM_BELOW_S = 0.05  # calls longer than this get no warming call before the timed one
SLOW = 6.0  # an engine that is this many times slower than the best sits out after the first rounds
FEWEST = 5
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 3e-2}
# Of quantised cases, against x as it is: errors are shown, not judged. A value that falls on the other side of a
# threshold moves all blocks after it, as one on the other side of a step of x does.
LARGEST_ROUNDED = {"linear": 0.1, "stack": 0.3, "thresholds": 0.3}


@dataclass
class Result:
    """One case: what each engine took, and ratios that are formed round by round."""

    case: Case
    samples: dict[str, Samples]
    paths: dict[str, str]
    declined: dict[str, str]
    errors: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0

    @property
    def best_dense(self) -> str:
        dense = {name: s for name, s in self.samples.items() if ENGINES[name].dense}
        return min(dense, key=lambda name: dense[name].median, default="")

    def ratio_to(self, name: str) -> Ratio | None:
        """Time of ``name`` over time of sparsec; None where one of them did not run."""
        if name not in self.samples or "sparsec" not in self.samples:
            return None
        base, ours = self.samples[name], self.samples["sparsec"]
        rounds = min(len(base.seconds), len(ours.seconds))
        return speedup(Samples(base.seconds[:rounds]), Samples(ours.seconds[:rounds]))

    @property
    def verdict(self) -> str:
        """``reached``, ``within noise`` (the interval holds the target) or ``below``; empty without a target.

        Targets of layers are set against the best dense peer, those of the encoder against Inductor.
        """
        ratio = self.ratio_to("inductor" if self.case.kind == "encoder" else self.best_dense)
        if ratio is None or self.case.target is None:
            return ""
        if ratio.value >= self.case.target:
            return "reached"
        return "within noise" if ratio.high >= self.case.target else "below"

    def to_dict(self) -> dict[str, Any]:
        best, inductor = self.ratio_to(self.best_dense), self.ratio_to("inductor")
        return {
            "case": self.case.to_dict(),
            "name": self.case.name,
            "best_dense": self.best_dense,
            "ratio": asdict(best) if best else None,
            "ratio_to_inductor": asdict(inductor) if inductor else None,
            "target": self.case.target,
            "verdict": self.verdict,
            "byte_limit": self.limit,
            "engines": {
                name: {
                    "us": {"min": 1e6 * s.best, "q20": 1e6 * s.quantile(0.2), "median": 1e6 * s.median}
                    | {"q80": 1e6 * s.quantile(0.8), "q95": 1e6 * s.quantile(0.95)},
                    "rounds": len(s.seconds),
                    "path": self.paths[name],
                    "error": self.errors[name],
                }
                for name, s in self.samples.items()
            },
            "declined": self.declined,
        }


class Remote:
    """A worker process. It runs only inside ``ask``; between calls it is stopped."""

    def __init__(self, engine: Engine, threads: int, log: IO[str], env: dict[str, str]) -> None:
        self.name = engine.name
        here = Path(__file__).resolve().parent.parent
        variables = {**os.environ, **dict(engine.env), **env, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", engine.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=here,
            env=variables,
        )
        self._stop()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Wake the worker, wait for its answer, stop it again. A worker that died answers ``declined``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"declined": f"its process ended (exit code {self.process.wait()}); see the log of the engine"}
        self._stop()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _stop(self) -> None:
        """Returns when the process stands still: the signal alone takes a while on a busy machine."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.process.returncode = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def workers(names: Sequence[str], threads: int, folder: Path, tune: str = "") -> Iterator[dict[str, Remote]]:
    """A stopped worker for each engine; all are killed at the end."""
    env = {"BENCH_TUNE": tune} if tune else {}
    with contextlib.ExitStack() as stack:
        found = {}
        for name in names:
            log = stack.enter_context(open(folder / f"{name}.log", "a", encoding="utf-8"))
            found[name] = Remote(ENGINES[name], threads, log, env)
            stack.callback(found[name].close)
        yield found


def measure(
    case: Case, remotes: dict[str, Remote], rounds: int, budget_s: float, step: Callable[[str], None]
) -> Result:
    """Prepare everywhere, then interleave. Stops after ``rounds`` or ``budget_s``, never before five rounds."""
    paths, declined, once, errors = {}, {}, {}, {}
    limit = 0.0
    for name in [name for name in remotes if not ENGINES[name].takes(case)]:
        remotes[name].ask(op="release")  # what it built for another case would only take memory
    remotes = {name: remote for name, remote in remotes.items() if ENGINES[name].takes(case)}
    for name, remote in remotes.items():
        step(f"{case.name}: {name} prepares")
        reply = remote.ask(op="prepare", case=case.to_dict())
        if "declined" in reply:
            declined[name] = reply["declined"]
        elif not reply["error"] <= largest_error(case):
            declined[name] = f"wrong answer: differs from fp32 torch by {reply['error']:.2g}"
        else:
            paths[name], once[name], errors[name] = reply["path"], reply["once"], reply["error"]
            limit = max(limit, reply["limit"])
    step(f"{case.name}: timing")
    samples = interleave(remotes, once, rounds, budget_s)
    return Result(case, samples, paths, declined, errors, limit)


def largest_error(case: Case) -> float:
    return LARGEST_ROUNDED[case.kind] if case.quantised or case.kind == "thresholds" else LARGEST_ERROR[case.dtype]


def interleave(remotes: dict[str, Remote], once: dict[str, float], rounds: int, budget_s: float) -> dict[str, Samples]:
    """Round robin with a rotating start. ``once``: seconds of one call, to choose repeats."""
    names = list(once)
    repeats = {name: max(1, math.ceil(MIN_ROUND_S / max(once[name], 1e-7))) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for i in range(rounds):
        if i >= FEWEST and time.perf_counter() - started > budget_s:
            break
        best = min((min(t) for t in taken.values() if t), default=0.0)
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            if i >= FEWEST and min(taken[name]) > SLOW * best:
                continue
            reply = remotes[name].ask(op="round", repeats=repeats[name], warm=once[name] < WARM_BELOW_S)
            if "declined" in reply:
                raise RuntimeError(f"{name} broke while it was timed: {reply['declined']}")
            taken[name].append(reply["seconds"])
    return {name: Samples(tuple(t)) for name, t in taken.items()}
