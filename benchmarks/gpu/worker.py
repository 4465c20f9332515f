"""The process that measures rows, and its end of a pipe. A kernel that takes the device down takes only this with it.

In: (row, names to skip, seconds for Inductor). Out: ("ready", environment), ("step", what is tried) any number of
times, then ("row", dict) or ("lost", sentence), after which the process ends.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.rows import Row

COPY_BYTES = 1 << 30


def serve(pipe: Connection, configs: int) -> None:
    """Measure what comes until None or the end of the pipe."""
    from benchmarks.gpu.measure import DeviceLost, measure

    try:
        session, said = open_session(configs)
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    session.step = lambda what: pipe.send(("step", what))
    pipe.send(("ready", said))
    while (asked := receive(pipe)) is not None:
        row, skip, inductor_s = asked
        session.inductor_s = inductor_s
        try:
            found = measure(Row(**row), session, skip)
        except DeviceLost as error:
            pipe.send(("lost", str(error)))
            os._exit(1)  # nothing of CUDA can be freed any more
        except Exception as error:  # no row ends the run
            found = {"name": Row(**row).name, **row, "failed": f"{type(error).__name__}: {error}"}
        pipe.send(("row", found | {"inductor_left": session.inductor_s}))


def receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # whoever asked is gone
        return None


def open_session(configs: int) -> tuple[Any, dict[str, Any]]:
    """The GPU, with the rate of a copy measured now, and what a reader has to know about this run."""
    import torch

    from benchmarks.gpu.measure import Session
    from sparsec.targets import cuda

    target = cuda.device()
    if target is None:
        raise RuntimeError("this machine has no NVIDIA GPU that torch can use")
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is fp32
    device = torch.device("cuda", torch.cuda.current_device())
    rate = copy_rate(device)
    session = Session(device, target.l2_bytes, target.capability, rate, configs=configs)
    return session, environment(target, rate)


def copy_rate(device: Any) -> float:
    """Bytes read and written a second by a copy from device memory to device memory."""
    import torch

    from sparsec.timing_gpu import GraphTimer

    source = torch.empty(COPY_BYTES // 4, device=device).normal_()
    target = torch.empty_like(source)
    once = GraphTimer().prepare(lambda i: target.copy_(source), 4)
    return 2 * COPY_BYTES / sorted(once() for _ in range(9))[4]


def environment(target: Any, rate: float) -> dict[str, Any]:
    import torch

    import sparsec
    from sparsec.codegen.cuda.cslt import doubtful, unavailable
    from sparsec.codegen.triton import need_triton

    library = torch.backends.cusparselt
    usable = not unavailable()
    return {
        "gpu": target.model, "sms": target.cores, "l2_bytes": target.l2_bytes, "isa": target.isa,
        "copy_tb_s": round(rate / 1e12, 3), "sm_clock": clock(), "sparsec": sparsec.__version__,
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": need_triton(),
        "cusparselt": library.version() if usable else None,
        "cusparselt_note": doubtful() if usable else unavailable(), "python": platform.python_version(),
    }  # fmt: skip


def clock() -> str:
    """What the driver's tool says of the clock and power, right after work; empty where it is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return ""
