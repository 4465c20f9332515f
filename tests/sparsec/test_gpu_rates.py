"""What is expected of GPU kernels before anything was measured, and what is decided from it."""

from __future__ import annotations

import pytest
import torch

from sparsec import targets
from sparsec.codegen.triton import LOOPS, kind_of, loops_of
from sparsec.codegen.triton.samples import sample_weight
from sparsec.facts import Decision
from sparsec.formats import Format
from sparsec.gpu_rates import MANY, rates_for
from sparsec.options import Policy
from sparsec.passes.decide import decide
from sparsec.passes.profile.weights import profile
from sparsec.targets.cuda import ARCHITECTURES, GpuTarget


def decided(name: str, density: float, size: int = 4096, target: str = "cuda:sm_90", **policy: float) -> Decision:
    machine = targets.resolve(target)
    assert isinstance(machine, GpuTarget)
    format = Format.parse(name)
    fact = profile(sample_weight(format, size, size, density=density))
    dtype = format.values
    return decide(fact, dtype, machine, rates_for(machine, fact), Policy(**policy))


@pytest.mark.parametrize("target", [f"cuda:{name}" for name in ARCHITECTURES])
@pytest.mark.parametrize("values", ["bf16", "fp16"])
def test_2_4_runs_on_sparse_tensor_cores_for_few_rows_and_dense_for_many(target: str, values: str) -> None:
    found = decided(f"nm:2:4+{values}", 0.5, target=target)
    assert found.at(1).kernel == "skinny"
    assert found.at(16).kernel == "skinny"
    assert found.at(4096).format == "dense"


def test_unstructured_weights_gather_for_few_rows_where_enough_is_zero() -> None:
    assert decided("index+bf16", 0.1).at(1).kernel == "gather"
    assert decided("index+bf16", 0.1).at(64).format == "dense"
    assert decided("index+bf16", 0.5).at(1).format == "dense"
    assert "break-even" in decided("index+bf16", 0.5).reason


def test_whole_blocks_run_at_any_number_of_rows() -> None:
    found = decided("block:64x64+bf16", 0.2)
    assert all(found.at(m).format.startswith("block") for m in (1, 64, 2048))


def test_a_layer_that_a_launch_outlasts_stays_dense() -> None:
    assert not decided("index+bf16", 0.1, size=256).ours


@pytest.mark.parametrize("name", ["index+bf16", "nm:2:4+bf16", "nm:8:16+bf16", "vnm:64:2:8+bf16"])
def test_no_kernel_is_chosen_for_more_rows_than_it_takes(name: str) -> None:
    found = decided(name, 0.2, min_speedup=0.0)
    for part in found.ranges:
        if part.format == "dense":
            continue
        most = LOOPS[kind_of(Format.parse(part.format), part.kernel)][part.kernel]
        assert not most or (part.m_hi is not None and part.m_hi <= most), part


def test_a_pattern_that_was_not_counted_takes_its_nearest_relative_and_only_loops_it_has() -> None:
    format = Format.parse("nm:5:7+bf16")
    assert ("nm", "tile") not in loops_of(format)
    machine = targets.resolve("cuda:sm_90")
    assert isinstance(machine, GpuTarget)
    keep = (torch.arange(7 * 64) % 7 < 5).float()
    fact = profile((torch.ones(64, 7 * 64) * keep).bfloat16())
    assert {r.loop for r in rates_for(machine, fact).kernels if r.pattern == "nm:5:7"} <= {"gather"}


def test_prefill_kernels_claim_nothing_below_the_rows_that_fill_a_gpu() -> None:
    machine = targets.resolve("cuda:sm_90")
    assert isinstance(machine, GpuTarget)
    fact = profile(sample_weight(Format.parse("nm:2:4+bf16"), 256, 256))
    (prefill,) = [r for r in rates_for(machine, fact).kernels if r.loop == "prefill" and r.dtype == "bf16"]
    assert all(position >= 1.0 for m, _, position, _ in prefill.points if m < MANY)
    assert not [r for r in rates_for(machine, fact).kernels if r.loop == "cusparselt"]  # no library without a GPU


def test_a_bf16_weight_on_the_grid_of_fp8_is_planned_in_bf16() -> None:
    """Kernels of fp8 round x, whatever the weight holds."""
    machine = targets.resolve("cuda:sm_90")
    assert isinstance(machine, GpuTarget)
    weight = sample_weight(Format.parse("nm:2:4+fp8"), 512, 512)
    rates = rates_for(machine, profile(weight))
    assert "fp8" not in {rate.dtype for rate in rates.kernels}
    found = decide(profile(weight), "bf16", machine, rates, Policy(min_speedup=0))
    assert {Format.parse(part.format).values for part in found.ranges if part.format != "dense"} == {"bf16"}
