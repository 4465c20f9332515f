"""The ops of a graph on a GPU: sparsec_gpu::linear, ::linear_needed and ::conv2d, and the table that serves them.

As on the CPU (``op.cpp``) a call receives the original weight and finds what was decided for it by identity: the
TensorImpl (held weakly), data pointer and version. It is Python, since a kernel launch is; a CUDA graph records the
launches and runs them without it, and packs are made when the graph is compiled, before anything is recorded. No C++
compiler is needed on a GPU machine.

Kernels run on the device of the weight, where its pack lies. What cannot be served runs dense, by the same
``F.linear`` that Inductor would have called.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import library as torch_library
from torch.nn import functional as F

from sparsec.codegen import reference
from sparsec.codegen.spec import Packed
from sparsec.codegen.triton import family_of
from sparsec.codegen.triton.contract import Call, Family
from sparsec.codegen.triton.launch import run
from sparsec.errors import SparsecWarning
from sparsec.passes.decide.gates import MOST_ROWS
from sparsec.runtime import library as on_cpu
from sparsec.runtime.gpu_watch import Watch

_libraries: list[torch_library.Library] = []  # a Library unregisters its ops when it is collected


Config: TypeAlias = "tuple[tuple[str, int], ...]"  # tile sizes, splits and warps; see ``codegen/triton/contract``
MANY = 1024  # numbers of rows that one route remembers what to do with


@dataclass(frozen=True)
class Route:
    """One range of M and what serves it.

    ``config``: for every M. ``tuned``: (M, config) as measured, M ascending; a config serves the M up to its own that
    no smaller one does. Beyond them, and where nothing is said, the family's best guess for each M. ``watch``: of a
    route that reads a part of the weight, in calls that leave little of it.
    """

    m_lo: int
    m_hi: int
    packed: Packed
    loop: str
    config: Config | None = None
    tuned: tuple[tuple[int, Config], ...] = ()
    watch: Watch | None = field(default=None, compare=False)
    known: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict, repr=False, compare=False)

    def config_at(self, m: int) -> Config | None:
        return self.config or next((config for most, config in self.tuned if m <= most), None)

    @functools.cached_property
    def family(self) -> Family:
        return family_of(self.packed.format, self.loop)

    def config_for(self, m: int, capability: int) -> dict[str, int]:
        """What a call with ``m`` rows takes, worked out once for each m, since a guess takes 4 to 170 us."""
        found = self.known.get((m, capability))
        if found is None:
            said = self.config_at(m)
            found = dict(said or self.family.configs(self.packed, self.loop, m, capability)[0])
            if len(self.known) >= MANY:
                self.known.clear()
            self.known[m, capability] = found
        return found


@dataclass
class Entry:
    """What was decided for one weight under one plan. No route: dense."""

    weight: weakref.ref[torch.Tensor]
    data: int
    version: int
    transposed: bool
    act: str
    capability: int
    verify: bool
    retry_after: int = 0
    routes: tuple[Route, ...] = ()
    uses: int = 0

    def fresh(self, weight: torch.Tensor) -> bool:
        if self.weight() is not weight:  # another tensor at the address of one that died
            return False
        if self.retry_after:
            return self.uses < self.retry_after
        return self.data == weight.data_ptr() and self.version == version_of(weight)

    def at(self, m: int) -> Route | None:
        """What reads all of the weight, for calls with ``m`` rows."""
        return next((r for r in self.routes if r.watch is None and r.m_lo <= m <= r.m_hi), None)

    def part(self, m: int, loop: str) -> Route | None:
        """What reads a part of it: by ``skip`` or ``select``."""
        return next((r for r in self.routes if r.watch and r.loop == loop and r.m_lo <= m <= r.m_hi), None)


def version_of(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else int(weight._version)


@dataclass
class Table:
    """Entries by the address of the TensorImpl and the plan; every method may be called from several threads."""

    entries: dict[tuple[int, str], Entry] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def find(self, weight: torch.Tensor, plan: str) -> Entry | None:
        entry = self.entries.get((weight._cdata, plan))
        return entry if entry is not None and entry.fresh(weight) else None

    def put(self, weight: torch.Tensor, plan: str, entry: Entry) -> None:
        with self.lock:
            self.entries[weight._cdata, plan] = entry

    def uses(self, impl: int, plan: str) -> int:
        entry = self.entries.get((impl, plan))
        return entry.uses if entry else -1

    def forget(self, impl: int) -> int:
        """Drop what is known about the weight at this address; returns how often it was used."""
        with self.lock:
            gone = [key for key in self.entries if key[0] == impl]
            return sum(self.entries.pop(key).uses for key in gone)


TABLE = Table()


def entry_of(weight: torch.Tensor, plan_text: str) -> Entry:
    found = TABLE.find(weight, plan_text)
    if found is None:
        from sparsec.runtime.store import STORE

        STORE.resolve(weight, plan_text)
        found = TABLE.find(weight, plan_text)
    assert found is not None, "the resolver installed nothing for this weight; please report this"
    found.uses += 1
    return found


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: str) -> torch.Tensor:
    """act(x @ W.T + bias): x [..., K] -> [..., N], of x's dtype, on the weight's device."""
    entry = entry_of(weight, plan)
    rows, matrix = _operands(entry, x, weight)
    return _rows(entry, rows, matrix, bias, plan, weight).view(*x.shape[:-1], matrix.shape[0])


def linear_needed(
    x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, needed: torch.Tensor, plan: str
) -> torch.Tensor:
    """As ``linear`` of the one weight in ``parts``, where nobody reads the outputs that meet only zeros of ``needed``
    [..., N], whose leading sizes may be those of x or fewer; there y holds 0, or what ``linear`` gives."""
    (weight,) = parts
    entry = entry_of(weight, plan)
    rows, matrix = _operands(entry, x, weight)
    n = matrix.shape[0]
    if needed.shape[-1] != n:
        raise RuntimeError(
            f"sparsec_gpu::linear_needed: there are {n} outputs, and what says which are needed is {needed.shape}"
        )
    known = needed.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bool)
    wanted = (needed if known else needed.ne(0)).reshape(-1, n).contiguous()
    part = entry.part(len(rows), "select") if 0 < len(wanted) <= MOST_ROWS and matrix.stride(1) == 1 else None
    y = _part(entry, part, rows, bias, weight=matrix, needed=wanted) if part else None
    if y is None:
        y = _rows(entry, rows, matrix, bias, plan, weight)
    elif entry.verify:
        from sparsec.runtime.store import STORE

        read = (wanted != 0).any(0)
        STORE.verify(rows, matrix[read], None if bias is None else bias[read], y[:, read], plan)
    return y.view(*x.shape[:-1], n)


def _operands(entry: Entry, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as [M, K], the weight as [N, K]."""
    matrix = weight.t() if entry.transposed else weight
    if x.shape[-1] != matrix.shape[1] or x.dtype != weight.dtype or x.device != weight.device:
        raise RuntimeError(
            f"sparsec_gpu::linear: x is {tuple(x.shape)} {x.dtype} on {x.device}, the weight {tuple(matrix.shape)} "
            f"{weight.dtype} on {weight.device}"
        )
    return x.reshape(-1, matrix.shape[1]), matrix


def conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: str) -> torch.Tensor:
    """x [B, C, H, W], weight [N, C, 1, 1] -> [B, N, H, W], in the memory format of x. Only 1x1, stride 1, unpadded."""
    entry = entry_of(weight, plan)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    b, c, h, w = x.shape
    if entry.at(b * h * w) is None:
        return reference.ACT[entry.act](F.conv2d(x, weight, bias)).contiguous(memory_format=layout)
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)
    y = _rows(entry, rows, weight.reshape(weight.shape[0], c), bias, plan, weight)
    return y.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def _rows(
    entry: Entry, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, plan: str, weight: torch.Tensor
) -> torch.Tensor:
    """x [M, K] @ matrix [N, K].T, which is ``weight`` as the plan reads it."""
    m = x.shape[0]
    part = entry.part(m, "skip") if m else None
    y = _part(entry, part, x, bias) if part else None
    route = entry.at(m) if m and y is None else None
    if route is not None:
        y = _tried(entry, route, x, lambda rows: product(route, rows, bias, entry.act, entry.capability))
    if y is None:
        y = reference.ACT[entry.act](F.linear(x, matrix, bias))
    if entry.verify:
        from sparsec.runtime.store import STORE

        STORE.verify(x, weight, bias, y, plan)
    return y


def _part(
    entry: Entry, route: Route, x: torch.Tensor, bias: torch.Tensor | None, **more: torch.Tensor
) -> torch.Tensor | None:
    """The product by a kernel that reads a part of the weight; None where recent calls left too much of it."""
    watch = route.watch
    assert watch is not None

    def call(x: torch.Tensor) -> torch.Tensor | None:
        if not watch.tries(x):
            return None
        count = watch.counter(x)
        asked = {} if count is None else {"count": count}
        y = product(route, x, bias, entry.act, entry.capability, **more, **asked)
        if count is not None:
            watch.note(count)
        return y

    return _tried(entry, route, x, call)


def _tried(
    entry: Entry, route: Route, x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor | None:
    """None where the kernel does not compile or launch: the answer must come out all the same."""
    try:
        return call(x if x.stride(1) == 1 else x.contiguous())
    except Exception as error:
        entry.routes = tuple(r for r in entry.routes if r is not route)
        _say(route, error)
        return None


def _say(route: Route, error: Exception) -> None:
    what = f"{route.packed.format} {route.loop} on a {route.packed.shape[0]}x{route.packed.shape[1]} weight"
    then = "it is not tried again" if route.watch else "these rows run dense from now on"
    reason = f"{what} failed ({type(error).__name__}: {error}), so {then}"
    warnings.warn(f"sparsec: {reason}", SparsecWarning, stacklevel=2)


def product(
    route: Route,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "",
    capability: int = 90,
    **more: torch.Tensor,
) -> torch.Tensor:
    """One kernel on one packed weight: x [M, K], unit inner stride -> [M, N]. Raises what Triton raises.

    ``more``: of the ``Call`` of kernels that read a part of the weight. Outside of Triton a call takes 14 to 22 us of
    Python, most of it the making of launches.
    """
    y = x.new_empty((x.shape[0], route.packed.shape[0]))
    config = route.config_for(x.shape[0], capability)
    with device_of(x):
        run(route.family.launches(route.packed, route.loop, Call(x, y, bias, act, capability, **more), config))
    return y


def device_of(x: torch.Tensor) -> Any:
    """A context in which kernels go to the device of ``x``: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def load() -> None:
    """Make ``torch.ops.sparsec_gpu.*`` exist in this process."""
    library: Any = torch_library.Library("sparsec_gpu", "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    one = "Tensor x, Tensor weight, Tensor? bias, str plan"
    ops = (
        ("linear", one, linear, on_cpu._linear_shape),
        ("linear_needed", "Tensor x, Tensor[] parts, Tensor? bias, Tensor needed, str plan", linear_needed,
         on_cpu._needed_shape),
        ("conv2d", one, conv2d, on_cpu._conv_shape),
    )  # fmt: skip
    for name, takes, function, shape in ops:
        library.define(f"{name}({takes}) -> Tensor", tags=tags)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch_library.register_fake(f"sparsec_gpu::{name}", shape, lib=library)
    _libraries.append(library)
