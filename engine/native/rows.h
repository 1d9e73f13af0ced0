// What happens to each row by itself: RMSNorm, SwiGLU, rotary embedding with the write to the cache.
#pragma once

#include <cmath>

#include "vector.h"

namespace baton {

constexpr int64_t ROWS_WORTH_A_THREAD = 8;  // below it, waking another thread takes longer than the rows do

// y = x / rms(x) * weight, each [width].
inline void norm_row(const float *x, const float *weight, float *y, int64_t width, float eps) {
  V squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES)
    for (int c = 0; c < 4; ++c) {
      const V part = load<LANES>(x + i + c * LANES);
      squares[c] += part * part;
    }
  float total = sum<LANES>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < width; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
  for (int64_t k = 0; k < width; ++k) y[k] = x[k] * scale * weight[k];
}

// normed = RMSNorm(hidden + delta); the sum stays in hidden. A null delta leaves hidden as it is. All [rows, width].
inline void norm(float *hidden, const float *delta, const float *weight, float *normed, int64_t rows, int64_t width,
                 float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows >= ROWS_WORTH_A_THREAD * threads)
  for (int64_t r = 0; r < rows; ++r) {
    float *row = hidden + r * width;
    if (delta != nullptr)
      for (int64_t k = 0; k < width; ++k) row[k] += delta[r * width + k];
    norm_row(row, weight, normed + r * width, width, eps);
  }
}

// y [rows, width] = silu(x[:, :width]) * x[:, width:].
inline void silu_mul(const float *x, float *y, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows >= ROWS_WORTH_A_THREAD * threads)
  for (int64_t r = 0; r < rows; ++r) {
    const float *gate = x + r * 2 * width, *up = gate + width;
    float *to = y + r * width;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
      const V g = load<LANES>(gate + k);
      store<LANES>(to + k, g / (1.0f + exponential<LANES>(-g)) * load<LANES>(up + k));
    }
    for (; k < width; ++k) to[k] = gate[k] / (1.0f + std::exp(-gate[k])) * up[k];
  }
}

// Rotates the queries and keys of qkv [rows, heads + 2 * kv_heads, head_dim] in place (half-split form; the first half
// of ``sine`` is negated), then writes keys and values to row written[r] of layer [slots, 2 * kv_heads, head_dim].
template <class KV>
void rope_write(float *qkv, const float *cosine, const float *sine, const int64_t *written, KV *layer, int64_t rows,
                int64_t heads, int64_t kv_heads, int64_t head_dim, int threads) {
  const int64_t half = head_dim / 2, all = heads + 2 * kv_heads;
#pragma omp parallel for num_threads(threads) if (rows >= ROWS_WORTH_A_THREAD * threads)
  for (int64_t r = 0; r < rows; ++r) {
    float *row = qkv + r * all * head_dim;
    const float *c = cosine + r * head_dim, *s = sine + r * head_dim;
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      float *low = row + h * head_dim, *high = low + half;
      for (int64_t i = 0; i < half; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a * c[i] + b * s[i];
        high[i] = b * c[half + i] + a * s[half + i];
      }
    }
    KV *slot = layer + written[r] * 2 * kv_heads * head_dim;
    const float *fresh = row + heads * head_dim;
    for (int64_t i = 0; i < 2 * kv_heads * head_dim; ++i) put(slot + i, fresh[i]);
  }
}

}  // namespace baton
