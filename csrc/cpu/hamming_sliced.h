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

// plane[p] from kBlockCodes chunks of T bits. Which code stands at which bit: `code_at`.
template <int T>
RAGSR_TARGET inline void planes_of(const uint8_t* chunks, Words* plane) {
  std::memcpy(static_cast<void*>(plane), chunks, T * sizeof(Words));
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

// Bit per code: is the distance `bound` or more? For codes of one chunk; 1 <= bound <= T.
template <int T>
RAGSR_TARGET inline Words far_codes(const Words* table, const uint16_t* offset, int64_t bound) {
  constexpr int kLevels = Chunk<T>::kLevels;
  static constexpr uint64_t bit[2] = {0, ~uint64_t{0}};
  Words counter[1 + kLevels];
#pragma GCC unroll 8
  for (int i = 0; i <= kLevels; ++i) counter[i] = broadcast(bit[(T - bound) >> i & 1]);
  return add_inputs<T, kLevels - 1, 0>(table, offset, counter);
}

// A chunk of longer codes: the counter is read and written back, and what its top carries ripples through `upper` more
// planes behind it. Returns the carry out of the last.
template <int T>
RAGSR_TARGET inline Words add_chunk(const Words* table, const uint16_t* offset, Words* state, int upper) {
  constexpr int kCounter = 1 + Chunk<T>::kLevels;
  Words counter[kCounter];
#pragma GCC unroll 8
  for (int i = 0; i < kCounter; ++i) counter[i] = state[i];
  Words carry = add_inputs<T, Chunk<T>::kLevels - 1, 0>(table, offset, counter);
#pragma GCC unroll 8
  for (int i = 0; i < kCounter; ++i) state[i] = counter[i];
  for (int i = kCounter; i < kCounter + upper; ++i) {
    const Words old = state[i];
    state[i] = old ^ carry;
    carry &= old;
  }
  return carry;
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
  const int64_t bytes = std::min<int64_t>(T / 8, width - from);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t word = load_word(codes + i * width + from, bytes);
    std::memcpy(out + i * (T / 8), &word, T / 8);
  }
  std::memset(out + n * (T / 8), 0, static_cast<size_t>((kBlockCodes - n) * (T / 8)));
}

// The table of one chunk of a block of codes.
template <int T>
RAGSR_TARGET inline void table_of(const uint8_t* codes, int64_t n, int64_t width, int64_t from, Words* table) {
  alignas(64) uint8_t chunks[T / 8 * kBlockCodes];
  Words item[T + Chunk<T>::kAdders];
  const bool whole = width == T / 8 && n == kBlockCodes;
  if (!whole) gather_chunks<T>(codes, n, width, from, chunks);
  planes_of<T>(whole ? codes : chunks, item);
  build_table<T>(item, table);
}

// Codes of at most 8 bytes: one chunk of T bits.
template <int T>
RAGSR_TARGET inline void scan_narrow(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                                     int64_t first, Nearest* nearest) {
  constexpr int kCases = Chunk<T>::kCases;
  std::vector<uint16_t> offsets(static_cast<size_t>(q * kCases));
  for (int64_t i = 0; i < q; ++i) choose_cases<T>(load_word(queries + i * width, width), &offsets[i * kCases]);
  Words table[Chunk<T>::kTable];
  for (int64_t start = 0; start < n; start += kBlockCodes) {
    const int64_t count = std::min(kBlockCodes, n - start);
    const uint8_t* block = codes + start * width;
    table_of<T>(block, count, width, 0, table);
    for (int64_t i = 0; i < q; ++i) {
      const int64_t bound = nearest[i].bound();
      if (bound == 0) continue;  // k equal codes are found already
      const Words far = bound > T ? Words{} : far_codes<T>(table, &offsets[i * kCases], bound);
      if (all_set(far)) continue;
      offer_near<T>(far, queries + i * width, block, count, width, first + start, nearest[i]);
    }
  }
}

// Codes of more than 8 bytes: chunks of 64 bits, one after the other, each for all queries.
RAGSR_TARGET inline void scan_wide(const uint8_t* queries, int64_t q, const uint8_t* codes, int64_t n, int64_t width,
                                   int64_t first, Nearest* nearest) {
  constexpr int kCases = Chunk<64>::kCases, kCounter = 1 + Chunk<64>::kLevels;
  const int64_t chunks = (width + 7) / 8;
  const int upper = log2_of(2 * chunks - 1);  // 64 * 2^upper >= 64 * chunks
  const int64_t top = int64_t{64} << upper, planes = kCounter + upper + 1;
  std::vector<uint16_t> offsets(static_cast<size_t>(chunks * q * kCases));
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < q; ++i)
      choose_cases<64>(load_word(queries + i * width + 8 * c, std::min<int64_t>(8, width - 8 * c)),
                       &offsets[(c * q + i) * kCases]);
  std::vector<uint8_t> room(static_cast<size_t>((q * planes + 1) * static_cast<int64_t>(sizeof(Words))));
  Words* states = aligned<Words>(room.data());
  Words table[Chunk<64>::kTable];
  for (int64_t start = 0; start < n; start += kBlockCodes) {
    const int64_t count = std::min(kBlockCodes, n - start);
    const uint8_t* block = codes + start * width;
    for (int64_t i = 0; i < q; ++i) {
      Words* state = states + i * planes;
      const int64_t begin = top - std::min(nearest[i].bound(), top);
      for (int64_t p = 0; p + 1 < planes; ++p) state[p] = broadcast(-static_cast<uint64_t>(begin >> p & 1));
      state[planes - 1] = Words{};
    }
    for (int64_t c = 0; c < chunks; ++c) {
      table_of<64>(block, count, width, 8 * c, table);
      for (int64_t i = 0; i < q; ++i)
        states[i * planes + planes - 1] |=
            add_chunk<64>(table, &offsets[(c * q + i) * kCases], states + i * planes, upper);
    }
    for (int64_t i = 0; i < q; ++i) {
      const int64_t bound = nearest[i].bound();
      const Words far = bound > top ? Words{} : states[i * planes + planes - 1];
      if (bound == 0 || all_set(far)) continue;
      offer_near<64>(far, queries + i * width, block, count, width, first + start, nearest[i]);
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
  if (width == 1) return scan_narrow<8>(queries, q, codes, n, width, first, nearest);
  if (width == 2) return scan_narrow<16>(queries, q, codes, n, width, first, nearest);
  if (width <= 4) return scan_narrow<32>(queries, q, codes, n, width, first, nearest);
  if (width <= 8) return scan_narrow<64>(queries, q, codes, n, width, first, nearest);
  scan_wide(queries, q, codes, n, width, first, nearest);
}
