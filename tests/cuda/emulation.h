// Runs CUDA kernels on a CPU, for the tests: what csrc/cuda takes of CUDA, in plain C++ (GCC, glibc).
//
// Every thread of a block is a fiber; blocks run one after the other. A fiber runs until it has to
// wait for others, at a barrier or for what the lanes of its warp exchange, so that between two
// barriers whole threads run one after the other, in the order that BOFT_EMULATION_ORDER names:
// where a barrier is missing, some order reads what was not written yet. Shared memory is filled with
// NaN before each block, and is an allocation of just the size asked for, which AddressSanitizer
// guards. What no emulation shows: speed, and races that no order of whole threads can bring about.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return float(half);
}
inline __half __float2half_rn(float value) {
  const _Float16 half = _Float16(value);
  __half bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of a block, on sm_90

enum class State { ready, at_barrier, in_warp, done };

struct Copy {  // that was started but not waited for (zeros if `from` is null), or the end of some
  void* to;
  const void* from;
  int bytes;
  bool closes;
};

struct Thread {
  uint3 index;
  State state;
  bool started;
  ucontext_t start;
  jmp_buf resume;
  void* sanitizer_stack;
  std::deque<Copy> copies;
};

// The values that the lanes of a warp hand each other. Deposits alternate between two sets of slots, so that
// the next exchange can begin before every lane has read this one.
struct Warp {
  alignas(16) unsigned char slots[2][kWarp][32];
  int arrived, turn;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint3 index, size;
  unsigned char* shared;
  unsigned char* stacks;
  int current, waiting, alive;
  const std::function<void()>* body;
  jmp_buf scheduler;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
};

inline Block& block() {
  static Block instance;
  return instance;
}
inline Thread& current() { return block().threads[size_t(block().current)]; }

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

// AddressSanitizer has to know which stack is in use.
inline void leaves_for(void** own, const void* bottom, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(own, bottom, size);
#else
  (void)own, (void)bottom, (void)size;
#endif
}
inline void arrived(void* own, const void** bottom, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own, bottom, size);
#else
  (void)own, (void)bottom, (void)size;
#endif
}

// Back to the scheduler, until this thread is ready again.
inline void wait() {
  Thread& me = current();
  if (_setjmp(me.resume) == 0) {
    leaves_for(&me.sanitizer_stack, block().scheduler_stack, block().scheduler_stack_size);
    _longjmp(block().scheduler, 1);
  }
  arrived(me.sanitizer_stack, nullptr, nullptr);
}

inline void run() {  // what a fiber does
  Block& b = block();
  arrived(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
  (*b.body)();
  current().state = State::done;
  --b.alive;
  leaves_for(nullptr, b.scheduler_stack, b.scheduler_stack_size);
  _longjmp(b.scheduler, 1);
}

inline void resume(int i) {
  Block& b = block();
  b.current = i;
  Thread& thread = b.threads[size_t(i)];
  unsigned char* stack = b.stacks + size_t(i) * kStack;
  void* own = nullptr;
  if (_setjmp(b.scheduler) == 0) {
    leaves_for(&own, stack, kStack);
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run, 0);
    setcontext(&thread.start);
  }
  arrived(own, nullptr, nullptr);
}

// The place of thread `turn` of `n` in this round.
inline int place(int turn, int n) {
  static const char* unset = "forward";
  const char* order = std::getenv("BOFT_EMULATION_ORDER");
  switch ((order ? order : unset)[0]) {
    case 'f': return turn;
    case 'r': return n - 1 - turn;
    case 's': return int((unsigned(turn) * 7919u + 5u) % unsigned(n));  // a prime: all, scattered
    default: fail("BOFT_EMULATION_ORDER: expected forward, reverse or scattered");
  }
}

inline void run_block(unsigned index, int n, size_t shared, const std::function<void()>& body) {
  Block& b = block();
  // an allocation of its own for every block: what lies behind it is poisoned
  std::unique_ptr<unsigned char[]> memory(new unsigned char[shared + 16]);
  b.shared = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16;
  std::memset(memory.get(), 0xff, shared + 16);
  b.threads.assign(size_t(n), Thread{});
  b.warps.assign(size_t((n + kWarp - 1) / kWarp), Warp{});
  b.index = {index, 0, 0}, b.size = {unsigned(n), 1, 1};
  b.body = &body, b.alive = n, b.waiting = 0;
  for (int i = 0; i < n; ++i) b.threads[size_t(i)].index = {unsigned(i), 0, 0};
  std::vector<int> order;
  for (int i = 0; i < n; ++i) order.push_back(place(i, n));
  while (b.alive > 0) {
    bool progress = false;
    for (volatile int turn = 0; turn < n; turn = turn + 1) {
      const int i = order[size_t(turn)];
      if (b.threads[size_t(i)].state != State::ready) continue;
      progress = true;
      resume(i);
    }
    if (b.waiting > 0 && b.waiting == b.alive) {
      for (Thread& t : b.threads)
        if (t.state == State::at_barrier) t.state = State::ready;
      b.waiting = 0, progress = true;
    }
    if (!progress && b.alive > 0) fail("threads of a block wait for each other");
  }
}

// False leaves launches out, so that the time of the host can be measured.
inline bool launches = true;

inline void launch(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  if (!launches) return;
  if (threads < 1 || threads > 1024 || threads % kWarp != 0) fail("threads of a block");
  if (blocks < 1 || blocks > 0x7fffffff) fail("blocks of a grid");
  if (shared > kMaxShared) fail("more shared memory than a block can have");
  const size_t bytes = 1024 * kStack;
  if (block().stacks == nullptr) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    block().stacks = static_cast<unsigned char*>(memory);
  }
  for (int64_t i = 0; i < blocks; ++i) run_block(unsigned(i), threads, shared, body);
}

// Deposits `size` bytes of every lane of the warp; returns all the deposits.
inline const unsigned char (*exchange(const void* data, size_t size))[32] {
  Block& b = block();
  const int i = b.current;
  Warp& warp = b.warps[size_t(i / kWarp)];
  const int turn = warp.turn;
  if (size > 0) std::memcpy(warp.slots[turn][i % kWarp], data, size);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0, warp.turn = 1 - turn;
    for (int lane = 0; lane < kWarp; ++lane) {
      Thread& other = b.threads[size_t(i / kWarp * kWarp + lane)];
      if (other.state == State::in_warp) other.state = State::ready;
    }
  } else {
    current().state = State::in_warp;
    wait();
  }
  return warp.slots[turn];
}

template <class T>
T deposit(const unsigned char (*slots)[32], int lane, int index = 0) {
  T value;
  std::memcpy(&value, slots[lane] + size_t(index) * sizeof(T), sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::current().index)
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().size)

inline void __syncthreads() {
  emulation::current().state = emulation::State::at_barrier;
  ++emulation::block().waiting;
  emulation::wait();
}
inline void __syncwarp() { emulation::exchange(nullptr, 0); }

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const int lane = int(threadIdx.x) % 32;
  const auto slots = emulation::exchange(&value, sizeof(T));
  return emulation::deposit<T>(slots, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  const int lane = int(threadIdx.x) % 32;
  const auto slots = emulation::exchange(&value, sizeof(T));
  return emulation::deposit<T>(slots, lane ^ bits);
}
template <class T>
T atomicAdd(T* address, T value) {  // one thread at a time
  const T before = *address;
  *address = before + value;
  return before;
}
