// Runs the CUDA kernels of hamming_topk on the host (cuda_on_host.h), through their own plan, against a sort of all
// distances. Says how many searches were right, or which one was not.
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all tests/csrc/hamming_cuda_driver.cpp
#include "cuda_on_host.h"

namespace ragsr {

enum class Formulation;
inline int product_of(Formulation how, uint32_t code, uint32_t query);

// What mma.sync does, from the layout of its fragments: lane = 4 * group + member.
template <Formulation kHow, size_t kHalves>
void multiply_fragments(int (&sum)[4], const uint32_t (&a)[2 * kHalves], const uint32_t (&b)[kHalves]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  for (size_t h = 0; h < kHalves; ++h) {
    uint32_t low[32], high[32], query[32];
    const auto collect = [](uint32_t given, uint32_t (&all)[32]) {
      const uint64_t* words = emulation::exchange(given);
      for (int i = 0; i < 32; ++i) all[i] = static_cast<uint32_t>(words[i]);
    };
    collect(a[2 * h], low);
    collect(a[2 * h + 1], high);
    collect(b[h], query);
    for (int m = 0; m < 4; ++m)  // the words of a row lie in the four lanes of a group
      for (int d = 0; d < 4; ++d)
        sum[d] += product_of(kHow, (d < 2 ? low : high)[4 * group + m], query[4 * (2 * member + d % 2) + m]);
  }
}
template <Formulation kHow>
void multiply(int (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<kHow, 2>(sum, a, b);
}
template <Formulation kHow>
void multiply(int (&sum)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  multiply_fragments<kHow, 1>(sum, a, b);
}

}  // namespace ragsr

#include "../../csrc/cuda/hamming_plan.h"
#include "code_sets.h"

// Of a register of a code and one of a query.
inline int ragsr::product_of(Formulation how, uint32_t code, uint32_t query) {
  if (how == Formulation::with_xor) return __builtin_popcount(code ^ query);
  if (how == Formulation::with_and) return __builtin_popcount(code & query);
  int sum = 0;
  for (int byte = 0; byte < 32; byte += 8)
    sum += static_cast<int8_t>(code >> byte & 0xff) * static_cast<int8_t>(query >> byte & 0xff);
  return sum;
}

namespace {

using ragsr::Formulation;

using code_sets::Bytes;
using code_sets::Kind;
using ragsr::Search;

// A small GPU: few processors, little memory to lend, and what it lends is full of nonsense.
struct HostDevice {
  int count = 2;
  int64_t bytes = 1 << 14;
  std::vector<std::unique_ptr<uint64_t[]>> lent;

  int processors() const { return count; }
  int64_t workspace() const { return bytes; }
  Formulation formulation() const { return Formulation::with_and; }
  void* lend(int64_t size) {
    const auto words = static_cast<size_t>((size + 7) / 8);
    lent.emplace_back(new uint64_t[words]);
    std::memset(lent.back().get(), 0xCD, words * 8);
    return lent.back().get();
  }
  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, int64_t blocks, int shared, const Arguments&... arguments) {
    emulation::launch(kernel, blocks, ragsr::kThreads, shared, arguments...);
  }
};

using Algorithm = void (*)(HostDevice&, const Search&);

struct Case {
  const char* name;
  Algorithm run;
  Kind kind;
  int64_t q, n, width, k, offset;  // offset: bytes by which the rows miss an aligned address
};

// The same bytes, `offset` bytes behind an aligned address.
struct Shifted {
  Bytes room;
  uint8_t* data;
  Shifted(const Bytes& from, int64_t bytes, int64_t offset) : room(new uint8_t[static_cast<size_t>(bytes + 16)]) {
    data = room.get() + (16 - reinterpret_cast<uintptr_t>(room.get()) % 16) % 16 + offset;
    std::memcpy(data, from.get(), static_cast<size_t>(bytes));
  }
};

bool right(const Case& c) {
  const Bytes made = code_sets::make_codes(c.kind, c.n, c.width);
  const Bytes asked = code_sets::make_codes(c.kind == code_sets::kApproaching ? code_sets::kLight : c.kind, c.q, c.width);
  const Shifted codes(made, c.n * c.width, c.offset), queries(asked, c.q * c.width, 0);
  const auto places = static_cast<size_t>(c.q * c.k);
  std::vector<int32_t> distance(places, -7);
  std::vector<int64_t> index(places, -7);
  HostDevice device;
  c.run(device, {queries.data, codes.data, c.q, c.n, c.width, c.k, distance.data(), index.data()});
  for (int64_t row = 0; row < c.q; ++row) {
    const auto wanted = code_sets::nearest(queries.data + row * c.width, codes.data, c.n, c.width, c.k);
    for (int64_t j = 0; j < c.k; ++j) {
      const auto at = static_cast<size_t>(row * c.k + j);
      const auto want = wanted[static_cast<size_t>(j)];
      if (distance[at] == want.first && index[at] == want.second) continue;
      std::printf("%s, set %d, q=%ld n=%ld width=%ld k=%ld offset=%ld: query %ld, place %ld is (%d, %ld), not (%d, %ld)\n",
                  c.name, c.kind, c.q, c.n, c.width, c.k, c.offset, row, j, distance[at], index[at], want.first,
                  want.second);
      return false;
    }
  }
  return true;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto choose = [](auto... of) {
    const int64_t list[] = {of...};
    return list[code_sets::generator() % (sizeof list / sizeof *list)];
  };
  const auto any_kind = [] { return static_cast<Kind>(code_sets::generator() % code_sets::kKinds); };
  const auto add = [&](const char* name, Algorithm run, int64_t q, int64_t n, int64_t width, int64_t k) {
    all.push_back({name, run, any_kind(), q, n, width, std::min(k, n), choose(0, 0, 1, 4, 8)});
  };
  const int64_t widths[] = {1, 2, 3, 4, 5, 8, 9, 12, 16, 20, 32, 33, 64, 100, 125, 128};
  for (const int64_t width : widths) {
    add("lists", ragsr::lists_topk<1, HostDevice>, 1, choose(1, 63, 257, 5000, 13000), width, choose(1, 4, 100, 1024));
    add("lists", ragsr::lists_topk<4, HostDevice>, choose(2, 3, 4), choose(300, 4097, 9001), width, choose(1, 4, 513));
    add("lists", ragsr::lists_topk<8, HostDevice>, choose(5, 8, 19), choose(1, 700, 4500), width, choose(1, 10, 300));
    for (const Algorithm run : {ragsr::mma_topk<Formulation::with_xor, HostDevice>,
                                ragsr::mma_topk<Formulation::with_and, HostDevice>,
                                ragsr::mma_topk<Formulation::with_bytes, HostDevice>})
      add("tensor cores", run, choose(1, 63, 130), choose(1, 300, 4500), width, choose(1, 4, 100));
    add("counts", ragsr::counts_topk<HostDevice>, choose(1, 3), choose(1, 63, 3000, 9000), width, choose(1, 1500, 9000));
  }
  for (int kind = 0; kind < code_sets::kKinds; ++kind) {  // lists that fill up, part after part
    all.push_back({"lists", ragsr::lists_topk<8, HostDevice>, static_cast<Kind>(kind), 9, 12300, 8, 100, 0});
    all.push_back({"lists", ragsr::lists_topk<1, HostDevice>, static_cast<Kind>(kind), 1, 20000, 4, 1000, 0});
    all.push_back({"tensor cores", ragsr::mma_topk<Formulation::with_and, HostDevice>, static_cast<Kind>(kind), 70, 9000,
                   8, 20, 0});
    all.push_back({"counts", ragsr::counts_topk<HostDevice>, static_cast<Kind>(kind), 2, 12300, 8, 5000, 0});
  }
  for (const int64_t k : {1, 2, 3, 8, 30, 50, 128}) {
    add("cube", ragsr::cube_topk<HostDevice>, choose(1, 70), choose(129, 4097, 9001), 1, k);
    if (k < 50) add("cube", ragsr::cube_topk<HostDevice>, choose(1, 300), choose(129, 5000), 2, k);
  }
  all.push_back({"plan", ragsr::hamming_topk<HostDevice>, code_sets::kRandom, 40, 900, 8, 4, 0});
  all.push_back({"plan", ragsr::hamming_topk<HostDevice>, code_sets::kRandom, 1, 3000, 2, 2000, 0});
  return all;
}

}  // namespace

int main() {
  int passed = 0;
  for (const Case& c : cases()) {
    if (!right(c)) return 1;
    ++passed;
  }
  std::printf("%d searches, all right\n", passed);
}
