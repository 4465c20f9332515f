"""The shape of the repository: its tree, who may import whom, how long a file may be, what importing costs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsec
from sparsec import errors

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("sparsec", "passes", "codegen", "targets", "benchmarks", "examples")
MAPPED = ("passes", "codegen", "targets")

TREE = {
    *(".ci", ".gitignore", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"),
    *("benchmarks", "codegen", "examples", "passes", "sparsec", "targets", "tests"),
}
MADE_BY_TOOLS = re.compile(
    r"\.git|\.venv|\.mypy_cache|\.ruff_cache|\.pytest_cache|\.hypothesis|__pycache__|.*\.egg-info|build|dist|"
    r"demo_report|bench_report|\.stamps|\.vscode|\.idea|\.coverage|\.DS_Store"
)

BASE = {
    f"sparsec.{m}" for m in ("errors", "options", "efforts", "facts", "formats", "grid", "records", "timing", "cache")
}
COMPAT = "sparsec.compat"

# Longer than the limits, each with the reason why it is not split.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

# Files besides sparsec/compat.py that may name a private torch module, each with the reason.
PRIVATE_TORCH = {
    "sparsec/options.py": "checks Inductor's own option names; the base layer cannot import compat",
}


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders or CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if not any((ROOT / p).is_symlink() for p in inside.parents):
                yield inside


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("sparsec", *parts) if parts[0] in MAPPED else parts)


def syntax(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def is_module(name: str) -> bool:
    parts = name.split(".")
    where = ROOT.joinpath(*(parts[1:] if len(parts) > 1 and parts[1] in MAPPED else parts))
    return where.with_suffix(".py").exists() or where.is_dir()


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in the file it does so."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inner] if "sparsec" in node.module else []
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "sparsec")


def package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def may_import(importer: str, imported_module: str) -> bool:
    """The layers: base < compat < targets < passes, codegen (never each other) < the front."""
    home, wanted = package(importer), package(imported_module)
    if importer in BASE:
        return imported_module in BASE
    if importer == COMPAT:
        return imported_module in BASE
    below = BASE | {COMPAT}
    if home == "sparsec.targets":
        return imported_module in below or wanted == home
    if home in ("sparsec.passes", "sparsec.codegen"):
        return imported_module in below or wanted in (home, "sparsec.targets")
    return True


@pytest.mark.parametrize("path", list(python_files("sparsec", *MAPPED)), ids=str)
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    importer = module_of(path)
    wrong = sorted({name for name in imported(path) if not may_import(importer, name)})
    assert not wrong, f"{importer} must not import {wrong}"


@pytest.mark.parametrize(
    ("importer", "wanted", "allowed"),
    [
        ("sparsec.facts", "sparsec.formats", True),
        ("sparsec.facts", "sparsec.pipeline", False),
        ("sparsec.passes.decide", "sparsec.codegen.spec", False),
        ("sparsec.codegen.cpp.nm", "sparsec.passes.decide", False),
        ("sparsec.targets.base", "sparsec.passes", False),
        ("sparsec.passes.decide", "sparsec.targets.base", True),
        ("sparsec.pipeline", "sparsec.codegen.build", True),
    ],
)
def test_the_import_rule_knows_the_layers(importer: str, wanted: str, allowed: bool) -> None:
    assert may_import(importer, wanted) is allowed


@pytest.mark.parametrize("path", list(python_files(*CODE_FOLDERS, "tests")), ids=str)
def test_imports_are_absolute_and_use_the_installed_names(path: Path) -> None:
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert (node.module or "").split(".")[0] not in MAPPED, f"{path}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & set(MAPPED), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", list(python_files()), ids=str)
def test_files_and_functions_stay_short(path: Path) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= 400 or str(path) in LONG_FILES, f"{path} has {lines} lines; look for two jobs in it"
    for node in ast.walk(syntax(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.body[0].lineno + 1  # a command's options are no work to read
            assert length <= 60 or f"{path}:{node.name}" in LONG_FUNCTIONS, f"{path}:{node.name} has {length} lines"


def private_torch(path: Path) -> set[str]:
    """Private torch modules and attributes (``torch._dynamo``, ``torch.fx._x``) that a file names in code."""
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found |= {n for n in names if re.match(r"torch(\.\w+)*\._[a-z]", n)}
    return found


@pytest.mark.parametrize("path", list(python_files()), ids=str)
def test_private_torch_is_used_only_in_compat(path: Path) -> None:
    if str(path) == "sparsec/compat.py" or str(path) in PRIVATE_TORCH:
        return
    assert not private_torch(path), f"move to sparsec/compat.py: {private_torch(path)}"


def test_exceptions_to_the_rules_are_still_needed() -> None:
    for name in [*LONG_FILES, *PRIVATE_TORCH, *(n.partition(":")[0] for n in LONG_FUNCTIONS)]:
        assert (ROOT / name).exists(), f"{name} is gone; remove its exception"
    for name in PRIVATE_TORCH:
        assert private_torch(Path(name)), f"{name} no longer needs its exception"


def test_the_top_level_tree_is_the_documented_one() -> None:
    there = {p.name for p in ROOT.iterdir() if not MADE_BY_TOOLS.fullmatch(p.name)}
    assert there == TREE


@pytest.mark.parametrize("name", MAPPED)
def test_links_let_static_tools_see_the_mapped_folders(name: str) -> None:
    link = ROOT / "sparsec" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def project_table(name: str) -> str:
    """The text of one ``[table]`` of pyproject.toml (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.partition(f"[{name}]\n")[2].partition("\n[")[0]


def test_every_package_folder_is_installed() -> None:
    folders = {module_of(p) for p in python_files("sparsec", *MAPPED) if p.name == "__init__.py"}
    listed = set(re.findall(r'^\s+"(sparsec[\w.]*)",$', project_table("tool.setuptools"), re.M))
    assert listed == folders


def test_every_folder_with_python_is_a_package() -> None:
    for path in python_files("sparsec", *MAPPED):
        assert (ROOT / path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_tests_have_unique_names_and_no_packages() -> None:
    paths = list(python_files("tests"))
    names = [p.name for p in paths if p.name != "conftest.py"]
    assert len(names) == len(set(names))
    assert not [p for p in paths if p.name == "__init__.py"]


def test_the_public_surface_is_exact() -> None:
    assert sparsec.__all__ == sorted(sparsec.__all__)
    assert len(set(sparsec.__all__)) == len(sparsec.__all__)
    assert dir(sparsec) == sparsec.__all__
    for name in sparsec.__all__:
        assert getattr(sparsec, name) is not None
    public = {n for n in vars(sparsec) if not n.startswith("_") and not isinstance(vars(sparsec)[n], type(sys))}
    assert public - set(sparsec.__all__) <= {"annotations", "TYPE_CHECKING", "Any"}


def test_registered_backend_and_command_resolve() -> None:
    for table in ("project.entry-points.torch_dynamo_backends", "project.scripts"):
        module, _, name = re.findall(r'= "([\w.:]+)"', project_table(table))[0].partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def registered() -> list[tuple[str, str]]:
    """(table, "module:attribute") for every name of every table."""
    from sparsec.cli import COMMANDS
    from sparsec.codegen.cpp import FAMILIES, INTEGER_FAMILIES, LOOP_FAMILIES
    from sparsec.passes.masks import METHODS
    from sparsec.targets import TARGETS

    return [
        *(("METHODS", place) for place in METHODS.values()),
        *(("FAMILIES", place) for place in FAMILIES.values()),
        *(("INTEGER_FAMILIES", place) for place in set(INTEGER_FAMILIES.values())),
        *(("LOOP_FAMILIES", place) for places in LOOP_FAMILIES.values() for place in set(places.values())),
        *(("TARGETS", place[0]) for place in TARGETS.values()),
        *(("COMMANDS", f"sparsec.cli.{name.replace('-', '_')}:command") for name in COMMANDS),
    ]


@pytest.mark.parametrize(("table", "place"), registered())
def test_every_registered_name_resolves(table: str, place: str) -> None:
    module, _, name = place.partition(":")
    assert getattr(importlib.import_module(module), name) is not None


def test_every_method_pass_and_kernel_file_is_registered() -> None:
    from sparsec.passes.rewrite import RULES

    modules = {place.partition(":")[0] for _, place in registered()}
    methods = {module_of(p) for p in python_files("passes/masks") if re.search(r"^    needs: ClassVar", read(p), re.M)}
    rules = {module_of(p) for p in python_files("passes/rewrite") if re.search(r"^class \w+Rule:", read(p), re.M)}
    families = {module_of(p) for p in python_files("codegen/cpp") if re.search(r"^FAMILY\b", read(p), re.M)}
    assert {m for m in methods if not m.endswith(".contract")} <= modules
    assert families <= modules
    assert rules == {type(rule).__module__ for rule in RULES}


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_importing_sparsec_imports_nothing_heavy() -> None:
    heavy = ("torch", "triton", "onnx", "onnxruntime", "onnxscript", "transformers", "matplotlib", "pydantic")
    done = run_python(f"import sparsec, sys; print([m for m in {heavy!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_command_line_starts_without_torch() -> None:
    done = run_python("import sparsec.cli, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_folder_has_one_identity(name: str) -> None:
    done = run_python(f"import {name}")
    assert done.returncode != 0
    assert f"import sparsec.{name}, not {name}" in done.stderr


def error_classes() -> list[type]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, (errors.SparsecError, Warning))]
    return [c for c in found if c.__module__ == errors.__name__]


def test_error_codes_are_unique_and_drawn_in_the_docstring() -> None:
    codes = [c.code for c in error_classes() if issubclass(c, errors.SparsecError)]
    assert len(set(codes)) == len(codes)
    for c in error_classes():
        assert c.__name__ in (errors.__doc__ or ""), f"{c.__name__} is missing from the tree in errors.py"


def test_every_mistake_has_a_test_that_names_it() -> None:
    here = Path(__file__).name
    tests = "\n".join((ROOT / p).read_text(encoding="utf-8") for p in python_files("tests") if p.name != here)
    leaves = [c.__name__ for c in error_classes() if not c.__subclasses__()]
    assert not [name for name in leaves if not re.search(rf"\b{name}\b", tests)]


def test_nothing_names_a_path_of_some_machine() -> None:
    wrong = re.compile(r"/(?:work|root|home/\w+|Users/\w+|tmp/\w+)/")
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT)
        if any(MADE_BY_TOOLS.fullmatch(part) for part in inside.parts) or not path.is_file() or path.suffix == ".so":
            continue
        found = wrong.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert not found, f"{inside} names {found.group() if found else ''}"
