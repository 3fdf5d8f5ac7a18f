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

#if defined(MOSAIC_BF16_PRODUCT)
constexpr bool kHasBf16Product = true;
#else
constexpr bool kHasBf16Product = false;
#endif

// Rows per pass, and with how many vectors of outputs: as many sums as the processor has registers for. Where that is one
// vector as a rule, weights lie in strips of one.
#if defined(MOSAIC_AVX512)
constexpr int kRows = 6;
constexpr bool kHasStrips = false;
constexpr int columns(int64_t) { return 4; }
#elif defined(MOSAIC_AVX2)
constexpr int kRows = 6;
constexpr bool kHasStrips = true;
constexpr int columns(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int kRows = 3;
constexpr bool kHasStrips = true;
constexpr int columns(int64_t rows) { return rows == 1 ? 2 : 1; }
#endif

// A part of a tile: depths [first, first + depth), where `first` begins a group (and, for int8, a span).
struct Window {
  const Matrix& matrix;
  int tile;
  int first, depth;

  int64_t groups() const { return (depth + matrix.group() - 1) / matrix.group(); }
  const char* packed() const {
    return (const char*)matrix.packed + tile * matrix.tile_bytes() + (int64_t)first * matrix.strip * 4 / matrix.group();
  }
};

MOSAIC_INLINE Window whole(const Matrix& m, int tile) { return {m, tile, 0, m.depth}; }

// The packed weights of some vectors of a tile's outputs: a group of a vector is 64 bytes, whatever its type.
struct Weights {
  const char* at;   // of the first vector and group
  int64_t step;     // bytes from group to group
  int64_t between;  // and from vector to vector

  Weights(const Window& w, int column) {
    const int64_t strip = int64_t{4} * w.matrix.padded_depth() / w.matrix.group();
    at = w.packed() + column * (kHasStrips ? strip : 4);
    step = kHasStrips ? 64 : w.matrix.width * 4;
    between = kHasStrips ? kLanes * strip : 64;
  }

  const char* vector(int j) const { return at + j * (kHasStrips ? between : 64); }
};

// Weights that will be needed soon, fetched while others are multiplied: `lines` cache lines with every group.
struct Ahead {
  const char* at = nullptr;
  int lines = 0;
};

// One row or two wait for the weights: fetching well ahead keeps more of them on the way.
template <int M, int V>
MOSAIC_INLINE void prefetch(const Weights& w, Ahead& ahead) {
  if (M <= 2)
    for (int j = 0; j < V; ++j) __builtin_prefetch(w.vector(j) + (kHasStrips ? 1024 : 4096));
  for (int i = 0; i < ahead.lines; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
}

// M rows of `a` times V vectors of outputs.
template <int M, int V>
MOSAIC_INLINE void multiply_f32(const float* a, int64_t stride, Weights w, int depth, Ahead ahead,
                                f32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; ++k, w.at += w.step) {
    prefetch<M, V>(w, ahead);
    f32x16 b[V];
    for (int j = 0; j < V; ++j) b[j] = load((const float*)w.vector(j));
    for (int m = 0; m < M; ++m) {
      const f32x16 x = splat(a[m * stride + k]);
      for (int j = 0; j < V; ++j) acc[m][j] = added(acc[m][j], x, b[j]);
    }
  }
}

// bfloat16 weights, operands rounded to bfloat16.
template <int M, int V>
MOSAIC_INLINE void multiply_bf16(const uint16_t* a, int64_t stride, Weights w, int depth, Ahead ahead,
                                 f32x16 (&acc)[M][V]) {
#if defined(MOSAIC_BF16_PRODUCT)
  for (int k = 0; k < depth; k += 2, w.at += w.step) {
    prefetch<M, V>(w, ahead);
    __m512bh b[V];
    for (int j = 0; j < V; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w.vector(j));
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + m * stride + k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < V; ++j) acc[m][j] = (f32x16)_mm512_dpbf16_ps((__m512)acc[m][j], x, b[j]);
    }
  }
#else
  (void)a, (void)stride, (void)w, (void)depth, (void)ahead, (void)acc;
#endif
}

// Two shifts instead of a mask, which would take a register from the sums.
MOSAIC_INLINE f32x16 without_low_halves(u32x16 v) {
  return each(
      [](Words w) {
        w >>= 16;
#if defined(MOSAIC_AVX2)
        asm("" : "+x"(w));
#endif
        return (Floats)(w << 16);
      },
      v);
}

// The same weights where there is no such instruction: widened, times float operands.
template <int M, int V>
MOSAIC_INLINE void multiply_widened(const float* a, int64_t stride, Weights w, int depth, Ahead ahead,
                                    f32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; k += 2, w.at += w.step) {
    prefetch<M, V>(w, ahead);
    // Each half of the weights is read when it is needed, not kept beside the sums: registers are few.
    f32x16 b[V];
    for (int j = 0; j < V; ++j) b[j] = as_floats(load_as_is<u32x16>(w.vector(j)) << 16);
    for (int m = 0; m < M; ++m) {
      const f32x16 x = splat(a[m * stride + k]);
      for (int j = 0; j < V; ++j) acc[m][j] = added(acc[m][j], x, b[j]);
    }
    if (k + 1 == depth) break;
    asm("" : "+r"(w.at));
    for (int j = 0; j < V; ++j) b[j] = without_low_halves(load_as_is<u32x16>(w.vector(j)));
    for (int m = 0; m < M; ++m) {
      const f32x16 x = splat(a[m * stride + k + 1]);
      for (int j = 0; j < V; ++j) acc[m][j] = added(acc[m][j], x, b[j]);
    }
  }
}

// Products of float or bfloat16 weights for M rows and the V vectors of outputs from `column` of the tile on.
template <int M, int V>
MOSAIC_INLINE void multiply_floats(const Window& w, int column, const Operand& x, int64_t row0, Ahead ahead,
                                   f32x16 (&acc)[M][V]) {
  const Weights weights(w, column);
  const float* wide = (const float*)x.data + row0 * x.stride;
  const uint16_t* narrow = (const uint16_t*)x.data + row0 * x.stride;
  if (w.matrix.type == kFloat32) multiply_f32<M, V>(wide, x.stride, weights, w.depth, ahead, acc);
  else if (kHasBf16Product) multiply_bf16<M, V>(narrow, x.stride, weights, w.depth, ahead, acc);
  else multiply_widened<M, V>(wide, x.stride, weights, w.depth, ahead, acc);
}

MOSAIC_INLINE void put_lanes(float* y, f32x16 v, int count, bool adds) {
  if (count >= kLanes) {
    if (adds) v += load(y);
    store(y, v);
  } else {
    float numbers[kLanes];
    store(numbers, v);
    for (int i = 0; i < count; ++i) y[i] = adds ? y[i] + numbers[i] : numbers[i];
  }
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
