"""Files that ``sparsec.export_onnx`` wrote, in ONNX Runtime with our kernels: ``session(path)`` is all it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import BadModelFile, MissingPackage

if TYPE_CHECKING:
    import onnxruntime

# By what inputs are rounded to. Panels of codes stand for ONNX Runtime's own product of integers.
FORMATS = {"": ("bitmap", "index"), "int8": ("bitmap+int8", "panel+int8")}
_REGISTERED = "sparsec.registered"
# ONNX Runtime adds two products of bytes in 16 bits where an x86 processor has no VNNI, and what is more it cuts off.
NO_SATURATION = ("session.x64quantprecision", "1")
LEAST = (1, 22)  # of ONNX Runtime, by the version of its C interface that the library asks for


def library_path(cache_dir: str = "") -> Path:
    """The library for ``SessionOptions.register_custom_ops_library``, with every operator that files may hold.

    It is compiled the first time (half a minute) and kept in the cache directory; it runs on any machine of the same
    architecture, with the best of its instruction sets. Raises NoCompiler, CompileFailed.
    """
    from sparsec import cache
    from sparsec.codegen.onnx.ops import STANDARD, compile_library

    return compile_library(STANDARD, cache.cache_dir(cache_dir))


def session(
    path: str | Path,
    options: onnxruntime.SessionOptions | None = None,
    cache_dir: str = "",
    exact: bool = False,
    **more: Any,
) -> onnxruntime.InferenceSession:
    """An ``InferenceSession`` of a file in which our operators run our kernels.

    ``options``: yours; the library is registered in it. ``exact``: do not let ONNX Runtime round what dense layers of 4
    bits read to 8 bits, which makes them several times faster. ``more``: for ``InferenceSession``; providers are the
    CPU's unless given. Raises MissingPackage without ONNX Runtime or with one before 1.22, BadModelFile where ONNX
    Runtime refuses the file, NoCompiler, CompileFailed.
    """
    ort = runtime()
    said = options or ort.SessionOptions()
    if not _registered(said):
        said.register_custom_ops_library(str(library_path(cache_dir)))
        said.add_session_config_entry(_REGISTERED, "1")
    said.add_session_config_entry(*accuracy(exact))
    said.add_session_config_entry(*NO_SATURATION)
    more.setdefault("providers", ["CPUExecutionProvider"])
    try:
        return ort.InferenceSession(str(path), said, **more)
    except Exception as error:  # whatever its C++ throws: each has a class of its own, under no common one
        raise BadModelFile(
            path=str(path) if isinstance(path, (str, Path)) else "the model", why=first_line(error)
        ) from error


def _registered(options: onnxruntime.SessionOptions) -> bool:
    """Whether options have our library already, which ONNX Runtime takes once only."""
    try:
        return bool(options.get_session_config_entry(_REGISTERED))
    except RuntimeError:
        return False


def accuracy(exact: bool) -> tuple[str, str]:
    """The session's entry that says whether products with 4-bit weights may round the other side to 8 bits."""
    return "session.qdq_matmulnbits_accuracy_level", "1" if exact else "4"


def formats_of(said: Sequence[str], x: str = "") -> tuple[str, ...]:
    """The formats that operators have for an input that is rounded as ``x`` says, of those in ``said`` (none: all)."""
    ours = FORMATS["int8" if x.partition(":")[0] == "int8" else ""]
    return tuple(name for name in ours if not said or name in said or name.partition("+")[0] in said) or ("dense",)


def runtime() -> Any:
    """The module ``onnxruntime``. Raises MissingPackage."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackage(feature="running ONNX files", package="onnxruntime", extra="onnx") from None
    numbers = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if numbers < LEAST:
        package = f"onnxruntime>={LEAST[0]}.{LEAST[1]} (here is {onnxruntime.__version__})"
        raise MissingPackage(feature="running ONNX files", package=package, extra="onnx")
    return onnxruntime


def first_line(error: BaseException) -> str:
    """What an error says, on one line and without its class."""
    return " ".join(str(error).split())[:300] or type(error).__name__
