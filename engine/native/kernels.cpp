// The C interface of the CPU kernels: what engine/native/ops.py calls through ctypes. Plain pointers and numbers, so
// that nothing here depends on the version of Python or torch. Shapes stand at each kernel's definition.

#include "attention.h"
#include "linear.h"
#include "rows.h"

using baton::bf16;

extern "C" {

// Columns of one panel of a packed matrix.
int64_t baton_panel() { return baton::PANEL; }

void baton_pack_bf16(const bf16 *weight, bf16 *panels, int64_t inputs, int64_t outputs, int64_t threads) {
  baton::pack(weight, panels, inputs, outputs, static_cast<int>(threads));
}

void baton_pack_f32(const float *weight, float *panels, int64_t inputs, int64_t outputs, int64_t threads) {
  baton::pack(weight, panels, inputs, outputs, static_cast<int>(threads));
}

void baton_linear_bf16(const float *x, const bf16 *panels, const float *bias, float *y, int64_t rows, int64_t inputs,
                       int64_t outputs, int64_t threads) {
  baton::linear(x, panels, bias, y, rows, inputs, outputs, static_cast<int>(threads));
}

void baton_linear_f32(const float *x, const float *panels, const float *bias, float *y, int64_t rows, int64_t inputs,
                      int64_t outputs, int64_t threads) {
  baton::linear(x, panels, bias, y, rows, inputs, outputs, static_cast<int>(threads));
}

void baton_norm(float *hidden, const float *delta, const float *weight, float *normed, int64_t rows, int64_t width,
                double eps, int64_t threads) {
  baton::norm(hidden, delta, weight, normed, rows, width, static_cast<float>(eps), static_cast<int>(threads));
}

void baton_silu_mul(const float *x, float *y, int64_t rows, int64_t width, int64_t threads) {
  baton::silu_mul(x, y, rows, width, static_cast<int>(threads));
}

// written [rows]: where in the cache each row of the step goes.
void baton_slots(const int64_t *numbers, int64_t spans, int64_t page_tokens, int64_t *written) {
  const baton::Step step{numbers, spans, 0, page_tokens};
  for (int64_t s = 0; s < spans; ++s)
    for (int64_t r = 0; r < step.span(s).count; ++r)
      written[step.span(s).first + r] = step.slot(step.span(s), step.span(s).start + r);
}

#define BATON_CACHE(NAME, KV)                                                                                          \
  void baton_rope_write_##NAME(float *qkv, const float *cosine, const float *sine, const int64_t *written, KV *layer,  \
                               int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t threads) {     \
    baton::rope_write(qkv, cosine, sine, written, layer, rows, heads, kv_heads, head_dim, static_cast<int>(threads));  \
  }                                                                                                                    \
  void baton_attend_##NAME(const int64_t *numbers, int64_t spans, int64_t decodes, int64_t page_tokens,                \
                           const float *qkv, const KV *layer, float *out, int64_t heads, int64_t kv_heads,             \
                           int64_t head_dim, int64_t window, int64_t threads) {                                        \
    const baton::Step step{numbers, spans, decodes, page_tokens};                                                      \
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));                                                \
    const baton::Heads each{heads, kv_heads, head_dim, scale, window};                                                 \
    baton::attend(step, each, qkv, layer, out, static_cast<int>(threads));                                             \
  }

BATON_CACHE(f32, float)
BATON_CACHE(bf16, bf16)

}  // extern "C"
