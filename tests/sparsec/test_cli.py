"""The command line itself: help, mistakes, exit codes, machine mode. What commands do is tested elsewhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer

from sparsec import cli
from sparsec.errors import ModelNotFound, UnknownOption

# `demo` runs in test_demo, in less time than its example takes.
EXAMPLES_RUN_HERE = [name for name in cli.COMMANDS if name != "demo"]


def sparsec(*words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "sparsec", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, env=environment)


@pytest.fixture
def a_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Put a function where a command's module would be, under the name ``probe``."""

    def put(function: Callable[..., None]) -> None:
        module = types.ModuleType("sparsec.cli.probe")
        module.command = function  # type: ignore[attr-defined]
        function.__module__ = module.__name__
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, "probe": "A probe."})

    return put


def raises(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_an_example_and_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys; from sparsec.cli import run; code = run([sys.argv[1], '--help']); "
        "heavy = [m for m in ('torch', 'transformers', 'matplotlib', 'onnx') if m in sys.modules]; "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"Usage: sparsec {name}" in done.stdout
    assert "Example:\n" in done.stdout
    assert f"    sparsec {name}" in done.stdout.partition("Example:\n")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES_RUN_HERE)
def test_the_example_in_the_help_runs(name: str, tmp_path: Path) -> None:
    module = f"sparsec.cli.{name.replace('-', '_')}"
    example = __import__(module, fromlist=["EXAMPLE"]).EXAMPLE.splitlines()[0]
    done = sparsec(*shlex.split(example)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_no_arguments_print_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparsec 0.")


def test_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["exlpain"]) == 2
    said = capsys.readouterr()
    assert "Did you mean 'explain'?" in said.err
    assert not said.out


@pytest.mark.parametrize("flag", ["--two-words", "--two_words"])
def test_dashes_and_underscores_are_the_same_in_flags(
    flag: str, a_command: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command(two_words: Annotated[int, typer.Option()] = 0) -> None:
        print(two_words + 1)

    a_command(command)
    assert cli.run(["probe", flag, "6"]) == 0
    assert capsys.readouterr().out == "7\n"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ModelNotFound(path="x", why="there is no such folder"), 2, "no model at 'x'"),
        (UnknownOption(key="a", nearest="", known="b"), 2, "unknown option 'a'"),
        (FileNotFoundError(2, "No such file or directory", "r.yaml"), 2, "r.yaml: No such file or directory."),
        (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied."),
        (ZeroDivisionError("division by zero"), 1, "a bug in sparsec (ZeroDivisionError: division by zero)"),
        (KeyboardInterrupt(), 130, "stopped."),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(
    error: BaseException,
    code: int,
    sentence: str,
    a_command: Callable[[Callable[..., None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPARSEC_DEBUG", raising=False)
    a_command(raises(error))
    assert cli.run(["probe"]) == code
    said = capsys.readouterr()
    assert said.err.startswith(f"sparsec: {sentence}")
    assert said.err.count("\n") == 1
    assert not said.out


def test_an_error_that_torch_wrapped_is_still_ours(
    a_command: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = RuntimeError("backend='sparsec' raised: ...")
    wrapped.inner_exception = UnknownOption(key="tunee", nearest="", known="tune")  # type: ignore[attr-defined]
    a_command(raises(wrapped))
    assert cli.run(["probe"]) == 2
    assert "unknown option 'tunee'" in capsys.readouterr().err


def test_debug_shows_the_traceback_before_the_sentence(
    a_command: Callable[[Callable[..., None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSEC_DEBUG", "1")
    a_command(raises(ModelNotFound(path="x", why="there is no such folder")))
    assert cli.run(["probe"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("sparsec: no model at 'x'")


def test_a_command_that_is_not_installed_breaks_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, "absent": "Not there."})
    assert cli.run(["absent"]) == 2
    assert "no command 'absent'" in capsys.readouterr().err
    assert cli.run(["--help"]) == 0
    assert cli.run(["doctor", "--help"]) == 0


def test_a_package_that_a_command_lacks_is_not_taken_for_a_missing_command(
    a_command: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    a_command(raises(ModuleNotFoundError("No module named 'yaml'", name="yaml")))
    assert cli.run(["probe"]) == 1
    assert "No module named 'yaml'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--nope"],
        ["bench"],
        ["bench", "./nowhere"],
        ["bench", "tiny:llama", "-o", "xml"],
        ["bench", "tiny:llama", "--compare", "nowhere.json"],
        ["bench", "tiny:llama", "-t", "0"],
        ["bench", "tiny:llama", "-r", "0"],
        ["bench", "tiny:llama", "--tune", "loud"],
        ["bench", "tiny:llama", "--formats", "bitmp"],
        ["eval"],
        ["eval", "tiny:llma"],
        ["eval", "tiny:llama", "--text", "nowhere.txt"],
        ["kernels", "--isa", "sse"],
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_code_2_and_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("sparsec: ")
    assert not said.out


@pytest.mark.parametrize("words", [["doctor", "--quick", "--json"], ["kernels", "--json"]], ids=" ".join)
def test_json_is_all_that_stdout_holds(words: list[str]) -> None:
    done = sparsec(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["kernels"], ["nope"]], ids=" ".join)
@pytest.mark.parametrize("colour", [{"NO_COLOR": "1"}, {"TERM": "xterm-256color"}], ids=["NO_COLOR", "pipe"])
def test_no_escape_codes_in_a_pipe_or_with_no_color(words: list[str], colour: dict[str, str]) -> None:
    done = sparsec(*words, **colour)
    assert "\x1b" not in done.stdout + done.stderr


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = f"{shlex.quote(sys.executable)} -m sparsec kernels --isa all | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_warning_is_a_sentence_without_a_place_in_our_code(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words to calibrate on. " * 20)
    words = ["sparsify", "tiny:llama", "--method", "sparsegpt", "--data", "text.txt", "-o", "out", "--no-eval"]
    words += ["--calibration", "{samples: 1, seqlen: 32}"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsec", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "calibration tokens are few" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: 32 calibration tokens are few")
