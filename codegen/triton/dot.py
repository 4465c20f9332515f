"""The product of two tiles, alike on a GPU and in Triton's interpreter.

The interpreter keeps bfloat16 as its bits and multiplies those as integers, so there tiles are widened first.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. a: [A, K], b: [K, B], of one dtype. fp32 tiles are multiplied as three TF32 products."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)
