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
#include <map>
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

enum State { RUNS, AT_WARP, AT_BARRIER, WAITS, DONE };
constexpr int WARP = 32, VALUES = 8, STACK = 256 << 10;

/* A copy to shared memory that a thread has started, and a product that its warpgroup has. */
struct Copy {
  void *to;
  const void *from;
  int bytes;
  bool inside;

  void run() const {
    if (inside) memcpy(to, from, bytes);
    else memset(to, 0, bytes);
  }
};

/* Turns after so many arrivals, when what was sent to it is there: once somebody looks. */
struct Barrier {
  int count = 0, missing = 0, turned = 0;
  std::vector<Copy> sent;
};
using Product = std::function<void()>;

struct Fiber {
  ucontext_t context;
  State state;
  int exchanges;
  Three index;
  std::vector<char> stack;
  std::vector<Copy> copies;
  std::vector<Product> products;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static std::function<void()> kernel;
static bool diverged;
static std::map<uint64_t *, Barrier> barriers;
static int passed;  // how often a thread has come past a barrier that it waited for
alignas(64) static char dynamic_memory[1 << 18];
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

/* All lanes of a warp up to the next barrier, or until they have to wait. */
static void run_warp(int first, int last) {
  for (State next = RUNS; next == RUNS || next == AT_WARP;) {
    for (int i = first; i < last; ++i)
      if (fibers[i].state != AT_BARRIER && fibers[i].state != DONE) resume(i);
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
    fiber.copies.clear();
    fiber.products.clear();
    fiber.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    fiber.stack.resize(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, begin, 0);
  }
  while (!diverged) {
    bool moved = false, waits = false;
    for (int i = 0; i < count && !diverged; i += WARP) {
      if (fibers[i].state == AT_BARRIER || fibers[i].state == DONE) continue;
      int before = passed;
      run_warp(i, min(i + WARP, count));
      moved |= fibers[i].state != WAITS || passed != before;
      waits |= fibers[i].state == WAITS;
    }
    // Where all wait and none comes on, a GPU would for ever.
    diverged |= waits && !moved;
    if (waits) continue;
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

/* Copies and products that run on by themselves are done as late as they may be: when a thread
   waits for them. So what reads too early, or is overwritten too early, gives a wrong result. */
template <int BYTES, typename T>
static inline void start_copy(void *to, const T *from, int offset, int inside) {
  gpu::fibers[gpu::current].copies.push_back({to, from + offset, BYTES, bool(inside)});
}

static inline gpu::Barrier &barrier_at(void *place) { return gpu::barriers[(uint64_t *)place]; }

template <int COUNT, int FULL, int FREE>
static inline void prepare_barriers(void *barriers) {
  for (int i = 0; i < 2 * COUNT && threadIdx.x == 0 && threadIdx.y == 0; ++i) {
    int arrivals = i < COUNT ? FULL : FREE;
    barrier_at((uint64_t *)barriers + i) = {arrivals, arrivals};
  }
  __syncthreads();
}

/* All copies that a thread has started belong to its next arrival. */
static inline void tvm_lowrank_copies_arrive(void *place) {
  auto &copies = gpu::fibers[gpu::current].copies;
  auto &barrier = barrier_at(place);
  barrier.sent.insert(barrier.sent.end(), copies.begin(), copies.end());
  copies.clear();
  --barrier.missing;
}

template <int BYTES>
static inline void send(void *to, const void *from, void *place, int mine) {
  if (!mine) return;
  barrier_at(place).sent.push_back({to, from, BYTES, true});
  --barrier_at(place).missing;
}

static inline void tvm_lowrank_barrier_arrive(void *place, int mine) {
  if (mine) --barrier_at(place).missing;
}

static inline void tvm_lowrank_barrier_wait(void *place, int parity) {
  auto &barrier = barrier_at(place);
  for (;;) {
    if (barrier.missing == 0) {
      for (const gpu::Copy &copy : barrier.sent) copy.run();
      barrier.sent.clear();
      barrier.missing = barrier.count;
      ++barrier.turned;
    }
    if (barrier.turned % 2 != parity) break;
    gpu::leave(gpu::WAITS);
  }
  ++gpu::passed;
}

static inline void wait_for_products(size_t pending) {
  auto &products = gpu::fibers[gpu::current].products;
  while (products.size() > pending) {
    products.front()();
    products.erase(products.begin());
  }
}

/* Registers of a lane: for each tile four, of 4 bytes. A value of float16 is half a register. */
template <typename T, int TILES, int LINE>
static inline void read_rows(unsigned *own, const float *rows) {
  constexpr int PAIR = 4 / sizeof(T);
  for (int i = 0; i < 4 * TILES * PAIR; ++i) {
    int tile = i / (4 * PAIR), place = i / PAIR % 4, element = place / 2 * PAIR + i % PAIR;
    float value = rows[element * 4 * LINE + 2 * tile + place % 2];
    ((T *)own)[i] = sizeof(T) == 4 ? T(tf32(value, 0x1000)) : T(value);
  }
}

/* wgmma.m64nNk8 of TF32 or m64nNk16 of halves for `TILES` tiles. Rows are in registers, as in
   mma.m16n8k8, or pairs of elements of the sum where that has one. Columns are in shared memory, in
   core matrices of 8 columns by 16 bytes; the next along the sum is N * 16 bytes on. */
template <typename T, int TILES, int N>
static inline void start_product(float *sums, const unsigned *own, const void *columns) {
  constexpr int K = 32 / sizeof(T), CORE = 16 / sizeof(T), PAIR = 4 / sizeof(T);
  std::vector<float> given(4 * TILES);
  memcpy(given.data(), own, 4 * given.size());
  auto lanes = gpu::exchange(given);
  int group = gpu::current % gpu::WARP / 4, t = gpu::current % 4;
  std::vector<T> kept;
  for (int row = 0; row < 2 * TILES; ++row)
    for (int k = 0; k < K; ++k) {
      int place = row / 2 * 4 + row % 2 + k / CORE * 2, lane = group * 4 + k % CORE / PAIR;
      kept.push_back(((const T *)lanes[lane])[place * PAIR + k % PAIR]);
    }
  auto &products = gpu::fibers[gpu::current].products;
  products.push_back([=] {
    for (int row = 0; row < 2 * TILES; ++row)
      for (int column = 0; column < N / 4; ++column) {
        int n = column / 2 * 8 + 2 * t + column % 2;
        float sum = 0;
        for (int k = 0; k < K; ++k) {
          T right = ((const T *)columns)[(k / CORE * N + n) * CORE + k % CORE];
          sum += float(kept[row * K + k]) * (sizeof(T) == 4 ? tf32(right, 0) : float(right));
        }
        sums[column * 2 * TILES + row] += sum;
      }
  });
  wait_for_products(1);
}

/* The same where rows are in shared memory too, in core matrices of 8 rows by 16 bytes, of which the
   next along the sum is LINE * 16 bytes on; each warp has 16 rows of every 64. A piece of STEPS such
   products is one group. */
template <typename T, int TILES, int N, int STEPS, int LINE>
static inline void start_shared_product(float *sums, const void *rows, const void *columns) {
  constexpr int K = STEPS * 32 / sizeof(T), CORE = 16 / sizeof(T);
  int group = gpu::current % gpu::WARP / 4, t = gpu::current % 4;
  int first = gpu::current / gpu::WARP % 4 * 16 + group;
  auto factor = [](const void *from, int place) {
    T value = ((const T *)from)[place];
    return sizeof(T) == 4 ? tf32(value, 0) : float(value);
  };
  gpu::fibers[gpu::current].products.push_back([=] {
    for (int tile = 0; tile < TILES; ++tile)
      for (int i = 0; i < N / 2; ++i) {
        int row = tile * 64 + first + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
        float sum = 0;
        for (int k = 0; k < K; ++k)
          sum += factor(rows, (k / CORE * LINE + row) * CORE + k % CORE) *
                 factor(columns, (k / CORE * N + column) * CORE + k % CORE);
        sums[tile * N / 2 + i] += sum;
      }
  });
  wait_for_products(1);
}

/* A thread's 16 bytes, read as they are. */
template <typename T>
static inline void fetch_channels(unsigned *held, const T *from, int offset) {
  memcpy(held, from + offset, 16);
}

template <typename T>
static inline void unpack_channels(float *values, const unsigned *held) {
  for (int i = 0; i < int(16 / sizeof(T)); ++i) values[i] = float(((const T *)held)[i]);
}

template <typename T>
static inline void store_channels(T *to, int offset, const float *values) {
  for (int i = 0; i < int(16 / sizeof(T)); ++i)
    to[offset + i] = sizeof(T) == 4 ? T(tf32(values[i], 0x1000)) : T(values[i]);
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
