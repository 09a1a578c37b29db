// Codes of 8 or 16 bits: the k nearest of every possible query at once.
//
// This file has no include guard on purpose: hamming_targets.h includes it once for each instruction set (see there).
//
// A query of 16 bits is one of 65,536. Cell c of the table holds a sorted list, at first the codes equal to c. Then,
// bit after bit of the cell number, every cell takes over what its neighbour across that bit has, one further away:
//
//     list[c] = the K smallest of  list[c]  and  list[c ^ bit] + 1
//
// After 16 bits each cell knows its K nearest codes. The two lists never hold the same code (their codes differ in a
// bit done before, or across this one), so nothing is counted twice and the answer is exact for any K.
//
// An entry is distance << 27 | index, so that integers order as (distance, index). Cells lie in vectors of kCells, and
// the K entries of a vector of cells lie side by side: table[cells / kCells][K][kCells].

constexpr int64_t kCells = sizeof(Cells) / 4;

// Two sorted lists -> the K smallest of both, as a list that rises and falls -> sorted.
template <int K>
RAGSR_TARGET inline __attribute__((always_inline)) void merge_lists(const Cells* own, const Cells* other, Cells* out) {
  constexpr uint32_t kFurther = uint32_t{1} << kCubeIndexBits;
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) out[i] = smaller(own[i], other[K - 1 - i] + kFurther);
#pragma GCC unroll 4
  for (int half = K / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) {
      if (i & half) continue;
      const Cells a = out[i], b = out[i + half];
      out[i] = smaller(a, b);
      out[i + half] = larger(a, b);
    }
  }
}

template <int K>
RAGSR_TARGET inline __attribute__((always_inline)) void merge_both(Cells* a, Cells* b) {
  Cells x[K], y[K];
  merge_lists<K>(a, b, x);
  merge_lists<K>(b, a, y);
  for (int i = 0; i < K; ++i) a[i] = x[i], b[i] = y[i];
}

// The bits of the cell number that lie inside a vector.
template <int K, int Bit>
RAGSR_TARGET inline __attribute__((always_inline)) void merge_inside(Cells* a) {
  Cells other[K], x[K];
  for (int i = 0; i < K; ++i) other[i] = across<Bit>(a[i]);
  merge_lists<K>(a, other, x);
  for (int i = 0; i < K; ++i) a[i] = x[i];
  if constexpr ((2 << Bit) < kCells) merge_inside<K, Bit + 1>(a);
}

// `Bits` bits of the cell number done on 2^Bits vectors that lie `stride` vectors apart, in one go through memory.
template <int K, int Bits>
RAGSR_TARGET inline void cube_tile(Cells* at, int64_t stride, bool inside) {
  constexpr int kRows = 1 << Bits;
  Cells x[kRows * K];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < K; ++j) x[i * K + j] = at[i * stride * K + j];
  if (inside)
    for (int i = 0; i < kRows; ++i) merge_inside<K, 0>(x + i * K);
#pragma GCC unroll 4
  for (int half = 1; half < kRows; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      if (!(i & half)) merge_both<K>(x + i * K, x + (i + half) * K);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < K; ++j) at[i * stride * K + j] = x[i * K + j];
}

// Part `part` of `parts` of the pass that does the bits [from, from + Bits) of the vector number.
template <int K, int Bits>
RAGSR_TARGET inline void cube_tiles(Cells* table, int64_t vectors, int from, int64_t part, int64_t parts) {
  const int64_t stride = int64_t{1} << from, tiles = vectors >> Bits;
  for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t)
    cube_tile<K, Bits>(table + ((t >> from << (from + Bits)) + (t & (stride - 1))) * K, stride, from == 0);
}

template <int K>
RAGSR_TARGET inline void cube_pass_of(Cells* table, int64_t vectors, int pass, int64_t part, int64_t parts) {
  constexpr int kBits = cube_pass_bits(K);
  const int from = pass * kBits;
  const int64_t left = vectors >> from;  // 2^(bits not yet done)
  if (left >= 1 << kBits) cube_tiles<K, kBits>(table, vectors, from, part, parts);
  else if (left == 8) cube_tiles<K, 3>(table, vectors, from, part, parts);
  else if (left == 4) cube_tiles<K, 2>(table, vectors, from, part, parts);
  else cube_tiles<K, 1>(table, vectors, from, part, parts);
}

// One pass over a table of `cells` lists of k entries (a power of two up to kCubeLargestK), cut into `parts`; every
// part of a pass must be done before the next pass.
RAGSR_TARGET inline void cube_pass(uint32_t* table, int64_t cells, int64_t k, int pass, int64_t part, int64_t parts) {
  Cells* at = reinterpret_cast<Cells*>(table);
  const int64_t vectors = cells / kCells;
  switch (k) {
    case 1: return cube_pass_of<1>(at, vectors, pass, part, parts);
    case 2: return cube_pass_of<2>(at, vectors, pass, part, parts);
    case 4: return cube_pass_of<4>(at, vectors, pass, part, parts);
    case 8: return cube_pass_of<8>(at, vectors, pass, part, parts);
    case 16: return cube_pass_of<16>(at, vectors, pass, part, parts);
    case 32: return cube_pass_of<32>(at, vectors, pass, part, parts);
    case 64: return cube_pass_of<64>(at, vectors, pass, part, parts);
    default: return cube_pass_of<128>(at, vectors, pass, part, parts);
  }
}
