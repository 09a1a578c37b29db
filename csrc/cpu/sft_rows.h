// The arithmetic of group_norm_sft along one row: positions of a channel where a tensor is contiguous, channels of a
// position where it is channels-last. Included once per instruction set by sft_targets.h, which defines Real, Reals,
// kLanes, load, store, real and exponential. Sums are kept per lane and added up in a fixed order: the same bits on every run.

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

// Calls step.run<true>(i, kLanes) over whole vectors, then step.run<false>(i, rest).
template <class Step>
RAGSR_TARGET inline void run_along(int64_t count, Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step.template run<true>(i, kLanes);
  if (i < count) step.template run<false>(i, count - i);
}

// The elements of an operand along a row. One that is the same for all is written out into `room` first: then the loops
// know but one kind of operand.
template <class T>
RAGSR_TARGET inline const T* spread(const Stream& stream, int64_t count, T* room) {
  const T* at = static_cast<const T*>(stream.at);
  if (at == nullptr || stream.step == 1) return at;
  std::fill_n(room, count, *at);
  return room;
}

RAGSR_TARGET inline Reals broadcast(Real x) { return x - Reals{}; }

// A value of the channel: one for the row where it runs along positions, one for each element where along channels.
template <bool kChannels>
struct PerChannel {
  Reals value;
  RAGSR_TARGET inline explicit PerChannel(const Real* at) : value(broadcast(*at)) {}
  template <bool kWhole>
  RAGSR_TARGET inline Reals at(int64_t, int64_t) const {
    return value;
  }
};

template <>
struct PerChannel<true> {
  const Real* values;
  RAGSR_TARGET inline explicit PerChannel(const Real* at) : values(at) {}
  template <bool kWhole>
  RAGSR_TARGET inline Reals at(int64_t i, int64_t n) const {
    return get<kWhole>(values + i, n);
  }
};

// A sum for the channel: lane by lane into one vector, or element by element.
template <bool kChannels>
struct Adder {
  Real* to;
  Reals sum;
  RAGSR_TARGET inline explicit Adder(Real* at) : to(at), sum(load(at)) {}
  template <bool kWhole>
  RAGSR_TARGET inline void add(int64_t, int64_t n, Reals x) {
    if (kWhole) {
      sum += x;
    } else {
      Real some[kLanes] = {};
      put<false>(some, n, x);
      sum += load(some);
    }
  }
  RAGSR_TARGET inline void finish() const { store(to, sum); }
};

template <>
struct Adder<true> {
  Real* to;
  RAGSR_TARGET inline explicit Adder(Real* at) : to(at) {}
  template <bool kWhole>
  RAGSR_TARGET inline void add(int64_t i, int64_t n, Reals x) const {
    put<kWhole>(to + i, n, get<kWhole>(to + i, n) + x);
  }
  RAGSR_TARGET inline void finish() const {}
};

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

// sums += x − centre and squares += (x − centre)², [kLanes] each, over a row of one channel.
template <class T>
RAGSR_TARGET void add_positions(const void* row, int64_t count, Real centre, Real* sums, Real* squares) {
  constexpr int kChains = 4;  // as many additions in flight
  const T* x = static_cast<const T*>(row);
  const Reals c = broadcast(centre);
  Reals sum[kChains] = {load(sums)}, square[kChains] = {load(squares)};
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) {
      const Reals d = load(x + i + chain * kLanes) - c;
      sum[chain] += d;
      square[chain] += d * d;
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    const Reals d = load(x + i) - c;
    sum[0] += d;
    square[0] += d * d;
  }
  store(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  store(squares, (square[0] + square[1]) + (square[2] + square[3]));
  for (int lane = 0; i < count; ++i, ++lane) {
    const Real d = real(x[i]) - centre;
    sums[lane] += d;
    squares[lane] += d * d;
  }
}

// The same over a row of `count` channels at one position, with a centre and sums for each channel.
template <class T>
RAGSR_TARGET void add_channels(const void* row, int64_t count, const Real* centres, Real* sums, Real* squares) {
  const T* x = static_cast<const T*>(row);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Reals d = load(x + i) - load(centres + i);
    store(sums + i, load(sums + i) + d);
    store(squares + i, load(squares + i) + d * d);
  }
  for (; i < count; ++i) {
    const Real d = real(x[i]) - centres[i];
    sums[i] += d;
    squares[i] += d * d;
  }
}

// ---------------------------------------------------------------- forward

template <class T, bool kChannels, Activation kActivation>
struct Modulate {
  const T *x, *gamma, *beta, *residual;
  PerChannel<kChannels> mean, scale, shift;
  T* out;
  bool mixed;
  Reals share;

  template <bool kWhole>
  RAGSR_TARGET inline void run(int64_t i, int64_t n) const {
    const Reals z = get<kWhole>(x + i, n), centred = z - mean.template at<kWhole>(i, n);
    const Reals affine = centred * scale.template at<kWhole>(i, n) + shift.template at<kWhole>(i, n);
    Reals y = activate<kActivation>(affine * (1 + get<kWhole>(gamma + i, n)) + get<kWhole>(beta + i, n));
    if (mixed) y = share * y + (1 - share) * z;
    if (residual != nullptr) y += get<kWhole>(residual + i, n);
    put<kWhole>(out + i, n, y);
  }
};

template <class T, bool kChannels, Activation kActivation>
RAGSR_TARGET void modulate_as(const ForwardRow<Real>& r) {
  T room[2][kLongestRow];
  Modulate<T, kChannels, kActivation> step{static_cast<const T*>(r.x),
                                           spread(r.gamma, r.count, room[0]),
                                           spread(r.beta, r.count, room[1]),
                                           static_cast<const T*>(r.residual),
                                           PerChannel<kChannels>(r.mean),
                                           PerChannel<kChannels>(r.scale),
                                           PerChannel<kChannels>(r.shift),
                                           static_cast<T*>(r.out),
                                           r.mixed,
                                           broadcast(r.share)};
  run_along(r.count, step);
}

template <class T, bool kChannels>
void modulate(const ForwardRow<Real>& r) {
  if (r.activation == Activation::silu) return modulate_as<T, kChannels, Activation::silu>(r);
  if (r.activation == Activation::relu) return modulate_as<T, kChannels, Activation::relu>(r);
  modulate_as<T, kChannels, Activation::none>(r);
}

// ---------------------------------------------------------------- backward

// What both passes over the gradient need of one vector.
struct Slopes {
  Reals grad, z_hat, affine, grad_t, grad_affine;
};

template <class T, bool kChannels, Activation kActivation>
struct Inputs {
  const T *grad, *x, *gamma, *beta;
  PerChannel<kChannels> mean, rstd, weight, bias;
  Reals share;

  RAGSR_TARGET inline Inputs(const BackwardRow<Real>& r, T (*room)[kLongestRow])
      : grad(spread(r.grad, r.count, room[0])), x(static_cast<const T*>(r.x)),
        gamma(spread(r.gamma, r.count, room[1])), beta(spread(r.beta, r.count, room[2])), mean(r.mean), rstd(r.rstd),
        weight(r.weight), bias(r.bias), share(broadcast(r.share)) {}

  template <bool kWhole>
  RAGSR_TARGET inline Slopes slopes(int64_t i, int64_t n) const {
    const Reals centred = get<kWhole>(x + i, n) - mean.template at<kWhole>(i, n);
    const Reals z_hat = centred * rstd.template at<kWhole>(i, n);
    const Reals affine = z_hat * weight.template at<kWhole>(i, n) + bias.template at<kWhole>(i, n);
    const Reals slope = 1 + get<kWhole>(gamma + i, n), above = get<kWhole>(grad + i, n);
    Reals grad_t = share * above;
    if (kActivation != Activation::none)
      grad_t = activate_backward<kActivation>(grad_t, affine * slope + get<kWhole>(beta + i, n));
    return {above, z_hat, affine, grad_t, grad_t * slope};
  }
};

// First pass: the gradients of γ and β where they are maps, and the sums.
template <class T, bool kChannels, Activation kActivation>
struct MapGradients {
  Inputs<T, kChannels, kActivation> in;
  T *dgamma, *dbeta;
  Adder<kChannels> by_affine, by_affine_z, by_t, by_t_affine;

  RAGSR_TARGET inline MapGradients(const BackwardRow<Real>& r, T (*room)[kLongestRow])
      : in(r, room), dgamma(static_cast<T*>(r.dgamma)), dbeta(static_cast<T*>(r.dbeta)), by_affine(r.sums[0]),
        by_affine_z(r.sums[1]), by_t(r.sums[2]), by_t_affine(r.sums[3]) {}

  template <bool kWhole>
  RAGSR_TARGET inline void run(int64_t i, int64_t n) {
    const Slopes s = in.template slopes<kWhole>(i, n);
    by_affine.template add<kWhole>(i, n, s.grad_affine);
    by_affine_z.template add<kWhole>(i, n, s.grad_affine * s.z_hat);
    if (dbeta != nullptr) put<kWhole>(dbeta + i, n, s.grad_t);
    else by_t.template add<kWhole>(i, n, s.grad_t);
    if (dgamma != nullptr) put<kWhole>(dgamma + i, n, s.grad_t * s.affine);
    else by_t_affine.template add<kWhole>(i, n, s.grad_t * s.affine);
  }
  RAGSR_TARGET inline void finish() const {
    by_affine.finish();
    by_affine_z.finish();
    by_t.finish();
    by_t_affine.finish();
  }
};

// Second pass: the gradient of x, now that the means over the group are known.
template <class T, bool kChannels, Activation kActivation>
struct InputGradient {
  Inputs<T, kChannels, kActivation> in;
  PerChannel<kChannels> mean_grad, mean_grad_z;
  T* dx;

  RAGSR_TARGET inline InputGradient(const BackwardRow<Real>& r, T (*room)[kLongestRow])
      : in(r, room), mean_grad(r.mean_grad), mean_grad_z(r.mean_grad_z), dx(static_cast<T*>(r.dx)) {}

  template <bool kWhole>
  RAGSR_TARGET inline void run(int64_t i, int64_t n) const {
    const Slopes s = in.template slopes<kWhole>(i, n);
    const Reals own = s.grad_affine * in.weight.template at<kWhole>(i, n);
    const Reals shared = mean_grad.template at<kWhole>(i, n) + s.z_hat * mean_grad_z.template at<kWhole>(i, n);
    put<kWhole>(dx + i, n, in.rstd.template at<kWhole>(i, n) * (own - shared) + (1 - in.share) * s.grad);
  }
  RAGSR_TARGET inline void finish() const {}
};

template <class Pass, class T>
RAGSR_TARGET void run_pass(const BackwardRow<Real>& r) {
  T room[3][kLongestRow];
  Pass pass(r, room);
  run_along(r.count, pass);
  pass.finish();
}

template <template <class, bool, Activation> class Pass, class T, bool kChannels>
void backward(const BackwardRow<Real>& r) {
  if (r.activation == Activation::silu) return run_pass<Pass<T, kChannels, Activation::silu>, T>(r);
  if (r.activation == Activation::relu) return run_pass<Pass<T, kChannels, Activation::relu>, T>(r);
  run_pass<Pass<T, kChannels, Activation::none>, T>(r);
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
  return {sizeof(T), add_positions<T>, add_channels<T>, modulate<T, kChannels>, backward<MapGradients, T, kChannels>,
          backward<InputGradient, T, kChannels>, widen<T>, narrow<T>};
}

template <class T>
Kernels<Real> kernels(bool along_channels) {
  return along_channels ? kernels_along<T, true>() : kernels_along<T, false>();
}
