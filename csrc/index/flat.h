// FlatIndex: codes in one array, scanned whole by every search. Searches may run concurrently; an `add` waits for them.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../cpu/hamming.h"

namespace ragsr {

class FlatIndex {
 public:
  explicit FlatIndex(int64_t width) : width_(width), kernel_(choose_kernel()) {
    if (width < 1 || width > 128)
      throw std::invalid_argument("width is " + std::to_string(width) + " bytes; 1 to 128 are allowed (8 to 1024 bits)");
  }

  int64_t width() const { return width_; }

  int64_t size() const {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    return static_cast<int64_t>(codes_.size()) / width_;
  }

  void add(const uint8_t* codes, int64_t rows) {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    codes_.insert(codes_.end(), codes, codes + rows * width_);
  }

  void search(const uint8_t* queries, int64_t q, int64_t k, int32_t* distance, int64_t* index) const {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    const int64_t n = static_cast<int64_t>(codes_.size()) / width_;
    const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
    hamming_topk(kernel_.distances, queries, q, codes_.data(), n, width_, k, distance, index, threads,
                 [&](int64_t tasks, const auto& body) { run(std::min(tasks, threads), tasks, body); });
  }

 private:
  template <class Body>
  static void run(int64_t threads, int64_t tasks, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
  }

  int64_t width_;
  CpuKernel kernel_;
  std::vector<uint8_t> codes_;
  mutable std::shared_mutex mutex_;
};

}  // namespace ragsr
