"""``sparsec``: the command line. In: argv. Out: text or JSON on stdout, progress and errors on stderr, an exit code.

Each command is one module ``sparsec.cli.<name>`` with a function ``command`` (typer annotations, docstring = help) and
a text ``EXAMPLE`` of shell lines, which ``--help`` shows and the tests run. A module is imported only when its command
is called, and imports torch only inside functions, so help is instant. ``-`` and ``_`` are the same in flag names.

Exit codes: 0 done, 1 a bug of ours, 2 bad input (one sentence on stderr), 130 stopped by the user.
SPARSEC_DEBUG=1 shows the traceback behind a sentence.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from sparsec import __version__
from sparsec.errors import SparsecError, SparsecWarning

COMMANDS = {
    "demo": "A pruned real model against Inductor, as a table and a report.",
    "sparsify": "Prune a model and save an ordinary checkpoint with exact zeros.",
    "pack": "Pack a pruned model: smaller in memory and on disk, loaded without packing.",
    "search": "The fastest recipe under an accuracy budget.",
    "explain": "Why is my pruned model not faster? One reason a layer.",
    "bench": "Time a model, dense and sparse side by side.",
    "eval": "What pruning cost, paired with the dense model.",
    "tune": "Measure the decisions on this machine and keep them.",
    "calibrate": "Count the zeros of a model's activations and keep the rates.",
    "export": "Write a model as ONNX that any ONNX Runtime runs, fast with our library.",
    "methods": "The sparsification methods and what each needs.",
    "targets": "The machines kernels can be made for, and this one.",
    "kernels": "The kernel families and where their source is.",
    "compile-kernels": "The GPU kernels of a model, compiled where there is no GPU.",
    "doctor": "Versions, compiler, caches: a block to paste into an issue.",
}
STOPPED = 130  # the shells' code for an interrupt
FOOTER = "Start with: sparsec demo. Each command has an example: sparsec explain -h"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit the process with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code and prints at most one sentence on stderr where it is not 0."""
    os.environ.setdefault("TERM", "dumb")  # rich asks for it; services and containers may have none
    usual, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        command = typer.main.get_command(build(_chosen(argv)))
        code = command.main(list(argv) or ["--help"], prog_name="sparsec", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit stays silent
        return 1
    except Exception as error:
        return _report(error)
    finally:
        warnings.formatwarning = usual
    if code == STOPPED:  # typer turns an interrupt into this code
        return _say("stopped.", STOPPED)
    return code if isinstance(code, int) else 0


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours without the place in our code that it came from; others as Python prints them."""
    if issubclass(category, SparsecWarning):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def build(chosen: str | None = None) -> typer.Typer:
    """The app. Only ``chosen`` is imported; the other commands are their line in ``COMMANDS``."""
    app = typer.Typer(
        name="sparsec",
        help="The sparsity compiler for PyTorch: finds zeros by itself, is never slower than dense, and says why.",
        epilog=FOOTER,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help is plain text: the same on a terminal, in a pipe and in an issue
        context_settings={
            "token_normalize_func": lambda name: name.replace("_", "-"),
            "help_option_names": ["-h", "--help"],
            "max_content_width": 110,
        },
    )
    app.callback()(_options)
    for name, line in COMMANDS.items():
        function = _load(name) if name == chosen else _unloaded
        text = _help(function, line) if name == chosen else line
        app.command(name, help=text, short_help=line)(function)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparsec {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options that come before the command's name."""


def _unloaded() -> None:
    """Stands in for a command that was not called; only its help line is read."""


def _chosen(argv: Sequence[str]) -> str | None:
    return next((word for word in argv if not word.startswith("-")), None)


def _load(name: str) -> Callable[..., Any]:
    module = f"sparsec.cli.{name.replace('-', '_')}"
    try:
        function: Callable[..., Any] = importlib.import_module(module).command
        return function
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SparsecError(detail=f"this installation has no command {name!r}; please install sparsec again.") from None


def _help(function: Callable[..., Any], line: str) -> str:
    text = inspect.cleandoc(function.__doc__ or line)
    example = getattr(sys.modules[function.__module__], "EXAMPLE", "").strip()
    if not example:
        return text
    shown = "\n".join(f"    {row}" for row in example.splitlines())
    return f"{text}\n\n\b\nExample:\n{shown}"  # \b keeps the lines of a paragraph as they are


def _report(error: Exception) -> int:
    if os.environ.get("SPARSEC_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
    error = getattr(error, "inner_exception", error)  # torch.compile wraps what a backend raises
    if isinstance(error, SparsecError):
        return _say(str(error), 2)
    usage = getattr(error, "format_message", None)  # the base class of usage errors differs between typer versions
    if usage:
        return _say(f"{_sentence(usage())} See: {_path_of(error)} --help", 2)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}.", 2)
    return _say(
        f"a bug in sparsec ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). "
        "Run again with SPARSEC_DEBUG=1 for the traceback, and please report it with the output of sparsec doctor.",
        1,
    )


def _sentence(text: str) -> str:
    return text if text.endswith(("?", ".", "!")) else f"{text}."


def _path_of(error: Exception) -> str:
    return getattr(getattr(error, "ctx", None), "command_path", "sparsec")


def _say(sentence: str, code: int) -> int:
    print(f"sparsec: {sentence}", file=sys.stderr)
    return code
