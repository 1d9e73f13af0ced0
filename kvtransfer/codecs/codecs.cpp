// The codecs' inner loops. Plain loops that the compiler vectorises; every result equals reference.py's bit for bit.
//
// K or V comes as rows [count] of heads * head_dim values, ``row_stride`` values apart, and leaves as
// [heads, count, head_dim], heads ``head_stride`` values apart. Levels of one head (a tile of count * head_dim) are packed together: eight bits a byte
// each; four as two planes' halves (level i and level i + n/2 share a byte); two as quarters; six as four plus two.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;

constexpr int32_t REFUSED = 0x7f000000;  // 2^127: its rounded-up scale would decode to infinity; NaN is above it too
constexpr float SURE = 0x1p127f;         // products and sums below it are finite, in bfloat16 too
constexpr float ROUNDER = 12582912.0f;   // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

inline int32_t bits(float value) {
  int32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

inline float real(int32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return real(static_cast<int32_t>(static_cast<uint32_t>(value) << 16)); }

inline void put(float *to, float value) { *to = value; }
inline void put(bf16 *to, float value) {
  const uint32_t word = static_cast<uint32_t>(bits(value));
  *to = static_cast<bf16>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline int32_t rounded(float value) { return bits(value + ROUNDER) - bits(ROUNDER); }

// A magnitude to bfloat16, away from zero (no level then passes the top one), and never the negative zero.
inline float up(float value) { return real(((bits(value) & 0x7fffffff) + 0xffff) & ~0xffff); }

inline uint8_t to_e4m3(float value) {
  const int32_t word = bits(value), magnitude = word & 0x7fffffff;
  const int32_t normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  const int32_t tiny = bits(real(magnitude) + 16384.0f) - bits(16384.0f);  // steps of 2^-9
  return static_cast<uint8_t>((magnitude < 0x3c800000 ? tiny : normal) | ((word >> 24) & 0x80));
}

inline float from_e4m3(uint8_t code) {
  const float magnitude = real((code & 0x7f) << 20) * 0x1p120f;
  return real(bits(magnitude) | ((code & 0x80) << 24));
}

inline int infinite(float value) { return (bits(value) & 0x7f800000) == 0x7f800000; }
inline int infinite(bf16 value) { return (value & 0x7f80) == 0x7f80; }

template <class T> int any_infinite(const T *__restrict__ values, int64_t count) {
  int found = 0;
  for (int64_t i = 0; i < count; ++i) found |= infinite(values[i]);
  return found;
}

template <class T> T *grown(std::vector<T> &room, int64_t size) {
  if (static_cast<int64_t>(room.size()) < size) room.resize(size);
  return room.data();
}

int64_t pack(const uint8_t *__restrict__ levels, int64_t n, int width, uint8_t *__restrict__ out) {
  if (width == 8) {
    std::memcpy(out, levels, n);
    return n;
  }
  if (width == 6) {  // the upper four bits, then the lower two
    thread_local std::vector<uint8_t> room;
    uint8_t *__restrict__ part = grown(room, n);
    for (int64_t i = 0; i < n; ++i) part[i] = levels[i] >> 2;
    const int64_t upper = pack(part, n, 4, out);
    for (int64_t i = 0; i < n; ++i) part[i] = levels[i] & 3;
    return upper + pack(part, n, 2, out + upper);
  }
  const int parts = 8 / width;
  const int64_t size = (n + parts - 1) / parts;
  const int64_t last = n - (parts - 1) * size;  // of the last part; what lies beyond n counts as 0
  if (last < 0) {                               // n < parts, or a short tail over two parts
    for (int64_t i = 0; i < size; ++i) {
      int byte = 0;
      for (int p = 0; p < parts; ++p)
        if (i + p * size < n) byte |= levels[i + p * size] << (p * width);
      out[i] = static_cast<uint8_t>(byte);
    }
    return size;
  }
  if (width == 4) {
    for (int64_t i = 0; i < last; ++i) out[i] = static_cast<uint8_t>(levels[i] | levels[i + size] << 4);
    for (int64_t i = last; i < size; ++i) out[i] = levels[i];
  } else {
    const uint8_t *a = levels, *b = a + size, *c = b + size, *d = c + size;
    for (int64_t i = 0; i < last; ++i) out[i] = static_cast<uint8_t>(a[i] | b[i] << 2 | c[i] << 4 | d[i] << 6);
    for (int64_t i = last; i < size; ++i) out[i] = static_cast<uint8_t>(a[i] | b[i] << 2 | c[i] << 4);
  }
  return size;
}

int64_t unpack(const uint8_t *__restrict__ in, int64_t n, int width, uint8_t *__restrict__ levels) {
  if (width == 8) {
    std::memcpy(levels, in, n);
    return n;
  }
  if (width == 6) {
    thread_local std::vector<uint8_t> room;
    uint8_t *__restrict__ part = grown(room, n);
    const int64_t upper = unpack(in, n, 4, levels);
    const int64_t lower = unpack(in + upper, n, 2, part);
    for (int64_t i = 0; i < n; ++i) levels[i] = static_cast<uint8_t>(levels[i] << 2 | part[i]);
    return upper + lower;
  }
  const int parts = 8 / width, mask = (1 << width) - 1;
  const int64_t size = (n + parts - 1) / parts;
  for (int p = 0; p < parts; ++p) {
    const int64_t some = std::min(size, n - p * size);
    uint8_t *to = levels + p * size;
    for (int64_t i = 0; i < some; ++i) to[i] = static_cast<uint8_t>(in[i] >> (p * width) & mask);
  }
  return size;
}

// One scale per token and group of ``group`` values. ``top``: the largest level, 448 for e4m3.
template <class T>
int quantise_tokens(const T *x, int64_t count, int64_t row_stride, int heads, int head_dim, int group, float top,
                    int width, int e4m3, bf16 *scales, uint8_t *out) {
  const int64_t tile = count * head_dim;
  thread_local std::vector<uint8_t> room;
  uint8_t *__restrict__ tile_levels = grown(room, tile);
  const float centre = width == 8 ? 0.0f : top;
  const int lowest = width == 8 ? -static_cast<int>(top) : 0;
  const int highest = static_cast<int>(width == 8 ? top : 2 * top);
  int32_t largest = 0;
  for (int h = 0; h < heads; ++h) {
    uint8_t *__restrict__ to = tile_levels;
    for (int64_t t = 0; t < count; ++t)
      for (int g = 0; g < head_dim; g += group, to += group) {
        const T *__restrict__ from = x + t * row_stride + h * head_dim + g;
        int32_t most = 0;
        for (int d = 0; d < group; ++d) most = std::max(most, bits(widen(from[d])) & 0x7fffffff);
        largest = std::max(largest, most);
        const float step = up(real(most) / top), divisor = step > 0.0f ? step : 1.0f;
        *scales++ = static_cast<bf16>(bits(step) >> 16);
        if (e4m3)
          for (int d = 0; d < group; ++d) to[d] = to_e4m3(widen(from[d]) / divisor);
        else
          for (int d = 0; d < group; ++d) {
            const int level = rounded(widen(from[d]) / divisor + centre);
            to[d] = static_cast<uint8_t>(std::min(std::max(level, lowest), highest));
          }
      }
    if (largest >= REFUSED) return 1;
    out += pack(tile_levels, tile, width, out);
  }
  return 0;
}

template <class T>
int dequantise_tokens(const bf16 *scales, const uint8_t *in, int64_t count, int heads, int head_dim, int group,
                      float top, int width, int e4m3, int64_t head_stride, T *all) {
  const int64_t tile = count * head_dim;
  thread_local std::vector<uint8_t> room;
  uint8_t *__restrict__ tile_levels = grown(room, tile);
  const float offset = width == 8 ? 0.0f : top;
  int wrong = 0;
  for (int h = 0; h < heads; ++h) {
    in += unpack(in, tile, width, tile_levels);
    const uint8_t *__restrict__ from = tile_levels;
    T *__restrict__ out = all + h * head_stride;
    for (int64_t at = 0; at < tile; at += group, from += group, out += group) {
      const bf16 scale = *scales++;
      wrong |= scale >= 0x7f80;  // negative or not finite
      const float step = widen(scale);
      if (e4m3)
        for (int d = 0; d < group; ++d) {
          wrong |= (from[d] & 0x7f) == 0x7f;
          put(out + d, from_e4m3(from[d]) * step);
        }
      else if (width == 8)
        for (int d = 0; d < group; ++d) put(out + d, static_cast<float>(static_cast<int8_t>(from[d])) * step);
      else
        for (int d = 0; d < group; ++d) put(out + d, (static_cast<float>(from[d]) - offset) * step);
      if (!(step < SURE / 512)) wrong |= any_infinite(out, group);
    }
  }
  return wrong;
}

// Each column's lowest, highest and (in bits) largest value; 1 if any may not be quantised.
template <class T>
int ranges(const T *from, int64_t rows, int64_t row_stride, int columns, float *__restrict__ low,
           float *__restrict__ high, int32_t *__restrict__ most) {
  for (int d = 0; d < columns; ++d) {
    low[d] = high[d] = widen(from[d]);
    most[d] = 0;
  }
  for (int64_t t = 0; t < rows; ++t) {
    const T *__restrict__ row = from + t * row_stride;
    for (int d = 0; d < columns; ++d) {
      const float value = widen(row[d]);
      low[d] = value < low[d] ? value : low[d];
      high[d] = value > high[d] ? value : high[d];
      most[d] = std::max(most[d], bits(value) & 0x7fffffff);
    }
  }
  int32_t largest = 0;
  for (int d = 0; d < columns; ++d) largest = std::max(largest, most[d]);
  return largest >= REFUSED;
}

// To bfloat16, towards zero. + 0: which zero is low is chance.
inline float middle_of(float low, float high) { return real(bits(high * 0.5f + low * 0.5f + 0.0f) & ~0xffff); }

// One scale and one middle per channel and group of ``group`` tokens (the last may be shorter). ``top``: the largest
// level, counted from 0.
template <class T>
int quantise_channels(const T *x, int64_t count, int64_t row_stride, int heads, int head_dim, int group, float top,
                      int width, bf16 *scales, bf16 *middles, uint8_t *out) {
  const int64_t tile = count * head_dim;
  thread_local std::vector<uint8_t> room;
  thread_local std::vector<float> columns;
  thread_local std::vector<int32_t> magnitudes;
  uint8_t *__restrict__ tile_levels = grown(room, tile);
  float *__restrict__ low = grown(columns, 4 * head_dim);
  float *__restrict__ high = low + head_dim;
  float *__restrict__ middle = high + head_dim;
  float *__restrict__ divisor = middle + head_dim;
  int32_t *__restrict__ most = grown(magnitudes, head_dim);
  const float centre = top / 2;
  const int limit = static_cast<int>(top);
  for (int h = 0; h < heads; ++h) {
    for (int64_t first = 0; first < count; first += group) {
      const int64_t some = std::min<int64_t>(group, count - first);
      const T *from = x + first * row_stride + h * head_dim;
      if (ranges(from, some, row_stride, head_dim, low, high, most)) return 1;
      for (int d = 0; d < head_dim; ++d) {
        middle[d] = middle_of(low[d], high[d]);
        const float above = high[d] - middle[d], below = middle[d] - low[d];
        const float step = up((above > below ? above : below) / centre);
        divisor[d] = step > 0.0f ? step : 1.0f;
        scales[d] = static_cast<bf16>(bits(step) >> 16);
        middles[d] = static_cast<bf16>(static_cast<uint32_t>(bits(middle[d])) >> 16);
      }
      uint8_t *__restrict__ to = tile_levels + first * head_dim;
      for (int64_t t = 0; t < some; ++t, to += head_dim) {
        const T *__restrict__ row = from + t * row_stride;
        for (int d = 0; d < head_dim; ++d) {
          const int level = rounded((widen(row[d]) - middle[d]) / divisor[d] + centre);
          to[d] = static_cast<uint8_t>(std::min(std::max(level, 0), limit));
        }
      }
      scales += head_dim;
      middles += head_dim;
    }
    out += pack(tile_levels, tile, width, out);
  }
  return 0;
}

template <class T>
int dequantise_channels(const bf16 *scales, const bf16 *middles, const uint8_t *in, int64_t count, int heads,
                        int head_dim, int group, float top, int width, int64_t head_stride, T *all) {
  const int64_t tile = count * head_dim;
  thread_local std::vector<uint8_t> room;
  thread_local std::vector<float> columns;
  uint8_t *__restrict__ tile_levels = grown(room, tile);
  float *__restrict__ step = grown(columns, 2 * head_dim);
  float *__restrict__ middle = step + head_dim;
  const float centre = top / 2;
  int wrong = 0;
  for (int h = 0; h < heads; ++h) {
    in += unpack(in, tile, width, tile_levels);
    const uint8_t *__restrict__ from = tile_levels;
    T *__restrict__ out = all + h * head_stride;
    for (int64_t first = 0; first < count; first += group) {
      int sure = 1;
      for (int d = 0; d < head_dim; ++d) {
        wrong |= (scales[d] >= 0x7f80) | ((middles[d] & 0x7f80) == 0x7f80);
        step[d] = widen(scales[d]);
        middle[d] = widen(middles[d]);
        sure &= real(bits(middle[d]) & 0x7fffffff) + 512.0f * step[d] < SURE;
      }
      scales += head_dim;
      middles += head_dim;
      const int64_t some = std::min<int64_t>(group, count - first);
      for (int64_t t = 0; t < some; ++t, from += head_dim, out += head_dim)
        for (int d = 0; d < head_dim; ++d)
          put(out + d, (static_cast<float>(from[d]) - centre) * step[d] + middle[d]);
      if (!sure) wrong |= any_infinite(out - some * head_dim, some * head_dim);
    }
  }
  return wrong;
}

// One step for all channels of a head and one middle per channel; levels leave channel by channel, [heads, head_dim,
// count]. ``resolution``: steps in the channels' typical half range, a geometric mean by the logarithm that the bits of
// a float are (linear between powers of two, so that plain torch gives the same).
constexpr int FURTHEST = 127;
constexpr int32_t OCTAVES = 20 << 23;  // a channel that is narrower than the widest by more counts as if by this
constexpr int STRIP = 64;              // tokens that are turned at once

template <class T>
int quantise_even(const T *x, int64_t count, int64_t row_stride, int heads, int head_dim, float resolution, bf16 *steps,
                  bf16 *middles, int8_t *out) {
  thread_local std::vector<float> columns;
  thread_local std::vector<int32_t> magnitudes;
  thread_local std::vector<int8_t> strip;
  float *__restrict__ low = grown(columns, 3 * head_dim);
  float *__restrict__ high = low + head_dim;
  float *__restrict__ middle = high + head_dim;
  int32_t *__restrict__ most = grown(magnitudes, head_dim);
  int8_t *__restrict__ turned = grown(strip, static_cast<int64_t>(STRIP) * head_dim);
  for (int h = 0; h < heads; ++h, out += head_dim * count) {
    const T *from = x + h * head_dim;
    if (ranges(from, count, row_stride, head_dim, low, high, most)) return 1;
    int32_t widest = 0;
    for (int d = 0; d < head_dim; ++d) {
      middle[d] = middle_of(low[d], high[d]);
      const float above = high[d] - middle[d], below = middle[d] - low[d];
      most[d] = bits(above > below ? above : below);
      widest = std::max(widest, most[d]);
      *middles++ = static_cast<bf16>(static_cast<uint32_t>(bits(middle[d])) >> 16);
    }
    int64_t sum = 0;
    for (int d = 0; d < head_dim; ++d) sum += std::max(most[d], widest - OCTAVES);
    const float typical = real(static_cast<int32_t>(std::max<int64_t>(sum / head_dim, 0)));
    const float wanted = up(typical / resolution), least = up(real(widest) / FURTHEST);
    const float step = wanted > least ? wanted : least, divisor = step > 0.0f ? step : 1.0f;
    *steps++ = static_cast<bf16>(bits(step) >> 16);
    for (int64_t first = 0; first < count; first += STRIP) {
      const int some = static_cast<int>(std::min<int64_t>(STRIP, count - first));
      for (int t = 0; t < some; ++t) {
        const T *__restrict__ row = from + (first + t) * row_stride;
        int8_t *__restrict__ to = turned + t * head_dim;
        for (int d = 0; d < head_dim; ++d) {
          const int level = rounded((widen(row[d]) - middle[d]) / divisor);
          to[d] = static_cast<int8_t>(std::min(std::max(level, -FURTHEST), FURTHEST));
        }
      }
      for (int d = 0; d < head_dim; ++d)
        for (int t = 0; t < some; ++t) out[d * count + first + t] = turned[t * head_dim + d];
    }
  }
  return 0;
}

template <class T>
int dequantise_even(const bf16 *steps, const bf16 *middles, const int8_t *in, int64_t count, int heads, int head_dim,
                    int64_t head_stride, T *all) {
  thread_local std::vector<float> columns;
  thread_local std::vector<int8_t> strip;
  float *__restrict__ middle = grown(columns, head_dim);
  int8_t *__restrict__ turned = grown(strip, static_cast<int64_t>(STRIP) * head_dim);
  int wrong = 0;
  for (int h = 0; h < heads; ++h, in += head_dim * count) {
    wrong |= *steps >= 0x7f80;
    const float step = widen(*steps++);
    float furthest = 0.0f;
    for (int d = 0; d < head_dim; ++d) {
      wrong |= (*middles & 0x7f80) == 0x7f80;
      middle[d] = widen(*middles++);
      furthest = std::max(furthest, real(bits(middle[d]) & 0x7fffffff));
    }
    T *__restrict__ out = all + h * head_stride;
    for (int64_t first = 0; first < count; first += STRIP) {
      const int some = static_cast<int>(std::min<int64_t>(STRIP, count - first));
      for (int d = 0; d < head_dim; ++d)
        for (int t = 0; t < some; ++t) turned[t * head_dim + d] = in[d * count + first + t];
      for (int t = 0; t < some; ++t, out += head_dim)
        for (int d = 0; d < head_dim; ++d) put(out + d, static_cast<float>(turned[t * head_dim + d]) * step + middle[d]);
    }
    if (!(furthest + 128.0f * step < SURE)) wrong |= any_infinite(all + h * head_stride, count * head_dim);
  }
  return wrong;
}

// One head of every token from ``from`` to ``to``; the compiler copies pieces of a known size with a few wide moves.
template <int64_t BYTES>
void copy_heads(const uint8_t *from, uint8_t *to, int heads, int64_t from_stride, int64_t to_stride, int64_t nbytes) {
  const int64_t size = BYTES ? BYTES : nbytes;
  for (int h = 0; h < heads; ++h) std::memcpy(to + h * to_stride, from + h * from_stride, size);
}

using Copy = void (*)(const uint8_t *, uint8_t *, int, int64_t, int64_t, int64_t);

Copy copy_for(int64_t nbytes) {
  switch (nbytes) {
    case 128: return copy_heads<128>;
    case 256: return copy_heads<256>;
    case 512: return copy_heads<512>;
    default: return copy_heads<0>;
  }
}

// Pages are written past the caches: nobody reads them before the request's next step, and a line that is written whole
// need not be read first. 44 MB to pages take 4.4 ms this way, and 7.5 through the caches (AMD Milan).
#ifdef __AVX2__
void stream_heads(const uint8_t *from, uint8_t *to, int heads, int64_t from_stride, int64_t nbytes) {
  for (int h = 0; h < heads; ++h)
    for (int64_t at = 0; at < nbytes; at += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i *>(to + h * nbytes + at),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + h * from_stride + at)));
}

bool streams(const uint8_t *pages, int64_t row_bytes, int64_t head_bytes) {
  return (reinterpret_cast<uintptr_t>(pages) | row_bytes | head_bytes) % 32 == 0;
}
#endif

int outside(const int64_t *slots, int64_t count, int64_t rows) {
  int wrong = 0;
  for (int64_t t = 0; t < count; ++t) wrong |= static_cast<uint64_t>(slots[t]) >= static_cast<uint64_t>(rows);
  return wrong;
}

}  // namespace

extern "C" {

// Heads of ``head_bytes`` between rows of pages, ``row_bytes`` apart, and a tensor of any token and head strides (in
// bytes). Nothing is copied where a slot is outside the ``rows``.
int baton_gather(const uint8_t *pages, int64_t rows, int64_t row_bytes, const int64_t *slots, int64_t count, int heads,
                 int64_t head_bytes, uint8_t *to, int64_t token_stride, int64_t head_stride) {
  if (outside(slots, count, rows)) return 1;
  const Copy copy = copy_for(head_bytes);
  for (int64_t t = 0; t < count; ++t)
    copy(pages + slots[t] * row_bytes, to + t * token_stride, heads, head_bytes, head_stride, head_bytes);
  return 0;
}

int baton_scatter(uint8_t *pages, int64_t rows, int64_t row_bytes, const int64_t *slots, int64_t count, int heads,
                  int64_t head_bytes, const uint8_t *from, int64_t token_stride, int64_t head_stride) {
  if (outside(slots, count, rows)) return 1;
#ifdef __AVX2__
  if (streams(pages, row_bytes, head_bytes)) {
    for (int64_t t = 0; t < count; ++t)
      stream_heads(from + t * token_stride, pages + slots[t] * row_bytes, heads, head_stride, head_bytes);
    _mm_sfence();
    return 0;
  }
#endif
  const Copy copy = copy_for(head_bytes);
  for (int64_t t = 0; t < count; ++t)
    copy(from + t * token_stride, pages + slots[t] * row_bytes, heads, head_stride, head_bytes, head_bytes);
  return 0;
}

int baton_quantise(const void *x, int brain, int channels, int64_t count, int64_t row_stride, int heads, int head_dim,
                   int group, float top, int width, int e4m3, bf16 *scales, bf16 *middles, uint8_t *out) {
  const auto *wide = static_cast<const float *>(x);
  const auto *narrow = static_cast<const bf16 *>(x);
  if (channels)
    return brain ? quantise_channels(narrow, count, row_stride, heads, head_dim, group, top, width, scales, middles, out)
                 : quantise_channels(wide, count, row_stride, heads, head_dim, group, top, width, scales, middles, out);
  return brain ? quantise_tokens(narrow, count, row_stride, heads, head_dim, group, top, width, e4m3, scales, out)
               : quantise_tokens(wide, count, row_stride, heads, head_dim, group, top, width, e4m3, scales, out);
}

int baton_dequantise(const bf16 *scales, const bf16 *middles, const uint8_t *in, int brain, int channels, int64_t count,
                     int heads, int head_dim, int group, float top, int width, int e4m3, int64_t head_stride,
                     void *out) {
  auto *wide = static_cast<float *>(out);
  auto *narrow = static_cast<bf16 *>(out);
  if (channels)
    return brain ? dequantise_channels(scales, middles, in, count, heads, head_dim, group, top, width, head_stride, narrow)
                 : dequantise_channels(scales, middles, in, count, heads, head_dim, group, top, width, head_stride, wide);
  return brain ? dequantise_tokens(scales, in, count, heads, head_dim, group, top, width, e4m3, head_stride, narrow)
               : dequantise_tokens(scales, in, count, heads, head_dim, group, top, width, e4m3, head_stride, wide);
}

int baton_quantise_even(const void *x, int brain, int64_t count, int64_t row_stride, int heads, int head_dim,
                        float resolution, bf16 *steps, bf16 *middles, int8_t *out) {
  return brain ? quantise_even(static_cast<const bf16 *>(x), count, row_stride, heads, head_dim, resolution, steps,
                               middles, out)
               : quantise_even(static_cast<const float *>(x), count, row_stride, heads, head_dim, resolution, steps,
                               middles, out);
}

int baton_dequantise_even(const bf16 *steps, const bf16 *middles, const int8_t *in, int brain, int64_t count, int heads,
                          int head_dim, int64_t head_stride, void *out) {
  auto *wide = static_cast<float *>(out);
  auto *narrow = static_cast<bf16 *>(out);
  return brain ? dequantise_even(steps, middles, in, count, heads, head_dim, head_stride, narrow)
               : dequantise_even(steps, middles, in, count, heads, head_dim, head_stride, wide);
}

void baton_pack(const uint8_t *levels, int64_t n, int width, uint8_t *out) { pack(levels, n, width, out); }

void baton_unpack(const uint8_t *in, int64_t n, int width, uint8_t *levels) { unpack(in, n, width, levels); }

// Rotates every word left by one bit (the sign goes below the mantissa) and deals its bytes out to planes, least
// significant first: [heads, count, head_dim] each.
void baton_split32(const uint32_t *__restrict__ x, int64_t count, int64_t row_stride, int heads, int head_dim,
                   uint16_t *__restrict__ low, uint8_t *__restrict__ middle, uint8_t *__restrict__ top) {
  for (int h = 0; h < heads; ++h)
    for (int64_t t = 0; t < count; ++t, low += head_dim, middle += head_dim, top += head_dim) {
      const uint32_t *row = x + t * row_stride + h * head_dim;
      for (int d = 0; d < head_dim; ++d) {
        const uint32_t word = row[d] << 1 | row[d] >> 31;
        low[d] = static_cast<uint16_t>(word);
        middle[d] = static_cast<uint8_t>(word >> 16);
        top[d] = static_cast<uint8_t>(word >> 24);
      }
    }
}

void baton_split16(const uint16_t *__restrict__ x, int64_t count, int64_t row_stride, int heads, int head_dim,
                   uint8_t *__restrict__ low, uint8_t *__restrict__ top) {
  for (int h = 0; h < heads; ++h)
    for (int64_t t = 0; t < count; ++t, low += head_dim, top += head_dim) {
      const uint16_t *row = x + t * row_stride + h * head_dim;
      for (int d = 0; d < head_dim; ++d) {
        const auto word = static_cast<uint16_t>(row[d] << 1 | row[d] >> 15);
        low[d] = static_cast<uint8_t>(word);
        top[d] = static_cast<uint8_t>(word >> 8);
      }
    }
}

void baton_join32(const uint16_t *low, const uint8_t *middle, const uint8_t *top, int64_t n, uint32_t *out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = static_cast<uint32_t>(top[i]) << 24 | static_cast<uint32_t>(middle[i]) << 16 | low[i];
    out[i] = word >> 1 | word << 31;
  }
}

void baton_join16(const uint8_t *low, const uint8_t *top, int64_t n, uint16_t *out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto word = static_cast<uint16_t>(top[i] << 8 | low[i]);
    out[i] = static_cast<uint16_t>(word >> 1 | word << 15);
  }
}

}  // extern "C"
