"""Every family, format, loop and its first configurations on the GPU, against float64 over ragged shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.codegen import triton
from tests.gpu import device_checks
from tests.gpu.device_checks import registered

LIMIT_S = 300
SCRIPT = Path(device_checks.__file__)


@dataclass(frozen=True)
class Said:
    """What the process of one format said. ``broke``: how it ended before it was done."""

    found: list[dict[str, Any]]
    broke: str = ""


def checked(kind: str, name: str) -> Said:
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), kind, name], capture_output=True, text=True, timeout=LIMIT_S, check=False,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        text, ending = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as error:
        text, ending = (error.stdout or b"").decode(), [f"it took more than {LIMIT_S} s"]
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    running = lines[-1].get("starts") if lines else None
    return Said([line["found"] for line in lines if "found" in line], f"{ending[0]} at {running}" if ending else "")


@pytest.fixture(scope="session")
def outcomes() -> Iterator[dict[tuple[str, str], Future[Said]]]:
    """All formats at once, as many processes as half the cores, eight at most: kernels compile on the CPU."""
    with ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 2) // 2))) as pool:
        yield {(kind, name): pool.submit(checked, kind, name) for kind, name in registered(on_device=True)}


@pytest.mark.parametrize(("kind", "name"), registered(on_device=True))
def test_every_kernel_gives_the_reference(
    kind: str, name: str, outcomes: dict[tuple[str, str], Future[Said]], gpu_table: list[tuple[str, ...]]
) -> None:
    said = outcomes[kind, name].result()
    loops = dict.fromkeys(found["case"]["loop"] for found in said.found)
    for loop in loops:
        mine = [found for found in said.found if found["case"]["loop"] == loop]
        bad = [found for found in mine if found["failure"]]
        refused = next((found["refused"] for found in mine if found["refused"]), "")
        verdict = bad[0]["failure"] if bad else f"refused: {refused}" if refused else "right"
        same = "yes" if all(found["same_bits"] for found in mine) else "NO"
        worst = max(found["worst"] for found in mine)
        gpu_table.append((kind, name, loop, str(len(mine)), f"{worst:.2g}", same, verdict[:80]))
    if said.broke:
        gpu_table.append((kind, name, "", str(len(said.found)), "", "", said.broke[:80]))
    assert not said.broke
    assert said.found
    assert not [found for found in said.found if found["failure"]]
    refused = [found["refused"] for found in said.found]
    if all(refused) and kind in triton.OTHERS:
        pytest.skip(refused[0])
    assert not all(refused)


@pytest.mark.parametrize(("kind", "name"), registered(on_device=True))
def test_two_runs_agree_bit_by_bit(kind: str, name: str, outcomes: dict[tuple[str, str], Future[Said]]) -> None:
    if kind == "cslt":
        pytest.skip("its algorithms promise nothing of the order of sums")
    different = [found["case"] for found in outcomes[kind, name].result().found if not found["same_bits"]]
    assert not different


@pytest.mark.parametrize(("kind", "name"), registered(on_device=True))
def test_a_kernel_runs_on_the_device_of_its_tensors(kind: str, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    case = next(device_checks.cases(kind, name))
    major, minor = torch.cuda.get_device_capability(1)
    with torch.cuda.device(1):
        found = device_checks.check(case, "cuda:1", 10 * major + minor)
    assert found is not None
    assert not found.failure
