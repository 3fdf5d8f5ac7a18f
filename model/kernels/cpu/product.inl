// y = W x for packed W and a few or many rows x. Every output is summed over the depth from first to last, whatever the
// number of rows, so a row's result does not depend on its company.

namespace mosaic {
namespace MOSAIC_ISA {

// Left operands: rows of floats, of bfloat16 where the processor multiplies those, or of bytes beside int8 weights.
struct Operand {
  const void* data;
  int64_t stride;                  // elements from row to row
  const float* scales = nullptr;   // bytes: what one step of each row is worth
  int64_t scale_stride = 0;
  bool is_signed = true;           // bytes: whether kZero stands for 0
};

struct Output {
  float* data;
  int64_t stride;
  bool adds = false;   // to what is there
  float scale = 1.0f;  // of the product
};

// A part of a tile: depths [first, first + depth), where `first` begins a group (and, for int8, a span).
struct Window {
  const Matrix& matrix;
  int tile;
  int first, depth;

  const char* packed() const {
    return (const char*)matrix.packed + tile * matrix.tile_bytes() + (int64_t)first * matrix.width * 4 / matrix.group();
  }
};

MOSAIC_INLINE Window whole(const Matrix& m, int tile) { return {m, tile, 0, m.depth}; }

// Weights that will be needed soon, fetched while others are multiplied: `lines` cache lines with every 64 bytes times V.
struct Ahead {
  const char* at = nullptr;
  int lines = 0;
};

#if defined(MOSAIC_BF16_PRODUCT)
constexpr bool kHasBf16Product = true;
#else
constexpr bool kHasBf16Product = false;
#endif

// Rows per pass and vectors of outputs: as many sums as the processor has registers for.
#if defined(MOSAIC_AVX512)
constexpr int kRows = 6, kColumns = 4;
#elif defined(MOSAIC_AVX2)
constexpr int kRows = 6, kColumns = 1;
#else
constexpr int kRows = 3, kColumns = 1;
#endif

// One row or two wait for the weights: fetching well ahead keeps more of them on the way.
template <int M, int V>
MOSAIC_INLINE void prefetch(const void* w, Ahead& ahead) {
  if (M <= 2)
    for (int i = 0; i < V * 64; i += 64) __builtin_prefetch((const char*)w + 4096 + i);
  for (int i = 0; i < ahead.lines; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
}

// M rows of `a` times V vectors of outputs. `w` moves on by `width` outputs a group.
template <int M, int V>
MOSAIC_INLINE void multiply_f32(const float* a, int64_t stride, const float* w, int width, int depth, Ahead ahead,
                                f32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; ++k, w += width) {
    prefetch<M, V>(w, ahead);
    f32x16 b[V];
    for (int j = 0; j < V; ++j) b[j] = load(w + j * kLanes);
    for (int m = 0; m < M; ++m) {
      const f32x16 x = splat(a[m * stride + k]);
      for (int j = 0; j < V; ++j) acc[m][j] = fma(x, b[j], acc[m][j]);
    }
  }
}

// bfloat16 weights, operands rounded to bfloat16.
template <int M, int V>
MOSAIC_INLINE void multiply_bf16(const uint16_t* a, int64_t stride, const uint16_t* w, int width, int depth,
                                 Ahead ahead, f32x16 (&acc)[M][V]) {
#if defined(MOSAIC_BF16_PRODUCT)
  for (int k = 0; k < depth; k += 2, w += 2 * width) {
    prefetch<M, V>(w, ahead);
    __m512bh b[V];
    for (int j = 0; j < V; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 2 * kLanes);
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + m * stride + k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < V; ++j) acc[m][j] = (f32x16)_mm512_dpbf16_ps((__m512)acc[m][j], x, b[j]);
    }
  }
#else
  (void)a, (void)stride, (void)w, (void)width, (void)depth, (void)ahead, (void)acc;
#endif
}

// The same weights where there is no such instruction: widened, times float operands.
template <int M, int V>
MOSAIC_INLINE void multiply_widened(const float* a, int64_t stride, const uint16_t* w, int width, int depth,
                                    Ahead ahead, f32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; k += 2, w += 2 * width) {
    prefetch<M, V>(w, ahead);
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

// Products of float or bfloat16 weights for M rows and the V vectors of outputs from `column` of the tile on.
template <int M, int V>
MOSAIC_INLINE void multiply_floats(const Window& w, int column, const Operand& x, int64_t row0, Ahead ahead,
                                   f32x16 (&acc)[M][V]) {
  const int width = w.matrix.width;
  const int64_t offset = row0 * x.stride;
  if (w.matrix.type == kFloat32) {
    multiply_f32<M, V>((const float*)x.data + offset, x.stride, (const float*)w.packed() + column, width, w.depth,
                       ahead, acc);
    return;
  }
  const uint16_t* packed = (const uint16_t*)w.packed() + 2 * column;
  if (kHasBf16Product)
    multiply_bf16<M, V>((const uint16_t*)x.data + offset, x.stride, packed, width, w.depth, ahead, acc);
  else
    multiply_widened<M, V>((const float*)x.data + offset, x.stride, packed, width, w.depth, ahead, acc);
}

MOSAIC_INLINE void put_lanes(float* y, f32x16 v, int count, bool adds) {
  if (count >= kLanes) {
    if (adds) v += load(y);
    store(y, v);
  } else {
    for (int i = 0; i < count; ++i) y[i] = adds ? y[i] + v[i] : v[i];
  }
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
