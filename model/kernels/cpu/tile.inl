// Tiles of y = W x for weights of any type: which rows and columns go through the processor's registers together.

namespace mosaic {
namespace MOSAIC_ISA {

template <int M, int V, bool Adds>
MOSAIC_INLINE void put_whole(const f32x16 (&acc)[M][V], float* y, const Output& out) {
  const f32x16 scale = splat(out.scale);
  for (int m = 0; m < M; ++m, y += out.stride)
    for (int j = 0; j < V; ++j)
      store(y + j * kLanes, Adds ? acc[m][j] * scale + load(y + j * kLanes) : acc[m][j] * scale);
}

// Outputs of M rows from `row0` on, and V vectors from `column` of the tile on.
template <int M, int V>
static __attribute__((noinline)) void tile_part(const Window& w, int column, const Operand& x, int64_t row0,
                                                const Output& out, Ahead ahead) {
  f32x16 acc[M][V] = {};
  if (w.matrix.type == kInt8) multiply_bytes<M, V>(w, column, x, row0, ahead, acc);
  else multiply_floats<M, V>(w, column, x, row0, ahead, acc);
  const int first = w.tile * w.matrix.width + column;
  const int count = w.matrix.rows - first;
  float* y = out.data + row0 * out.stride + first;
  if (count >= V * kLanes && !w.matrix.bias) {
    if (out.adds) put_whole<M, V, true>(acc, y, out);
    else put_whole<M, V, false>(acc, y, out);
    return;
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < V && j * kLanes < count; ++j) {
      f32x16 v = acc[m][j] * out.scale;
      if (w.matrix.bias) v += load(w.matrix.bias + first + j * kLanes);
      put_lanes(y + m * out.stride + j * kLanes, v, count - j * kLanes, out.adds);
    }
  }
}

// Calls f with `count`, 1 to kRows, as a constant.
template <typename F>
MOSAIC_INLINE void with_rows(int64_t count, const F& f) {
  switch (count) {
    case 6: f(std::integral_constant<int, 6>()); break;
    case 5: f(std::integral_constant<int, 5>()); break;
    case 4: f(std::integral_constant<int, 4>()); break;
    case 3: f(std::integral_constant<int, 3>()); break;
    case 2: f(std::integral_constant<int, 2>()); break;
    default: f(std::integral_constant<int, 1>()); break;
  }
}

// Fetches `left` lines from `at` on, spread over what remains to be computed.
struct Fetching {
  const char* at;
  int64_t left, steps;

  Ahead share(int64_t now) {
    const int64_t lines = left > 0 ? (left + steps - 1) / steps : 0;
    const Ahead ahead = {at, (int)lines};
    at += 64 * lines * now;
    left -= lines * now;
    steps -= now;
    return ahead;
  }
};

// Rows [begin, end), at most V vectors at a time.
template <int V>
static void multiply_rows(const Window& w, const Operand& x, int64_t begin, int64_t end, const Output& out,
                          const char* next, int64_t bytes) {
  const int64_t groups = w.groups();
  const int64_t passes = (end - begin + kRows - 1) / kRows;
  const int64_t parts = (w.matrix.width + V * kLanes - 1) / (V * kLanes);
  Fetching fetching = {next, next ? bytes / 64 : 0, passes * groups * parts};
  for (int column = 0; column < w.matrix.width; column += V * kLanes) {
    int64_t row = begin;
    for (int64_t left = passes; left > 0; --left) {
      const int64_t some = (end - row + left - 1) / left;
      const Ahead ahead = fetching.share(groups);
      with_rows(some, [&](auto m) {
        if constexpr (V == 4) {
          if (w.matrix.width == 2 * kLanes) return tile_part<m, 2>(w, column, x, row, out, ahead);
        }
        tile_part<m, V>(w, column, x, row, out, ahead);
      });
      row += some;
    }
  }
}

// Rows [begin, end) of a part of a tile. While they are computed, `bytes` of weights from `next` on are fetched, a share
// with every pass.
static void multiply_tile(const Window& w, const Operand& x, int64_t begin, int64_t end, const Output& out,
                          const char* next = nullptr, int64_t bytes = 0) {
  const int vectors = columns(end - begin);
  if (vectors == 4) multiply_rows<4>(w, x, begin, end, out, next, bytes);
  else if (vectors == 2) multiply_rows<2>(w, x, begin, end, out, next, bytes);
  else multiply_rows<1>(w, x, begin, end, out, next, bytes);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
