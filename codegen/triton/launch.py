"""One kernel call as data: the same record runs on a GPU, runs in Triton's interpreter, and compiles without a GPU.

A family turns (pack, x, bias, y) into ``Launch`` records; ``run`` executes them in order. Nothing here imports torch's
CUDA side, and triton is imported by the families alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Loop:
    """What the main loop of a kernel does in one trip, to count its instructions by.

    ``unit``: "weight" (a position of the dense matrix) or "nonzero". ``count``: units that one program handles a trip.
    ``budget``: lane instructions that a unit may take so that an H200 still waits for memory. ``repeats``: how many
    programs handle each unit, where the rows of x are split over programs. ``reason``: why a count above the budget
    cannot be helped or does no harm, in a sentence; a test asks for one.
    """

    unit: str
    count: int
    budget: float
    repeats: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Launch:
    """``args``: tensors, ints and floats by parameter name; ``constants``: the ``tl.constexpr`` ones.

    ``loop``: of the kernel that reads the weight; None for reductions and other small work.
    ``expects``: text that its SASS must hold on targets whose ``native`` has the key, such as {"mma.sp": "HMMA.SP"}.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    loop: Loop | None = None
    expects: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def identity(self) -> str:
        """Equal for launches that compile to the same code, however many rows or programs they are for."""
        return f"{self.name} {signature(self)} {sorted(self.constants.items())} {self.warps} {self.stages} {self.loop}"

    def run(self) -> None:
        """Execute, on the current device."""
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)


class Runs(Protocol):
    """A launch, of whatever language."""

    @property
    def name(self) -> str: ...

    @property
    def run(self) -> Callable[[], object]: ...


def run(launches: Sequence[Runs]) -> None:
    """Execute in order."""
    for launch in launches:
        launch.run()


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """Types of all parameters in their order, and which of them Triton may take for multiples of 16.

    As at run time: tensors are aligned (torch allocates by 512 bytes), integers where their value says so.
    """
    names = list(launch.kernel.arg_names)
    types: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        if name in launch.constants:
            types[name] = "constexpr"
            continue
        value = launch.args[name]
        if isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
        elif isinstance(value, bool) or value is None:
            raise TypeError(f"parameter {name} of {launch.name} must be a constant: it is {value!r}")
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, attributes
