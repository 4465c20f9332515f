// The instructions of codegen/cuda/device.cuh on a CPU. Each thread of a block is a fibre; an instruction of a warp or a
// warpgroup runs when all its lanes have come to it, by the tables of the PTX ISA. Asynchronous copies and products run
// either at once or as late as their waits allow (`late`: 1 copies, 2 products), and of the warps that can go on, the
// first or the last goes as far as it can (`backward`): data read or written too early shows in one of these ways.
// Addresses are checked; shared memory starts as NaN.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <utility>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = long long;
using std::exp;

#define DEVICE static inline
#define KERNEL extern "C" void

struct uint4 {
  u32 x, y, z, w;
};
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

static void demand(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

static const int kStack = 1 << 16, kBase = 4096;  // bytes of a fibre's stack; where shared memory starts
static const int kBf16 = FLOAT16[0] == 'b';

struct Gmma {
  float *d[128];
  u32 e[128];
  u64 a, b;
  int selector, columns, add;
};
struct Group {  // of threads that meet: a warp, a warpgroup or the block
  int size = 0, come = 0, turn = 0;
  std::vector<std::vector<Gmma>> batches;  // committed, not yet run
  std::vector<Gmma> open;
};
struct Copy {
  u32 to;
  const void *from;
  int bytes;
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
  std::vector<std::vector<Copy>> batches;
  std::vector<Copy> open;
  const Group *waits = nullptr;
  int turn = 0;
  void *slot = nullptr;
};
struct Range {
  const char *from, *to;
};

static std::vector<Thread> threads;
static std::vector<Group> warps, warpgroups;
static Group block;
static ucontext_t scheduler;
static int now, block_now, late;
static std::vector<unsigned char> memory;
static std::vector<Range> readable;
static std::function<void()> body;

static int thread_index() { return now; }
static int block_index() { return block_now; }
static u32 shared_base() { return kBase; }

static unsigned char *at(u32 address, int bytes) {
  demand(address >= kBase && address + bytes <= kBase + memory.size(), "shared address out of bounds");
  demand(address % bytes == 0, "shared address not aligned");
  return memory.data() + (address - kBase);
}

// Waits until all of `group` are here; the last to come runs `act` first.
template <class F> static void meet(Group &group, F act) {
  Thread &self = threads[now];
  if (++group.come == group.size) {
    act();
    group.come = 0;
    ++group.turn;
    return;
  }
  self.waits = &group, self.turn = group.turn;
  while (self.turn == group.turn) swapcontext(&self.context, &scheduler);
  self.waits = nullptr;
}

static void sync_block() {
  meet(block, [] {});
}

static void run(const Copy &copy) {
  unsigned char *to = at(copy.to, 16);
  std::memset(to, 0, 16);
  if (copy.bytes) std::memcpy(to, copy.from, copy.bytes);
}
static void copy16(u32 to, const void *from, int bytes) {
  const char *start = static_cast<const char *>(from);
  bool inside = !bytes;
  for (const Range &r : readable) inside |= start >= r.from && start + bytes <= r.to;
  demand(inside, "global read out of bounds");
  demand(reinterpret_cast<uintptr_t>(from) % 16 == 0, "global address not aligned");
  if (late & 1) threads[now].open.push_back({to, from, bytes});
  else run(Copy{to, from, bytes});
}
static void copy_commit() {
  Thread &self = threads[now];
  self.batches.push_back(std::move(self.open));
  self.open.clear();
}
template <int N> static void copy_wait() {
  auto &batches = threads[now].batches;
  while (batches.size() > N) {
    for (const Copy &copy : batches.front()) run(copy);
    batches.erase(batches.begin());
  }
}

static void load16(u32 (&r)[4], u32 from) { std::memcpy(r, at(from, 16), 16); }
static u32 load4(u32 from) {
  u32 r;
  std::memcpy(&r, at(from, 4), 4);
  return r;
}
static u16 load2(u32 from) {
  u16 r;
  std::memcpy(&r, at(from, 2), 2);
  return r;
}
static float load_float(u32 from) {
  float r;
  std::memcpy(&r, at(from, 4), 4);
  return r;
}
static void store_float(u32 to, float value) { std::memcpy(at(to, 4), &value, 4); }
static void store2(u32 to, u16 value) { std::memcpy(at(to, 2), &value, 2); }

static float widen(u16 bits) {
  if (!kBf16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return half;
  }
  const u32 wide = u32(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
static u16 narrow(float value) {
  u16 bits;
  if (!kBf16) {
    const _Float16 half = value;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  u32 wide;
  std::memcpy(&wide, &value, 4);
  if (value != value) return 0x7fff;
  return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}

struct Matrix4 {
  u32 row, *r;
};
static void load_matrix4(u32 (&r)[4], u32 row) {
  Matrix4 mine{row, r};
  threads[now].slot = &mine;
  const int first = now / 32 * 32;
  meet(warps[now / 32], [first] {
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        const u32 from = static_cast<Matrix4 *>(threads[first + 8 * i + lane / 4].slot)->row;
        demand(from % 16 == 0, "matrix row not aligned");
        static_cast<Matrix4 *>(threads[first + lane].slot)->r[i] = load4(from + lane % 4 * 4);
      }
    }
  });
}

// What a product is made of: elements of a 32-bit register, and their values.
static const int kFp8 = std::strstr(MMA_SPARSE, "e4m3") != nullptr;
static const int kPer = kFp8 ? 4 : 2;
static float e4m3(u32 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return (bits & 127) == 127 ? NAN : bits & 128 ? -size : size;
}
static float element_of(u32 reg, int i) { return kFp8 ? e4m3(reg >> (8 * i) & 255) : widen(reg >> (16 * i)); }

// The column in a product of a kept value of `row`. word(lane): metadata that a lane of the row's warp gave. 16 bits:
// half-words of four groups, of the pair of lanes that SELECTOR names; 8 bits: words of eight groups, of all four lanes.
template <class F> static int kept_column(F word, int row, int kept, int selector) {
  const int half = row % 16 / 8, group = kept / 2, first = row % 8 * 4;
  const u32 nibble = kFp8 ? word(first + 2 * (kept / 16) + half) >> (4 * (group % 8))
                          : word(first + 2 * selector + kept / 8) >> (16 * half + 4 * (group % 4));
  return group * 4 + (nibble >> (2 * (kept % 2)) & 3);
}

struct Mma {
  float *d;
  const u32 *a, *b;
  u32 e;
};
template <int SELECTOR> static void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  Mma mine{d, a, b, meta};
  threads[now].slot = &mine;
  const int first = now / 32 * 32;
  meet(warps[now / 32], [first] {
    float x[64][8], sums[16][8];
    auto lane = [first](int i) -> Mma & { return *static_cast<Mma *>(threads[first + i].slot); };
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 4 * kPer; ++j) {  // b_j: row 4 kPer (j / kPer) + kPer t + j % kPer, column g
        x[j / kPer * 4 * kPer + i % 4 * kPer + j % kPer][i / 4] = element_of(lane(i).b[j / kPer], j % kPer);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int n = 0; n < 8; ++n) sums[row][n] = lane(row % 8 * 4 + n / 2).d[row / 8 * 2 + n % 2];
      for (int kept = 0; kept < 8 * kPer; ++kept) {
        const int t = kept % (4 * kPer) / kPer, reg = kept / (4 * kPer) * 2 + row / 8;
        const float value = element_of(lane(row % 8 * 4 + t).a[reg], kept % kPer);
        const int k = kept_column([&](int i) { return lane(i).e; }, row, kept, SELECTOR);
        for (int n = 0; n < 8; ++n) sums[row][n] += value * x[k][n];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int n = 0; n < 8; ++n) lane(row % 8 * 4 + n / 2).d[row / 8 * 2 + n % 2] = sums[row][n];
    }
  });
}

// A value of a K-major matrix in the 128-byte swizzle, which acts on the bits of addresses.
static float element(u64 descriptor, int row, int column) {
  demand(descriptor >> 62 == 1, "not the 128-byte swizzle");
  const u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  u32 address = start + row / 8 * stride + row % 8 * 128 + column * (4 / kPer);
  address ^= (address >> 7 & 7) << 4;
  return element_of(load2(address & ~1u), kFp8 ? address & 1 : 0);
}
static void run(const Gmma &op) {
  for (int row = 0; row < 64; ++row) {
    const int warp = row / 16, g = row % 8, half = row % 16 / 8;
    float value[32];
    int k[32];
    for (int kept = 0; kept < 8 * kPer; ++kept) {
      value[kept] = element(op.a, row, kept);
      k[kept] = kept_column([&](int i) { return op.e[warp * 32 + i]; }, row, kept, op.selector);
    }
    for (int n = 0; n < op.columns; ++n) {
      float &sum = op.d[warp * 32 + g * 4 + n % 8 / 2][n / 8 * 4 + 2 * half + n % 2];
      if (!op.add) sum = 0;
      for (int kept = 0; kept < 8 * kPer; ++kept) sum += value[kept] * element(op.b, n, k[kept]);
    }
  }
}

struct GmmaLane {
  float *d;
  u64 a, b;
  u32 e;
};
static void gmma_fence() {}
static void gmma_sees_copies() {}
template <int SELECTOR, int J> static void gmma_sparse(float (&d)[J][4], u64 a, u64 b, u32 meta, int add) {
  GmmaLane mine{&d[0][0], a, b, meta};
  threads[now].slot = &mine;
  Group &group = warpgroups[now / 128];
  const int first = now / 128 * 128;
  meet(group, [&group, first, add] {
    Gmma op{};
    for (int i = 0; i < 128; ++i) {
      const GmmaLane &lane = *static_cast<GmmaLane *>(threads[first + i].slot);
      op.d[i] = lane.d, op.e[i] = lane.e, op.a = lane.a, op.b = lane.b;
    }
    op.selector = SELECTOR, op.columns = J * 8, op.add = add;
    if (late & 2) group.open.push_back(op);
    else run(op);
  });
}
static void gmma_commit() {
  Group &group = warpgroups[now / 128];
  meet(group, [&group] {
    group.batches.push_back(std::move(group.open));
    group.open.clear();
  });
}
template <int N> static void gmma_wait() {
  Group &group = warpgroups[now / 128];
  meet(group, [&group] {
    while (group.batches.size() > N) {
      for (const Gmma &op : group.batches.front()) run(op);
      group.batches.erase(group.batches.begin());
    }
  });
}

template <int J> static void gmma_end(float (&)[J][4]) { gmma_wait<0>(); }

static void fibre() {
  body();
  threads[now].done = true;
  swapcontext(&threads[now].context, &scheduler);
}

// One block: always the first (or last) thread that can go on, as far as it can.
static void run_block(int count, int shared, int backward) {
  threads.assign(count, Thread());
  warps.assign(count / 32, Group());
  warpgroups.assign((count + 127) / 128, Group());
  for (Group &group : warps) group.size = 32;
  for (Group &group : warpgroups) group.size = 128;
  block = Group();
  block.size = count;
  memory.assign(shared, 0xff);
  for (Thread &thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, fibre, 0);
  }
  for (int left = count; left;) {
    int next = -1;
    for (int i = 0; i < count && next < 0; ++i) {
      const int id = backward ? count - 1 - i : i;
      const Thread &thread = threads[id];
      if (!thread.done && (!thread.waits || thread.waits->turn != thread.turn)) next = id;
    }
    demand(next >= 0, "some threads wait for others that do not come");
    now = next;
    swapcontext(&scheduler, &threads[next].context);
    left -= threads[next].done;
  }
}
