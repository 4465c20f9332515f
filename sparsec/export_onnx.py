"""One ONNX file that any ONNX Runtime runs, and that runs our kernels where our library is registered.

``torch.onnx.export`` writes the model; then the linear layers that are expected to gain become operators of the domain
``sparsec``, each with a body in standard ONNX (``onnx_rewrite.py``). An ONNX file of another tool takes the same second
step. What was written is run before it is called done, with and without the library, against PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsec import cache, targets
from sparsec.codegen.onnx import bodies
from sparsec.errors import BadModelFile, BadOptionValue, MissingPackage, VerifyError, WriteFailed
from sparsec.onnx import first_line
from sparsec.onnx_rewrite import OnnxLayer, operators, rewrite
from sparsec.onnx_small import WAYS, as_sparse_initializers, expand_when_loaded

if TYPE_CHECKING:
    import onnx_ir as ir

Errors = Mapping[str, Mapping[str, float]]
OPSET = 21
_DEFAULTS = 4  # the version of the format from which an initializer that is an input is only its default
_EXTERNAL = 2**31 - 2**27  # bytes from which weights go to a file of their own; a protobuf ends at 2 GiB
ALLOWED = 2e-3  # of the largest value of an output, that outputs may differ from PyTorch's


@dataclass(frozen=True)
class OnnxReport:
    """What was written. ``errors``: of each output the largest difference from PyTorch over its largest value, with our
    library (``sparsec``) and without (``plain``); empty where nothing was run."""

    path: str
    layers: tuple[OnnxLayer, ...]
    bytes: int
    dense_bytes: int
    errors: Errors

    def __str__(self) -> str:
        from sparsec.onnx_report import text_of

        return text_of(self)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "layers": [layer.to_dict() for layer in self.layers]}


@torch.no_grad()
def export_onnx(
    model: torch.nn.Module,
    args: Sequence[Any],
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    names: tuple[Sequence[str], Sequence[str]] = ((), ()),
    portable: bool = False,
    compress: str = "",
    external: bool = False,
    min_speedup: float = 1.05,
    rows: int = 0,
    opset: int = OPSET,
    verify: bool = True,
    cache_dir: str = "",
) -> OnnxReport:
    """Write ``model`` as ONNX.

    ``args``, ``kwargs``: inputs that the model can be called with; use sizes above 1 where they are to be dynamic.
    ``dynamic_shapes``: as for ``torch.onnx.export``; by default the first axis of every tensor, and the second of ids
    and masks. ``names``: of the inputs and outputs. ``portable``: standard operators only. ``compress``: pack constants
    with many zeros that stay dense, too, embeddings among them, as ``bitmap`` or ``sparse_initializer``; the file is
    small then, and slow to load. ``external``: weights in a file beside it (``path``.data), which runtimes map instead
    of reading it; always so above 2 GB. ``min_speedup``: of our operators over dense, expected for ``rows`` (0: the
    tokens of ``args``); 0 takes them wherever a weight has zeros. ``verify``: run the file, with ONNX Runtime.
    Raises MissingPackage without onnx and onnxscript; BadModelFile where the model cannot be written as ONNX, with the
    operator that cannot; WriteFailed; VerifyError where an output differs, with the first layer that does.
    """
    said, model = dict(kwargs or {}), getattr(model, "_orig_mod", model)  # of torch.compile(module)
    if not isinstance(model, torch.nn.Module):
        raise BadModelFile(path=type(model).__name__, why="it is no torch.nn.Module")
    shapes = _axes(model, args, said) if dynamic_shapes is None else dynamic_shapes
    program = _exported(model, tuple(args), said, shapes, opset, names)
    inputs = _tensors([*args, *said.values()])

    def run(partial: Path) -> Errors:
        return _compared(partial, str(path), inputs, _tensors(model(*args, **said)), cache_dir)

    with evaluating(model):
        return write(
            program,
            Path(path),
            portable=portable,
            compress=compress,
            external=external,
            min_speedup=min_speedup,
            rows=rows or rows_of(inputs),
            cache_dir=cache_dir,
            check=run if verify else None,
        )


def write(
    model: ir.Model,
    path: Path,
    *,
    portable: bool = False,
    compress: str = "",
    external: bool = False,
    min_speedup: float = 1.05,
    rows: int = 1,
    cache_dir: str = "",
    check: Callable[[Path], Errors] | None = None,
) -> OnnxReport:
    """Rewrite an onnx-ir model, which is changed, and write it. ``check``: what is asked about the file before it takes
    its place; gives the report's errors. Raises WriteFailed, BadOptionValue."""
    if compress and compress not in WAYS:
        raise BadOptionValue(key="compress", value=compress, expected=f"it must be one of {', '.join(WAYS)}")
    if not min_speedup >= 0:
        raise BadOptionValue(key="min_speedup", value=min_speedup, expected="it must be a number from 0 on")
    dense, sparse = _bytes_of(model), compress == "sparse_initializer"
    if sparse and (external or dense > _EXTERNAL):
        raise BadOptionValue(key="compress", value=compress, expected="weights in a file of their own are not sparse")
    layers = [*operators(model), *_rewritten(model, min_speedup, cache_dir, portable, rows)]
    if compress == "bitmap":
        expand_when_loaded(model)
    size, errors = _save(model, path, sparse, external, check)
    return OnnxReport(str(path), tuple(layers), size, dense, errors)


def rewrite_file(source: str | Path, path: str | Path, verify: bool = True, **said: Any) -> OnnxReport:
    """As ``export_onnx`` for an ONNX file from any tool. ``said``: keywords of ``write``. ``verify``: run both files on
    inputs that are made up, where ONNX Runtime is installed and takes such. Raises BadModelFile, VerifyError."""
    model = loaded(source)
    has_runtime = importlib.util.find_spec("onnxruntime") is not None

    def run(partial: Path) -> Errors:
        from sparsec.onnx_verify import example

        made = example(Path(source))
        return {} if made is None else _compared(partial, str(path), *made, said.get("cache_dir", ""))

    return write(model, Path(path), **said, check=run if verify and has_runtime else None)


def explain_file(source: str | Path, min_speedup: float = 1.05, cache_dir: str = "", rows: int = 1) -> OnnxReport:
    """What ``rewrite_file`` would make of an ONNX file; nothing is written. Raises BadModelFile."""
    model = loaded(source)
    dense, ours = _bytes_of(model), operators(model)
    layers = _rewritten(model, min_speedup, cache_dir, rows=rows)
    return OnnxReport(str(source), (*ours, *layers), _bytes_of(model), dense, {})


def _rewritten(
    model: ir.Model, min_speedup: float, cache_dir: str, portable: bool = False, rows: int = 1
) -> list[OnnxLayer]:
    threads, kept = torch.get_num_threads(), cache.cache_dir(cache_dir)
    return rewrite(model, targets.resolve("cpu"), threads, kept, min_speedup, portable, rows=rows)


def loaded(source: str | Path) -> ir.Model:
    """An ONNX file as an onnx-ir model of opset 18 or later. Raises BadModelFile."""
    reader = _onnx_ir()
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    try:
        found: ir.Model = reader.load(str(source))
        for value in found.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()  # weights beside the file are mapped, and are missed here
        LiftConstantsToInitializersPass()(found)
        if found.ir_version < _DEFAULTS:  # before, initializers had to be named as inputs, and could not be given
            for value in [v for v in found.graph.inputs if v.is_initializer()]:
                found.graph.inputs.remove(value)
            found.ir_version = _DEFAULTS
        if (found.opset_imports.get("") or OPSET) < bodies.LEAST_OPSET:
            _converted(found)
    except Exception as error:  # protobuf, onnx and onnx-ir have no class in common
        raise BadModelFile(path=str(source), why=first_line(error)) from error
    if not len(found.graph) and not found.graph.outputs:
        raise BadModelFile(path=str(source), why="it holds no graph")
    return found


def _converted(model: ir.Model) -> None:
    """Bring a model of an older opset to OPSET."""
    from onnxscript import version_converter

    with quiet_export():
        version_converter.convert_version(model, OPSET, fallback=True)
    if model.opset_imports.get("") != OPSET:
        raise ValueError(f"its opset {model.opset_imports.get('')} cannot be converted to {OPSET}")


def _compared(
    partial: Path, path: str, inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], cache_dir: str
) -> Errors:
    """The errors of a file that is to become ``path``. Raises VerifyError."""
    from sparsec.onnx_verify import differences, first_difference

    errors = differences(partial, inputs, wanted, cache_dir)
    checked(errors, path, lambda: first_difference(partial, inputs, ALLOWED, cache_dir))
    return errors


def checked(errors: Errors, path: str, first: Callable[[], str] = str) -> None:
    """Raise VerifyError where an error is more than rounding. ``first``: names the first layer that differs."""
    for how, of in errors.items():
        for output, error in of.items():
            if error <= ALLOWED:  # NaN is not
                continue
            layer = first()
            where = f"{output} of {path}" + (f", first in {layer}," if layer else "")
            raise VerifyError(where=where, format=f"{how} ONNX", error=error, allowed=ALLOWED)


def _onnx_ir() -> Any:
    try:
        import onnx_ir
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError:
        raise MissingPackage(feature="ONNX export", package="onnx, onnxscript", extra="onnx") from None
    return onnx_ir


def _exported(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    opset: int,
    names: tuple[Sequence[str], Sequence[str]],
) -> ir.Model:
    _onnx_ir()
    if opset < bodies.LEAST_OPSET:
        raise BadOptionValue(key="opset", value=opset, expected=f"it must be {bodies.LEAST_OPSET} or later")
    said: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": opset, "verbose": False}
    said |= {"input_names": list(names[0]) or None, "output_names": list(names[1]) or None}
    try:
        with quiet_export(), evaluating(model):
            program = torch.onnx.export(model, args, kwargs=kwargs, **said)
    except torch.onnx.errors.OnnxExporterError as error:
        raise BadModelFile(path=type(model).__name__, why=f"torch.onnx cannot export it: {_reason(error)}") from error
    assert program is not None
    found: ir.Model = program.model
    return found


def _reason(error: BaseException) -> str:
    """The innermost cause, which names the operator and the line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed."""
    import logging

    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _axes(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first axis of every tensor as dynamic, and the second of whole numbers, which are ids and masks."""
    auto = torch.export.Dim.AUTO

    def of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(of(item) for item in value)
        if isinstance(value, Mapping):
            return {key: of(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return None
        tokens = value.dim() > 1 and not value.is_floating_point()
        return dict.fromkeys(range(min(value.dim(), 2 if tokens else 1)), auto)

    positional = tuple(of(value) for value in args)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        own = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        positional = (*positional[:own], positional[own:])
    if not kwargs:
        return positional
    named = {name: of(value) for name, value in kwargs.items()}
    return named if not args else (*positional, *named.values())


def rows_of(inputs: Sequence[Any]) -> int:
    """Rows that linear layers read in a call, as its inputs tell: tokens of ids, or what has features last."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.numel()]
    return max((x.numel() // (x.shape[-1] if x.is_floating_point() and x.dim() else 1) for x in tensors), default=1)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nest of containers, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _bytes_of(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _save(
    model: ir.Model, path: Path, sparse: bool, external: bool, check: Callable[[Path], Errors] | None
) -> tuple[int, Errors]:
    """Write elsewhere first, so that a full disk or a failed check leaves what was there; the bytes and what ``check``
    gave. ``sparse``: sparse initializers."""
    ir = _onnx_ir()
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise WriteFailed(path=str(path), why="there is something that is no file")
    beside, errors = f"{path.name}.data", {}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder, path.name)
            if external or _bytes_of(model) > _EXTERNAL:
                ir.save(model, str(partial), external_data=beside)
            else:
                ir.external_data.load_to_model(model)  # else the file would name what lies beside another one
                proto = ir.to_proto(model)
                if sparse:
                    as_sparse_initializers(proto)
                partial.write_bytes(proto.SerializeToString())
            if check is not None:
                errors = dict(check(partial))
            made = sorted(Path(folder).iterdir(), reverse=True)  # the weights before the file that names them
            size = sum(file.stat().st_size for file in made)
            for file in made:
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise WriteFailed(path=str(path), why=error.strerror or str(error)) from error
    return size, errors
