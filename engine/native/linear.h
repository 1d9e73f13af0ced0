// Products with a packed weight matrix, and the register tile that attention multiplies with as well.
#pragma once

#include <algorithm>
#include <utility>

#include "vector.h"

namespace baton {

constexpr int PANEL = 2 * LANES;  // columns of one panel: outputs of a linear, keys or dimensions of attention

struct Pair {
  V low, high;
};

// One row of a panel. A bf16 panel keeps columns c and c + LANES in one word: a shift and a mask give both vectors.
inline Pair pair(const bf16 *row) {
  auto words = *reinterpret_cast<const Of<LANES>::WordsAnywhere *>(row);
  return {reinterpret_cast<V>(words << 16), reinterpret_cast<V>(words & 0xffff0000u)};
}

inline Pair pair(const float *row) { return {load<LANES>(row), load<LANES>(row + LANES)}; }

// y [ROWS, PANELS * PANEL] = x [ROWS, depth] times PANELS panels [depth, PANEL], ``panel_step`` apart, added to y's own
// values if ``add``. Each sum runs over the depth in order, one term after the other, whatever ROWS and PANELS are: a row
// comes out the same alone and among others. Few rows take several panels, lest each sum wait for the one before.
template <int ROWS, int PANELS, class W>
[[gnu::noinline]] void multiply(const float *x, int64_t x_stride, const W *panel, int64_t panel_stride,
                                int64_t panel_step, int64_t depth, float *y, int64_t y_stride, bool add) {
  V low[PANELS][ROWS] = {}, high[PANELS][ROWS] = {};
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const Pair w = pair(panel + p * panel_step + k * panel_stride);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const float factor = x[r * x_stride + k];
        low[p][r] += factor * w.low;
        high[p][r] += factor * w.high;
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      float *to = y + r * y_stride + p * PANEL;
      store<LANES>(to, add ? load<LANES>(to) + low[p][r] : low[p][r]);
      store<LANES>(to + LANES, add ? load<LANES>(to + LANES) + high[p][r] : high[p][r]);
    }
}

template <class W>
using Multiply = void (*)(const float *, int64_t, const W *, int64_t, int64_t, int64_t, float *, int64_t, bool);

template <class W, int... ROWS> inline Multiply<W> multiply_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr Multiply<W> of_height[] = {multiply<ROWS + 1, 1, W>...};
  return of_height[rows - 1];
}

// y [rows, PANEL] (+)= x [rows, depth] panel [depth, PANEL] for any rows, in tiles of about equal height.
template <class W>
inline void product(const float *x, int64_t x_stride, int64_t rows, const W *panel, int64_t panel_stride,
                    int64_t depth, float *y, int64_t y_stride, bool add) {
  int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t first = 0; first < rows; --tiles) {
    const int64_t height = (rows - first + tiles - 1) / tiles;
    const auto of_height = multiply_of<W>(height, std::make_integer_sequence<int, TILE_ROWS>());
    of_height(x + first * x_stride, x_stride, panel, panel_stride, 0, depth, y + first * y_stride, y_stride, add);
    first += height;
  }
}

inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// W [outputs, inputs] to panels [outputs / PANEL, inputs, PANEL], the last one filled up with zeros.
template <class W> void pack(const W *weight, W *panels, int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels_of(outputs); ++p) {
    W *panel = panels + p * inputs * PANEL;
    for (int c = 0; c < PANEL; ++c) {
      const int64_t output = p * PANEL + c;
      const int place = sizeof(W) == 2 ? 2 * (c % LANES) + c / LANES : c;
      for (int64_t k = 0; k < inputs; ++k)
        panel[k * PANEL + place] = output < outputs ? weight[output * inputs + k] : W();
    }
  }
}

// The last panel of a matrix whose outputs do not fill it: its product goes through a tile of its own.
template <class W>
void edge_product(const float *x, const W *panel, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                  int64_t columns) {
  alignas(64) float tile[TILE_ROWS * PANEL];
  for (int64_t first = 0; first < rows; first += TILE_ROWS) {
    const int64_t height = std::min<int64_t>(TILE_ROWS, rows - first);
    product(x + first * inputs, inputs, height, panel, PANEL, inputs, tile, PANEL, false);
    for (int64_t r = 0; r < height; ++r) std::memcpy(y + (first + r) * outputs, tile + r * PANEL, 4 * columns);
  }
}

constexpr int64_t FEW_ROWS = 3;  // more keep enough sums of one panel under way

// ``count`` whole panels side by side, for at most FEW_ROWS rows.
template <class W>
void few_rows(const float *x, const W *panels, float *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t count) {
  const auto wide = rows == 1 ? multiply<1, 4, W> : rows == 2 ? multiply<2, 2, W> : multiply<3, 2, W>;
  const int64_t step = rows == 1 ? 4 : 2, panel = inputs * PANEL;
  int64_t p = 0;
  for (; p + step <= count; p += step)
    wide(x, inputs, panels + p * panel, PANEL, panel, inputs, y + p * PANEL, outputs, false);
  for (; p < count; ++p) product(x, inputs, rows, panels + p * panel, PANEL, inputs, y + p * PANEL, outputs, false);
}

// One thread's panels [begin, end) of the product below, for rows that stay in the second-level cache.
template <class W>
void some_panels(const float *x, const W *panels, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                 int64_t begin, int64_t end) {
  const int64_t whole = std::max(begin, std::min(end, outputs / PANEL)), panel = inputs * PANEL;
  if (rows <= FEW_ROWS) {
    few_rows(x, panels + begin * panel, y + begin * PANEL, rows, inputs, outputs, whole - begin);
  } else {
    for (int64_t p = begin; p < whole; ++p)
      product(x, inputs, rows, panels + p * panel, PANEL, inputs, y + p * PANEL, outputs, false);
  }
  for (int64_t p = whole; p < end; ++p)
    edge_product(x, panels + p * panel, y + p * PANEL, rows, inputs, outputs, outputs - p * PANEL);
}

// y [rows, outputs] = x [rows, inputs] W^T + bias. Rows are blocked so that they stay in the second-level cache while
// every panel passes by; a panel stays in the first while every row of the block meets it.
template <class W>
void linear(const float *x, const W *panels, const float *bias, float *y, int64_t rows, int64_t inputs,
            int64_t outputs, int threads) {
  constexpr int64_t BLOCK_BYTES = 192 << 10;
  const int64_t fitting = std::max<int64_t>(BLOCK_BYTES / (4 * inputs) / TILE_ROWS, 1) * TILE_ROWS;
  const int64_t all = panels_of(outputs);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t begin = all * thread / threads, end = all * (thread + 1) / threads;
    for (int64_t first = 0, blocks = (rows + fitting - 1) / fitting; first < rows; --blocks) {
      const int64_t height = (rows - first + blocks - 1) / blocks;
      some_panels(x + first * inputs, panels, y + first * outputs, height, inputs, outputs, begin, end);
      first += height;
    }
    if (bias == nullptr) continue;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = begin * PANEL; c < std::min(end * PANEL, outputs); ++c) y[r * outputs + c] += bias[c];
  }
}

}  // namespace baton
