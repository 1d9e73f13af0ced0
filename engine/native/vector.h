// Vectors as GCC and Clang know them on every CPU: no intrinsics, so the same source serves x86-64 and ARM.
#pragma once

#include <cstdint>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bf16 pairs are taken apart as little-endian words");

namespace baton {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Rows of one product's tile of [TILE_ROWS, 2 * LANES] sums: what fits the registers beside one pair of weights.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif

using bf16 = uint16_t;

template <int N> struct Of {
  typedef float Floats __attribute__((vector_size(4 * N)));
  typedef float Anywhere __attribute__((vector_size(4 * N), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(4 * N)));
  typedef uint32_t Words __attribute__((vector_size(4 * N)));
  typedef uint32_t WordsAnywhere __attribute__((vector_size(4 * N), aligned(2), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(2 * N), aligned(2), may_alias));
};

using V = Of<LANES>::Floats;
using V8 = Of<8>::Floats;  // where a head's dimensions are the vector: eight divide every head_dim

template <int N> inline typename Of<N>::Floats load(const float *from) {
  return *reinterpret_cast<const typename Of<N>::Anywhere *>(from);
}

template <int N> inline typename Of<N>::Floats load(const bf16 *from) {
  auto halves = *reinterpret_cast<const typename Of<N>::Halves *>(from);
  return reinterpret_cast<typename Of<N>::Floats>(__builtin_convertvector(halves, typename Of<N>::Words) << 16);
}

template <int N> inline void store(float *to, typename Of<N>::Floats value) {
  *reinterpret_cast<typename Of<N>::Anywhere *>(to) = value;
}

// Rounds to the nearest bf16, ties to even, as torch does; a NaN stays one.
inline bf16 rounded(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<bf16>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline void put(float *to, float value) { *to = value; }
inline void put(bf16 *to, float value) { *to = rounded(value); }

template <int N> inline float sum(typename Of<N>::Floats value) {
  float total = 0.0f;
  for (int lane = 0; lane < N; ++lane) total += value[lane];
  return total;
}

// Two vectors to one of half as many sums of each: [a0+a1, a2+a3, b0+b1, b2+b3, a4+a5, ...].
inline V8 folded(V8 a, V8 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return __builtin_shuffle(a, b, Of<8>::Ints{0, 2, 8, 10, 4, 6, 12, 14}) +
         __builtin_shuffle(a, b, Of<8>::Ints{1, 3, 9, 11, 5, 7, 13, 15});
#endif
}

// Lane i is the sum of vectors[i].
inline V8 sums_of(const V8 vectors[8]) {
  const V8 low = folded(folded(vectors[0], vectors[1]), folded(vectors[2], vectors[3]));
  const V8 high = folded(folded(vectors[4], vectors[5]), folded(vectors[6], vectors[7]));
#if defined(__clang__)
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return __builtin_shuffle(low, high, Of<8>::Ints{0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(low, high, Of<8>::Ints{4, 5, 6, 7, 12, 13, 14, 15});
#endif
}

template <int N> inline typename Of<N>::Floats larger(typename Of<N>::Floats a, typename Of<N>::Floats b) {
  return a > b ? a : b;
}

// e^x with a relative error under 2e-7 for x in [-87, 88]; below it e^-87, above it e^88. Range reduction and the
// minimax polynomial as in Cephes' expf; the rounding to an integer is that of adding 1.5 * 2^23.
template <int N> inline typename Of<N>::Floats exponential(typename Of<N>::Floats x) {
  using F = typename Of<N>::Floats;
  using I = typename Of<N>::Ints;
  const F zero = {};
  x = x < zero - 87.0f ? zero - 87.0f : x;
  x = x > zero + 88.0f ? zero + 88.0f : x;
  const F shifted = x * 1.44269504088896341f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  F r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I power = (reinterpret_cast<I>(shifted) << 23) + 0x3f800000;  // the low bits of ``shifted`` are n
  return p * reinterpret_cast<F>(power);
}

}  // namespace baton
