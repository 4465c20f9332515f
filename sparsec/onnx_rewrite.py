"""Linear layers of an ONNX model become operators of ours: a model in, the same model and a row for each layer out.

Which layers is decided as the backend decides, from facts of the weight and this machine's rates. An operator is a node
and a function of the same name (``codegen/onnx/bodies.py``), so the file also runs where our library is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsec.codegen import cpp
from sparsec.codegen.onnx import bodies
from sparsec.codegen.onnx.ops import DOMAIN, LAYOUT, Op, supported
from sparsec.codegen.spec import Packed
from sparsec.errors import PackError
from sparsec.facts import Decision, ValueFact, WeightFact
from sparsec.formats import Format, stored_types
from sparsec.measure import rates_for
from sparsec.onnx import FORMATS
from sparsec.onnx_inputs import rounded
from sparsec.onnx_int8 import WHY as int8_why
from sparsec.onnx_int8 import replace_int8
from sparsec.onnx_low_bit import OPSET as LOW_BIT_OPSET
from sparsec.onnx_low_bit import WHY as low_bit_why
from sparsec.onnx_low_bit import low_bit, replace_low_bit
from sparsec.onnx_sites import OnnxSite, initializer, shared, sites
from sparsec.options import Policy
from sparsec.passes.decide import decide
from sparsec.passes.profile.weights import profile
from sparsec.targets.base import Target

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]
NO_ZEROS_SKIPPED = "standard ONNX skips no zeros"
_ABOUT = 1.1  # times as long: what a file of a third the size is worth
_FUNCTIONS = 8  # the version of the format from which files may hold functions
TOO_MANY = "more values than the operator's standard ONNX counts; it stays dense"


@dataclass(frozen=True)
class OnnxLayer:
    """What became of a layer. ``decision``: the format's name, or ``dense``; ``bytes``: of its weight in the file."""

    name: str
    n: int
    k: int
    zeros: float
    decision: str
    reason: str
    bytes: int
    expected: float  # times faster than dense at the rows it was decided for, 1 for dense

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


def rewrite(
    model: ir.Model,
    target: Target,
    threads: int,
    cache: Path,
    min_speedup: float,
    portable: bool = False,
    low_bits: bool = True,
    rows: int = 1,
) -> list[OnnxLayer]:
    """Replace what is expected to gain ``min_speedup`` at ``rows`` of x, or (0) whatever has a zero. ``portable``: by
    standard ONNX. ``low_bits``: dense weights of 4 bits, too."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    packs: dict[str, list[ir.Value]] = {}
    machine = _Machine(target, threads, cache, min_speedup, portable, low_bits, max(rows, 1))
    layers = [_site(model, site, machine, packs) for site in list(sites(model.graph))]
    if packs:
        model.graph.opset_imports[DOMAIN] = 1
        model.ir_version = max(model.ir_version, _FUNCTIONS)
    RemoveUnusedNodesPass()(model)
    return layers


def operators(model: ir.Model) -> list[OnnxLayer]:
    """Layers that are operators of ours already."""
    found = []
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        n, k = (int(node.attributes[name].value) for name in ("n", "k"))
        held = [v.const_value for v in node.inputs[2:] if v is not None and v.const_value is not None]
        kept = _kept({(t.name or "").rpartition(".")[2]: t.numpy() for t in held}, n, k)
        name = (node.name or node.op_type).removesuffix(f"_{node.op_type}")
        why, size = "an operator of sparsec already", sum(t.nbytes for t in held)
        found.append(OnnxLayer(name, n, k, 1 - kept / (n * k), node.op_type, why, size, 1.0))
    return found


def _kept(pack: dict[str, Array], n: int, k: int) -> int:
    """How many of n x k weights an operator of ours keeps, from the tensors of its pack."""
    if "lanes" in pack:
        return int(pack["start"][-2])
    masks = pack.get("masks", np.zeros(0, np.uint8)).view(np.uint8)
    if masks.size:
        return int(np.unpackbits(masks).sum(dtype=np.int64))
    tiles, steps = -(-n // 16), -(-k // 16) * 4
    codes = pack.get("codes", masks)[: 64 * tiles * steps]
    if codes.size < 64 * tiles * steps:  # no pack of ours
        return 0
    codes = codes.reshape(tiles, steps, 16, 4).swapaxes(1, 2)  # int_steps.h
    return int(np.count_nonzero(codes.reshape(16 * tiles, 4 * steps)[:n, :k] != 128))  # 128 stands for 0


@dataclass(frozen=True)
class _Machine:
    target: Target
    threads: int
    cache: Path
    min_speedup: float
    portable: bool
    low_bits: bool
    rows: int

    def decide(self, fact: WeightFact, x: str) -> Decision:
        """Of the fastest format, or of a smaller one about as fast; ``min_speedup`` 0: bitmaps even where they lose."""
        formats = FORMATS[x] if self.min_speedup else FORMATS[x][:1]
        rates = rates_for(fact, "fp32", self.target, self.threads, self.cache, formats, x)
        found = [
            decide(fact, "fp32", self.target, rates, Policy(formats=(name,), min_speedup=self.min_speedup), x=x)
            for name in formats
        ]
        taken = {d: d.at(self.rows) for d in found if d.at(self.rows).format != "dense"}
        if not taken:
            return found[0]
        most = _ABOUT * min(r.ours_s for r in taken.values())
        near = [d for d, r in taken.items() if r.ours_s <= most]
        return min(near, key=lambda d: next(c.bytes for c in d.candidates if c.format == taken[d].format))


def _site(model: ir.Model, site: OnnxSite, machine: _Machine, packs: dict[str, list[ir.Value]]) -> OnnxLayer:
    n, k = site.shape
    if site.reason:
        assert site.constant.const_value is not None
        return OnnxLayer(site.name, n, k, 0.0, "dense", site.reason, site.constant.const_value.nbytes, 1.0)
    weight, before = site.weight(), rounded(site.x)
    fact = profile(weight)
    on_grid = before is not None and "int8" in stored_types(fact.values)
    row = OnnxLayer(site.name, n, k, fact.sparsity, "dense", NO_ZEROS_SKIPPED, weight.nbytes, 1.0)
    if machine.low_bits and before is None and _opset(model) >= LOW_BIT_OPSET and (four := low_bit(fact)):
        size = replace_low_bit(model, site, weight, four, fact.key)
        return replace(row, decision=four, reason=low_bit_why, bytes=size, expected=weight.nbytes / size)
    x = "int8" if on_grid else ""
    if not x:
        fact = replace(fact, values=ValueFact())  # codes whose x stays as it is have no operator
    decision = None if machine.portable else machine.decide(fact, x)
    first = decision.at(machine.rows) if decision else None
    row = replace(row, reason=decision.reason if decision else row.reason)
    if decision is None or first is None or first.format == "dense" or not supported(Format.parse(first.format), x):
        if decision is not None and decision.ours:
            row = replace(row, reason=_elsewhere(decision, machine.rows))
        if not on_grid or before is None or k > bodies.MOST_K:
            return row
        size = replace_int8(model, site, before, weight, fact.key)
        return replace(row, decision="int8", reason=int8_why, bytes=size, expected=weight.nbytes / size)
    fixed = before.fixed if x and before is not None else 0.0
    op = Op(Format.parse(first.format), x, bool(fixed))
    if not bodies.countable(op, n, k, fact.nnz):
        return replace(row, reason=TOO_MANY)
    try:
        values = _packed(model.graph, site, op, weight, fact, packs)
    except PackError as error:
        return replace(row, reason=str(error))
    _replace(model, site, before.x if x and before is not None else site.x, op, values, decision, fixed)
    size = sum(v.const_value.nbytes for v in values if v.const_value is not None)
    gain = first.dense_s / first.ours_s if first.ours_s else 1.0
    return replace(row, decision=first.format, bytes=size, expected=gain)


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("") or bodies.OPSET


def _elsewhere(decision: Decision, rows: int) -> str:
    """Why a layer is dense that would not be at another number of rows."""
    other = next(r for r in decision.ranges if r.format != "dense")
    until = f"up to {other.m_hi}" if other.m_hi is not None and other.m_hi < rows else f"from {other.m_lo}"
    return f"dense is expected to be faster at {rows} rows of x; {other.format} {until}"


def _packed(
    graph: ir.Graph, site: OnnxSite, op: Op, weight: torch.Tensor, fact: WeightFact, packs: dict[str, list[ir.Value]]
) -> list[ir.Value]:
    """The pack of a weight as initializers, which tied weights share. Raises PackError."""
    key = f"{op.kernel} {fact.key}"
    if key not in packs:
        packed = cpp.pack_verified(weight, op.format, fact.key, x=op.x)
        packs[key] = _initializers(graph, site.name, op, packed)
    return packs[key]


def _replace(
    model: ir.Model, site: OnnxSite, x: ir.Value, op: Op, values: list[ir.Value], decision: Decision, fixed: float
) -> None:
    """Put an operator that reads ``x`` in the place of a site. ``fixed``: the one scale of x, where there is one."""
    import onnx_ir as ir

    n, k = site.shape
    said: dict[str, int | float] = {"n": n, "k": k, "outer_from": _outer_from(decision), "version": LAYOUT}
    said |= {"x_scale": fixed} if op.fixed else {}
    inputs = [x, _bias(model.graph, site), *values]
    node = ir.node(op.name, inputs, said, domain=DOMAIN, name=f"{site.name}_{op.name}")
    node.metadata_props.update(site.nodes[0].metadata_props)
    site.put(model.graph, [node])
    if (DOMAIN, op.name, "") not in model.functions:
        model.functions[DOMAIN, op.name, ""] = ir.serde.deserialize_function(bodies.function(op, _opset(model)))


def _initializers(graph: ir.Graph, name: str, op: Op, packed: Packed) -> list[ir.Value]:
    """The tensors of a pack as initializers; masks as bytes, since standard ONNX looks bytes up."""
    tensors = (*packed.tensors, bodies.gaps(packed.tensors[0])) if "gaps" in op.packs else packed.tensors
    named = {"work": packed.work, **dict(zip(op.packs, tensors, strict=True))}
    arrays = {part: tensor.contiguous().numpy().reshape(-1) for part, tensor in named.items()}
    bytes_of = {part: array.view(np.uint8) if part == "masks" else array for part, array in arrays.items()}
    return [initializer(graph, f"{name}.{part}", array) for part, array in bytes_of.items()]


def _bias(graph: ir.Graph, site: OnnxSite) -> ir.Value:
    """The layer's bias; zeros where it has none, since all inputs of an operator are there."""
    if site.bias_from is not None:
        return site.bias_from
    n = site.shape[0]
    return shared(graph, f"sparsec.zeros.{n}", np.zeros(n, np.float32))


def _outer_from(decision: Decision) -> int:
    """The least number of rows that the loop ``outer`` serves; 0 where none."""
    return next((r.m_lo for r in decision.ranges if r.kernel == "outer"), 0)
