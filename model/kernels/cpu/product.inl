// y = W x for packed W and a few or many rows x. Every output is summed over the depth from first to last, whatever the
// number of rows, so a row's result does not depend on its company.

namespace mosaic {
namespace MOSAIC_ISA {

// Left operands: rows of floats, or of bfloat16 where the processor multiplies those.
struct Operand {
  const void* data;
  int64_t stride;  // elements from row to row
};

#if defined(MOSAIC_BF16_PRODUCT)
constexpr bool kHasBf16Product = true;
#else
constexpr bool kHasBf16Product = false;
#endif

constexpr int kRows = 6;  // rows per pass: 24 accumulators, 4 weights, 1 operand of 32 registers

// One row or two wait for the weights: fetching well ahead keeps more of them on the way.
template <int M>
MOSAIC_INLINE void prefetch(const void* w, int bytes) {
  if (M <= 2)
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)w + 4096 + i);
}

// M rows of `a` times V vectors of outputs.
template <int M, int V>
MOSAIC_INLINE void multiply_f32(const float* a, int64_t stride, const float* w, int depth, f32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; ++k, w += V * kLanes) {
    prefetch<M>(w, V * 64);
    f32x16 b[V];
    for (int j = 0; j < V; ++j) b[j] = load(w + j * kLanes);
    for (int m = 0; m < M; ++m) {
      const f32x16 x = splat(a[m * stride + k]);
      for (int j = 0; j < V; ++j) acc[m][j] = fma(x, b[j], acc[m][j]);
    }
  }
}

// bfloat16 weights, operands rounded to bfloat16. `pairs` = depth / 2.
template <int M, int V>
MOSAIC_INLINE void multiply_bf16(const uint16_t* a, int64_t stride, const uint16_t* w, int pairs,
                                 f32x16 (&acc)[M][V]) {
#if defined(MOSAIC_BF16_PRODUCT)
  for (int k = 0; k < pairs; ++k, w += 2 * V * kLanes) {
    prefetch<M>(w, V * 64);
    __m512bh b[V];
    for (int j = 0; j < V; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 2 * kLanes);
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + m * stride + 2 * k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < V; ++j) acc[m][j] = (f32x16)_mm512_dpbf16_ps((__m512)acc[m][j], x, b[j]);
    }
  }
#else
  (void)a, (void)stride, (void)w, (void)pairs, (void)acc;
#endif
}

// The same weights where there is no such instruction: widened, times float operands.
template <int M, int V>
MOSAIC_INLINE void multiply_widened(const float* a, int64_t stride, const uint16_t* w, int depth,
                                    f32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; k += 2, w += 2 * V * kLanes) {
    prefetch<M>(w, V * 64);
    f32x16 even[V], odd[V];
    for (int j = 0; j < V; ++j) {
      u32x16 bits;
      __builtin_memcpy(&bits, w + j * 2 * kLanes, sizeof bits);
      even[j] = (f32x16)(bits << 16);
      odd[j] = (f32x16)(bits & 0xffff0000u);
    }
    const bool has_odd = k + 1 < depth;
    for (int m = 0; m < M; ++m) {
      const f32x16 x = splat(a[m * stride + k]);
      const f32x16 y = splat(has_odd ? a[m * stride + k + 1] : 0.0f);
      for (int j = 0; j < V; ++j) acc[m][j] = fma(y, odd[j], fma(x, even[j], acc[m][j]));
    }
  }
}

enum Store { kWrite, kAdd };

// Outputs [row0, row0 + M) of one tile.
template <int M, int V>
static __attribute__((noinline)) void tile_rows(const Matrix& w, int tile, const Operand& x, int64_t row0, float* out,
                                                int64_t out_stride, Store mode, float scale) {
  f32x16 acc[M][V] = {};
  const int64_t offset = row0 * x.stride;
  if (w.type == kFloat32) {
    const float* packed = (const float*)w.packed + (int64_t)tile * w.depth * w.width;
    multiply_f32<M, V>((const float*)x.data + offset, x.stride, packed, w.depth, acc);
  } else {
    const uint16_t* packed = (const uint16_t*)w.packed + (int64_t)tile * w.padded_depth() * w.width;
    if (kHasBf16Product) {
      multiply_bf16<M, V>((const uint16_t*)x.data + offset, x.stride, packed, w.padded_depth() / 2, acc);
    } else {
      multiply_widened<M, V>((const float*)x.data + offset, x.stride, packed, w.depth, acc);
    }
  }
  const int first = tile * w.width;
  const int count = w.rows - first < w.width ? w.rows - first : w.width;
  for (int m = 0; m < M; ++m) {
    float* y = out + (row0 + m) * out_stride + first;
    for (int j = 0; j < V && j * kLanes < count; ++j) {
      f32x16 v = acc[m][j] * scale;
      if (w.bias) v += load(w.bias + first + j * kLanes);
      if ((j + 1) * kLanes <= count) {
        if (mode == kAdd) v += load(y + j * kLanes);
        store(y + j * kLanes, v);
      } else {
        for (int i = 0; i < count - j * kLanes; ++i) y[j * kLanes + i] = mode == kAdd ? y[j * kLanes + i] + v[i] : v[i];
      }
    }
  }
}

template <int V>
static void multiply_rows(const Matrix& w, int tile, const Operand& x, int64_t begin, int64_t end, float* out,
                          int64_t out_stride, Store mode, float scale) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) tile_rows<kRows, V>(w, tile, x, row, out, out_stride, mode, scale);
  switch (end - row) {
    case 5: tile_rows<5, V>(w, tile, x, row, out, out_stride, mode, scale); break;
    case 4: tile_rows<4, V>(w, tile, x, row, out, out_stride, mode, scale); break;
    case 3: tile_rows<3, V>(w, tile, x, row, out, out_stride, mode, scale); break;
    case 2: tile_rows<2, V>(w, tile, x, row, out, out_stride, mode, scale); break;
    case 1: tile_rows<1, V>(w, tile, x, row, out, out_stride, mode, scale); break;
    default: break;
  }
}

// Rows [begin, end) of one tile.
static void multiply_tile(const Matrix& w, int tile, const Operand& x, int64_t begin, int64_t end, float* out,
                          int64_t out_stride, Store mode, float scale) {
  if (w.width == 64) multiply_rows<4>(w, tile, x, begin, end, out, out_stride, mode, scale);
  else multiply_rows<2>(w, tile, x, begin, end, out, out_stride, mode, scale);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
