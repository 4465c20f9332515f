"""Dry runs: every step of a recipe with its modules, memory and time before anything is touched."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from sparsec import sparsify
from sparsec.cli import run
from sparsec.errors import SparsecWarning
from sparsec.forecast import forecast, forecast_table, memory_parts
from sparsec.sparsify import prepare
from sparsec.tiny import tiny_model

SUITE: list[Any] = [
    "equalize",
    {"method": "owl", "sparsity": 0.6},
    {"method": "ria", "outliers": 0.01},
    "variance",
    {"method": "ebft", "epochs": 3},
]


def told(recipe: Any, tokens: int | None = 4096, **settings: Any) -> dict[str, Any]:
    return forecast(prepare(tiny_model("tiny:llama").model, recipe), tokens, **settings)


def test_every_step_is_shown_in_order_with_its_modules() -> None:
    said = told(SUITE)
    assert [(step["step"], step["method"], step["role"]) for step in said["steps"]] == [
        (1, "equalize", "reparam"),
        (2, "owl", "allocate"),
        (3, "ria", "mask"),
        (4, "variance", "post"),
        (5, "ebft", "post"),
    ]
    assert all(step["modules"] == ["model.layers.0", "model.layers.1"] for step in said["steps"])
    assert {layer["step"] for layer in said["layers"]} == {3}
    lines = forecast_table(said)
    owl = next(line for line in lines if "2 owl" in line)
    assert "model.layers.0,1" in owl
    assert "mean 60.0%" in owl
    assert any("3 ria" in line and "unstructured, row, 0.01 aside" in line for line in lines)
    assert [line.split("  ")[0] for line in lines if "5 ebft" in line] == ["model.layers.0,1"]
    assert lines[-1] == "nothing was changed"
    json.dumps(said)


def test_two_mask_steps_have_the_numbers_that_they_have_in_the_recipe() -> None:
    steps = [{"method": "wanda", "targets": ["*.mlp.*"]}, "variance", {"method": "magnitude", "targets": ["q_proj"]}]
    said = told(steps)
    assert {(layer["step"], layer["method"]) for layer in said["layers"]} == {(1, "wanda"), (3, "magnitude")}


def test_layers_outside_the_blocks_are_modules_of_their_own() -> None:
    said = told([{"method": "wanda", "ignore": []}])
    assert said["steps"][0]["modules"] == ["model.layers.0", "model.layers.1", "lm_head"]


def test_a_model_without_blocks_is_one_module() -> None:
    model = nn.Linear(64, 64)
    said = forecast(prepare(model, ["magnitude", "variance"]))
    assert said["steps"][1]["modules"] == [""]
    assert any("(the model)" in line and "2 variance" in line for line in forecast_table(said))


def test_more_tokens_take_more_time_and_memory_and_what_is_over_the_budget_goes_to_disk() -> None:
    few, many = told("wanda", 1000), told("wanda", 100_000)
    assert few["scratch_bytes"] < many["scratch_bytes"]
    assert few["calibration_tokens"] == 1000
    assert many["spilled_bytes"] == 0
    spilled = told("wanda", 100_000, memory=1 << 20)
    assert spilled["scratch_bytes"] < many["scratch_bytes"]
    assert spilled["spilled_bytes"] == 2 * (100_000 * 64 * 4 - (1 << 20))
    assert "on disk" in forecast_table(spilled)[0]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("wanda", ["wanda", "ebft"]),
        (["wanda", {"method": "ebft", "epochs": 1}], ["wanda", {"method": "ebft", "epochs": 50}]),
        ("wanda", ["owl", "wanda"]),
        ("wanda", "gblm"),
        ("wanda", {"true_sequential": True, "steps": ["wanda"]}),
    ],
)
def test_steps_that_do_more_are_forecast_to_multiply_more(
    less: Any, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsec import forecast as module

    monkeypatch.setattr(module, "_rates", lambda jobs: module.Rates(1e-9, 1e-9))
    assert told(less)["calibration_seconds"] < told(more)["calibration_seconds"]


def test_a_recipe_without_data_has_no_calibration_in_its_forecast() -> None:
    said = told("magnitude", None)
    assert (said["calibration_tokens"], said["calibration_seconds"], said["calibration_guessed"]) == (0, 0.0, False)
    assert not any("calibration" in line for line in forecast_table(said))


def test_statistics_of_pairs_take_their_square_of_memory() -> None:
    model = nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 8))
    wanda, sparsegpt = (forecast(prepare(model, name), 64)["scratch_bytes"] for name in ("wanda", "sparsegpt"))
    assert sparsegpt - wanda == pytest.approx((4 + 32) * 512 * 512, rel=0.05)


def test_inputs_of_many_experts_weigh_more_than_the_layer_at_work() -> None:
    experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 8), "down": nn.Linear(8, 64)}) for _ in range(20))
    parts = memory_parts(prepare(nn.ModuleDict({"blocks": nn.ModuleList([experts])}), "sparsegpt"), 0)
    inputs = 20 * (64 + 8)
    assert sum(parts.values()) == 8 * 20 * (64**2 + 8**2) + 4 * 64**2 + 4 * 512 * inputs


def test_layers_that_read_one_input_share_its_statistics_and_only_rewrites_copy_what_they_change() -> None:
    model = tiny_model("tiny:llama").model
    wanda, rewritten = (memory_parts(prepare(model, steps), 0) for steps in ("wanda", ["equalize", "wanda"]))
    shapes = [tuple(m.weight.shape) for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    size = sum(n * k for n, k in shapes)
    assert wanda["block"] == 5 * size
    assert rewritten["block"] == 9 * size
    wide = model.config.intermediate_size
    assert wanda["statistics"] == (4 * 512 + 4) * (3 * model.config.hidden_size + wide)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_forecast_of_memory_is_near_the_tensors_that_a_run_makes(method: str) -> None:
    """By torch's own count of what its allocator hands out and takes back, so that malloc has no part in it."""
    config = {"hidden_size": 160, "intermediate_size": 480, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**config, vocab_size=64, max_position_embeddings=64)).eval()
    data = [torch.randint(0, 64, (1, 32)) for _ in range(8)]
    said = sum(memory_parts(prepare(model, method), 8 * 32).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsecWarning)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            sparsify(model, method, data, progress=False)
    now = peak = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0.7 * peak < said < 1.5 * peak


def test_a_structured_step_says_that_its_time_is_not_known() -> None:
    lines = forecast_table(told({"method": "slicegpt", "sparsity": 0.25}))
    assert any("1 slicegpt" in line and "25.0%" in line for line in lines)
    assert any("slicegpt: time and memory are not forecast" in line for line in lines)
    assert " s\n" not in lines[0] + "\n"


def test_a_forecast_changes_nothing() -> None:
    model = tiny_model("tiny:llama").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forecast(prepare(model, SUITE))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_dry_run_reads_the_text_and_counts_its_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("sparse " * 1000)
    words = ["sparsify", "tiny:llama", "--method", "wanda", "--dry-run"]
    small = ["--calibration", "{samples: 16, seqlen: 96}"]
    assert run([*words, *small, "--data", "text.txt", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["calibration_tokens"], said["calibration_guessed"]) == (16 * 96, False)
    assert run([*words, *small]) == 0
    assert "1536 calibration tokens, as many as the recipe asks for at most" in capsys.readouterr().out
    assert run([*words, "--data", "missing.txt"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
