// The arithmetic of group_norm_sft on a block of rows: positions of a channel where a tensor is contiguous, channels of a
// position where it is channels-last. Included once per instruction set by sft_targets.h, which defines Real, Reals,
// kLanes, load, store, real and exponential. Sums are added in a fixed order: the same bits on every run.
//
// A step says what to do with one vector: how many values of the channel it needs (kConstants) and how many sums it adds
// to (kAdders), where its operands lie in a row, and run(). along_positions and along_channels carry it over the block.

template <bool kWhole, class T>
RAGSR_TARGET inline Reals get(const T* from, int64_t n) {
  if (kWhole) return load(from);
  T some[kLanes] = {};
  std::memcpy(some, from, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}

template <bool kWhole, class T>
RAGSR_TARGET inline void put(T* to, int64_t n, Reals x) {
  if (kWhole) return store(to, x);
  T some[kLanes];
  store(some, x);
  std::memcpy(to, some, static_cast<size_t>(n) * sizeof(T));
}

RAGSR_TARGET inline Reals broadcast(Real x) { return x - Reals{}; }

// Added in halves.
RAGSR_TARGET inline Real sum_of_lanes(Reals x) {
  Real lanes[kLanes];
  store(lanes, x);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
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

// One row after another; a channel's values and sums stay in registers along it.
template <class Step>
RAGSR_TARGET inline void along_positions(const Step& step, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = step.row(r);
    Reals constants[Step::kConstants], sums[Step::kAdders + 1] = {};
    for (int k = 0; k < Step::kConstants; ++k) constants[k] = broadcast(step.constants[k][r]);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) step.template run<true>(row, i, kLanes, constants, sums);
    if (i < count) step.template run<false>(row, i, count - i, constants, sums);
    for (int k = 0; k < Step::kAdders; ++k) step.sums[k][r * step.next_sum] = sum_of_lanes(sums[k]);
  }
}

template <bool kWhole, class Step>
RAGSR_TARGET inline void across_rows(const Step& step, const typename Step::Row* rows, int64_t count, int64_t i,
                                     int64_t n) {
  Reals constants[Step::kConstants], sums[Step::kAdders + 1] = {};
  for (int k = 0; k < Step::kConstants; ++k) constants[k] = get<kWhole>(step.constants[k] + i, n);
  for (int64_t r = 0; r < count; ++r) step.template run<kWhole>(rows[r], i, n, constants, sums);
  for (int k = 0; k < Step::kAdders; ++k) {
    Real* to = step.sums[k] + i;
    put<kWhole>(to, n, get<kWhole>(to, n) + sums[k]);
  }
}

// Some rows together: the values and sums of a channel are loaded once for all of them.
template <class Step>
RAGSR_TARGET inline void along_channels(const Step& step, int64_t rows, int64_t count) {
  constexpr int64_t kTogether = 4;
  for (int64_t r = 0; r < rows; r += kTogether) {
    const int64_t some = std::min(kTogether, rows - r);
    typename Step::Row together[kTogether];
    for (int64_t j = 0; j < some; ++j) together[j] = step.row(r + j);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) across_rows<true>(step, together, some, i, kLanes);
    if (i < count) across_rows<false>(step, together, some, i, count - i);
  }
}

template <bool kChannels, class Step>
RAGSR_TARGET inline void along(const Step& step, int64_t rows, int64_t count) {
  kChannels ? along_channels(step, rows, count) : along_positions(step, rows, count);
}

RAGSR_TARGET inline Reals sigmoid(Reals t) { return 1 / (1 + exponential(-t)); }

template <Activation kActivation>
RAGSR_TARGET inline Reals activate(Reals t) {
  if (kActivation == Activation::silu) return t * sigmoid(t);
  if (kActivation == Activation::relu) return t < 0 ? Reals{} : t;  // NaN stays
  return t;
}

template <Activation kActivation>
RAGSR_TARGET inline Reals activate_backward(Reals grad, Reals t) {
  if (kActivation == Activation::silu) {
    const Reals gate = sigmoid(t);
    return grad * gate * (1 + t * (1 - gate));
  }
  if (kActivation == Activation::relu) return t > 0 ? grad : Reals{};
  return grad;
}

// ---------------------------------------------------------------- statistics

template <class T>
RAGSR_TARGET void measure(const Stream& x, int64_t rows, int64_t count, Real centre, double* all, double* all_squares) {
  constexpr int kChains = 4;  // as many additions in flight
  const Reals c = broadcast(centre);
  Reals sum[kChains] = {}, square[kChains] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = row_of<const T>(x, r);
    int64_t i = 0;
    for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
      for (int chain = 0; chain < kChains; ++chain) {
        const Reals d = load(row + i + chain * kLanes) - c;
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
    store(rest, get<false>(row + i, count - i) - c);
    std::fill(rest + (count - i), rest + kLanes, Real(0));
    sum[0] += load(rest);
    square[0] += load(rest) * load(rest);
  }
  *all = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  *all_squares = sum_of_lanes((square[0] + square[1]) + (square[2] + square[3]));
}

template <class T>
struct MeasureChannels {
  static constexpr int kConstants = 1, kAdders = 2;
  using Row = const T*;
  const Stream& x;
  const Real* constants[kConstants];
  Real* sums[kAdders];

  RAGSR_TARGET inline Row row(int64_t r) const { return row_of<const T>(x, r); }
  template <bool kWhole>
  RAGSR_TARGET inline void run(Row at, int64_t i, int64_t n, const Reals* centre, Reals* sum) const {
    const Reals d = get<kWhole>(at + i, n) - centre[0];
    sum[0] += d;
    sum[1] += d * d;
  }
};

template <class T>
RAGSR_TARGET void measure_channels(const Stream& x, int64_t rows, int64_t count, const Real* centres, Real* sums,
                                   Real* squares) {
  along_channels(MeasureChannels<T>{x, {centres}, {sums, squares}}, rows, count);
}

// ---------------------------------------------------------------- forward

template <class T, Activation kActivation>
struct Modulate {
  static constexpr int kConstants = 3, kAdders = 0;
  struct Row {
    const T *x, *gamma, *beta, *residual;
    T* out;
  };
  const ForwardBlock<Real>& block;
  T (*room)[kLongestRow];
  const Real* constants[kConstants];
  Reals share;
  Real* sums[1] = {};
  int64_t next_sum = 0;

  RAGSR_TARGET inline Row row(int64_t r) const {
    return {row_of<const T>(block.x, r), spread_row(block.gamma, r, block.count, room[0]),
            spread_row(block.beta, r, block.count, room[1]), row_of<const T>(block.residual, r),
            row_of<T>(block.out, r)};
  }
  template <bool kWhole>
  RAGSR_TARGET inline void run(const Row& row, int64_t i, int64_t n, const Reals* of, Reals*) const {
    const Reals z = get<kWhole>(row.x + i, n), mean = of[0], scale = of[1], shift = of[2];
    const Reals affine = (z - mean) * scale + shift;
    Reals y = activate<kActivation>(affine * (1 + get<kWhole>(row.gamma + i, n)) + get<kWhole>(row.beta + i, n));
    if (block.mixed) y = share * y + (1 - share) * z;
    if (row.residual != nullptr) y += get<kWhole>(row.residual + i, n);
    put<kWhole>(row.out + i, n, y);
  }
};

template <class T, bool kChannels, Activation kActivation>
RAGSR_TARGET void modulate_as(const ForwardBlock<Real>& b) {
  T room[2][kLongestRow];
  along<kChannels>(Modulate<T, kActivation>{b, room, {b.mean, b.scale, b.shift}, broadcast(b.share)}, b.rows, b.count);
}

template <class T, bool kChannels>
void modulate(const ForwardBlock<Real>& block) {
  if (block.activation == Activation::silu) return modulate_as<T, kChannels, Activation::silu>(block);
  if (block.activation == Activation::relu) return modulate_as<T, kChannels, Activation::relu>(block);
  modulate_as<T, kChannels, Activation::none>(block);
}

// ---------------------------------------------------------------- backward

template <class T>
struct BackwardRow {
  const T *x, *grad, *gamma, *beta;
  T *dgamma, *dbeta, *dx;
};

// What both passes over the gradient need of one vector.
struct Slopes {
  Reals grad, centred, affine, grad_t, grad_affine;
};

template <class T, Activation kActivation>
struct BackwardStep {
  using Row = BackwardRow<T>;
  const BackwardBlock<Real>& block;
  T (*room)[kLongestRow];
  Reals share;

  RAGSR_TARGET inline BackwardStep(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : block(b), room(room), share(broadcast(b.share)) {}

  RAGSR_TARGET inline Row row(int64_t r) const {
    return {row_of<const T>(block.x, r), spread_row(block.grad, r, block.count, room[0]),
            spread_row(block.gamma, r, block.count, room[1]), spread_row(block.beta, r, block.count, room[2]),
            row_of<T>(block.dgamma, r), row_of<T>(block.dbeta, r), row_of<T>(block.dx, r)};
  }
  template <bool kWhole>
  RAGSR_TARGET inline Slopes slopes(const Row& row, int64_t i, int64_t n, const Reals* of) const {
    const Reals mean = of[0], scale = of[1], shift = of[2];
    const Reals centred = get<kWhole>(row.x + i, n) - mean, affine = centred * scale + shift;
    const Reals slope = 1 + get<kWhole>(row.gamma + i, n), above = get<kWhole>(row.grad + i, n);
    Reals grad_t = share * above;
    if (kActivation != Activation::none)
      grad_t = activate_backward<kActivation>(grad_t, affine * slope + get<kWhole>(row.beta + i, n));
    return {above, centred, affine, grad_t, grad_t * slope};
  }
};

// First pass: the gradients of γ and β where they are maps, and the sums. Empty lanes have no gradient and add nothing.
template <class T, Activation kActivation>
struct MapGradients : BackwardStep<T, kActivation> {
  static constexpr int kConstants = 3, kAdders = kSums;
  const Real* constants[kConstants];
  Real* sums[kAdders];
  int64_t next_sum;

  RAGSR_TARGET inline MapGradients(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : BackwardStep<T, kActivation>(b, room), constants{b.mean, b.scale, b.shift},
        sums{b.sums[0], b.sums[1], b.sums[2], b.sums[3]}, next_sum(b.next_sum) {}

  template <bool kWhole>
  RAGSR_TARGET inline void run(const BackwardRow<T>& row, int64_t i, int64_t n, const Reals* of, Reals* sum) const {
    const Slopes s = this->template slopes<kWhole>(row, i, n, of);
    sum[kAffine] += s.grad_affine;
    sum[kAffineZ] += s.grad_affine * s.centred;
    if (row.dbeta != nullptr) put<kWhole>(row.dbeta + i, n, s.grad_t);
    else sum[kT] += s.grad_t;
    if (row.dgamma != nullptr) put<kWhole>(row.dgamma + i, n, s.grad_t * s.affine);
    else sum[kTAffine] += s.grad_t * s.affine;
  }
};

// Second pass: the gradient of x, now that the means over the group are known.
template <class T, Activation kActivation>
struct InputGradient : BackwardStep<T, kActivation> {
  static constexpr int kConstants = 7, kAdders = 0;
  const Real* constants[kConstants];
  Real* sums[1] = {};
  int64_t next_sum = 0;

  RAGSR_TARGET inline InputGradient(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : BackwardStep<T, kActivation>(b, room), constants{b.mean,   b.scale,  b.shift, b.weight,
                                                       b.rstd,   b.shared, b.spread} {}

  template <bool kWhole>
  RAGSR_TARGET inline void run(const BackwardRow<T>& row, int64_t i, int64_t n, const Reals* of, Reals*) const {
    const Slopes s = this->template slopes<kWhole>(row, i, n, of);
    const Reals weight = of[3], rstd = of[4], shared = of[5], spread = of[6];
    const Reals own = s.grad_affine * weight - (shared + s.centred * spread);
    put<kWhole>(row.dx + i, n, rstd * own + (1 - this->share) * s.grad);
  }
};

template <class Step, class T, bool kChannels>
RAGSR_TARGET void run_step(const BackwardBlock<Real>& b) {
  T room[3][kLongestRow];
  along<kChannels>(Step(b, room), b.rows, b.count);
}

template <template <class, Activation> class Step, class T, bool kChannels>
void backward(const BackwardBlock<Real>& b) {
  if (b.activation == Activation::silu) return run_step<Step<T, Activation::silu>, T, kChannels>(b);
  if (b.activation == Activation::relu) return run_step<Step<T, Activation::relu>, T, kChannels>(b);
  run_step<Step<T, Activation::none>, T, kChannels>(b);
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
    put<false>(static_cast<T*>(to) + i, n, get<false>(from + i, n));
  }
}

template <class T, bool kChannels>
Kernels<Real> kernels_along() {
  return {sizeof(T), measure<T>, measure_channels<T>, modulate<T, kChannels>, backward<MapGradients, T, kChannels>,
          backward<InputGradient, T, kChannels>, widen<T>, narrow<T>};
}

template <class T>
Kernels<Real> kernels(bool along_channels) {
  return along_channels ? kernels_along<T, true>() : kernels_along<T, false>();
}
