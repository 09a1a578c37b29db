// Runs CUDA kernels on the host, thread by thread: the same source as on a GPU, so that selection, merging and tails
// can be tested where there is none.
//
// Every thread of a block is a fiber. A fiber runs until it waits for its block (`__syncthreads`), its warp (ballots,
// shuffles, `__syncwarp`) or other blocks (csrc/cuda/team.h); then another one goes on, in an order drawn at random.
// `launch` runs blocks one after the other, `launch_some` so many at once: each as far as it gets. A block whose threads wait at different
// places, or do not all come, is an error and says so; so are blocks that wait for one another for ever, and reading
// the shared memory of a block that has left.
//
// What it cannot show: races between threads that never wait for one another, what a GPU may see of another block's
// writes before it has waited for them, and anything about time. Variables that are `__shared__` are the same for all
// blocks: blocks that run at once must use the shared memory whose size is given at the launch.
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

struct Block;

struct Thread {
  ucontext_t start;
  jmp_buf here;
  bool started = false;
  Index3 index;
  Block* block = nullptr;
  Place place = Place::running;
  uint64_t given = 0;      // to a collective of its warp or block
  unsigned cluster_arrivals = 0;
};

struct Block {
  Index3 index;
  std::vector<Thread> threads;
  std::vector<uint64_t> warp_given;  // what the threads gave to the last collective, once all were there
  uint64_t any = 0;                  // of the last __syncthreads_or
  std::vector<unsigned char> shared;
};

inline std::vector<Block> blocks;  // those that run at once
inline unsigned cluster_size = 1;
inline Thread* current = nullptr;
inline Block* block = nullptr;  // of the current thread
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline uint64_t progress = 0;  // steps other than asking in vain
inline std::mt19937 order(1);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void enter() {
  kernel();
  current->place = Place::done;
  ++progress;
  _longjmp(scheduler, 1);
}

// A context is entered once; from then on jumps switch between fibers, many times faster.
__attribute__((noinline)) inline void resume(Thread& thread) {
  current = &thread;
  block = thread.block;
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void give_way() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

inline void wait(Place place, uint64_t given) {
  current->place = place;
  current->given = given;
  ++progress;
  give_way();
}

// What the lanes of the caller's warp gave, one word each.
inline const uint64_t* exchange(uint64_t given) {
  wait(Place::warp, given);
  return &block->warp_given[current->index.x / kLanes * kLanes];
}

// Lets those go on who have all arrived at the same kind of place. Threads that have ended do not count.
inline bool release(Block* block) {
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
  return released;
}

inline bool ended(const Block& of) {
  return std::all_of(of.threads.begin(), of.threads.end(), [](const Thread& t) { return t.place == Place::done; });
}

// One step of every thread of a block that can take one; false: none got anywhere.
inline bool step(Block& b) {
  const uint64_t before = progress;
  std::vector<Thread*> ready;
  for (Thread& thread : b.threads)
    if (thread.place == Place::running) ready.push_back(&thread);
  std::shuffle(ready.begin(), ready.end(), order);
  for (Thread* thread : ready) resume(*thread);
  const bool released = release(&b);
  if (ready.empty() && !released) fail("a block is stuck: its threads wait at different places");
  return released || progress != before;
}

// Each block runs as far as it gets before another one has its turn: who does not wait where it should is far ahead.
inline void run_blocks() {
  std::vector<Block*> left;
  for (Block& b : blocks) left.push_back(&b);
  while (!left.empty()) {
    std::shuffle(left.begin(), left.end(), order);
    const uint64_t before = progress;
    for (Block* b : left)
      while (!ended(*b) && step(*b)) {
      }
    left.erase(std::remove_if(left.begin(), left.end(), [](Block* b) { return ended(*b); }), left.end());
    if (progress == before) fail("blocks wait for one another for ever");
  }
}

inline Index3 block_size, grid_size;

inline char* stack_of(size_t thread) {  // kept from launch to launch
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

__attribute__((noinline)) inline void prepare(Thread& thread, unsigned number, unsigned fiber) {
  thread.index.x = number;
  thread.place = Place::running;
  thread.started = false;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stack_of(fiber);
  thread.start.uc_stack.ss_size = kStack;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, enter, 0);
}

// Blocks [first, last) at once.
inline void run_some(int64_t first, int64_t last, int threads, int shared) {
  blocks.clear();
  blocks.resize(static_cast<size_t>(last - first));
  unsigned fiber = 0;
  for (Block& b : blocks) {
    b.index.x = static_cast<unsigned>(first++);
    b.threads.resize(static_cast<size_t>(threads));
    b.warp_given.resize(static_cast<size_t>(threads));
    b.shared.assign(static_cast<size_t>(shared), 0xAB);
    unsigned number = 0;
    for (Thread& thread : b.threads) {
      thread.block = &b;
      prepare(thread, number++, fiber++);
    }
  }
  run_blocks();
}

// `at_once` blocks run together, in clusters of `cluster`.
template <class... Parameters, class... Arguments>
void launch_some(void (*function)(Parameters...), int64_t count, int64_t at_once, int64_t cluster, int threads,
                 int shared, const Arguments&... arguments) {
  if (count < 1 || count > 0x7fffffff) fail("a launch of no blocks, or of too many");
  if (count % cluster != 0 || at_once % cluster != 0) fail("a cluster that is not whole");
  kernel = [&] { function(arguments...); };
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(count);
  cluster_size = static_cast<unsigned>(cluster);
  for (int64_t first = 0; first < count; first += at_once)
    run_some(first, std::min(first + at_once, count), threads, shared);
}

template <class Kernel, class... Arguments>
void launch(Kernel function, int64_t count, int threads, int shared, const Arguments&... arguments) {
  launch_some(function, count, 1, 1, threads, shared, arguments...);
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block->index)
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
T __shfl_down_sync(unsigned, T value, unsigned step) {
  const int lane = static_cast<int>(threadIdx.x % emulation::kLanes), other = lane + static_cast<int>(step);
  return from_lane(value, other < emulation::kLanes ? other : lane);
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

// As in csrc/cuda/team.h.
inline void arrive(unsigned* counter) {
  ++*counter;
  ++emulation::progress;
}
inline void wait_for(const unsigned* counter, unsigned number) {
  while (*counter < number) emulation::give_way();
}
inline void cluster_arrive() {
  ++emulation::current->cluster_arrivals;
  ++emulation::progress;
}
inline emulation::Block& cluster_block(unsigned rank) {
  const unsigned own = blockIdx.x - emulation::blocks[0].index.x;
  return emulation::blocks[own / emulation::cluster_size * emulation::cluster_size + rank];
}
inline bool cluster_arrived(unsigned number) {
  for (unsigned rank = 0; rank < emulation::cluster_size; ++rank)
    for (const emulation::Thread& thread : cluster_block(rank).threads)
      if (thread.cluster_arrivals < number) return false;
  return true;
}
inline void cluster_wait() {
  while (!cluster_arrived(emulation::current->cluster_arrivals)) emulation::give_way();
}
template <class T>
const T* in_block(const T* own, unsigned rank) {
  emulation::Block& other = cluster_block(rank);
  if (emulation::ended(other)) emulation::fail("a block reads the shared memory of one that has left");
  const auto offset = reinterpret_cast<const unsigned char*>(own) - emulation::block->shared.data();
  return reinterpret_cast<const T*>(other.shared.data() + offset);
}

}  // namespace ragsr
