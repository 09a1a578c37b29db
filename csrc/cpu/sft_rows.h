// The arithmetic of group_norm_sft on a block of rows: positions of a channel where a tensor is contiguous, channels of a
// position where it is channels-last. Included once per instruction set by sft_targets.h, which defines Real, Reals,
// kLanes, load, store, real and exponential. Sums are added in a fixed order: the same bits on every run.
//
//     pieces        a row is read and written in vectors: whole ones, two of bfloat16 at a time, and what is left
//     steps         what is done with one vector: sft_steps.h
//     along_...     carry a step over the block

template <class T>
RAGSR_TARGET __attribute__((noinline)) Reals load_some(const T* from, int64_t n) {
  T some[kLanes] = {};
  std::memcpy(some, from, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}

template <class T>
RAGSR_TARGET __attribute__((noinline)) void store_some(T* to, int64_t n, Reals x) {
  T some[kLanes];
  store(some, x);
  std::memcpy(to, some, static_cast<size_t>(n) * sizeof(T));
}

// ---------------------------------------------------------------- pieces

struct Whole {
  int64_t at;
  template <class T>
  RAGSR_TARGET inline Reals read(const T* row) const { return load(row + at); }
  template <class T>
  RAGSR_TARGET inline void write(T* row, Reals x) const { store(row + at, x); }
};

struct Some {
  int64_t at, count;
  template <class T>
  RAGSR_TARGET inline Reals read(const T* row) const { return load_some(row + at, count); }
  template <class T>
  RAGSR_TARGET inline void write(T* row, Reals x) const { store_some(row + at, count, x); }
};

// Every second of two vectors of bfloat16: halves of 32-bit words, which a shift or a mask makes float32. To have the
// elements in their order they would have to be moved from lane to lane.
struct Even {
  int64_t at;
  template <class T>
  RAGSR_TARGET inline Reals read(const T* row) const { return load_even(row + at); }
};

struct Odd {
  int64_t at;
  template <class T>
  RAGSR_TARGET inline Reals read(const T* row) const { return load_odd(row + at); }
};

template <class T>
constexpr bool kPaired = std::is_same_v<T, BFloat16>;

// ---------------------------------------------------------------- rows

RAGSR_TARGET inline Reals broadcast(Real x) { return x - Reals{}; }

// Added in halves, which stay in a register: by way of memory each step would wait for the one before to be stored.
template <int64_t kHalf = kLanes / 2>
RAGSR_TARGET inline Real sum_of_lanes(Reals x) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    Reals moved;
    for (int64_t lane = 0; lane < kLanes; ++lane) moved[lane] = x[lane ^ kHalf];
    return sum_of_lanes<kHalf / 2>(x + moved);
  }
}

template <class T>
RAGSR_TARGET inline T* row_of(const Stream& stream, int64_t row) {
  return stream.at == nullptr ? nullptr : static_cast<T*>(stream.at) + row * stream.next;
}

// The same for an operand that may be one element for all: that is written out into `room`, so that the loops know but
// one kind of operand.
template <class T>
RAGSR_TARGET inline const T* spread_row(const Stream& stream, int64_t row, int64_t count, T* room) {
  const T* at = row_of<const T>(stream, row);
  if (at == nullptr || stream.step == 1) return at;
  std::fill_n(room, count, *at);
  return room;
}

template <class Step, class Piece>
RAGSR_TARGET inline void run(const Step& step, const typename Step::Row& row, Piece piece, const Reals* constants,
                             Reals* sums) {
  Reals results[Step::kResults + 1];
  step.run(piece, row, constants, sums, results);
  for (int k = 0; k < Step::kResults; ++k)
    if (row.to[k] != nullptr) piece.write(row.to[k], results[k]);
}

template <class Step>
RAGSR_TARGET inline void run_pair(const Step& step, const typename Step::Row& row, int64_t i, const Reals* constants,
                                  Reals* sums) {
  Reals even[Step::kResults + 1], odd[Step::kResults + 1];
  step.run(Even{i}, row, constants, sums, even);
  step.run(Odd{i}, row, constants, sums, odd);
  for (int k = 0; k < Step::kResults; ++k)
    if (row.to[k] != nullptr) store_pair(row.to[k] + i, even[k], odd[k]);
}

// One row after another; a channel's values and sums stay in registers along it. Sums of many small terms beside a large
// one lose digits, so these are of a stretch each, and the stretches are added.
template <class Step>
RAGSR_TARGET inline void along_positions(const Step step, int64_t rows, int64_t count) {
  const int64_t stretch = Step::kAdders > 0 ? 32 * kLanes : count;
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = step.row(r);
    Reals constants[Step::kConstants], sums[Step::kAdders + 1] = {};
    for (int k = 0; k < Step::kConstants; ++k) constants[k] = broadcast(step.constants[k][r]);
    for (int64_t i = 0; i < count;) {
      const int64_t end = std::min(count, i + stretch);
      Reals some[Step::kAdders + 1] = {};
      if constexpr (kPaired<typename Step::Element>)
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) run_pair(step, row, i, constants, some);
#pragma GCC unroll 4
      for (; i + kLanes <= end; i += kLanes) run(step, row, Whole{i}, constants, some);
      if (i < end) run(step, row, Some{i, end - i}, constants, some);
      i = end;
      for (int k = 0; k < Step::kAdders; ++k) sums[k] += some[k];
    }
    for (int k = 0; k < Step::kAdders; ++k) step.sums[k][r * step.next_sum] = sum_of_lanes(sums[k]);
  }
}

template <int64_t kRows, class Step, class Piece>
RAGSR_TARGET inline void across_rows(const Step& step, const typename Step::Row* rows, Piece piece) {
  Reals constants[Step::kConstants], sums[Step::kAdders + 1] = {};
  for (int k = 0; k < Step::kConstants; ++k) constants[k] = piece.read(step.constants[k]);
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) run(step, rows[r], piece, constants, sums);
  for (int k = 0; k < Step::kAdders; ++k) piece.write(step.sums[k], piece.read(step.sums[k]) + sums[k]);
}

template <int64_t kRows, class Step>
RAGSR_TARGET inline void along_rows(const Step& step, int64_t first, int64_t count) {
  typename Step::Row rows[kRows];
  for (int64_t r = 0; r < kRows; ++r) rows[r] = step.row(first + r);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) across_rows<kRows>(step, rows, Whole{i});
  if (i < count) across_rows<kRows>(step, rows, Some{i, count - i});
}

// Where channels are summed, some rows together: their sums are loaded and stored once for all of them.
template <class Step>
RAGSR_TARGET inline void along_channels(const Step step, int64_t rows, int64_t count) {
  constexpr int64_t kTogether = Step::kAdders > 0 ? 4 : 1;
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) along_rows<kTogether>(step, r, count);
  for (; r < rows; ++r) along_rows<1>(step, r, count);
}

template <bool kChannels, class Step>
RAGSR_TARGET inline void along(const Step& step, int64_t rows, int64_t count) {
  kChannels ? along_channels(step, rows, count) : along_positions(step, rows, count);
}

// ---------------------------------------------------------------- statistics

// The next two vectors, in any order.
template <class T>
RAGSR_TARGET inline void load_two(const T* from, Reals* to) {
  if constexpr (kPaired<T>) {
    to[0] = load_even(from);
    to[1] = load_odd(from);
  } else {
    to[0] = load(from);
    to[1] = load(from + kLanes);
  }
}

template <class T>
RAGSR_TARGET void measure(const Stream& x, int64_t rows, int64_t count, Real centre, double* all, double* all_squares) {
  constexpr int kChains = 4;  // as many additions in flight
  const Reals c = broadcast(centre);
  Reals sum[kChains] = {}, square[kChains] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = row_of<const T>(x, r);
    int64_t i = 0;
    for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
      Reals some[kChains];
      for (int chain = 0; chain < kChains; chain += 2) load_two(row + i + chain * kLanes, some + chain);
      for (int chain = 0; chain < kChains; ++chain) {
        const Reals d = some[chain] - c;
        sum[chain] += d;
        square[chain] += d * d;
      }
    }
    for (; i + kLanes <= count; i += kLanes) {
      const Reals d = load(row + i) - c;
      sum[0] += d;
      square[0] += d * d;
    }
    if (i == count) continue;
    Real rest[kLanes] = {};  // less the centre, which the empty lanes must not add
    store(rest, load_some(row + i, count - i) - c);
    std::fill(rest + (count - i), rest + kLanes, Real(0));
    sum[0] += load(rest);
    square[0] += load(rest) * load(rest);
  }
  *all = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  *all_squares = sum_of_lanes((square[0] + square[1]) + (square[2] + square[3]));
}

template <class T>
struct MeasureChannels {
  static constexpr int kConstants = 1, kAdders = 2, kResults = 0;
  using Element = T;
  struct Row {
    const T* x;
    T* to[1];
  };
  const Stream& x;
  const Real* constants[kConstants];
  Real* sums[kAdders];

  RAGSR_TARGET inline Row row(int64_t r) const { return {row_of<const T>(x, r), {}}; }
  template <class Piece>
  RAGSR_TARGET inline void run(Piece piece, const Row& row, const Reals* centre, Reals* sum, Reals*) const {
    const Reals d = piece.read(row.x) - centre[0];
    sum[0] += d;
    sum[1] += d * d;
  }
};

template <class T>
RAGSR_TARGET void measure_channels(const Stream& x, int64_t rows, int64_t count, const Real* centres, Real* sums,
                                   Real* squares) {
  along_channels(MeasureChannels<T>{x, {centres}, {sums, squares}}, rows, count);
}

// ---------------------------------------------------------------- vectors of parameters

template <class T>
RAGSR_TARGET void widen(const void* from, int64_t count, Real* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = real(static_cast<const T*>(from)[i]);
}

template <class T>
RAGSR_TARGET void narrow(const Real* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, count - i);
    store_some(static_cast<T*>(to) + i, n, load_some(from + i, n));
  }
}
