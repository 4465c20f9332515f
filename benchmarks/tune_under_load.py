"""``python -m benchmarks.tune_under_load``: does tuning on a noisy machine pick kernels that lose on a quiet one?

Weights near the break-even are tuned while other processes load every core, as a user's machine may be. Then the load
stops, and every way that was measured runs beside dense again, in many interleaved rounds. A pick is a loser where the
whole 95 % interval of that is below 1. For comparison: what a tuner that believes medians would have picked. Exit code
1 where a loser was picked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from sparsec import targets
from sparsec.cache import cache_dir
from sparsec.cli.common import console, progress
from sparsec.efforts import EFFORTS
from sparsec.errors import BadOptionValue, SparsecError
from sparsec.measure import rates_for
from sparsec.measure_calls import thread_count
from sparsec.measure_kernels import TORCH
from sparsec.options import Policy
from sparsec.passes.decide import decide
from sparsec.passes.profile.weights import profile
from sparsec.quiet import wait_for_cores
from sparsec.timing import Ratio, speedup
from sparsec.tune import measured_for, tuning
from sparsec.tune_cpu import CpuPoint

# A load ends with its pipe, so also when this process is killed.
UNTIL_KILLED = (
    "import os, sys, threading\nthreading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
)
LOADS = {
    "spin": "while True: pass",
    "memory": "import torch; torch.set_num_threads(1); a = torch.ones(2**26)\nwhile True: a.mul_(1.0)",
    "bursts": "import random, time\nwhile True:\n  end = time.time() + random.expovariate(20)\n"
    "  while time.time() < end: pass\n  time.sleep(random.expovariate(20))",
}
SHAPES = ((256, 256), (768, 768), (2048, 2048))
DENSITIES = (0.6, 0.4)  # most losers are where a format hardly pays
MS = (1, 64)


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    density: float

    def weight(self, dtype: str) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.n + round(100 * self.density))
        kept = torch.rand(self.n, self.k, generator=g) < self.density
        return (torch.randn(self.n, self.k, generator=g) * kept).to(TORCH[dtype])


@dataclass(frozen=True)
class Row:
    """One weight at one M: the pick under load and by medians alone (``dense`` or ``format/loop``), each with what it
    gives in quiet, and the best way in quiet. ``busy``: the machine was not quiet even then."""

    n: int
    k: int
    density: float
    m: int
    pick: str
    quiet: Ratio
    naive: str
    naive_quiet: Ratio
    best: str
    best_quiet: Ratio
    busy: bool

    @property
    def loser(self) -> bool:
        return self.quiet.high < 1


SAME = Ratio(1.0, 1.0, 1.0)


def main(
    load: Annotated[int, typer.Option(help="Processes of load; 0: one a core.")] = 0,
    kind: Annotated[str, typer.Option(help=f"What they do: {', '.join(LOADS)}.")] = "spin",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    quick: Annotated[bool, typer.Option("--quick", help="Two weights only: a minute or so.")] = False,
    threads: Annotated[int, typer.Option(help="Of torch; 0: its own choice.")] = 0,
    effort: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    patience: Annotated[float, typer.Option(help="Seconds to wait for a quiet machine, before each weight.")] = 20.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rows as JSON, too.")] = None,
) -> None:
    """Tune under load, measure in quiet, and count the losers."""
    for key, said, known in (("--kind", kind, list(LOADS)), ("--effort", effort, ["quick", "full"])):
        if said not in known:
            raise BadOptionValue(key=key, value=said, expected=f"it must be one of {', '.join(known)}")
    if dtype not in TORCH:
        raise BadOptionValue(key="--dtype", value=dtype, expected=f"it must be one of {', '.join(TORCH)}")
    cases = [Case(*shape, density) for shape in SHAPES for density in DENSITIES]
    cases = cases[2:4] if quick else cases
    with thread_count(threads or torch.get_num_threads()), tempfile.TemporaryDirectory() as folder:
        policy = Policy(tune=effort, cache_dir=folder)
        rows = measure(cases, dtype, policy, load or targets.resolve("auto").cores, LOADS[kind], patience)
    if output:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    console().print(text(rows), markup=False, soft_wrap=True)
    raise typer.Exit(int(any(row.loser for row in rows)))


def measure(cases: list[Case], dtype: str, policy: Policy, load: int, code: str, patience: float) -> list[Row]:
    """Tune all under load, then measure all in quiet."""
    picks: dict[Case, dict[int, tuple[str, str]]] = {}
    rows: list[Row] = []
    with progress("tune under load") as step:
        with loaded(load, code):
            for i, case in enumerate(cases):
                step(i, 2 * len(cases), f"{case} under load")
                picks[case] = picked(case, dtype, policy)
        for i, case in enumerate(cases):
            step(len(cases) + i, 2 * len(cases), f"{case} in quiet")
            wait_for_cores(torch.get_num_threads(), patience)
            rows += in_quiet(case, dtype, policy, picks[case])
    return rows


@contextmanager
def loaded(count: int, code: str) -> Iterator[None]:
    processes = [
        subprocess.Popen([sys.executable, "-c", UNTIL_KILLED + code], stdin=subprocess.PIPE) for _ in range(count)
    ]
    try:
        time.sleep(2.0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def picked(case: Case, dtype: str, policy: Policy) -> dict[int, tuple[str, str]]:
    """M -> what the tuner decides now, and what the largest median would."""
    weight, target = case.weight(dtype), targets.resolve("auto")
    fact = profile(weight)
    with tuning(1e9) as session:
        found = measured_for(weight, fact, dtype, target, policy, MS)
    rates = rates_for(fact, dtype, target, torch.get_num_threads(), cache_dir(policy.cache_dir))
    decision = decide(fact, dtype, target, rates, policy, found)
    picks = {}
    for m in MS:
        ran = decision.at(m)
        medians = {r.key.name: r.ratio.value for r in session.measured if r.key.m == m}
        naive = max(medians, key=lambda name: medians[name], default="dense")
        tuned = "dense" if ran.format == "dense" else f"{ran.format}/{ran.kernel}"
        picks[m] = tuned, naive if medians.get(naive, 0.0) > 1 else "dense"
    return picks


def in_quiet(case: Case, dtype: str, policy: Policy, picks: dict[int, tuple[str, str]]) -> Iterator[Row]:
    weight, target = case.weight(dtype), targets.resolve("auto")
    point = CpuPoint(weight, profile(weight), dtype, target, policy, torch.get_num_threads())
    effort = replace(EFFORTS["full"], candidates=10**6, hopeless=1e9, point_s=2.0)
    for m, (pick, naive) in picks.items():
        timed = point.measure(point.trials(m, effort), m, effort, 1e9)
        found = {key.name: speedup(timed.dense, ours) for key, ours in timed.ways.items()} if timed else {}
        found["dense"] = SAME
        best = max(found, key=lambda name: found[name].low)
        yield Row(
            case.n, case.k, case.density, m, pick, found[pick], naive, found[naive], best, found[best],
            timed is not None and timed.busy,
        )  # fmt: skip


def text(rows: list[Row]) -> str:
    lines = [
        f"{'shape':>10} {'zero':>5} {'M':>3}  {'picked under load':22} {'in quiet':22} {'medians alone':22} in quiet"
    ]
    for r in rows:
        note = "  LOSER" if r.loser else ""
        note += f"  missed {r.best} {r.best_quiet.value:.2f}x" if r.pick == "dense" and r.best_quiet.low > 1.05 else ""
        lines.append(
            f"{f'{r.n}x{r.k}':>10} {100 * (1 - r.density):>4.0f}% {r.m:>3}  {r.pick:22} {_said(r.quiet):22} "
            f"{r.naive:22} {r.naive_quiet.value:.2f}x{' LOSER' if r.naive_quiet.high < 1 else ''}{note}"
        )
    ours = sum(r.pick != "dense" for r in rows)
    naive, lost = sum(r.naive != "dense" for r in rows), sum(r.naive_quiet.high < 1 for r in rows)
    picked = f"picked under load: {ours} kernels, {sum(r.loser for r in rows)} losers"
    lines.append(f"{len(rows)} decisions; {picked}; medians alone: {naive} kernels, {lost} losers")
    if busy := sum(r.busy for r in rows):
        lines.append(f"the machine was not quiet: {busy} of {len(rows)} of the later measurements were disturbed, too")
    return "\n".join(lines)


def _said(ratio: Ratio) -> str:
    return "-" if ratio is SAME else f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparsecError as error:
        print(f"tune_under_load: {error}", file=sys.stderr)
        sys.exit(2)
