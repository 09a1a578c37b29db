// The index under the sanitizers: every class of csrc/index, against counting, alone and with readers beside a writer.
//
//     g++ -std=c++17 -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all tests/index/sanitize.cpp
//     g++ -std=c++17 -O1 -g -pthread -fsanitize=thread tests/index/sanitize.cpp
//     ./a.out FOLDER        writes its files there; prints "sanitized" at the end
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../csrc/index/flat.h"
#include "../../csrc/index/mih.h"

using ragsr::FlatIndex;
using ragsr::MultiIndexHash;
using ragsr::Plan;
using ragsr::View;
using Bytes = std::vector<uint8_t>;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

Bytes random_bytes(int64_t count, unsigned seed) {
  std::mt19937 draw(seed);
  Bytes bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(draw() & 3);
  return bytes;
}

std::vector<uint64_t> counted(const View& view, const uint8_t* query) {
  std::vector<uint64_t> keys;
  for (int64_t id = 0; id < view.total(); ++id) {
    if (view.removed->has(id)) continue;
    int64_t distance = 0;
    for (int64_t i = 0; i < view.width(); ++i) distance += __builtin_popcount(view.code(id)[i] ^ query[i]);
    keys.push_back(ragsr::make_key(distance, id));
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

void check(const View& view, int64_t k) {
  const int64_t q = 3;
  const Bytes queries = random_bytes(q * view.width(), 77);
  k = std::min(k, view.live());
  std::vector<int32_t> distance(static_cast<size_t>(q * k));
  std::vector<int64_t> id(static_cast<size_t>(q * k));
  const ragsr::Ranges near = view.range_search(queries.data(), q, 2 * view.width());
  if (k > 0) view.search(queries.data(), q, k, distance.data(), id.data());
  for (int64_t row = 0; row < q; ++row) {
    const std::vector<uint64_t> keys = counted(view, queries.data() + row * view.width());
    for (int64_t j = 0; j < k; ++j)
      require(ragsr::make_key(distance[row * k + j], id[row * k + j]) == keys[j], "search agrees with counting");
    const int64_t count = near.limits[row + 1] - near.limits[row];
    require(std::equal(keys.begin(), keys.begin() + count, near.keys.begin() + near.limits[row]), "range_search");
    require(count == static_cast<int64_t>(keys.size()) || ragsr::key_distance(keys[count]) > 2 * view.width(), "all");
  }
}

void check_hash(const FlatIndex& index, int64_t k) {
  const MultiIndexHash hash(index.view());
  const int64_t q = 3, width = hash.view().width();
  const Bytes queries = random_bytes(q * width, 78);
  std::vector<int32_t> wanted(static_cast<size_t>(q * k)), distance(wanted);
  std::vector<int64_t> wanted_id(static_cast<size_t>(q * k)), id(wanted_id);
  hash.view().search(queries.data(), q, k, wanted.data(), wanted_id.data());
  for (const Plan plan : {Plan::buckets, Plan::automatic, Plan::scan}) {
    hash.search(queries.data(), q, k, distance.data(), id.data(), plan);
    require(distance == wanted && id == wanted_id, "hash agrees with the scan");
  }
}

void alone(const std::string& path, int64_t width) {
  FlatIndex(width).save(path);
  auto index = FlatIndex::open(path);
  for (const int64_t rows : {int64_t{1}, int64_t{500}, (int64_t{1} << 20) / width + 1, int64_t{3}}) {
    const Bytes codes = random_bytes(rows * width, static_cast<unsigned>(rows));
    const int64_t first = index->add(codes.data(), rows);
    check(*index->view(), 7);
    index->remove({first});
    check(*index->view(), 7);
    index->commit();
    check(*index->view(), 40);
  }
  check_hash(*index, 5);
  index->close();
  for (const bool map : {true, false}) check(*FlatIndex::load(path, map)->view(), 9);
  try {
    index->remove({0});
    require(false, "a removed code cannot be removed");
  } catch (const std::invalid_argument&) {
  }
}

void checksums() {
  const Bytes bytes = random_bytes(1000, 3);
  require(ragsr::crc32c(0, reinterpret_cast<const uint8_t*>("123456789"), 9) == 0xE3069283, "the published CRC-32C");
  for (int64_t count = 0; count < 40; ++count)
    require(ragsr::crc32c(7, &bytes[count], count) == ragsr::crc32c_portable(7, &bytes[count], count), "one CRC");
}

// One thread adds, removes and commits mapped records; the others search, load, hash and save what they see.
void together(const std::string& path, const std::string& copy) {
  const int64_t width = 128, rows = 4500;
  FlatIndex(width).save(path);
  auto index = FlatIndex::open(path);
  const Bytes codes = random_bytes(rows * width, 5);
  index->add(codes.data(), rows);
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 2; ++reader)
    readers.emplace_back([&, reader] {
      int64_t last = 0;
      while (!stop) {
        const auto view = index->view();
        require(view->total() % rows == 0 && view->total() >= last, "a whole prefix");
        last = view->total();
        std::vector<int32_t> distance(6);
        std::vector<int64_t> id(6);
        view->search(codes.data(), 2, 3, distance.data(), id.data());
        view->range_search(codes.data(), 1, 20);
        index->describe();
        if (reader == 0) FlatIndex::load(path, true)->view()->check_blocks();
        if (reader == 1) index->save(copy);
      }
    });
  for (int round = 0; round < 8; ++round) {
    const int64_t first = index->add(codes.data(), rows);
    index->remove({first, first + 9});
    if (round % 3 == 2) index->commit();
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  index->commit();
  require(FlatIndex::load(path, true)->view()->live() == 9 * rows - 16, "all was committed");
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 2, "usage: sanitize FOLDER");
  const std::string folder = arguments[1];
  checksums();
  for (const int64_t width : {1, 3, 8, 20, 128}) alone(folder + "/alone.index", width);
  together(folder + "/together.index", folder + "/copy.index");
  std::puts("sanitized");
}
