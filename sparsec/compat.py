"""The only door to private torch APIs, checked when it is opened. Written for torch 2.11 to 2.13.

What goes out: plain functions. A torch that lacks one of these names raises one sentence at import of this module,
which happens when the backend is first used, not at ``import sparsec``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, cast

import torch

try:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._logging._internal import trace_structured
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"sparsec needs torch 2.11 to 2.13; torch {torch.__version__} lacks {error.name or error}. "
        "Install torch==2.13.0 or a newer sparsec."
    ) from error

__all__ = [
    "CsltOps",
    "compile_rest",
    "compile_rewritten",
    "copy_graph_module",
    "cslt_ops",
    "emit_artifact",
    "enters_autocast",
    "exported",
    "is_fake",
    "looking_only",
    "mode_options",
    "onnx_operators",
    "own_frame",
    "real_tensors",
    "scaled_mm_fp8",
    "shared_libraries",
    "source_name",
    "static_input",
    "turns_gradients_on",
]


def compile_rest(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Hand a Dynamo graph to Inductor, which takes ownership of it."""
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=dict(patches))
    return cast(Callable[..., Any], compiled)


def compile_rewritten(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    patches: Mapping[str, Any],
    rewrite: Callable[[torch.fx.GraphModule, Sequence[int]], torch.fx.GraphModule],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> Callable[..., Any]:
    """As ``compile_rest``, with ``rewrite(graph of ATen operators, numbers of the inputs that are weights)`` before
    Inductor takes it. Nothing is cached across processes: what ``rewrite`` puts into the graph lives in this one."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx_inner

    def inner(lowered: torch.fx.GraphModule, inputs: Sequence[Any], **said: Any) -> Any:
        return compile_fx_inner(rewrite(lowered, tuple(said.get("static_input_idxs") or ())), inputs, **said)

    here = {"fx_graph_cache": False, **patches}
    with functorch_config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(gm, list(example_inputs), inner, here, dict(decompositions))
    return cast(Callable[..., Any], compiled)


@functools.cache
def onnx_operators() -> tuple[Callable[[Any], bool], dict[Any, Callable[..., Any]]]:
    """Whether torch.onnx can write an operator, and how the other ones are made of those it can."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib()
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    return registry.is_registered, dict(_decomp.create_onnx_friendly_decomposition_table(known))


def exported(gm: torch.fx.GraphModule) -> torch.export.ExportedProgram:
    """A graph of ATen operators, whose inputs are tensors and sizes, in the form that ``torch.onnx.export`` takes."""
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.export.graph_signature import (
        ExportGraphSignature,
        InputKind,
        InputSpec,
        OutputKind,
        OutputSpec,
        SymIntArgument,
        TensorArgument,
    )
    from torch.utils import _pytree

    def argument(node: torch.fx.Node) -> SymIntArgument | TensorArgument:
        return (TensorArgument if isinstance(node.meta["val"], torch.Tensor) else SymIntArgument)(name=node.name)

    inputs = gm.graph.find_nodes(op="placeholder")
    outputs: Sequence[Any] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, argument(node), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, argument(node), None) for node in outputs],
    )
    in_spec = _pytree.tree_structure((tuple(inputs), {}))
    call = ModuleCallSignature([], [], in_spec, _pytree.tree_structure(tuple(outputs)))
    return torch.export.ExportedProgram(
        root=gm, graph=gm.graph, graph_signature=signature, state_dict={}, range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)], constants={},
    )  # fmt: skip


def mode_options(mode: str) -> dict[str, Any]:
    """The Inductor settings behind ``torch.compile(mode=...)``. Raises RuntimeError for an unknown mode."""
    return dict(list_mode_options(mode))


@contextmanager
def real_tensors() -> Iterator[None]:
    """Dynamo calls backends under a fake mode; leave it to compute on real weights, without gradients."""
    with unset_fake_temporarily(), torch.no_grad():
        yield


def is_fake(tensor: object) -> bool:
    return isinstance(tensor, FakeTensor)


def copy_graph_module(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy whose graph may be rewritten while ``gm`` stays as Dynamo made it.

    Node meta is copied shallowly; what Dynamo and AOTAutograd keep as attributes of placeholders and of the module
    (``_dynamo_source``, ``_param_name_to_source``) is carried over, or their caches and checks fail.
    """
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    result = graph.graph_copy(gm.graph, mapping)
    graph.output(result)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    for old, new in zip(reversed(gm.graph.nodes), reversed(graph.nodes), strict=False):  # the output node
        new.meta = dict(old.meta)
        break
    copy = torch.fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    copy.meta = dict(gm.meta)
    for key, value in vars(gm).items():
        if key not in vars(copy) and not key.startswith("_forward"):
            setattr(copy, key, value)
    return copy


def source_name(placeholder: torch.fx.Node) -> str:
    """Where a graph input comes from, as a module path: ``L['self']._modules['a']._parameters['w']`` -> ``a.w``."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "") if source is not None else ""
    text = name() if callable(name) else str(name)
    _, _, path = text.partition("]")
    parts = re.findall(r"(?:_modules|_parameters|_buffers)\['([^']+)'\]|\.(?!_modules|_parameters|_buffers)(\w+)", path)
    return ".".join(a or b for a, b in parts)


def static_input(placeholder: torch.fx.Node) -> bool:
    """Whether Dynamo knows this input as a parameter, buffer or attribute of a module, not as an argument."""
    return "_dynamo_static_input_type" in (placeholder.meta.get("tensor_dict") or {})


def turns_gradients_on(graph: torch.fx.Graph) -> bool:
    """Whether the captured function switches gradient recording on inside."""
    return any(n.target is torch._C._set_grad_enabled and n.args == (True,) for n in graph.nodes)


def enters_autocast(graph: torch.fx.Graph) -> bool:
    """Whether the captured function opens an autocast region inside."""
    return any(n.target is torch.amp.autocast_mode._enter_autocast for n in graph.nodes)


def emit_artifact(name: str, text: str) -> None:
    """Add a text to the structured trace (``TORCH_TRACE``), where tlparse shows it."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def own_frame(model: Callable[..., Any]) -> Any:
    """The model behind a function whose code nothing else has.

    Dynamo counts what it compiled by the code of the frame, and stops at eight: looking at a model again and again must
    neither reach that limit nor bring the user's own compilation nearer to it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)


@contextmanager
def looking_only() -> Iterator[None]:
    """Compile with every size static, and take back what Dynamo keeps for frames that had nothing compiled before.

    Sizes that changed since an earlier look would become symbols, and rows are what a report is about. Dynamo keeps its
    results with the code of a frame, whatever the backend, and compiles no more after eight: looking at a model must
    not use these up.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.convert_frame import register_bytecode_hook

    had: dict[CodeType, bool] = {}

    def note(code: CodeType, new_code: CodeType) -> None:
        had.setdefault(code, bool(_debug_get_cache_entry_list(code)))

    handle = register_bytecode_hook(note)
    try:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
            yield
    finally:
        handle.remove()
        for code in (code for code, before in had.items() if not before):
            reset_code(code)


def shared_libraries() -> list[str]:
    """Flags to compile C++ against this torch: includes, libraries, run path."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = [f"-I{path}" for path in include_paths()]
    for path in library_paths():
        flags += [f"-L{path}", f"-Wl,-rpath,{path}"]
    abi = int(torch.compiled_with_cxx11_abi())
    return [*flags, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-ltorch_cpu", "-lc10"]


def scaled_mm_fp8(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(x * x_scale) @ (weight * scale), dense. x: e4m3 [M, K], weight: e4m3 [K, N] with unit stride along K, x_scale:
    fp32 [M, 1], scale: fp32 [1, N]. The tensor core's own sums: no second ones in fp32 beside them."""
    made: torch.Tensor = torch._scaled_mm(
        x, weight, scale_a=x_scale, scale_b=scale, out_dtype=dtype, use_fast_accum=True
    )
    return made


@dataclass(frozen=True)
class CsltOps:
    """torch's operators for cuSPARSELt. ``compress``: [N, K] -> its own format; ``search``: (compressed, x^T [K, M],
    bias [N] or None, factors of rows fp32 [N] or None, dtype of y or None for x's) -> the best algorithm;
    ``multiply``: the same and an algorithm -> y [M, N]."""

    compress: Callable[[torch.Tensor], torch.Tensor]
    search: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.dtype | None], int]
    multiply: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.dtype | None, int], torch.Tensor
    ]


def cslt_ops() -> CsltOps:
    """The operators; calling one fails where torch was built without the library."""
    aten: Any = torch.ops.aten
    return CsltOps(
        compress=aten._cslt_compress,
        search=lambda w, x, bias, alpha, out: int(
            aten._cslt_sparse_mm_search(w, x, bias=bias, alpha=alpha, out_dtype=out, transpose_result=True)
        ),
        multiply=lambda w, x, bias, alpha, out, algorithm: aten._cslt_sparse_mm(
            w, x, bias=bias, alpha=alpha, out_dtype=out, alg_id=algorithm, transpose_result=True
        ),
    )
