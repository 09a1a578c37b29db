// Vectors of float32: the half types in and out, and the exponential. Included by sft_targets.h for each instruction
// set, after Reals, Bits and kLanes.

RAGSR_TARGET inline Reals load(const float* from) {
  Reals x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

RAGSR_TARGET inline void store(float* to, Reals x) { std::memcpy(to, &x, sizeof x); }

#ifndef RAGSR_SHORTS_IN_HARDWARE

using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));

inline Bits load_shorts(const void* from) {
  Shorts x;
  std::memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, Bits);
}

inline void store_shorts(void* to, Bits x) {
  const Shorts out = __builtin_convertvector(x, Shorts);
  std::memcpy(to, &out, sizeof out);
}

#endif

// bfloat16 is the upper half of a float32.
RAGSR_TARGET inline Reals load(const BFloat16* from) { return (Reals)(load_shorts(from) << 16); }

RAGSR_TARGET inline Reals load_even(const BFloat16* from) {
  Bits x;
  std::memcpy(&x, from, sizeof x);
  return (Reals)(x << 16);
}

RAGSR_TARGET inline Reals load_odd(const BFloat16* from) {
  Bits x;
  std::memcpy(&x, from, sizeof x);
  return (Reals)(x & 0xffff0000);
}

// To the nearest, ties to the even one: in the upper halves. A NaN stays one: those of bfloat16, and those that arithmetic
// makes of other numbers, have nothing in their lower halves that could carry over.
RAGSR_TARGET inline Bits rounded(Reals x) {
  const Bits bits = (Bits)x;
  return bits + ((bits & 0x10000) != 0 ? bits * 0 + 0x8000 : bits * 0 + 0x7fff);
}

RAGSR_TARGET inline void store(BFloat16* to, Reals x) { store_shorts(to, rounded(x) >> 16); }

RAGSR_TARGET inline void store_pair(BFloat16* to, Reals even, Reals odd) {
  const Bits x = rounded(even) >> 16 | (rounded(odd) & 0xffff0000);
  std::memcpy(to, &x, sizeof x);
}

#ifdef RAGSR_SHORTS_IN_HARDWARE

RAGSR_TARGET inline Reals load(const Half* from) { return load_half(from); }
RAGSR_TARGET inline void store(Half* to, Reals x) { store_half(to, x); }

#else

// The exponent of a float16 is 112 less than that of a float32; the product also puts subnormal numbers right.
RAGSR_TARGET inline Reals load(const Half* from) {
  const Bits wide = load_shorts(from), magnitude = wide & 0x7fff;
  const Bits scaled = (Bits)((Reals)(magnitude << 13) * 0x1p112f);
  const Bits finite_or_not = magnitude >= 0x7c00 ? scaled | 0x7f800000 : scaled;
  return (Reals)(finite_or_not | (wide & 0x8000) << 16);
}

// To the nearest, ties to the even one. A sum with 0.5 rounds what becomes subnormal at the right bit.
RAGSR_TARGET inline void store(Half* to, Reals x) {
  const Bits sign = ((Bits)x >> 16) & 0x8000, magnitude = (Bits)x & 0x7fffffff;
  const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const Bits subnormal = (Bits)((Reals)magnitude + 0.5f) - 0x3f000000;
  const Bits finite = magnitude < 0x38800000 ? subnormal : normal;
  const Bits large = magnitude > 0x7f800000 ? finite * 0 + 0x7e00 : finite * 0 + 0x7c00;
  store_shorts(to, (magnitude < 0x477ff000 ? finite : large) | sign);
}

#endif

template <class T>
RAGSR_TARGET inline float real(T x) {
  T room[kLanes] = {x};
  return load(room)[0];
}

// exp(x) = 2^k · exp(r), |r| <= ln 2 / 2, by the Taylor series: 1e-7 relative. A sum with 1.5 · 2^23 rounds k.
RAGSR_TARGET inline Reals exponential(Reals x) {
  constexpr float kRound = 12582912.0f;
  x = x < -87.0f ? Reals{} - 87.0f : x;
  x = x > 88.0f ? Reals{} + 88.0f : x;
  const Reals shifted = x * 1.44269504f + kRound, k = shifted - kRound;
  const Reals r = x - k * 0.693145752f - k * 1.42860677e-6f;  // ln 2 in two parts: the first product is exact
  Reals sum = r * (1 / 5040.0f) + 1 / 720.0f;
  sum = sum * r + 1 / 120.0f;
  sum = sum * r + 1 / 24.0f;
  sum = sum * r + 1 / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return (Reals)((Bits)sum + ((Bits)shifted << 23));  // the low bits of `shifted` are k
}
