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

template <class T, Activation kActivation>
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
  bool mixed;
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
    if (mixed) y = share * y + (1 - share) * z;
    if (row.residual != nullptr) y += piece.read(row.residual);
    result[0] = y;
  }
};

template <class T, bool kChannels, Activation kActivation>
RAGSR_TARGET void modulate_as(const ForwardBlock<Real>& b) {
  T room[2][kLongestRow];
  along<kChannels>(Modulate<T, kActivation>{b, room, {b.mean, b.scale, b.shift}, broadcast(b.share), b.mixed}, b.rows,
                   b.count);
}

template <class T, bool kChannels>
void modulate(const ForwardBlock<Real>& block) {
  if (block.activation == Activation::silu) return modulate_as<T, kChannels, Activation::silu>(block);
  if (block.activation == Activation::relu) return modulate_as<T, kChannels, Activation::relu>(block);
  modulate_as<T, kChannels, Activation::none>(block);
}

// ---------------------------------------------------------------- backward

// What both passes over the gradient need of one vector.
struct Slopes {
  Reals grad, centred, affine, grad_t, grad_affine;
};

template <class T, Activation kActivation>
struct BackwardStep {
  using Element = T;
  struct Row {
    const T *x, *grad, *gamma, *beta;
    T* to[2];
  };
  const BackwardBlock<Real>& block;
  T (*room)[kLongestRow];
  Reals share;
  bool mixed;

  RAGSR_TARGET inline BackwardStep(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : block(b), room(room), share(broadcast(b.share)), mixed(b.mixed) {}

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
    Reals grad_t = mixed ? share * above : above;
    if (kActivation != Activation::none)
      grad_t = activate_backward<kActivation>(grad_t, affine * slope + piece.read(row.beta));
    return {above, centred, affine, grad_t, grad_t * slope};
  }
};

// First pass: the gradients of γ and β where they are maps, and the sums. Empty lanes have no gradient and add nothing.
template <class T, Activation kActivation>
struct MapGradients : BackwardStep<T, kActivation> {
  static constexpr int kConstants = 3, kAdders = kSums, kResults = 2;
  using typename BackwardStep<T, kActivation>::Row;
  const Real* constants[kConstants];
  Real* sums[kAdders];
  int64_t next_sum;

  RAGSR_TARGET inline MapGradients(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : BackwardStep<T, kActivation>(b, room), constants{b.mean, b.scale, b.shift},
        sums{b.sums[0], b.sums[1], b.sums[2], b.sums[3]}, next_sum(b.next_sum) {}

  RAGSR_TARGET inline Row row(int64_t r) const {
    return BackwardStep<T, kActivation>::row(r, this->block.dgamma, this->block.dbeta);
  }
  template <class Piece>
  RAGSR_TARGET inline void run(Piece piece, const Row& row, const Reals* of, Reals* sum, Reals* result) const {
    const Slopes s = this->slopes(piece, row, of);
    sum[kAffine] += s.grad_affine;
    sum[kAffineZ] += s.grad_affine * s.centred;
    result[0] = s.grad_t * s.affine;
    result[1] = s.grad_t;
    if (row.to[0] == nullptr) sum[kTAffine] += result[0];
    if (row.to[1] == nullptr) sum[kT] += result[1];
  }
};

// Second pass: the gradient of x, now that the means over the group are known.
template <class T, Activation kActivation>
struct InputGradient : BackwardStep<T, kActivation> {
  static constexpr int kConstants = 7, kAdders = 0, kResults = 1;
  using typename BackwardStep<T, kActivation>::Row;
  const Real* constants[kConstants];
  Real* sums[1] = {};
  int64_t next_sum = 0;

  RAGSR_TARGET inline InputGradient(const BackwardBlock<Real>& b, T (*room)[kLongestRow])
      : BackwardStep<T, kActivation>(b, room), constants{b.mean,   b.scale,  b.shift, b.weight,
                                                       b.rstd,   b.shared, b.spread} {}

  RAGSR_TARGET inline Row row(int64_t r) const { return BackwardStep<T, kActivation>::row(r, this->block.dx, {}); }
  template <class Piece>
  RAGSR_TARGET inline void run(Piece piece, const Row& row, const Reals* of, Reals*, Reals* result) const {
    const Slopes s = this->slopes(piece, row, of);
    const Reals weight = of[3], rstd = of[4], shared = of[5], spread = of[6];
    result[0] = rstd * (s.grad_affine * weight - (shared + s.centred * spread));
    if (this->mixed) result[0] += (1 - this->share) * s.grad;
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
