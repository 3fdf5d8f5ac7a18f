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

// Rows [begin, end), V vectors from `column` of the tile on. While they are computed, `bytes` of weights from `next` on
// are fetched, a share with every pass.
template <int V>
static void multiply_rows(const Window& w, int column, const Operand& x, int64_t begin, int64_t end, const Output& out,
                          const char* next, int64_t bytes) {
  const int64_t groups = (w.depth + w.matrix.group() - 1) / w.matrix.group();
  int64_t passes = (end - begin + kRows - 1) / kRows, left = next ? bytes / 64 : 0;
  Ahead ahead = {next, 0};
  const auto share = [&] {
    ahead.lines = left > 0 ? (int)((left + std::max<int64_t>(passes, 1) * groups - 1) / (std::max<int64_t>(passes, 1) * groups)) : 0;
    left -= ahead.lines * groups;
    --passes;
  };
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    share();
    tile_part<kRows, V>(w, column, x, row, out, ahead);
    ahead.at += 64 * ahead.lines * groups;
  }
  share();
  switch (end - row) {
    case 5: tile_part<5, V>(w, column, x, row, out, ahead); break;
    case 4: tile_part<4, V>(w, column, x, row, out, ahead); break;
    case 3: tile_part<3, V>(w, column, x, row, out, ahead); break;
    case 2: tile_part<2, V>(w, column, x, row, out, ahead); break;
    case 1: tile_part<1, V>(w, column, x, row, out, ahead); break;
    default: break;
  }
}

// Rows [begin, end) of a part of a tile.
static void multiply_tile(const Window& w, const Operand& x, int64_t begin, int64_t end, const Output& out,
                          const char* next = nullptr, int64_t bytes = 0) {
  constexpr int wide = kColumns * kLanes;
  int column = 0;
  for (; column + wide <= w.matrix.width; column += wide, next = nullptr)
    multiply_rows<kColumns>(w, column, x, begin, end, out, next, bytes);
  if (column < w.matrix.width) multiply_rows<2>(w, column, x, begin, end, out, nullptr, 0);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
