"""Which layers a recipe means. One matcher for ``targets``, ``ignore`` and ``overrides``, four spellings:

  class    ``Linear``                  modules of that class or a subclass of it
  bare     ``lm_head``, ``q_proj``     the last component of the name (``language_model.lm_head`` too)
  glob     ``*.layers.[01].*``         the whole name; ``*`` crosses dots; any of ``* ? [`` makes a glob
  exact    ``model.layers.0.mlp.up``   a dotted name without wildcards
  regex    ``re:model\\.(a|b)\\..*``     ``re.fullmatch`` on the whole name

Where several entries of ``overrides`` match, the most specific decides: exact, bare, glob, regex, class; among equals
the last written. ``ignore`` beats ``targets``. The whole model, where it is one layer, has the name "".
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from sparsec.errors import BadRecipe

EXACT, BARE, GLOB, REGEX, CLASS = range(5)  # the most specific first


def match(entry: str, name: str, cls: type) -> int | None:
    """How ``entry`` matches a module (EXACT to CLASS), or None. Raises BadRecipe for a regex that does not compile."""
    if entry.startswith("re:"):
        return REGEX if _regex(entry).fullmatch(name) else None
    if entry == name:
        return EXACT
    if any(c in entry for c in "*?["):
        return GLOB if fnmatch.fnmatchcase(name, entry) else None
    if "." in entry:
        return None
    if entry == name.rpartition(".")[2]:
        return BARE
    return CLASS if any(c.__name__ == entry for c in cls.__mro__) else None


def matching(entry: str, modules: Mapping[str, type]) -> list[str]:
    """The names that ``entry`` matches, in the order of ``modules`` (name -> class)."""
    return [name for name, cls in modules.items() if match(entry, name, cls) is not None]


def winner(entries: Sequence[str], name: str, cls: type) -> str | None:
    """The entry that decides for a module: the most specific, then the last written; None where none matches."""
    ranks = [(-rank, place) for place, e in enumerate(entries) if (rank := match(e, name, cls)) is not None]
    return entries[max(ranks)[1]] if ranks else None


def nearest(entry: str, modules: Mapping[str, type], count: int = 3) -> list[str]:
    """The ``count`` names most like ``entry``, each from another kind of place: of numbered twins only the first."""
    core = re.sub(r"^re:|[\\^$()*?\[\]|+]", "", entry).strip(".")
    first: dict[str, str] = {}
    for name in modules:
        first.setdefault(re.sub(r"\d+", "#", name), name)
    classes = dict.fromkeys(c.__name__ for c in modules.values())
    candidates = [*first.values(), *(classes if "." not in core else ())]
    return sorted(candidates, key=lambda name: -_likeness(core, name))[:count]


def _likeness(core: str, name: str) -> float:
    whole = difflib.SequenceMatcher(None, core, name).ratio()
    return max(whole, difflib.SequenceMatcher(None, core.rpartition(".")[2], name.rpartition(".")[2]).ratio())


@lru_cache(maxsize=256)
def _regex(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise BadRecipe(detail=f"{entry!r} is not a regular expression ({error})") from None


def unmatched(entries: Iterable[str], modules: Mapping[str, type]) -> list[str]:
    """The entries that match nothing."""
    return [entry for entry in entries if not matching(entry, modules)]
