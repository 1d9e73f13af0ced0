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

template <int ROWS> struct Tile {
  V low[ROWS], high[ROWS];

  // Adds x [ROWS, depth] times panel [depth, PANEL].
  template <class W>
  [[gnu::always_inline]] void add(const float *x, int64_t x_stride, const W *panel, int64_t panel_stride,
                                  int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      const Pair w = pair(panel + k * panel_stride);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const float factor = x[r * x_stride + k];
        low[r] += factor * w.low;
        high[r] += factor * w.high;
      }
    }
  }
};

// y [ROWS, PANEL] = x [ROWS, depth] panel [depth, PANEL], added to y's own values if ``add``. Few rows would wait for
// the latency of each sum, so they keep several.
template <int ROWS, class W>
[[gnu::noinline]] void multiply(const float *x, int64_t x_stride, const W *panel, int64_t panel_stride, int64_t depth,
                                float *y, int64_t y_stride, bool add) {
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
  Tile<ROWS> tiles[CHAINS] = {};
  const int64_t whole = depth - depth % CHAINS;
  if constexpr (CHAINS == 1) {
    tiles[0].add(x, x_stride, panel, panel_stride, depth);
  } else {
    for (int64_t k = 0; k < whole; k += CHAINS)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c)
        tiles[c].add(x + k + c, x_stride, panel + (k + c) * panel_stride, panel_stride, 1);
    tiles[0].add(x + whole, x_stride, panel + whole * panel_stride, panel_stride, depth - whole);
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    V low = tiles[0].low[r], high = tiles[0].high[r];
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) {
      low += tiles[c].low[r];
      high += tiles[c].high[r];
    }
    float *to = y + r * y_stride;
    store<LANES>(to, add ? load<LANES>(to) + low : low);
    store<LANES>(to + LANES, add ? load<LANES>(to + LANES) + high : high);
  }
}

template <class W>
using Multiply = void (*)(const float *, int64_t, const W *, int64_t, int64_t, float *, int64_t, bool);

template <class W, int... ROWS> inline Multiply<W> multiply_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr Multiply<W> of_height[] = {multiply<ROWS + 1, W>...};
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
    of_height(x + first * x_stride, x_stride, panel, panel_stride, depth, y + first * y_stride, y_stride, add);
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

// y [rows, outputs] = x [rows, inputs] W^T + bias. Rows are blocked so that they stay in the second-level cache while
// every panel passes by; a panel stays in the first while every row of the block meets it.
template <class W>
void linear(const float *x, const W *panels, const float *bias, float *y, int64_t rows, int64_t inputs,
            int64_t outputs, int threads) {
  constexpr int64_t BLOCK_BYTES = 192 << 10;
  const int64_t fitting = std::max<int64_t>(BLOCK_BYTES / (4 * inputs) / TILE_ROWS, 1) * TILE_ROWS;
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0, blocks = (rows + fitting - 1) / fitting; first < rows; --blocks) {
    const int64_t height = (rows - first + blocks - 1) / blocks;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels_of(outputs); ++p) {
      const float *from = x + first * inputs;
      const W *panel = panels + p * inputs * PANEL;
      float *to = y + first * outputs + p * PANEL;
      const int64_t columns = std::min<int64_t>(PANEL, outputs - p * PANEL);
      if (columns == PANEL)
        product(from, inputs, height, panel, PANEL, inputs, to, outputs, false);
      else
        edge_product(from, panel, to, height, inputs, outputs, columns);
      if (bias == nullptr) continue;
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < columns; ++c) to[r * outputs + c] += bias[p * PANEL + c];
    }
    first += height;
  }
}

}  // namespace baton
