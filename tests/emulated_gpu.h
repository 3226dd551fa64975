/* Runs CUDA kernels on a processor: every thread of a block is a fiber.

   The lanes of a warp meet where they exchange values, the threads of a block at barriers. In
   between each warp runs on alone as far as it can, so that a kernel which lacks a barrier reads
   shared memory before it is written, and gives a wrong result here. What the instructions do is
   written from NVIDIA's PTX reference, not from the kernels. */
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define uchar unsigned char

struct Three {
  int x, y, z;
};
static Three threadIdx, blockIdx;

typedef _Float16 half;
struct alignas(8) half4 {
  half x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
static inline T max(T a, T b) { return a > b ? a : b; }
template <typename T>
static inline T min(T a, T b) { return a < b ? a : b; }
#define __expf std::exp
static inline float __fdividef(float x, float y) { return x / y; }

namespace gpu {

enum State { RUNS, AT_WARP, AT_BARRIER, DONE };
constexpr int WARP = 32, VALUES = 6, STACK = 256 << 10;

struct Fiber {
  ucontext_t context;
  State state;
  int exchanges;
  Three index;
  std::vector<char> stack;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static std::function<void()> kernel;
static bool diverged;
alignas(64) static char dynamic_memory[1 << 17];
// What the lanes of the running warp hand to each other; two, as a lane may be one ahead.
static float exchanged[2][WARP][VALUES];

static void leave(State state) {
  Fiber &self = fibers[current];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

static void begin() {
  kernel();
  leave(DONE);
}

/* Give values to the warp; all lanes' values once all have come. */
static float (*exchange(const std::vector<float> &values))[VALUES] {
  Fiber &self = fibers[current];
  auto &slot = exchanged[self.exchanges++ % 2];
  for (size_t i = 0; i < values.size(); ++i) slot[current % WARP][i] = values[i];
  leave(AT_WARP);
  return slot;
}

static void resume(int number) {
  current = number;
  threadIdx = fibers[number].index;
  fibers[number].state = RUNS;
  swapcontext(&scheduler, &fibers[number].context);
}

/* All lanes of a warp up to the next barrier. */
static void run_warp(int first, int last) {
  for (State next = RUNS; next != AT_BARRIER && next != DONE;) {
    for (int i = first; i < last; ++i)
      if (fibers[i].state == RUNS || fibers[i].state == AT_WARP) resume(i);
    next = fibers[first].state;
    for (int i = first; i < last; ++i) diverged |= fibers[i].state != next;
    if (diverged) return;
  }
}

static void run_block(Three threads) {
  int count = threads.x * threads.y * threads.z;
  fibers.resize(count);
  for (int i = 0; i < count; ++i) {
    Fiber &fiber = fibers[i];
    fiber.state = RUNS;
    fiber.exchanges = 0;
    fiber.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    fiber.stack.resize(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, begin, 0);
  }
  while (!diverged) {
    for (int i = 0; i < count && !diverged; i += WARP) run_warp(i, min(i + WARP, count));
    for (const Fiber &fiber : fibers) diverged |= fiber.state != fibers[0].state;
    if (fibers[0].state == DONE) return;
    for (Fiber &fiber : fibers) fiber.state = RUNS;
  }
}

/* 0, or 1 if threads part at a barrier or at an exchange. */
static int run(const int *grid, const int *block, std::function<void()> body) {
  kernel = body;
  diverged = false;
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0] && !diverged; ++x) {
        blockIdx = {x, y, z};
        run_block({block[0], block[1], block[2]});
      }
  return diverged;
}

}  // namespace gpu

static inline void __syncthreads() { gpu::leave(gpu::AT_BARRIER); }
static inline unsigned __activemask() { return 0xffffffffu; }

static inline float __shfl_sync(unsigned, float value, int lane, int) {
  return gpu::exchange({value})[lane % gpu::WARP][0];
}

static inline float __shfl_down_sync(unsigned, float value, int offset, int) {
  int lane = gpu::current % gpu::WARP + offset;
  auto values = gpu::exchange({value});
  return lane < gpu::WARP ? values[lane][0] : value;
}

/* TF32 has 10 bits of mantissa: cvt.rna rounds to them, mma does not look at the others. */
static inline float tf32(float x, uint32_t added) {
  uint32_t bits;
  if (!std::isfinite(x)) return x;
  memcpy(&bits, &x, 4);
  bits = (bits + added) & ~0x1fffu;
  memcpy(&x, &bits, 4);
  return x;
}

static inline float tvm_lowrank_tf32(float x) { return tf32(x, 0x1000); }

/* mma.m16n8k8: with group = lane / 4 and t = lane % 4, a lane holds of A (group, t), (group + 8, t),
   (group, t + 4), (group + 8, t + 4), of B (t, group), (t + 4, group), and of the sums
   (group, 2 t), (group, 2 t + 1), (group + 8, 2 t), (group + 8, 2 t + 1). */
static inline void tvm_lowrank_mma_tf32(float &c0, float &c1, float &c2, float &c3, float a0,
                                        float a1, float a2, float a3, float b0, float b1) {
  auto lanes = gpu::exchange({a0, a1, a2, a3, b0, b1});
  int group = gpu::current % gpu::WARP / 4, t = gpu::current % 4;
  float *sums[] = {&c0, &c1, &c2, &c3};
  for (int i = 0; i < 4; ++i) {
    int row = group + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
      float a = lanes[row % 8 * 4 + k % 4][(row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0)];
      float b = lanes[column * 4 + k % 4][4 + (k >= 4 ? 1 : 0)];
      sum += tf32(a, 0) * tf32(b, 0);
    }
    *sums[i] += sum;
  }
}

/* Fragments of 16 x 16; here every lane has all of them. */
namespace nvcuda::wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };
template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr bool turned = std::is_same_v<Layout, col_major>;
  float values[256];
};
// Where element i of a tile, counted by rows, lies in memory.
static int place_of(int i, int stride, bool turned) {
  return turned ? i % 16 * stride + i / 16 : i / 16 * stride + i % 16;
}

template <typename F>
static void fill_fragment(F &into, float value) {
  for (float &x : into.values) x = value;
}
template <typename F, typename T>
static void load_matrix_sync(F &into, const T *from, int stride) {
  for (int i = 0; i < 256; ++i) into.values[i] = float(from[place_of(i, stride, F::turned)]);
}
template <typename F, typename T>
static void store_matrix_sync(T *into, const F &from, int stride, layout_t layout) {
  const bool turned = layout == mem_col_major;
  for (int i = 0; i < 256; ++i) into[place_of(i, stride, turned)] = from.values[i];
}
template <typename F, typename A, typename B>
static void mma_sync(F &into, const A &a, const B &b, const F &sums) {
  for (int i = 0; i < 256; ++i) {
    float sum = sums.values[i];
    for (int k = 0; k < 16; ++k) sum += a.values[i / 16 * 16 + k] * b.values[k * 16 + i % 16];
    into.values[i] = sum;
  }
}
}  // namespace nvcuda::wmma
