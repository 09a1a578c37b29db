// What group_norm_sft does with one vector, forward and backward, and the table of its kernels. Included after
// sft_rows.h, once per instruction set.

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

// ---------------------------------------------------------------- forward

template <class T, Activation kActivation, bool kMixed, bool kResidual>
struct Modulate {
  static constexpr int kConstants = 3, kAdders = 0, kResults = 1;
  using Element = T;
  struct Row {
    const T *x, *gamma, *beta, *residual;
    T* to[kResults];
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
            {row_of<T>(block.out, r)}};
  }
  template <class Piece>
  RAGSR_TARGET inline void run(Piece piece, const Row& row, const Reals* of, Reals*, Reals* result) const {
    const Reals z = piece.read(row.x), mean = of[0], scale = of[1], shift = of[2];
    const Reals affine = (z - mean) * scale + shift;
    Reals y = activate<kActivation>(affine * (1 + piece.read(row.gamma)) + piece.read(row.beta));
    if (kMixed) y = share * y + (1 - share) * z;
    if (kResidual) y += piece.read(row.residual);
    result[0] = y;
  }
};

template <class T, bool kChannels, Activation kActivation, bool kMixed, bool kResidual>
RAGSR_TARGET void modulate_as(const ForwardBlock<Real>& b) {
  T room[2][kLongestRow];
  along<kChannels>(Modulate<T, kActivation, kMixed, kResidual>{b, room, {b.mean, b.scale, b.shift}, broadcast(b.share)},
                   b.rows, b.count);
}

template <class T, bool kChannels, Activation kActivation>
void modulate_with(const ForwardBlock<Real>& b) {
  const bool residual = b.residual.at != nullptr;
  if (b.mixed && residual) return modulate_as<T, kChannels, kActivation, true, true>(b);
  if (b.mixed) return modulate_as<T, kChannels, kActivation, true, false>(b);
  if (residual) return modulate_as<T, kChannels, kActivation, false, true>(b);
  modulate_as<T, kChannels, kActivation, false, false>(b);
}

template <class T, bool kChannels>
void modulate(const ForwardBlock<Real>& block) {
  if (block.activation == Activation::silu) return modulate_with<T, kChannels, Activation::silu>(block);
  if (block.activation == Activation::relu) return modulate_with<T, kChannels, Activation::relu>(block);
  modulate_with<T, kChannels, Activation::none>(block);
}

// ---------------------------------------------------------------- backward

// What both passes over the gradient need of one vector.
struct Slopes {
  Reals grad, centred, affine, grad_t, grad_affine;
};

template <class T, Activation kActivation, bool kMixed>
struct BackwardStep {
  using Element = T;
  struct Row {
    const T *x, *grad, *gamma, *beta;
    T* to[2];
  };
  const BackwardBlock<Real>& block;
  T (*room)[kLongestRow];
  Reals share;

  RAGSR_TARGET inline BackwardStep(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : block(b), room(room), share(broadcast(b.share)) {}

  RAGSR_TARGET inline Row row(int64_t r, const Stream& one, const Stream& other) const {
    return {row_of<const T>(block.x, r), spread_row(block.grad, r, block.count, room[0]),
            spread_row(block.gamma, r, block.count, room[1]), spread_row(block.beta, r, block.count, room[2]),
            {row_of<T>(one, r), row_of<T>(other, r)}};
  }
  template <class Piece>
  RAGSR_TARGET inline Slopes slopes(Piece piece, const Row& row, const Reals* of) const {
    const Reals mean = of[0], scale = of[1], shift = of[2];
    const Reals centred = piece.read(row.x) - mean, affine = centred * scale + shift;
    const Reals slope = 1 + piece.read(row.gamma), above = piece.read(row.grad);
    Reals grad_t = kMixed ? share * above : above;
    if (kActivation != Activation::none)
      grad_t = activate_backward<kActivation>(grad_t, affine * slope + piece.read(row.beta));
    return {above, centred, affine, grad_t, grad_t * slope};
  }
};

// First pass: the gradients of γ and β where they are maps, and the sums. Empty lanes have no gradient and add nothing.
template <class T, Activation kActivation, bool kMixed>
struct MapGradients : BackwardStep<T, kActivation, kMixed> {
  static constexpr int kConstants = 3, kAdders = kSums, kResults = 2;
  using Base = BackwardStep<T, kActivation, kMixed>;
  using typename Base::Row;
  const Real* constants[kConstants];
  Real* sums[kAdders];
  int64_t next_sum;

  RAGSR_TARGET inline MapGradients(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : Base(b, room), constants{b.mean, b.scale, b.shift},
        sums{b.sums[0], b.sums[1], b.sums[2], b.sums[3]}, next_sum(b.next_sum) {}

  RAGSR_TARGET inline Row row(int64_t r) const {
    return Base::row(r, this->block.dgamma, this->block.dbeta);
  }
  template <class Piece>
  RAGSR_TARGET inline void run(Piece piece, const Row& row, const Reals* of, Reals* sum, Reals* result) const {
    const Slopes s = this->slopes(piece, row, of);
    sum[kAffine] += s.grad_affine;
    sum[kAffineZ] += s.grad_affine * s.centred;
    result[0] = s.grad_t * s.affine;
    result[1] = s.grad_t;
    sum[kTAffine] += result[0];
    sum[kT] += result[1];
  }
};

// Second pass: the gradient of x, now that the means over the group are known.
template <class T, Activation kActivation, bool kMixed>
struct InputGradient : BackwardStep<T, kActivation, kMixed> {
  static constexpr int kConstants = 7, kAdders = 0, kResults = 1;
  using Base = BackwardStep<T, kActivation, kMixed>;
  using typename Base::Row;
  const Real* constants[kConstants];
  Real* sums[1] = {};
  int64_t next_sum = 0;

  RAGSR_TARGET inline InputGradient(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : Base(b, room), constants{b.mean,   b.scale,  b.shift, b.weight,
                                                       b.rstd,   b.shared, b.spread} {}

  RAGSR_TARGET inline Row row(int64_t r) const { return Base::row(r, this->block.dx, {}); }
  template <class Piece>
  RAGSR_TARGET inline void run(Piece piece, const Row& row, const Reals* of, Reals*, Reals* result) const {
    const Slopes s = this->slopes(piece, row, of);
    const Reals weight = of[3], rstd = of[4], shared = of[5], spread = of[6];
    result[0] = rstd * (s.grad_affine * weight - (shared + s.centred * spread));
    if (kMixed) result[0] += (1 - this->share) * s.grad;
  }
};

template <class Step, class T, bool kChannels>
RAGSR_TARGET void run_step(const BackwardBlock<Real>& b) {
  T room[3][kLongestRow];
  along<kChannels>(Step(b, room), b.rows, b.count);
}

template <template <class, Activation, bool> class Step, class T, bool kChannels, bool kMixed>
void backward_with(const BackwardBlock<Real>& b) {
  if (b.activation == Activation::silu) return run_step<Step<T, Activation::silu, kMixed>, T, kChannels>(b);
  if (b.activation == Activation::relu) return run_step<Step<T, Activation::relu, kMixed>, T, kChannels>(b);
  run_step<Step<T, Activation::none, kMixed>, T, kChannels>(b);
}

template <template <class, Activation, bool> class Step, class T, bool kChannels>
void backward(const BackwardBlock<Real>& b) {
  b.mixed ? backward_with<Step, T, kChannels, true>(b) : backward_with<Step, T, kChannels, false>(b);
}

// ---------------------------------------------------------------- the table

template <class T, bool kChannels>
Kernels<Real> kernels_along() {
  return {sizeof(T), measure<T>, measure_channels<T>, modulate<T, kChannels>, backward<MapGradients, T, kChannels>,
          backward<InputGradient, T, kChannels>, widen<T>, narrow<T>};
}

template <class T>
Kernels<Real> kernels(bool along_channels) {
  return along_channels ? kernels_along<T, true>() : kernels_along<T, false>();
}
