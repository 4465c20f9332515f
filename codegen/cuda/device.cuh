// The instructions that the kernels use, each as one function. No header of the toolkit is needed. Kernels name nothing
// else of CUDA, so the same text runs on a CPU where these functions are emulated.
// Shared memory is addressed by 32-bit offsets. 16-bit floats are bits (u16); FLOAT16, of y and the bias, is "bf16" or
// "f16". MMA_SPARSE is the shape and the types of a product; kSelectors products share a word of metadata.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(kThreads)

extern __shared__ __align__(1024) unsigned char shared_memory[];

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE u32 shared_base() { return (static_cast<u32>(__cvta_generic_to_shared(shared_memory)) + 1023) & ~1023u; }
DEVICE void sync_block() { __syncthreads(); }

// 16 bytes from global to shared memory, without registers; only the first `bytes` (0 or 16) are read, others are zero.
DEVICE void copy16(u32 to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last N groups of this thread have arrived.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE void load16(u32 (&r)[4], u32 from) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
DEVICE u32 load4(u32 from) {
  u32 r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(from) : "memory");
  return r;
}
DEVICE u16 load2(u32 from) {
  u16 r;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(from) : "memory");
  return r;
}
DEVICE float load_float(u32 from) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
  return r;
}
DEVICE void store_float(u32 to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}
DEVICE void store2(u32 to, u16 value) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory"); }

// Four 8 x 8 matrices of 16-bit values; lane 8 i + r gives the address of row r of matrix i.
DEVICE void load_matrix4(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// d[16 x 8] += A[16 x K, two of four kept] B[K x 8], K 32 columns of 16 bits or 64 of 8. SELECTOR: which pair of each
// four lanes holds the metadata of 16-bit products; all four hold that of 8-bit ones.
template <int SELECTOR> DEVICE void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned." MMA_SPARSE " "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
                 "n"(SELECTOR));
}

DEVICE float widen(u16 bits) {
  float value;
  asm("{ .reg .b32 t; cvt.f32." FLOAT16 " %0, %1; }" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE u16 narrow(float value) {
  u16 bits;
  asm("cvt.rn." FLOAT16 ".f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
