// Many queries against many codes without counting bits: addition on bit planes.
//
// This file has no include guard on purpose: hamming_targets.h includes it once for each instruction set, in a
// namespace that defines RAGSR_TARGET, the vector `Words` and a few operations on it. Everything below is the same for
// all of them.
//
// A block of codes (512 with AVX-512) is turned so that plane p holds bit p of every code, one code per bit position. A
// full adder on planes then adds one bit of every code at once:
//
//     sum = a ^ b ^ c      carry = majority(a, b, c)          two instructions with AVX-512, for 512 codes
//
// To count the bits in which 64-bit codes differ from a query takes about 62 adders. Half of them, those that add the
// bits themselves (weight 1), meet the query only as "this input is inverted or not": eight cases for each adder. Those
// are worked out once per block, into a table, and serve all queries:
//
//     bits p0 p1 ... p63 --> 31 adders --> 31 carries x 8 cases, 2 sums left x 2 cases            (`build_table`)
//     query              --> which case of each of them                                           (`choose_cases`)
//     31 carries, 2 sums --> 1 + 31 adders --> is the distance below the bound? one bit per code  (`far_codes`)
//
// The adders start from 2^m - bound, so the carry out of the top says "bound or more". The few codes that are nearer
// are then compared one by one. On paper twice what xor, VPOPCNTQ and minimum can do.

constexpr int64_t kBlockCodes = sizeof(Words) * 8;

constexpr uint64_t even_groups(int size) {  // size = 1: 0x5555..., 2: 0x3333..., and so on
  return ~uint64_t{0} / ((uint64_t{1} << size) + 1);
}

// ---------------------------------------------------------------- codes to planes

// A square of N x N tiles of `Tile` x `Tile` bits, turned about its diagonal; its rows lie `Stride` vectors apart.
template <int N, int Tile, int Stride>
RAGSR_TARGET inline void turn(Words* at) {
  Words row[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) row[i] = at[i * Stride];
#pragma GCC unroll 3
  for (int half = N / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (i & half) continue;
      const int shift = half * Tile;
      const Words mask = broadcast(even_groups(shift));
      const Words low = row[i], high = row[i + half];
      row[i] = choose(mask, low, high << shift);
      row[i + half] = choose(mask, low >> shift, high);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) at[i * Stride] = row[i];
}

// kBlockCodes chunks of T bits, end to end, become plane[p]. Which code stands at which bit: `code_at`.
template <int T>
RAGSR_TARGET inline void turn_to_planes(Words* plane) {
  for (int i = 0; i < 8 && T > 8; ++i) turn<T / 8, 8, 8>(plane + i);
  for (int i = 0; i < T; i += 8) turn<8, 1, 1>(plane + i);
}

// The code whose bits stand at position `bit` of the planes.
template <int T>
constexpr int64_t code_at(int64_t bit) {
  return kBlockCodes / T * (bit % T) + bit / T;
}

// ---------------------------------------------------------------- the part that all queries share

template <int T>
struct Chunk {
  static constexpr int kAdders = T / 2 - 1;
  static constexpr int kInputs = T / 2;            // carries of weight 2: those of the adders, and one of the sums left
  static constexpr int kCases = kInputs + 1;       // what a query has to choose
  static constexpr int kTable = 8 * kAdders + 4;   // planes
  static constexpr int kLevels = log2_of(T) - 1;   // adders of weight 2, 4, ..., T / 2
};

// item [T + kAdders]: the planes, then the sums in the order in which they are made; adder i takes items 3i to 3i + 2.
template <int T>
RAGSR_TARGET inline void build_table(Words* item, Words* table) {
  constexpr int kAdders = Chunk<T>::kAdders;
  for (int i = 0; i < kAdders; ++i) {
    const Words a = item[3 * i], b = item[3 * i + 1], c = item[3 * i + 2];
    item[T + i] = parity(a, b, c);
    Words* carry = table + 8 * i;
    carry[0] = majority(a, b, c), carry[7] = ~carry[0];
    carry[1] = majority(~a, b, c), carry[6] = ~carry[1];
    carry[2] = majority(a, ~b, c), carry[5] = ~carry[2];
    carry[4] = majority(a, b, ~c), carry[3] = ~carry[4];
  }
  Words* left = table + 8 * kAdders;
  left[0] = item[3 * kAdders], left[1] = ~left[0];
  left[2] = item[3 * kAdders + 1], left[3] = ~left[2];
}

// The cases of a query: byte offsets into the table. The same adders, on the bits of the query.
template <int T>
inline void choose_cases(uint64_t query, uint16_t* offset) {
  constexpr int kAdders = Chunk<T>::kAdders;
  uint8_t item[T + kAdders];
  for (int p = 0; p < T; ++p) item[p] = query >> p & 1;
  const auto place = [](int plane) { return static_cast<uint16_t>(plane * static_cast<int>(sizeof(Words))); };
  for (int i = 0; i < kAdders; ++i) {
    const int a = item[3 * i], b = item[3 * i + 1], c = item[3 * i + 2];
    item[T + i] = static_cast<uint8_t>(a ^ b ^ c);
    offset[i] = place(8 * i + (a | b << 1 | c << 2));
  }
  offset[kAdders] = place(8 * kAdders + item[3 * kAdders]);
  offset[kAdders + 1] = place(8 * kAdders + 2 + item[3 * kAdders + 1]);
}

// ---------------------------------------------------------------- the part of each query

// sum += a + b, in one weight; returns the carry.
RAGSR_TARGET inline __attribute__((always_inline)) Words add(Words& sum, Words a, Words b) {
  const Words carry = majority(sum, a, b);
  sum = parity(sum, a, b);
  return carry;
}

RAGSR_TARGET inline __attribute__((always_inline)) Words table_plane(const Words* table, uint16_t offset) {
  return *reinterpret_cast<const Words*>(reinterpret_cast<const char*>(table) + offset);
}

// Adds inputs First to First + 2^(Level + 1) - 1 to the counter: level 0 takes two, level 1 two carries of level 0, ...
// counter[0] has weight 1, counter[1 + level] weight 2^(level + 1). Returns the carry out of `Level`.
template <int T, int Level, int First>
RAGSR_TARGET inline __attribute__((always_inline)) Words add_inputs(const Words* table, const uint16_t* offset,
                                                                     Words* counter) {
  if constexpr (Level < 0) {
    if constexpr (First < Chunk<T>::kAdders) return table_plane(table, offset[First]);
    return add(counter[0], table_plane(table, offset[First]), table_plane(table, offset[First + 1]));
  } else {
    const Words a = add_inputs<T, Level - 1, First>(table, offset, counter);
    const Words b = add_inputs<T, Level - 1, First + (1 << Level)>(table, offset, counter);
    return add(counter[1 + Level], a, b);
  }
}

// Bit per code: is the distance `bound` or more? 1 <= bound <= T << Upper. The counter stays in registers while the
// chunks of the codes go by: table [chunks][kTable], offset [chunks][kCases], at most 2^Upper chunks. Where all codes
// are far after some of them, the others are left out.
template <int T, int Upper>
RAGSR_TARGET inline Words far_codes(const Words* table, const uint16_t* offset, int64_t chunks, int64_t bound) {
  constexpr int kCounter = 1 + Chunk<T>::kLevels, kTop = Chunk<T>::kLevels - 1;
  static constexpr uint64_t bit[2] = {0, ~uint64_t{0}};
  const int64_t begin = (int64_t{T} << Upper) - bound;
  Words counter[kCounter + Upper];
#pragma GCC unroll 16
  for (int i = 0; i < kCounter + Upper; ++i) counter[i] = broadcast(bit[begin >> i & 1]);
  if constexpr (Upper == 0) return add_inputs<T, kTop, 0>(table, offset, counter);
  Words far{};
  for (int64_t c = 0; c < chunks && !all_set(far); ++c) {
    Words carry = add_inputs<T, kTop, 0>(table + c * Chunk<T>::kTable, offset + c * Chunk<T>::kCases, counter);
#pragma GCC unroll 4
    for (int i = kCounter; i < kCounter + Upper; ++i) {
      const Words old = counter[i];
      counter[i] = old ^ carry;
      carry &= old;
    }
    far |= carry;
  }
  return far;
}

// ---------------------------------------------------------------- the scan

// Offers every code of the block that `far` leaves out. `first` is the index of its first code.
template <int T>
RAGSR_TARGET inline void offer_near(Words far, const uint8_t* query, const uint8_t* codes, int64_t n, int64_t width,
                                    int64_t first, Nearest& nearest) {
  uint64_t word[sizeof(Words) / 8];
  std::memcpy(word, &far, sizeof far);
  for (size_t lane = 0; lane < sizeof(Words) / 8; ++lane) {
    for (uint64_t near = ~word[lane]; near != 0; near &= near - 1) {
      const int64_t i = code_at<T>(static_cast<int64_t>(64 * lane) + __builtin_ctzll(near));
      if (i >= n) continue;  // padding of the last block
      nearest.offer(make_key(popcount_words(query, codes + i * width, width), first + i));
    }
  }
}

// Bytes [from, from + T / 8) of each code, end to end, padded with zeros to a whole block.
template <int T>
RAGSR_TARGET inline void gather_chunks(const uint8_t* codes, int64_t n, int64_t width, int64_t from, uint8_t* out) {
  constexpr int64_t kBytes = T / 8;
  if (width == kBytes) {
    std::memcpy(out, codes, static_cast<size_t>(n * kBytes));
  } else if (from + kBytes <= width) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * kBytes, codes + i * width + from, kBytes);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t word = load_word(codes + i * width + from, width - from);
      std::memcpy(out + i * kBytes, &word, kBytes);
    }
  }
  std::memset(out + n * kBytes, 0, static_cast<size_t>((kBlockCodes - n) * kBytes));
}

// The tables of all chunks of a block of codes, one behind the other; `item` has room for the items of each.
template <int T>
RAGSR_TARGET inline void tables_of(const uint8_t* codes, int64_t n, int64_t width, int64_t chunks, Words* item,
                                   Words* table) {
  constexpr int64_t kItems = T + Chunk<T>::kAdders;
  const bool split = T == 64 && n == kBlockCodes && split_block(codes, width, item, kItems);
  for (int64_t c = 0; c < chunks; ++c, item += kItems, table += Chunk<T>::kTable) {
    if (!split) gather_chunks<T>(codes, n, width, T / 8 * c, reinterpret_cast<uint8_t*>(item));
    turn_to_planes<T>(item);
    build_table<T>(item, table);
  }
}

// Asks for part `i` of `parts` of the `bytes` from `begin` on.
inline void fetch_ahead(const uint8_t* begin, int64_t bytes, int64_t i, int64_t parts) {
  for (int64_t at = bytes * i / parts / 64 * 64; at < bytes * (i + 1) / parts; at += 64) __builtin_prefetch(begin + at);
}

// Codes of `chunks` chunks of T bits: the tables of a block (16 KB for each chunk) stay in the second cache while the
// queries go by.
template <int T, int Upper>
RAGSR_TARGET inline void scan_sliced(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                                     int64_t first, Nearest* nearest) {
  constexpr int kCases = Chunk<T>::kCases, kTable = Chunk<T>::kTable;
  constexpr int64_t kBytes = T / 8, kMostChunks = 1 << Upper;
  const int64_t chunks = Upper == 0 ? 1 : divide_up(width, kBytes);
  std::vector<uint16_t> offsets(static_cast<size_t>(q * chunks * kCases));
  for (int64_t i = 0; i < q; ++i)
    for (int64_t c = 0; c < chunks; ++c)
      choose_cases<T>(load_word(queries + i * width + kBytes * c, std::min(kBytes, width - kBytes * c)),
                      &offsets[static_cast<size_t>((i * chunks + c) * kCases)]);
  constexpr int64_t kItems = T + Chunk<T>::kAdders;
  std::vector<uint8_t> room(sizeof(Words[kMostChunks * (kTable + kItems) + 1]));
  Words* table = aligned<Words>(room.data());
  for (int64_t start = 0; start < n; start += kBlockCodes) {
    const int64_t count = std::min(kBlockCodes, n - start);
    const uint8_t* block = codes + start * width;
    tables_of<T>(block, count, width, chunks, table + kMostChunks * kTable, table);
    const int64_t ahead = std::min(kBlockCodes, n - start - count) * width;
    for (int64_t i = 0; i < q; ++i) {
      fetch_ahead(block + count * width, ahead, i, q);
      const int64_t bound = nearest[i].bound();
      if (bound == 0) continue;  // k equal codes are found already
      const uint16_t* offset = &offsets[static_cast<size_t>(i * chunks * kCases)];
      const Words far = bound > T << Upper ? Words{} : far_codes<T, Upper>(table, offset, chunks, bound);
      if (all_set(far)) continue;
      offer_near<T>(far, queries + i * width, block, count, width, first + start, nearest[i]);
    }
  }
}

// ---------------------------------------------------------------- few queries

// Offers the codes whose distance stands in `distance` [n] and is below the bound; looks closer at 64 at a time.
RAGSR_TARGET inline void offer_below(const uint16_t* distance, int64_t n, int64_t first, Nearest& nearest) {
  for (int64_t start = 0; start < n; start += 64) {
    const int64_t end = std::min(n, start + 64);
    uint16_t least = ~uint16_t{0};
    for (int64_t i = start; i < end; ++i) least = std::min(least, distance[i]);
    if (least >= nearest.bound()) continue;
    for (int64_t i = start; i < end; ++i)
      if (distance[i] < nearest.bound()) nearest.offer(make_key(distance[i], first + i));
  }
}

RAGSR_TARGET inline void scan_direct(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                                     int64_t first, Nearest* nearest) {
  constexpr int64_t kBlock = 2048;
  uint16_t distance[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    for (int64_t i = 0; i < q; ++i) {
      distances(queries + i * width, codes + start * width, count, width, distance);
      offer_below(distance, count, first + start, nearest[i]);
    }
  }
}

// Offers all codes [n, width], the first of which has index `first`, to the `nearest` of each query [q, width].
RAGSR_TARGET inline void scan(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                              int64_t first, Nearest* nearest) {
  if (q < kSlicedQueries) return scan_direct(queries, q, codes, n, width, first, nearest);
  const int64_t head = std::min(n, kBlockCodes);  // brings the bounds down before the planes are of use
  scan_direct(queries, q, codes, head, width, first, nearest);
  codes += head * width, n -= head, first += head;
  if (n == 0) return;
  if (width == 1) return scan_sliced<8, 0>(queries, q, codes, n, width, first, nearest);
  if (width == 2) return scan_sliced<16, 0>(queries, q, codes, n, width, first, nearest);
  if (width <= 4) return scan_sliced<32, 0>(queries, q, codes, n, width, first, nearest);
  if (width <= 8) return scan_sliced<64, 0>(queries, q, codes, n, width, first, nearest);
  if (width <= 16) return scan_sliced<64, 1>(queries, q, codes, n, width, first, nearest);
  if (width <= 32) return scan_sliced<64, 2>(queries, q, codes, n, width, first, nearest);
  if (width <= 64) return scan_sliced<64, 3>(queries, q, codes, n, width, first, nearest);
  scan_sliced<64, 4>(queries, q, codes, n, width, first, nearest);
}
