"""Parts of graphs in ONNX Runtime: the op ``sparsec_onnx::run`` and, behind it, a session for each set of weights.

Weights are arguments of the op, as everywhere: a session is made when weights are first seen, found by their identity
(TensorImpl, version, data pointer), and dropped when one of them is gone. In it, dense weights are the very memory of
the tensors; tensors go in and out without a copy.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import library as torch_library

from sparsec.errors import SparsecWarning, VerifyError
from sparsec.export_onnx import rows_of
from sparsec.onnx import NO_SATURATION, accuracy, library_path, runtime
from sparsec.onnx_rewrite import OnnxLayer, rewrite
from sparsec.options import Policy
from sparsec.runtime.gpu import version_of
from sparsec.targets.base import Target

MIN_USES = 16  # of a session; weights that change more often than that run without one
MAX_SHORT_LIVED = 4  # such changes in a row, before a part is left to PyTorch
_INLINE = 1024  # bytes of a constant that stays in the model's text
_BOOL = 9  # TensorProto.BOOL
_NUMPY = ("FLOAT", "INT8", "UINT8", "INT32", "INT64")  # of constants that are handed over as they lie
ALLOWED = 1e-3  # of the largest value, that ``verify`` lets a result differ

_libraries: list[torch_library.Library] = []  # a Library unregisters its ops when it is collected
PARTS: weakref.WeakValueDictionary[str, Part] = weakref.WeakValueDictionary()


@dataclass
class Session:
    """ONNX Runtime ready to run, and what it needs alive."""

    run: Callable[[list[str], dict[str, Any]], list[Any]]
    held: list[Any]
    layers: list[OnnxLayer]
    uses: int = 0


@dataclass
class Part:
    """A piece of a graph. ``module``: as PyTorch runs it; ``model``: as ONNX, its weights inputs too.

    ``names``: of its inputs, in order; ``weights``: numbers of those that are weights; ``sizes``: of those that are
    whole numbers.
    """

    module: torch.fx.GraphModule
    model: bytes = field(repr=False)
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[int, ...]
    sizes: tuple[int, ...]
    policy: Policy
    target: Target
    sessions: dict[tuple[tuple[int, int, int], ...], Session] = field(default_factory=dict)
    short_lived: int = 0
    watched: set[int] = field(default_factory=set)
    # The collector may find a dead weight while a session is made, in the same thread.
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def run(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """What ``module`` gives, from ONNX Runtime; from PyTorch where there is no session."""
        inputs = self.inputs(tensors, sizes)
        session = self._session([inputs[i] for i in self.weights], inputs)
        results = self._results(session, inputs) if session else None
        if results is None:
            return [y.contiguous().clone() for y in self.module(*inputs)]
        if self.policy.verify:
            self._verify(results, self.module(*inputs))
        return results

    def _results(self, session: Session, inputs: Sequence[Any]) -> list[torch.Tensor] | None:
        try:
            ort, weights = runtime(), set(self.weights)
            feed = {self.names[i]: _value(ort, x) for i, x in enumerate(inputs) if i not in weights}
            return [_tensor(value) for value in session.run(list(self.outputs), feed)]
        except Exception as error:  # the answer must come out whatever ONNX Runtime says
            self._give_up(f"{type(error).__name__}: {error}")
            return None

    def inputs(self, tensors: Sequence[torch.Tensor], sizes: Sequence[Any]) -> list[Any]:
        """Tensors and sizes in the order of ``names``."""
        left, numbers = iter(tensors), iter(sizes)
        return [next(numbers) if i in self.sizes else next(left) for i in range(len(self.names))]

    def _session(self, weights: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Session | None:
        key = tuple((w._cdata, version_of(w), w.data_ptr()) for w in weights)
        found = self.sessions.get(key)
        if found is None:
            with self.lock:
                found = self.sessions.get(key) or self._made(key, weights, inputs)
        if found is not None:
            found.uses += 1
        return found

    def _made(
        self, key: tuple[tuple[int, int, int], ...], weights: Sequence[torch.Tensor], inputs: Sequence[Any]
    ) -> Session | None:
        if self.short_lived >= MAX_SHORT_LIVED:
            return None
        mine = {impl for impl, _, _ in key}
        for old in [old for old in list(self.sessions) if mine & {impl for impl, _, _ in old}]:
            gone = self.sessions.pop(old, None)
            self.short_lived = self.short_lived + 1 if gone and gone.uses < MIN_USES else 0
        if self.short_lived >= MAX_SHORT_LIVED:
            self._give_up("its weights change too often for sessions of ONNX Runtime")
            return None
        try:
            session = self._opened(weights, inputs)
        except Exception as error:  # the answer must come out whatever happens here
            self._give_up(f"{type(error).__name__}: {error}")
            return None
        self.sessions[key] = session
        for weight in weights:
            if weight._cdata not in self.watched:
                self.watched.add(weight._cdata)
                weakref.finalize(weight, _died, weakref.ref(self), weight._cdata).atexit = False
        return session

    def _opened(self, weights: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Session:
        import onnx_ir as ir

        from sparsec import cache

        ort, kept = runtime(), cache.cache_dir(self.policy.cache_dir)
        model = ir.from_proto(_parsed(self.model))
        arrays = {self.names[i]: w.detach().contiguous().numpy() for i, w in zip(self.weights, weights, strict=True)}
        _as_constants(model, arrays)
        threads, least = torch.get_num_threads(), self.policy.min_speedup
        rows = rows_of([x for i, x in enumerate(inputs) if i not in self.weights])
        layers = rewrite(model, self.target, threads, kept, least, low_bits=False, rows=rows)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Every session has threads of its own, as has torch; those that wait must not take cores from those that work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(*accuracy(exact=True))
        options.add_session_config_entry(*NO_SATURATION)
        options.register_custom_ops_library(str(library_path(self.policy.cache_dir)))
        held = _outside(model, options, ort)
        text = ir.to_proto(model).SerializeToString()
        made = ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
        return Session(made.run_with_ort_values, [*held, made], layers)

    def _verify(self, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
        for name, y, want in zip(self.outputs, found, wanted, strict=True):
            largest = float(want.double().abs().max()) if want.numel() else 0.0
            error = float((y.double() - want.double()).abs().max()) / (largest or 1.0) if want.numel() else 0.0
            if not error <= ALLOWED and bool(want.isfinite().all()):
                raise VerifyError(where=name, format="ONNX Runtime", error=error, allowed=ALLOWED)

    def forget(self, impl: int) -> None:
        """Drop the sessions that have a weight in them."""
        with self.lock:
            for key in [key for key in list(self.sessions) if any(impl == other for other, _, _ in key)]:
                self.sessions.pop(key, None)

    def _give_up(self, why: str) -> None:
        with self.lock:
            self.short_lived = MAX_SHORT_LIVED
            self.sessions.clear()
        warnings.warn(f"sparsec runs a part of a graph in PyTorch: {why}", SparsecWarning, stacklevel=4)


def forget(weight: torch.Tensor) -> None:
    """Drop every session that has a weight in it."""
    for part in list(PARTS.values()):
        part.forget(weight._cdata)


def _died(part: weakref.ref[Part], impl: int) -> None:
    if (found := part()) is not None:
        found.watched.discard(impl)
        found.forget(impl)


def load() -> None:
    """Make ``sparsec_onnx::run`` exist."""
    if _libraries:
        return
    ops: Any = torch_library.Library("sparsec_onnx", "DEF")  # type: ignore[no-untyped-call]
    ops.define("run(Tensor[] tensors, SymInt[] sizes, str part) -> Tensor[]")
    ops.impl("run", _run, "CompositeExplicitAutograd")
    torch_library.register_fake("sparsec_onnx::run", _fake, lib=ops)
    _libraries.append(ops)


def _run(tensors: list[torch.Tensor], sizes: list[int], part: str) -> list[torch.Tensor]:
    return PARTS[part].run(tensors, sizes)


def _fake(tensors: list[torch.Tensor], sizes: list[Any], part: str) -> list[torch.Tensor]:
    known = PARTS[part]
    return [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in known.module(*known.inputs(tensors, sizes))]


def _value(ort: Any, x: Any) -> Any:
    """A tensor or a number as ONNX Runtime takes it, without a copy of what is contiguous."""
    tensor = x.detach().contiguous() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.int64)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _tensor(value: Any) -> torch.Tensor:
    """A result without a copy, but for booleans and nothing, which DLPack says in other words, and old versions."""
    if value.element_type() == _BOOL or 0 in value.shape() or not hasattr(value, "__dlpack__"):
        return torch.from_numpy(value.numpy())
    return torch.utils.dlpack.from_dlpack(value)


def _parsed(text: bytes) -> Any:
    import onnx

    return onnx.ModelProto.FromString(text)


def _as_constants(model: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Make initializers of those inputs whose values are known."""
    import onnx_ir as ir

    for value in [value for value in model.graph.inputs if value.name in arrays]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[value.name], name=value.name)
        model.graph.register_initializer(value)


def _outside(model: Any, options: Any, ort: Any) -> list[Any]:
    """Hand large constants over as they lie in memory; what must stay alive for it."""
    import onnx_ir as ir

    named: dict[str, Any] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE or str(tensor.dtype) not in _NUMPY:
            continue
        named[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
        value.const_value = ir.ExternalTensor("memory", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name)
    options.add_external_initializers(list(named), list(named.values()))
    return list(named.values())
