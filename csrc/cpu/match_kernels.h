// The three inner loops of the correlation search. What they are for, and the letters G, T and S, is told in match.h.
//
// This file has no include guard on purpose: match_targets.h includes it once for each instruction set. Sums are always
// taken in the same order, wherever a position lies in a vector, a tile or a block: equal patches score equally.

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int64_t kLanes = kBytes / static_cast<int64_t>(sizeof(T));

template <class T>
RAGSR_TARGET inline __attribute__((always_inline)) Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
RAGSR_TARGET inline __attribute__((always_inline)) void store(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof x);
}

// out [Rows, Vectors] = a [depth, Rows]ᵀ · b [depth, Vectors], held in registers
template <class T, int Rows, int Vectors>
RAGSR_TARGET void multiply_tile(const T* a, const T* b, int64_t depth, T* out, int64_t stride) {
  Vector<T> sum[Rows][Vectors] = {};
  for (int64_t c = 0; c < depth; ++c, a += Rows, b += Vectors * kLanes<T>) {
    Vector<T> right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += a[r] * right[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(out + r * stride + v * kLanes<T>, sum[r][v]);
}

// G: `rows` pixels of a, packed by tiles, times a row of b of `vectors`, packed by panels (see Layout)
template <class T>
RAGSR_TARGET void multiply(const T* a, int64_t rows, const T* b, int64_t vectors, int64_t depth, T* out,
                           int64_t stride) {
  for (int64_t v = 0; v < vectors; v += 2) {
    const T* panel = b + v * kLanes<T> * depth;
    const bool two = v + 1 < vectors;
    for (int64_t r = 0; r < rows;) {
      const bool tall = rows - r >= kTall;
      const auto tile = tall ? (two ? multiply_tile<T, kTall, 2> : multiply_tile<T, kTall, 1>)
                             : (two ? multiply_tile<T, kShort, 2> : multiply_tile<T, kShort, 1>);
      tile(a + r * depth, panel, depth, out + r * stride + v * kLanes<T>, stride);
      r += tall ? kTall : kShort;
    }
  }
}

// N vectors of the sum of `patch` rows of numbers, each `step` further
template <class T, int N>
RAGSR_TARGET inline __attribute__((always_inline)) void add_up(const T* from, int64_t patch, int64_t step,
                                                               Vector<T>* sum) {
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) sum[v] = load(from + v * kLanes<T>);
  for (int64_t d = 1; d < patch; ++d) {
    from += step;
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[v] += load(from + v * kLanes<T>);
  }
}

// T: out [rows, columns] = Σ_d g [r + d, x + d]; whole vectors are written
template <class T>
RAGSR_TARGET void add_diagonals(const T* g, int64_t stride, int64_t patch, int64_t rows, int64_t columns, T* out,
                                int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, g += stride, out += out_stride) {
    int64_t x = 0;
    for (; x + 4 * kLanes<T> <= columns; x += 4 * kLanes<T>) {
      Vector<T> sum[4];
      add_up<T, 4>(g + x, patch, stride + 1, sum);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store(out + x + v * kLanes<T>, sum[v]);
    }
    for (; x < columns; x += kLanes<T>) {
      Vector<T> sum[1];
      add_up<T, 1>(g + x, patch, stride + 1, sum);
      store(out + x, sum[0]);
    }
  }
}

// S: scores [columns] = scale · Σ_d sums[d], and the largest of them; whole vectors are written, NaN is never largest
template <class T>
RAGSR_TARGET T score_row(const T* const* sums, int64_t offset, int64_t patch, const T* scale, int64_t columns,
                         T* scores) {
  Vector<T> largest = Vector<T>{} - std::numeric_limits<T>::infinity();
  int64_t x = 0;
  for (; x + kLanes<T> <= columns; x += kLanes<T>) {
    Vector<T> sum = load(sums[0] + offset + x);
    for (int64_t d = 1; d < patch; ++d) sum += load(sums[d] + offset + x);
    sum *= load(scale + x);
    store(scores + x, sum);
    largest = sum > largest ? sum : largest;
  }
  T best = largest[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) best = largest[lane] > best ? largest[lane] : best;
  if (x == columns) return best;
  Vector<T> sum = load(sums[0] + offset + x);
  for (int64_t d = 1; d < patch; ++d) sum += load(sums[d] + offset + x);
  store(scores + x, Vector<T>(sum * load(scale + x)));
  for (; x < columns; ++x) best = scores[x] > best ? scores[x] : best;
  return best;
}

// scores [count] = scale · the inner product of a patch a and the one at b, a pixel further for every next score. A patch
// is `patch` rows of `run` numbers, whole vectors in a, where zeros fill the last; four scores share what is read of a.
template <class T, int Together>
RAGSR_TARGET inline __attribute__((always_inline)) void score_together(const T* a, const T* b, int64_t row,
                                                                       int64_t channels, int64_t patch, int64_t run,
                                                                       const T* scale, T* scores) {
  Vector<T> sum[Together] = {};
  for (int64_t y = 0; y < patch; ++y, a += run, b += row)
    for (int64_t x = 0; x < run; x += kLanes<T>) {
      const Vector<T> left = load(a + x);
#pragma GCC unroll 4
      for (int i = 0; i < Together; ++i) sum[i] += left * load(b + i * channels + x);
    }
  for (int i = 0; i < Together; ++i) {
    T total = sum[i][0];
    for (int64_t lane = 1; lane < kLanes<T>; ++lane) total += sum[i][lane];
    scores[i] = total * scale[i];
  }
}

template <class T>
RAGSR_TARGET void score_neighbours(const T* a, const T* b, int64_t row, int64_t channels, int64_t patch, int64_t run,
                                   const T* scale, int64_t count, T* scores) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    score_together<T, 4>(a, b + i * channels, row, channels, patch, run, scale + i, scores + i);
  for (; i < count; ++i) score_together<T, 1>(a, b + i * channels, row, channels, patch, run, scale + i, scores + i);
}

template <class T>
SearchKernel<T> search_kernel(const char* name) {
  return {name, {kLanes<T>, kTall, kShort}, multiply<T>, add_diagonals<T>, score_row<T>, score_neighbours<T>};
}
