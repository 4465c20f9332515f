"""What commands share: JSON on stdout, progress on stderr, no escape codes where nobody asked for them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_S = 10.0


def emit_json(value: Any, pretty: bool = True) -> None:
    """Print one JSON value on stdout; what json does not know (paths, dtypes) as text."""
    print(json.dumps(value, indent=2 if pretty else None, default=str))


def colour(stream: Any = None) -> bool:
    """Whether to write escape codes: a terminal, and NO_COLOR unset or empty (no-color.org)."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def console(stderr: bool = False) -> Console:
    """A rich console that is plain text in a pipe, at a width that tables fit (120 columns where unknown)."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    plain = not colour(stream)
    width = None if stream.isatty() else 120
    # emoji: names such as tiny:llama: are names
    terminal = False if plain else None
    return Console(file=stream, no_color=plain, force_terminal=terminal, width=width, highlight=False, emoji=False)


@contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A sticky bar with the time left, on stderr; where stderr is no terminal, a line every ten seconds.

    Gives ``step(done, total, what)``.
    """
    if quiet:
        yield lambda done, total, what: None
        return
    if not colour(sys.stderr):
        yield _lines(title)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)


@contextmanager
def going_on(state: Path) -> Iterator[None]:
    """Where Ctrl-C ends what keeps its state in ``state``, say so."""
    try:
        yield
    except KeyboardInterrupt:
        if state.exists():
            print(f"what was finished is in {state}; the same command goes on from there", file=sys.stderr)
        raise


def _lines(title: str) -> Callable[[int, int, str], None]:
    last = time.monotonic()

    def step(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            print(f"{title}: {done} of {total} {what}".rstrip(), file=sys.stderr)

    return step
