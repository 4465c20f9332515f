"""What papers say of gate methods, on trained models: each with a margin that earlier measurements support.

The language models are those of the accuracy benchmark (``SPARSEC_EVAL``); the encoder is MiniLM, on this repository's
own texts. Gaps are means over windows that both sides were judged on.
"""

from __future__ import annotations

import itertools
import os
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.activations import activation_grid
from benchmarks.accuracy.fixture import Fixture, Settings, fixture
from benchmarks.accuracy.grid import Row
from sparsec.errors import MissingPackage
from sparsec.passes.gates.layers import gates_of

pytestmark = pytest.mark.filterwarnings("ignore::sparsec.errors.SparsecWarning")
EVAL = Path(os.environ.get("SPARSEC_EVAL") or "/nonexistent")
ROOT = Path(__file__).resolve().parents[2]
trained = pytest.mark.skipif(not (EVAL / "tinylm").is_dir(), reason="SPARSEC_EVAL names no folder with tinylm")


@cache
def model(name: str) -> Fixture:
    if name == "minilm":
        return fixture(name, ROOT / "CONTRIBUTING.md", ROOT / "README.md", Settings(8, 128, 12))
    return fixture(str(EVAL / name), EVAL / "calib.txt", EVAL / "test.txt", Settings(8, 256, 12))


@cache
def measured(name: str, row: str) -> dict[str, Any]:
    rows: dict[str, Row] = {r.name: r for r in activation_grid()}
    return model(name).measure(rows[row], 0)


def cost(name: str, row: str) -> float:
    return statistics.fmean(measured(name, row)["costs"])


@trained
def test_teal_costs_more_the_more_it_zeroes_and_half_is_nearly_free() -> None:
    costs = [cost("tinylm", f"teal {label}") for label in ("20%", "30%", "50%", "65%")]
    assert all(b > 1.3 * a for a, b in itertools.pairwise(costs))
    assert 0.03 < costs[2] < 0.4


@trained
def test_a_dense_context_changes_what_the_last_half_of_a_window_costs_by_less_than_a_tenth() -> None:
    gated = cost("tinylm", "teal(last half scored) 65%")
    assert cost("tinylm", "teal(last half) 65%") == pytest.approx(gated, rel=0.1)


@trained
def test_thresholds_of_each_channel_are_no_worse_than_one_of_all() -> None:
    assert cost("tinylm", "chess(MLP) 80%") <= 1.05 * cost("tinylm", "cats 80%")


@trained
def test_top_k_of_each_token_is_about_a_threshold_at_a_half_and_better_above() -> None:
    assert cost("tinylm", "qsparse 50%") == pytest.approx(cost("tinylm", "teal 50%"), rel=0.2)
    assert cost("tinylm", "qsparse 65%") < 1.05 * cost("tinylm", "teal 65%")


@trained
def test_gating_the_inputs_of_down_alone_costs_a_fraction_of_gating_all() -> None:
    assert cost("tinylm", "teal(down) 50%") < 0.25 * cost("tinylm", "teal 50%")


@trained
def test_where_relu_zeroes_more_than_was_asked_cats_changes_nothing() -> None:
    found = measured("tinylm-relu", "cats 50%")
    assert max(map(abs, found["costs"])) == 0.0
    assert found["zeros"] > 0.7


@trained
def test_signs_find_zeros_of_relu_at_a_small_cost() -> None:
    found = measured("tinylm-relu", "sparseinfer 50%")
    assert found["zeros"] == pytest.approx(0.5, abs=0.06)
    assert statistics.fmean(found["costs"]) < 0.5 * cost("tinylm-relu", "dejavu 50%")


@trained
def test_zeros_on_the_test_text_are_within_three_points_of_what_was_asked() -> None:
    for row, share in (("teal 30%", 0.3), ("teal 50%", 0.5), ("cats 80%", 0.8), ("chess(MLP) 80%", 0.8)):
        assert measured("tinylm", row)["zeros"] == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("mode", "label"), [("median", "50%"), ("median", "70%"), ("kde", "50%")])
def test_centring_on_the_mode_helps_an_encoder_with_gelu(mode: str, label: str) -> None:
    try:
        model("minilm")
    except MissingPackage as missing:
        pytest.skip(str(missing))
    assert cost("minilm", f"scap({mode}) {label}") < 0.95 * cost("minilm", f"teal {label}")


def test_a_measured_model_is_a_copy() -> None:
    try:
        loaded = model("minilm")
    except MissingPackage as missing:
        pytest.skip(str(missing))
    loaded.measure({r.name: r for r in activation_grid()}["cats 50%"], 0)
    assert list(gates_of(loaded.loaded.model)) == []
    assert torch.is_tensor(loaded.dense)
