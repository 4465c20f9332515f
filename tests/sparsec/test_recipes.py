"""The recipes in ``examples/recipes``: each runs on a two-block model, reaches what it asks for, and loads again."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.cli import run
from sparsec.errors import SparsecError
from sparsec.models import need_transformers
from sparsec.passes.masks import METHODS
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.recipe import Calibration, Recipe
from sparsec.recipe_file import parse_yaml
from sparsec.recipe_steps import Step
from sparsec.sparsify import Report
from sparsec.tiny import tiny_model

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SMALLER: dict[str, dict[str, Any]] = {  # so that a test takes seconds; everything else is run as it is written
    "bonsai": {"samples": 12, "fraction": 0.1},
    "loraprune": {"steps": 20},
    "time": {"target": "reference"},  # its fixed costs: the same plan on every machine
    "dejavu": {"epochs": 2},
    "shadowllm": {"epochs": 2},
}
QUICK = ["--calibration", "{samples: 16, seqlen: 96}", "--no-eval", "--no-explain"]
STRUCTURE = ("bonsai", "loraprune", "slicegpt")
GATES = [p.stem for p in RECIPES if any(step.role == "gate" for step in Recipe.load(p).steps)]


def text(size: int = 20_000) -> str:
    chance = random.Random(0)
    words = ("sparse", "dense", "weight", "layer", "block", "kernel", "zero", "mask")
    return " ".join(chance.choice(words) for _ in range(size // 5))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(text(100_000))
    return path


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model_for(name: str) -> Any:
    """Two blocks; wide enough that zeros gain time where time is what is asked for."""
    if name != "time":
        return tiny_model("tiny:llama").model
    transformers = need_transformers("the test")
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, num_key_value_heads=2, **shape))


def quick(path: Path) -> Recipe:
    recipe = Recipe.load(path)
    steps = [step.model_copy(update=SMALLER.get(step.method, {})) for step in recipe.steps]
    samples = 64 if path.stem == "time" else 16  # eight tokens for each in-feature
    return recipe.model_copy(update={"steps": tuple(steps), "calibration": Calibration(samples=samples, seqlen=96)})


@dataclass(frozen=True)
class Kept:
    """How many weights a pattern may keep, counted the slow way: ``most`` in any group, ``columns`` in any V rows."""

    step: Step

    def holds(self, weight: torch.Tensor) -> bool:
        pattern = MaskPattern.parse(self.step.pattern)
        kept = weight != 0
        n, k = kept.shape
        if pattern.kind == "nm" and self.step.outliers is None:
            most, m = pattern.params
            return all(int(kept[:, j : j + m].sum(1).max()) <= most for j in range(0, k, m))
        if pattern.kind == "nm":
            most, m = pattern.params
            count, width = map(int, self.step.outliers.split(":"))
            return bool((kept.sum(1) <= k * most // m + -(-k * count // width)).all())
        if pattern.kind == "vnm":
            v, most, m = pattern.params
            tiles = [kept[i : i + v, j : j + m] for i in range(0, n, v) for j in range(0, k, m)]
            return all(int(t.sum(1).max()) <= most and int(t.any(0).sum()) <= 4 for t in tiles)
        if pattern.kind == "block":
            r, c = pattern.params
            tiles = [kept[i : i + r, j : j + c] for i in range(0, n, r) for j in range(0, k, c)]
            return all(bool(t.all()) or not bool(t.any()) for t in tiles)
        return True


def masks(recipe: Recipe) -> Step:
    found = [step for step in recipe.steps if isinstance(step, Step)]
    assert len(found) == 1
    return found[0]


def expected(report: Report) -> float:
    """What the resolved recipe asks of all layers together, outliers kept beside the quota."""
    step = masks(report.recipe)
    layers = [layer for layer in report.layers if layer.method == step.method]
    asked = sum(layer.asked * layer.weights for layer in layers) / sum(layer.weights for layer in layers)
    if step.outliers is None:
        return asked
    count, width = map(int, step.outliers.split(":"))
    return asked - count / width


def test_every_method_has_a_recipe() -> None:
    assert {step.method for path in RECIPES for step in Recipe.load(path).steps} == set(METHODS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is_for(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert 40 < len(lines[0]) <= 120
    assert len(lines) <= 20
    assert path.name.isascii()


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem not in (*STRUCTURE, *GATES)], ids=lambda path: path.stem)
def test_a_recipe_reaches_its_sparsity_in_its_pattern_and_loads_again(path: Path, calibration: Path) -> None:
    model = model_for(path.stem)
    report = sparsec.sparsify(model, quick(path), calibration, progress=False)
    asked = 0.7 if path.stem == "time" else expected(report)
    assert report.achieved == pytest.approx(asked, abs=0.05 if path.stem == "time" else 0.008)
    assert len({layer.name for layer in report.layers}) == 14
    for layer in report.layers:
        assert Kept(masks(report.recipe)).holds(model.get_submodule(layer.name).weight), layer.name
    assert_loads(model, report)


@pytest.mark.parametrize("name", GATES)
def test_a_recipe_of_gates_reaches_its_share_and_loads_again(name: str, calibration: Path) -> None:
    model = model_for(name)
    report = sparsec.sparsify(model, quick(FOLDER / f"{name}.yaml"), calibration, progress=False)
    gates = [row for row in report.gates if row.achieved is not None and row.asked is not None]
    assert gates or name in ("sparseinfer", "qsparse")
    assert all(row.achieved == pytest.approx(row.asked, abs=0.1) for row in gates)
    folder = sparsec.save(model, "out", report)
    loaded = model_for(name)
    sparsec.load(folder, loaded)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert Recipe.load(folder / "recipe.yaml").sha == report.recipe.sha


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_structured_recipe_leaves_a_smaller_model_that_loads_again(name: str, calibration: Path) -> None:
    model = model_for(name)
    report = sparsec.sparsify(model, quick(FOLDER / f"{name}.yaml"), calibration, progress=False)
    done = report.structured
    assert done is not None
    assert done.unsaved == ""
    assert 0.1 < report.achieved < 0.4
    assert done.parameters_before == sum(p.numel() for p in model_for(name).parameters())
    kept = sum(row.parameters_after for row in done.rows) / sum(row.parameters_before for row in done.rows)
    assert kept < 0.9
    assert sum(p.numel() for p in model.parameters()) == done.parameters_after
    if done.as_zeros:
        dense = model_for(name)
        gone = sum(
            int((p == 0).sum()) - int((q == 0).sum())
            for p, q in zip(model.parameters(), dense.parameters(), strict=True)
        )
        assert gone == sum(row.parameters_before - row.parameters_after for row in done.rows)
    else:
        assert done.parameters_after < done.parameters_before
    assert_loads(model, report)


def assert_loads(model: nn.Module, report: Report) -> None:
    """The saved folder is a plain checkpoint, and gives the same weights."""
    folder = sparsec.save(model, "out", report)
    loaded = need_transformers("the test").AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config"} & set(config)
    assert Recipe.load(folder / "recipe.yaml").sha == report.recipe.sha


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(["sparsify", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", ["suite-8-16", "llm-compressor", "owl-wanda"])
def test_a_recipe_runs_over_the_command_line(
    capsys: pytest.CaptureFixture[str], name: str, calibration: Path, tmp_path: Path
) -> None:
    words = ["--recipe", str(FOLDER / f"{name}.yaml"), "--data", str(calibration)]
    code, out, err = said(capsys, "tiny:llama", *words, *QUICK, "-o", "out")
    assert code == 0, err
    assert "14 layers" in out
    loaded = need_transformers("the test").AutoModelForCausalLM.from_pretrained("out")
    steps = Recipe.load(FOLDER / f"{name}.yaml").steps
    resolved = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert [step.method for step in resolved.steps] == [step.method for step in steps]
    assert (resolved.calibration.samples, resolved.calibration.seqlen) == (16, 96)
    assert Kept(masks(resolved)).holds(loaded.model.layers[1].mlp.down_proj.weight)


def test_the_text_of_a_flag_leaves_the_calibration_of_the_file(
    capsys: pytest.CaptureFixture[str], calibration: Path
) -> None:
    Path("r.yaml").write_text("{method: wanda, calibration: {samples: 16, seqlen: 96, seed: 3}}")
    code, out, _ = said(
        capsys, "tiny:llama", "--recipe", "r.yaml", "--data", str(calibration), "--dry-run", "--json"
    )  # fmt: skip
    assert code == 0
    told = json.loads(out)["recipe"]["calibration"]
    assert (told["samples"], told["seqlen"], told["seed"]) == (16, 96, 3)
    assert told["dataset"] == str(calibration)


def test_an_option_of_a_method_may_be_called_steps(capsys: pytest.CaptureFixture[str]) -> None:
    one = Recipe.load({"method": "proximal", "pattern": "2:4", "steps": 50})
    assert one.steps[0].method_object().steps == 50
    assert Recipe.load({"steps": [{"method": "proximal", "pattern": "2:4", "steps": 50}]}).sha == one.sha
    Path("r.yaml").write_text("{method: proximal, pattern: 2:4, steps: 50}")
    words = ["tiny:llama", "--recipe", "r.yaml", "--set", "steps=7", "--dry-run", "--json"]
    code, out, _ = said(capsys, *words)
    assert code == 0
    assert json.loads(out)["recipe"]["steps"][0]["steps"] == 7


# (recipe, text of the data file or None for a missing one, flags, words of the sentence)
BAD: dict[str, tuple[str, str | None, str, str]] = {
    "unknown key": ("{method: wanda, sparsty: 0.5}", "", "", "did you mean 'sparsity'"),
    "unknown method": ("{method: wnda}", "", "", "did you mean 'wanda'"),
    "unknown method in steps": ("[owl, wnda]", "", "", "did you mean 'wanda'"),
    "unknown pattern": ("{method: wanda, pattern: 2to4}", "", "", "is not a pattern"),
    "no such layer": ("{method: wanda, targets: ['*.q_prj']}", "", "", "matches no layer of this model"),
    "no such override": ("{method: wanda, overrides: {'*.q_prj': skip}}", "", "", "matches no layer of this model"),
    "sparsity of one": ("{method: wanda, sparsity: 1.0}", "", "", "less than 1"),
    "negative sparsity": ("[{method: owl, sparsity: -0.1}, wanda]", "", "", "greater than or equal to 0"),
    "no text": ("wanda", "", "", "holds no text"),
    "short text": ("{method: wanda, calibration: {seqlen: 96}}", "too short", "", "9 tokens, and one segment takes 96"),
    "missing text": ("wanda", None, "", "there is no such file"),
    "allocator last": ("[wanda, owl]", "", "", "owl must be followed by the step of a mask method"),
    "allocator of what was rewritten": ("[owl, equalize, wanda]", "", "", "put it first"),
    "two allocators": ("[owl, besa, wanda]", "", "", "both allocate"),
    "repair first": ("[variance, wanda]", "", "", "put it after the step of a mask method"),
    "masks and heads": ("[bonsai, wanda]", "", "", "stands alone"),
    "heads after rewrites": ("[permute, bonsai]", "", "", "has no use before it"),
    "outliers and blocks": ("{method: wanda, pattern: block:4x4, outliers: 0.01}", "", "", "cannot go with block:4x4"),
    "outliers and V:N:M": ("{method: wanda, pattern: '64:2:16', outliers: 4:256}", "", "", "cannot go with 64:2:16"),
    "outliers that are all": ("{method: wanda, outliers: 256:256}", "", "", "keeps 256 of 256"),
    "proximal 4:8": ("{method: proximal, pattern: 4:8}", "", "", "makes 2:4 only, and the pattern is 4:8"),
    "proximal without a pattern": ("proximal", "", "", "makes 2:4 only, and the pattern is unstructured"),
    "negative memory": ("wanda", "", "--max-memory -1", "0 or more"),
    "quantization": ("{GPTQModifier: {scheme: W4A16}}", "", "", "GPTQModifier quantizes"),
    "a flag for theirs": ("{WandaPruningModifier: {sparsity: 0.5}}", "", "--sparsity 0.6", "could mean any step"),
    "an empty file": ("", "", "", "not a recipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_recipe_or_text_is_one_sentence_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path
) -> None:
    recipe, data, flags, words = BAD[name]
    Path("r.yaml").write_text(recipe)
    if data is not None:
        Path("text.txt").write_text(data)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = said(
        capsys, "tiny:llama", "--recipe", "r.yaml", "--data", "text.txt", "-o", "out", *flags.split()
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [n for n in BAD if not BAD[n][2]])
def test_a_wrong_recipe_or_text_leaves_the_model_as_it_was(name: str) -> None:
    recipe, data, _, words = BAD[name]
    if data is not None:
        Path("text.txt").write_text(data)
    model = tiny_model("tiny:llama").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    read = parse_yaml(recipe)
    with pytest.raises(SparsecError) as raised:
        sparsec.sparsify(model, read, Path("text.txt"), progress=False)
    assert words in str(raised.value) or name == "an empty file"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_data_that_is_missing_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "tiny:llama", "--method", "wanda", "-o", "out")
    assert code == 2
    assert "wanda needs calibration data" in err
