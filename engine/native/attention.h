// Causal attention over the pages of a KV cache, read where they lie: one row per sequence (decode) or many (prefill).
// Online softmax as in FlashAttention (arXiv:2205.14135), long contexts split among threads as in Flash-Decoding. Query heads that share a KV head read its K and V together.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "linear.h"

namespace baton {

// The rows of one sequence: ``count`` from position ``start`` on, in rows ``first...`` of the step. Its pages are
// numbers[table...]. engine/native/ops.py writes these four numbers.
struct Span {
  int64_t first, start, count, table;
};

// All sequences of a step: ``spans`` of them at the head of ``numbers``, their block tables behind. The first
// ``decodes`` have one row each. A chunk may have one row as well, and is computed as every other chunk is: how a prompt
// was cut must not show in its KV.
struct Step {
  const int64_t *numbers;
  int64_t spans, decodes, page_tokens;

  const Span &span(int64_t index) const { return reinterpret_cast<const Span *>(numbers)[index]; }

  int64_t slot(const Span &span, int64_t position) const {
    return numbers[span.table + position / page_tokens] * page_tokens + position % page_tokens;
  }
};

struct Heads {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t window;  // tokens a row sees, itself included; 0 is all

  int64_t sharing() const { return heads / kv_heads; }
  int64_t slot() const { return 2 * kv_heads * head_dim; }         // of the cache
  int64_t row() const { return (heads + 2 * kv_heads) * head_dim; }  // of qkv
  int64_t first_seen(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0; }
};

constexpr float HIDDEN = -std::numeric_limits<float>::infinity();
constexpr int64_t TOKENS = 64;        // of the context, taken at once
constexpr int64_t ROWS = 192;         // query rows that meet one tile of keys, heads that share it included
constexpr int64_t SPLIT_TOKENS = 256;  // a shorter part of a context is not worth a thread

static_assert(TOKENS % PANEL == 0 && TOKENS % 8 == 0);

// Where ``count`` tokens from position ``first`` on lie in ``layer``.
template <class KV>
inline void locate(const Step &step, const Span &span, const Heads &h, const KV *layer, int64_t first, int64_t count,
                   const KV **rows) {
  for (int64_t t = 0; t < count; ++t) rows[t] = layer + step.slot(span, first + t) * h.slot();
}

// exp(x - new maximum) of one row's scores in place, their sum, and the new maximum. ``scores`` [TOKENS], of which
// those that are not seen hold -inf; at least one is seen, now or before.
struct Softmax {
  float maximum = HIDDEN, total = 0.0f;

  // Returns what the output so far is to be multiplied by.
  inline float add(float *scores, int64_t count) {
    V8 best = load<8>(scores);
    for (int64_t t = 8; t < count; t += 8) best = larger<8>(best, load<8>(scores + t));
    float top = maximum;
    for (int lane = 0; lane < 8; ++lane) top = std::max(top, best[lane]);
    if (top == HIDDEN) {
      std::fill(scores, scores + count, 0.0f);
      return 1.0f;
    }
    const float kept = maximum == HIDDEN ? 0.0f : std::exp(maximum - top);
    V8 sums = {};
    for (int64_t t = 0; t < count; t += 8) {
      const V8 score = load<8>(scores + t);
      const V8 weight = score == HIDDEN ? V8{} : exponential<8>(score - top);
      store<8>(scores + t, weight);
      sums += weight;
    }
    maximum = top;
    total = total * kept + sum<8>(sums);
    return kept;
  }
};

// scores[t] = scale * query . keys[t], eight tokens at a time so that the sums do not wait for each other.
template <class KV>
inline void score(const float *query, const KV *const *rows, int64_t offset, int64_t head_dim, float scale,
                  float *scores) {
  V8 sums[8] = {};
  for (int64_t d = 0; d < head_dim; d += 8) {
    const V8 q = load<8>(query + d);
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) sums[t] += q * load<8>(rows[t] + offset + d);
  }
  store<8>(scores, sums_of(sums) * scale);
}

// out[CHUNK * 8] = out * kept + the sum over tokens of weights[t] * values[t].
template <int CHUNK, class KV>
inline void mix_chunk(const float *weights, const KV *const *rows, int64_t offset, int64_t count, float kept,
                      float *out) {
  V8 sums[CHUNK];
#pragma GCC unroll 8
  for (int c = 0; c < CHUNK; ++c) sums[c] = load<8>(out + 8 * c) * kept;
  for (int64_t t = 0; t < count; ++t) {
    const KV *value = rows[t] + offset;
#pragma GCC unroll 8
    for (int c = 0; c < CHUNK; ++c) sums[c] += weights[t] * load<8>(value + 8 * c);
  }
#pragma GCC unroll 8
  for (int c = 0; c < CHUNK; ++c) store<8>(out + 8 * c, sums[c]);
}

template <class KV>
inline void mix(const float *weights, const KV *const *rows, int64_t offset, int64_t head_dim, int64_t count,
                float kept, float *out) {
  int64_t d = 0;
  for (; d + 64 <= head_dim; d += 64) mix_chunk<8>(weights, rows, offset + d, count, kept, out + d);
  for (; d + 16 <= head_dim; d += 16) mix_chunk<2>(weights, rows, offset + d, count, kept, out + d);
  for (; d < head_dim; d += 8) mix_chunk<1>(weights, rows, offset + d, count, kept, out + d);
}

// One query row over tokens [first, end): all heads at once, since K and V of a token lie side by side. Leaves the
// unscaled output in out [heads, head_dim] and what scales it in softmax [heads].
template <class KV>
void decode(const Step &step, const Span &span, const Heads &h, const float *queries, const KV *layer, int64_t first,
            int64_t end, float *out, Softmax *softmax) {
  const KV *rows[TOKENS];
  alignas(64) float scores[TOKENS];
  std::fill(out, out + h.heads * h.head_dim, 0.0f);
  for (int64_t at = first; at < end; at += TOKENS) {
    const int64_t count = std::min(TOKENS, end - at), padded = (count + 7) / 8 * 8;
    locate(step, span, h, layer, at, count, rows);
    std::fill(rows + count, rows + padded, rows[0]);
    for (int64_t head = 0; head < h.heads; ++head) {
      const int64_t keys = head / h.sharing() * h.head_dim, values = keys + h.kv_heads * h.head_dim;
      const float *query = queries + head * h.head_dim;
      for (int64_t t = 0; t < padded; t += 8) score(query, rows + t, keys, h.head_dim, h.scale, scores + t);
      std::fill(scores + count, scores + padded, HIDDEN);
      const float kept = softmax[head].add(scores, padded);
      mix(scores, rows, values, h.head_dim, count, kept, out + head * h.head_dim);
    }
  }
}

// Keys transposed to [head_dim, TOKENS] and values to [TOKENS, wide], float32, of one KV head and ``count`` tokens.
template <class KV>
inline void gather(const KV *const *rows, int64_t count, int64_t head_dim, int64_t values_offset, int64_t wide,
                   float *keys, float *values) {
  for (int64_t t = 0; t < TOKENS; ++t) {
    const KV *row = rows[std::min(t, count - 1)];
    for (int64_t d = 0; d < head_dim; d += 8) {
      const V8 k = load<8>(row + d);
      for (int lane = 0; lane < 8; ++lane) keys[(d + lane) * TOKENS + t] = k[lane];
      store<8>(values + t * wide + d, load<8>(row + values_offset + d));
    }
  }
}

// Rows [begin, begin + tokens) of a span for one KV head. out: [rows of the step, heads, head_dim].
template <class KV> class Prefill {
 public:
  Prefill(const Step &step, const Heads &h)
      : step_(step), h_(h), wide_(panels_of(h.head_dim) * PANEL), rows_(h.sharing() * block(h)),
        queries_(rows_ * h.head_dim), keys_(h.head_dim * TOKENS), values_(TOKENS * wide_), scores_(rows_ * TOKENS),
        mixed_(rows_ * wide_), softmax_(rows_) {}

  // Tokens of a sequence that are computed together.
  static int64_t block(const Heads &h) { return std::max<int64_t>(ROWS / h.sharing(), 1); }

  void run(const Span &span, int64_t kv_head, int64_t begin, int64_t tokens, const float *qkv, const KV *layer,
           float *out) {
    const int64_t sharing = h_.sharing(), rows = tokens * sharing, dim = h_.head_dim;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = kv_head * sharing + r % sharing;
      const float *query = qkv + (span.first + begin + r / sharing) * h_.row() + head * dim;
      for (int64_t d = 0; d < dim; ++d) queries_[r * dim + d] = query[d] * h_.scale;
    }
    std::fill(mixed_.begin(), mixed_.end(), 0.0f);
    std::fill(softmax_.begin(), softmax_.end(), Softmax());
    const int64_t position = span.start + begin, end = position + tokens;
    for (int64_t at = h_.first_seen(position) / TOKENS * TOKENS; at < end; at += TOKENS) {
      const int64_t count = std::min(TOKENS, end - at);
      locate(step_, span, h_, layer + kv_head * dim, at, count, places_);
      gather(places_, count, dim, h_.kv_heads * dim, wide_, keys_.data(), values_.data());
      meet(rows, position, at, count);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float *to = out + ((span.first + begin + r / sharing) * h_.heads + kv_head * sharing + r % sharing) * dim;
      const float scale = 1.0f / softmax_[r].total;
      for (int64_t d = 0; d < dim; ++d) to[d] = mixed_[r * wide_ + d] * scale;
    }
  }

 private:
  // All query rows with the tile of ``count`` tokens from position ``at`` on.
  void meet(int64_t rows, int64_t position, int64_t at, int64_t count) {
    const int64_t sharing = h_.sharing(), dim = h_.head_dim;
    for (int64_t t = 0; t < count; t += PANEL)
      product(queries_.data(), dim, rows, keys_.data() + t, TOKENS, dim, scores_.data() + t, TOKENS, false);
    const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
    for (int64_t r = 0; r < rows; ++r) {
      float *scores = scores_.data() + r * TOKENS;
      const int64_t own = position + r / sharing;
      const int64_t seen = std::clamp<int64_t>(own + 1 - at, 0, count);
      const int64_t before = std::clamp<int64_t>(h_.first_seen(own) - at, 0, padded);
      std::fill(scores + seen, scores + padded, HIDDEN);
      std::fill(scores, scores + before, HIDDEN);
      const float kept = softmax_[r].add(scores, padded);
      if (kept != 1.0f)
        for (int64_t d = 0; d < wide_; ++d) mixed_[r * wide_ + d] *= kept;
    }
    for (int64_t d = 0; d < wide_; d += PANEL)
      product(scores_.data(), TOKENS, rows, values_.data() + d, wide_, count, mixed_.data() + d, wide_, true);
  }

  const Step &step_;
  const Heads &h_;
  const int64_t wide_;  // head_dim, filled up to whole panels
  const int64_t rows_;  // most query rows at once
  std::vector<float> queries_, keys_, values_, scores_, mixed_;
  std::vector<Softmax> softmax_;
  const KV *places_[TOKENS];
};

// A part of a sequence's context, for one thread.
struct Part {
  int64_t span, first, end;
};

// A sequence is cut alike whatever the others are, so that its sums are the same in every batch.
inline std::vector<Part> parts_of(const Step &step, const Heads &h, int threads) {
  std::vector<Part> parts;
  for (int64_t s = 0; s < step.decodes; ++s) {
    const Span &span = step.span(s);
    const int64_t first = h.first_seen(span.start), tokens = span.start + 1 - first;
    const int64_t count = std::clamp<int64_t>(tokens / SPLIT_TOKENS, 1, threads);
    for (int64_t p = 0; p < count; ++p)
      parts.push_back({s, first + tokens * p / count, first + tokens * (p + 1) / count});
  }
  return parts;
}

// Rows of chunks, for one thread: up to Prefill::block tokens of one sequence and one KV head.
struct Block {
  int64_t span, kv_head, begin, tokens;
};

template <class KV> std::vector<Block> blocks_of(const Step &step, const Heads &h) {
  std::vector<Block> blocks;
  const int64_t most = Prefill<KV>::block(h);
  for (int64_t s = step.decodes; s < step.spans; ++s)
    for (int64_t end = step.span(s).count; end > 0; end -= most)  // dearest first
      for (int64_t head = 0; head < h.kv_heads; ++head)
        blocks.push_back({s, head, std::max<int64_t>(end - most, 0), std::min(end, most)});
  return blocks;
}

// One head's parts of a context to its output [head_dim]: each weighs what its share of the softmax's total is.
inline void combine(const float *const *outs, const Softmax *const *softmax, int64_t count, int64_t head_dim,
                    float *out) {
  float top = HIDDEN, total = 0.0f;
  for (int64_t p = 0; p < count; ++p) top = std::max(top, softmax[p]->maximum);
  for (int64_t p = 0; p < count; ++p) total += softmax[p]->total * std::exp(softmax[p]->maximum - top);
  std::fill(out, out + head_dim, 0.0f);
  for (int64_t p = 0; p < count; ++p) {
    const float weight = std::exp(softmax[p]->maximum - top) / total;
    for (int64_t d = 0; d < head_dim; ++d) out[d] += outs[p][d] * weight;
  }
}

// Every row of a step. qkv: [rows, heads + 2 * kv_heads, head_dim], layer: [slots, 2 * kv_heads, head_dim],
// out: [rows, heads, head_dim].
template <class KV>
void attend(const Step &step, const Heads &h, const float *qkv, const KV *layer, float *out, int threads) {
  const std::vector<Part> parts = parts_of(step, h, threads);
  const std::vector<Block> blocks = blocks_of<KV>(step, h);
  const int64_t wide = h.heads * h.head_dim, decodes = parts.size(), chunks = blocks.size();
  std::vector<Softmax> softmax(decodes * h.heads);
  std::vector<float> partial(decodes * wide);
#pragma omp parallel num_threads(threads) if (decodes + chunks > 1)
  {
#pragma omp for schedule(dynamic) nowait
    for (int64_t p = 0; p < decodes; ++p) {
      const Part &part = parts[p];
      const Span &span = step.span(part.span);
      decode(step, span, h, qkv + span.first * h.row(), layer, part.first, part.end, partial.data() + p * wide,
             softmax.data() + p * h.heads);
    }
    if (chunks > 0) {
      Prefill<KV> prefill(step, h);
#pragma omp for schedule(dynamic) nowait
      for (int64_t b = 0; b < chunks; ++b) {
        const Block &block = blocks[b];
        prefill.run(step.span(block.span), block.kv_head, block.begin, block.tokens, qkv, layer, out);
      }
    }
  }
  std::vector<const float *> outs(threads);
  std::vector<const Softmax *> shares(threads);
  for (int64_t p = 0, count; p < decodes; p += count) {
    for (count = 1; p + count < decodes && parts[p + count].span == parts[p].span; ++count) continue;
    for (int64_t head = 0; head < h.heads; ++head) {
      for (int64_t c = 0; c < count; ++c) {
        outs[c] = partial.data() + (p + c) * wide + head * h.head_dim;
        shares[c] = softmax.data() + (p + c) * h.heads + head;
      }
      combine(outs.data(), shares.data(), count, h.head_dim,
              out + step.span(parts[p].span).first * wide + head * h.head_dim);
    }
  }
}

}  // namespace baton
