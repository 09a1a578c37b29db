// Runs CUDA kernels on the host, thread by thread: the same source as on a GPU, so that selection, merging and tails can be
// tested where there is none.
//
// Every thread of a block is a fiber. A fiber runs until it waits for its block (`__syncthreads`) or its warp (ballots,
// shuffles, `__syncwarp`); then another one goes on, in an order drawn at random. Blocks run one after the other. A block
// whose threads wait at different places, or do not all come, is an error and says so.
//
// What it cannot show: races between threads that never wait for one another, and anything about time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__ inline
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;

enum class Place { running, warp, block, done };

struct Thread {
  ucontext_t start;
  jmp_buf here;
  bool started = false;
  Index3 index;
  Place place = Place::running;
  uint64_t given = 0;  // to a collective of its warp or block
};

struct Block {
  std::vector<Thread> threads;
  std::vector<uint64_t> warp_given;  // what the threads gave to the last collective, once all were there
  uint64_t any = 0;                  // of the last __syncthreads_or
  std::vector<unsigned char> shared;
  Thread* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
};

inline Block* block = nullptr;
inline std::mt19937 order(1);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void enter() {
  block->kernel();
  block->current->place = Place::done;
  _longjmp(block->scheduler, 1);
}

// A context is entered once; from then on jumps switch between fibers, many times faster.
__attribute__((noinline)) inline void resume(Thread& thread) {
  block->current = &thread;
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void wait(Place place, uint64_t given) {
  Thread* self = block->current;
  self->place = place;
  self->given = given;
  if (_setjmp(self->here) == 0) _longjmp(block->scheduler, 1);
}

// What the lanes of the caller's warp gave, one word each.
inline const uint64_t* exchange(uint64_t given) {
  wait(Place::warp, given);
  return &block->warp_given[block->current->index.x / kLanes * kLanes];
}

// Lets those go on who have all arrived at the same kind of place. Threads that have ended do not count.
inline bool release() {
  bool released = false;
  const size_t threads = block->threads.size();
  for (size_t first = 0; first < threads; first += kLanes) {
    const size_t last = std::min(threads, first + kLanes);
    size_t waiting = 0, alive = 0;
    for (size_t i = first; i < last; ++i) {
      waiting += block->threads[i].place == Place::warp;
      alive += block->threads[i].place != Place::done;
    }
    if (waiting == 0 || waiting < alive) continue;
    for (size_t i = first; i < last; ++i) {
      block->warp_given[i] = block->threads[i].given;
      if (block->threads[i].place == Place::warp) block->threads[i].place = Place::running;
    }
    released = true;
  }
  size_t waiting = 0, alive = 0;
  for (const Thread& thread : block->threads) {
    waiting += thread.place == Place::block;
    alive += thread.place != Place::done;
  }
  if (waiting > 0 && waiting == alive) {
    block->any = 0;
    for (Thread& thread : block->threads) {
      if (thread.place != Place::block) continue;
      block->any |= thread.given;
      thread.place = Place::running;
    }
    released = true;
  }
  return released || alive == 0;
}

inline void run_block() {
  std::vector<Thread*> ready;
  for (;;) {
    ready.clear();
    for (Thread& thread : block->threads)
      if (thread.place == Place::running) ready.push_back(&thread);
    if (ready.empty()) {
      if (!release()) fail("a block is stuck: its threads wait at different places");
      bool alive = false;
      for (const Thread& thread : block->threads) alive |= thread.place != Place::done;
      if (!alive) return;
      continue;
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (Thread* thread : ready) resume(*thread);
  }
}

inline Index3 block_index, block_size, grid_size;

inline char* stack_of(size_t thread) {  // kept from launch to launch
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

__attribute__((noinline)) inline void prepare(Thread& thread, unsigned number) {
  thread.index.x = number;
  thread.place = Place::running;
  thread.started = false;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stack_of(number);
  thread.start.uc_stack.ss_size = kStack;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, enter, 0);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, const Arguments&... arguments) {
  if (blocks < 1 || blocks > 0x7fffffff) fail("a launch of no blocks, or of too many");
  Block state;
  state.kernel = [&] { kernel(arguments...); };
  state.threads.resize(static_cast<size_t>(threads));
  state.warp_given.resize(static_cast<size_t>(threads));
  block = &state;
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    block_index.x = static_cast<unsigned>(b);
    state.shared.assign(static_cast<size_t>(shared), 0xAB);
    unsigned number = 0;
    for (Thread& thread : state.threads) prepare(thread, number++);
    run_block();
  }
  block = nullptr;
}

}  // namespace emulation

#define threadIdx (emulation::block->current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::wait(emulation::Place::block, 0); }
inline int __syncthreads_or(int value) {
  emulation::wait(emulation::Place::block, value != 0);
  return emulation::block->any != 0;
}
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::exchange(0); }

inline unsigned __ballot_sync(unsigned, int value) {
  const uint64_t* given = emulation::exchange(value != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) bits |= static_cast<unsigned>(given[lane]) << lane;
  return bits;
}

inline unsigned __match_any_sync(unsigned, int value) {
  const auto own = static_cast<uint64_t>(static_cast<unsigned>(value));
  const uint64_t* given = emulation::exchange(own);
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) bits |= static_cast<unsigned>(given[lane] == own) << lane;
  return bits;
}

template <class T>
T from_lane(T value, int lane) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const uint64_t* given = emulation::exchange(word);
  std::memcpy(&value, &given[lane & (emulation::kLanes - 1)], sizeof value);
  return value;
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const int lane = static_cast<int>(threadIdx.x % emulation::kLanes);
  return from_lane(value, lane < static_cast<int>(step) ? lane : lane - static_cast<int>(step));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return from_lane(value, static_cast<int>(threadIdx.x % emulation::kLanes) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return from_lane(value, lane);
}

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Fibers give way only where they wait, so a read and a write are one step.
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}

namespace ragsr {
inline unsigned char* dynamic_shared() { return emulation::block->shared.data(); }
}  // namespace ragsr
