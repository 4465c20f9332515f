"""``sparsec sparsify`` and ``sparsec methods`` as a user runs them: exit codes, one sentence, files."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsec.cli import methods as methods_command
from sparsec.cli import run
from sparsec.cli import sparsify as sparsify_command
from sparsec.cli.sparsify import merged
from sparsec.errors import BadRecipe
from sparsec.passes.masks import METHODS
from sparsec.recipe_file import parse_yaml

MODEL = "tiny:llama"


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command; exit code, stdout, stderr."""
    code = run(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def ask(flags: str) -> list[str]:
    return ["sparsify", MODEL, *flags.split()]


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith("sparsec")  # those hold how long it took
    }


def test_a_pruned_model_is_written_and_the_saved_recipe_writes_the_same_bytes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = said(capsys, *ask("--method magnitude --sparsity 0.5 --pattern 2:4 -o one"))
    assert code == 0
    assert "50.0% zero" in out
    assert "next:  sparsec explain one" in out
    assert {"config.json", "model.safetensors", "recipe.yaml", "sparsec.json"} <= {
        p.name for p in Path("one").iterdir()
    }
    assert said(capsys, "sparsify", MODEL, "--recipe", "one/recipe.yaml", "-o", "two")[0] == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_output_folder_keeps_what_another_recipe_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ask("--method magnitude -o out")
    assert said(capsys, *words)[0] == 0
    before = files(tmp_path / "out")
    code, out, err = said(capsys, *words, "--sparsity", "0.7")
    assert (code, out) == (2, "")
    assert "already holds a model pruned with another recipe" in err
    assert said(capsys, *words)[0] == 0  # the same again
    assert files(tmp_path / "out") == before
    assert said(capsys, *words, "--sparsity", "0.7", "--overwrite")[0] == 0
    assert files(tmp_path / "out") != before


def test_a_dry_run_touches_no_file_and_prints_layer_step_pattern(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("r.yaml").write_text(
        "version: 1\nsteps:\n- {method: magnitude, pattern: 2:4, targets: [q_proj]}\n"
        "- {method: magnitude, sparsity: 0.8, targets: ['*.mlp.*'], scope: global}\n"
    )
    before = files(tmp_path)
    code, out, err = said(capsys, "sparsify", MODEL, "--recipe", "r.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert files(tmp_path) == before
    row = next(line for line in out.splitlines() if "q_proj" in line)
    assert "1 magnitude" in row
    assert "2:4" in row
    assert any(
        "2 magnitude" in line and "unstructured, global" in line and "80.0%" in line for line in out.splitlines()
    )
    assert "kB beside the model" in out
    assert "nothing was changed" in out
    code, out, _ = said(capsys, "sparsify", MODEL, "--recipe", "r.yaml", "--dry-run", "--json")
    forecast = json.loads(out)
    assert {layer["step"] for layer in forecast["layers"]} == {1, 2}
    assert {"scratch_bytes", "seconds", "weights", "recipe"} <= set(forecast)


def test_the_resolved_recipe_is_saved_on_request_and_never_over_another(capsys: pytest.CaptureFixture[str]) -> None:
    words = ask("--method magnitude --dry-run --save-recipe r.yaml")
    assert said(capsys, *words)[0] == 0
    recipe = parse_yaml(Path("r.yaml").read_text())
    assert recipe["steps"][0]["sparsity"] == 0.5
    assert recipe["steps"][0]["targets"] == ["Linear"]
    code, _, err = said(capsys, *words)
    assert code == 2
    assert "'r.yaml' already holds something else" in err


def test_flags_win_over_the_file_and_underscores_are_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text("{method: magnitude, pattern: 2:4, sparsity: 0.5, targets: [Linear], seed: 1}")
    flags = ["--pattern", "1:4", "--targets", "q_proj,k_proj", "--targets", "re:.*(o|v)_proj", "--seed", "7"]
    flags += ["--ignore", "v_proj", "--overrides", '{"k_proj": {pattern: 8:16}}', "--calibration", "{samples: 5}"]
    code, out, _ = said(capsys, "sparsify", MODEL, "--recipe", "r.yaml", *flags, "--dry_run", "--json")
    assert code == 0
    plan = json.loads(out)
    patterns = {layer["name"].rpartition(".")[2]: layer["pattern"] for layer in plan["layers"]}
    assert patterns == {"q_proj": "1:4", "k_proj": "8:16", "o_proj": "1:4"}
    assert plan["recipe"]["seed"] == 7
    assert plan["recipe"]["calibration"]["samples"] == 5
    assert plan["recipe"]["steps"][0]["sparsity"] == 0.75


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("magnitude", {"sparsity": 0.3}, {"method": "magnitude", "sparsity": 0.3}),
        ("[magnitude]", {"sparsity": 0.3}, {"steps": [{"method": "magnitude", "sparsity": 0.3}]}),
        ("[magnitude, magnitude]", {"seed": 3}, {"steps": ["magnitude", "magnitude"], "seed": 3}),
        ("{method: magnitude, mask_structure: 2:4}", {"pattern": "1:4"}, {"method": "magnitude", "pattern": "1:4"}),
    ],
)
def test_flags_go_into_the_one_step_of_a_file(text: str, flags: dict[str, Any], expected: dict[str, Any]) -> None:
    Path("r.yaml").write_text(text)
    assert merged(Path("r.yaml"), flags) == expected


@pytest.mark.parametrize(("text", "words"), [("[magnitude, magnitude]", "any step"), ("5", "not a recipe")])
def test_a_flag_that_could_mean_two_steps_is_refused(text: str, words: str) -> None:
    Path("r.yaml").write_text(text)
    with pytest.raises(BadRecipe, match=words):
        merged(Path("r.yaml"), {"sparsity": 0.3})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--method magntude -o o", "did you mean 'magnitude'"),
        ("--method magnitude --targets *.q_prj -o o", "q_proj"),
        ("--method magnitude --ignore Linear -o o", "leaves no layer to prune"),
        ("--method magnitude --sparsity 1.5 -o o", "must be less than 1"),
        ("--method magnitude --sparsity half -o o", "'--sparsity'"),
        ("--method magnitude --pattern 4:2 -o o", "prunes nothing"),
        ("--method magnitude --scope column -o o", "'layer', 'global' or 'row'"),
        ("--method magnitude --sparsity 0.7 --pattern 2:4 -o o", "means sparsity 0.5"),
        ("--method magnitude --set damp=1 -o o", "unknown key 'damp'"),
        ("--method magnitude --set damp -o o", "KEY=VALUE"),
        ("--method magnitude --overrides {a: -o o", "--overrides, line 1"),
        ("--method magnitude --calibration {samples: -o o", "--calibration, line 1"),
        ("--method magnitude", "--dry-run"),
        ("-o o", "no method was named"),
        ("--recipe nope.yaml -o o", "nope.yaml"),
        ("--recpe r.yaml -o o", "--recipe"),
    ],
)
def test_bad_input_is_exit_code_two_and_one_sentence(
    capsys: pytest.CaptureFixture[str], words: str, sentence: str, tmp_path: Path
) -> None:
    code, out, err = said(capsys, *ask(words))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "sparsify", "./nowhere", "--method", "magnitude", "-o", "o")
    assert code == 2
    assert "nowhere" in err


def test_json_is_alone_on_stdout_and_a_pipe_has_no_escape_codes(tmp_path: Path) -> None:
    words = ask("--method magnitude --sparsity 0.6 --json -o out")
    done = subprocess.run(
        [sys.executable, "-m", "sparsec", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert report["output"] == "out"
    assert "\x1b" not in done.stdout + done.stderr


def test_methods_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "methods")
    assert code == 0
    for name in METHODS:
        assert any(line.startswith(name) for line in out.splitlines())
    assert "no data" in out
    told = json.loads(said(capsys, "methods", "--json")[1])
    assert [x["name"] for x in told] == list(METHODS)
    assert "Han et al., 2015" in said(capsys, "methods", "magnitude")[1]


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    one = json.loads(said(capsys, "methods", "magnitude", "--schema")[1])
    assert one["properties"]["method"]["const"] == "magnitude"
    assert set(json.loads(said(capsys, "methods", "--schema")[1])["$defs"]) >= set(METHODS)
    code, _, err = said(capsys, "methods", "magnitud", "--schema")
    assert code == 2
    assert "did you mean 'magnitude'" in err


@pytest.mark.parametrize("line", [*sparsify_command.EXAMPLE.splitlines(), *methods_command.EXAMPLE.splitlines()])
def test_the_examples_of_the_help_run(capsys: pytest.CaptureFixture[str], line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "sparsec"
    assert said(capsys, *words)[0] == 0


@pytest.mark.parametrize("name", ["sparsify", "methods"])
def test_help_shows_the_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = said(capsys, name, "--help")
    assert code == 0
    assert "Example:" in out
    assert f"sparsec {name}" in out
