"""The text of ``wgmma.mma_async.sp`` and what goes with it: one asm statement a width, with all its accumulators."""

from __future__ import annotations


def instructions(columns: int, values: str) -> str:
    """Functions of one warpgroup for products m64 n``columns``, sums[columns / 8][4] fp32 in registers.

    ``values``: bf16 or f16 (products of 32 columns of K), e4m3 (64, of which K is the inner dimension by definition).
    """
    count = columns // 2
    sums = ", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(count))
    registers = ", ".join(f"%{i}" for i in range(count))
    array = f"float (&d)[{columns // 8}][4]"
    a, b, meta, selector, add = (f"%{count + i}" for i in range(5))
    shape = f"m64n{columns}k{64 if values == 'e4m3' else 32}.f32.{values}.{values}"
    major = "" if values == "e4m3" else ", 0, 0"  # both have K inside; only 16-bit operands could be transposed
    return f"""
DEVICE void gmma_fence() {{ asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }}
DEVICE void gmma_commit() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}
// What this thread copied to shared memory becomes visible to the tensor cores.
DEVICE void gmma_sees_copies() {{ asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }}
// Until all but the last N groups of products are done. Sums must not be named while products are under way: ptxas then
// makes each product wait for the one before (C7515).
template <int N> DEVICE void gmma_wait() {{ asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }}
// Until all are done; the sums are named so that no use of them moves up.
DEVICE void gmma_end({array}) {{ asm volatile("wgmma.wait_group.sync.aligned 0;" : {sums}::"memory"); }}
// d = A B, plus d where `add`. a, b: matrix descriptors. SELECTOR: which pair of each four lanes holds the metadata.
template <int SELECTOR> DEVICE void gmma_sparse({array}, u64 a, u64 b, u32 meta, int add) {{
  asm volatile("{{ .reg .pred p; setp.ne.s32 p, {add}, 0;"
               "wgmma.mma_async.sp.sync.aligned.{shape} {{{registers}}}, "
               "{a}, {b}, {meta}, {selector}, p, 1, 1{major}; }}"
               : {sums} : "l"(a), "l"(b), "r"(meta), "n"(SELECTOR), "r"(add));
}}
"""
