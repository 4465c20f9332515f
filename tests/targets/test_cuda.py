"""NVIDIA GPUs as targets: by architecture without a device, and what a device says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from sparsec import targets
from sparsec.errors import BadOptionValue, UnknownTarget
from sparsec.targets import cuda
from sparsec.targets.cuda import ARCHITECTURES, GpuTarget, described


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_a_target_where_there_is_no_gpu(name: str) -> None:
    found = targets.resolve(f"cuda:{name}")
    assert isinstance(found, GpuTarget)
    assert found.isa == name
    assert found.gpu
    assert json.dumps(asdict(found))
    assert found.flops("bf16") > found.flops("fp32") > 0
    assert found.fingerprint != targets.resolve("cpu").fingerprint


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_alone_needs_a_gpu_and_says_which_names_do_not() -> None:
    with pytest.raises(BadOptionValue, match=r"no NVIDIA GPU; name an architecture: cuda:sm_100"):
        targets.resolve("cuda")
    assert cuda.device() is None
    assert targets.for_weights("auto", on_gpu=False).name == "cpu"


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UnknownTarget, match="cuda:sm_90"):
        targets.resolve("cuda:sm_91")


def test_a_device_is_described_by_what_it_says() -> None:
    found = described("NVIDIA H100 PCIe", 90, 114, 50 << 20)
    assert (found.model, found.cores, found.l2_bytes, found.here) == ("H100 PCIe", 114, 50 << 20, True)
    assert found.bandwidth == ARCHITECTURES["sm_90"].bandwidth


def test_an_architecture_newer_than_known_takes_the_rates_of_the_newest_before_it() -> None:
    found = described("NVIDIA Future", 130, 200, 0)
    assert found.isa == "sm_130"
    assert found.dense_flops == ARCHITECTURES["sm_120"].dense_flops
    assert described("NVIDIA A10", 86, 72, 6 << 20).native == ARCHITECTURES["sm_80"].native


def test_a_gpu_older_than_sm_80_is_refused_in_a_sentence() -> None:
    with pytest.raises(BadOptionValue, match="Tesla T4 is sm_75, and kernels are made for sm_80 or newer"):
        described("Tesla T4", 75, 40, 4 << 20)
