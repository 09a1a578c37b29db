// The threads of the index: started for one call and joined before it returns.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace ragsr {

inline int64_t thread_count() { return std::max<int64_t>(1, std::thread::hardware_concurrency()); }

// body(task) for every task in [0, tasks), on at most `threads` threads, the caller's among them. What a body throws
// stops the rest and is thrown here.
template <class Body>
void run_parallel(int64_t threads, int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr problem;
  std::mutex guard;
  const auto work = [&] {
    try {
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    } catch (...) {
      next = tasks;
      const std::lock_guard<std::mutex> lock(guard);
      if (!problem) problem = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (problem) std::rethrow_exception(problem);
}

}  // namespace ragsr
