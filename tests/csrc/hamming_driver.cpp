// Runs every kernel of csrc/cpu/hamming.h that the machine has against a sort of all distances, without torch: for
// sanitizers, and for what Python cannot reach (indices beyond 2^31, rooms that end where the codes end).
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc tests/csrc/hamming_driver.cpp
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "code_sets.h"
#include "cpu/hamming.h"

namespace {

using namespace ragsr;
using namespace code_sets;

std::vector<uint64_t> sorted_keys(const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width) {
  std::vector<uint64_t> keys;
  for (int64_t i = 0; i < n; ++i) {
    int distance = 0;
    for (int64_t j = 0; j < width; ++j) distance += __builtin_popcount(query[j] ^ codes[i * width + j]);
    keys.push_back(make_key(distance, i));
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

void in_order(int64_t tasks, const std::function<void(int64_t)>& body) {
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

struct Case {
  Kind kind;
  int64_t q, n, width, k, threads;
};

[[noreturn]] void fail(const char* what, const char* kernel, const Case& c, int64_t row) {
  std::printf("%s, %s: kind %d q %ld n %ld width %ld k %ld threads %ld: row %ld is wrong\n", what, kernel, c.kind,
              long(c.q), long(c.n), long(c.width), long(c.k), long(c.threads), long(row));
  std::exit(1);
}

void check(const Case& c) {
  const Bytes codes = make_codes(c.kind, c.n, c.width), queries = make_codes(c.kind, c.q, c.width);
  std::vector<std::vector<uint64_t>> wanted;
  for (int64_t i = 0; i < c.q; ++i) wanted.push_back(sorted_keys(&queries[i * c.width], codes.get(), c.n, c.width));
  for (const CpuKernel& kernel : available_kernels()) {
    std::vector<int32_t> distance(static_cast<size_t>(c.q * c.k), -1);
    std::vector<int64_t> index(static_cast<size_t>(c.q * c.k), -1);
    const Answer answer{distance.data(), index.data(), c.k};
    const auto compare = [&](const char* what) {
      for (int64_t i = 0; i < c.q; ++i)
        for (int64_t j = 0; j < c.k; ++j)
          if (make_key(distance[i * c.k + j], index[i * c.k + j]) != wanted[i][j]) fail(what, kernel.name, c, i);
    };
    hamming_topk(kernel, queries.get(), c.q, codes.get(), c.n, c.width, c.k, distance.data(), index.data(), c.threads,
                 in_order);
    compare("hamming_topk");
    scan_topk(kernel, queries.get(), c.q, codes.get(), c.n, c.width, answer, c.threads, in_order);
    compare("scan_topk");
    if (c.width > 2 || c.k > kCubeLargestK) continue;
    CubeTable(kernel, codes.get(), c.n, c.width, c.k, in_order).look_up(queries.get(), c.q, answer, in_order);
    compare("the table");
  }
}

// Codes that begin at an index beyond 2^32.
void check_far_index() {
  const int64_t first = (int64_t{1} << 33) + 5, n = 3000, q = 40, k = 5;
  for (int64_t width : {2, 8, 20}) {
    const Bytes codes = make_codes(kLight, n, width), queries = make_codes(kLight, q, width);
    for (const CpuKernel& kernel : available_kernels()) {
      std::vector<uint64_t> keys(static_cast<size_t>(q * Nearest::room(k)));
      std::vector<Nearest> nearest;
      for (int64_t i = 0; i < q; ++i) nearest.emplace_back(&keys[static_cast<size_t>(i * Nearest::room(k))], k);
      kernel.scan(queries.get(), q, codes.get(), n, width, first, nearest.data());
      for (int64_t i = 0; i < q; ++i) {
        nearest[i].finish();
        const std::vector<uint64_t> wanted = sorted_keys(&queries[i * width], codes.get(), n, width);
        for (int64_t j = 0; j < k; ++j)
          if (nearest[i].keys()[j] != wanted[j] + static_cast<uint64_t>(first))
            fail("far index", kernel.name, {kLight, q, n, width, k, 1}, i);
      }
    }
  }
}

// A table is built when scans have cost as much, found again by its bytes alone, and never after one of them changed.
void check_table_cache() {
  const int64_t n = 3000, q = 64, width = 2;
  const Bytes codes = make_codes(kRandom, n, width);
  const Bytes copy(new uint8_t[static_cast<size_t>(n * width)]);
  std::copy_n(codes.get(), n * width, copy.get());
  TableCache cache;
  int built = 0, calls = 0;
  const auto ask = [&](const uint8_t* from, int64_t k) {
    return cache.find_or_build(from, n, width, k, TableCosts(q, n, width, k), [&] {
      ++built;
      return std::make_shared<const CubeTable>(available_kernels().front(), from, n, width, k, in_order);
    });
  };
  const auto expect = [](bool right, const char* what) {
    if (!right) std::printf("table cache: %s\n", what), std::exit(1);
  };
  while (!ask(codes.get(), 3) && calls < 1000) ++calls;
  expect(built == 1 && calls > 1, "the first table comes after some scans");
  expect(ask(codes.get(), 4) && ask(codes.get(), 1) && ask(copy.get(), 2) && built == 1, "equal bytes find it");
  for (int64_t at : {int64_t{0}, n, n * width - 1}) {
    copy[static_cast<size_t>(at)] ^= 1;
    expect(!ask(copy.get(), 3), "other bytes do not");
    copy[static_cast<size_t>(at)] ^= 1;
  }
  expect(!ask(codes.get(), 5) && built == 1, "a larger k needs a table of its own");
}

}  // namespace

int main() {
  check_far_index();
  check_table_cache();
  int cases = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int64_t width : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 20, 25, 32, 33, 64, 65, 125, 128}) {
      for (int64_t n : {1, 63, 513, 1025, 1700}) {
        for (int64_t k : {int64_t{1}, int64_t{4}, int64_t{17}, int64_t{100}, n}) {
          if (k > n) continue;
          const int64_t q = cases % 3 == 0 ? 3 : 33;
          check({static_cast<Kind>(kind), q, n, width, k, 1 + cases % 2});
          ++cases;
        }
      }
    }
  }
  for (int64_t width : {2, 8, 16})  // parts of the codes
    for (int64_t k : {3, 100, 9000}) check({kLight, 2, 70000, width, k, 2}), ++cases;
  std::printf("%d cases\n", cases);
}
