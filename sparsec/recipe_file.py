"""Recipe files: YAML, JSON or TOML text in, plain dicts and lists out; and back to YAML.

YAML is read as 1.2 reads scalars. PyYAML follows 1.1, where ``2:4`` is the number 124 (base 60), ``off`` is False,
``1e-5`` is a string, ``010`` is 8 and ``2024-01-01`` a date. Here ``2:4`` and ``off`` are texts, ``1e-5`` a number.
A key that is written twice is an error, not the last one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from sparsec.errors import BadRecipe, MissingPackage

SUFFIXES = (".yaml", ".yml", ".json", ".toml")

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar types of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own layout)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            scalar = isinstance(key, yaml.ScalarNode)
            if not scalar or key.value in seen:
                what = f"the key {key.value!r} is there twice" if scalar else "a key must be a text"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else."""


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):  # the first match decides
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In double quotes where it has one of Unicode's other line breaks, which PyYAML folds into blanks otherwise."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def parse_yaml(text: str, where: str = "the text") -> Any:
    """The value of one YAML document. Raises BadRecipe with the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadRecipe(detail=f"{where}{line}: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise BadRecipe(detail=f"{where}: {str(error).splitlines()[0]}") from None


def read(path: Path) -> Any:
    """The value in a recipe file, by its suffix (YAML where there is none). Raises BadRecipe."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(detail=f"{str(path)!r} cannot be read ({getattr(error, 'strerror', '') or error})") from None
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise BadRecipe(detail=f"{str(path)!r}: {error}") from None
    return _toml(text, path) if path.suffix == ".toml" else parse_yaml(text, repr(str(path)))


def _toml(text: str, path: Path) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise MissingPackage(
            feature="a TOML recipe", package="tomllib of Python 3.11", run="the same as YAML"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadRecipe(detail=f"{str(path)!r}: {error}") from None


def to_yaml(value: Any) -> str:
    """YAML in the order given; texts like 2:4 are quoted, so that 1.1 readers see them as they are too."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)
