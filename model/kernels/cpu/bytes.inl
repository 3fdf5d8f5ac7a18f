// Products of int8 weights with rows quantised to bytes, and how a row is quantised. Their sums are sums of integers and
// exact: every path gives the same ones.

namespace mosaic {
namespace MOSAIC_ISA {

// sum_bytes: M rows of bytes `a` times V vectors of outputs, added to `acc`: x w where kSumsUnsigned, else (x - kZero) w.
// The last group of the depth may be partly padding: weights of 0, whatever bytes stand beside them.
#if defined(MOSAIC_AVX512)
constexpr bool kSumsUnsigned = true;

template <int M, int V>
MOSAIC_INLINE void sum_bytes(const uint8_t* a, int64_t stride, Weights w, int depth, Ahead ahead,
                             i32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; k += 4, w.at += w.step) {
    prefetch<M, V>(w, ahead);
    __m512i b[V];
    for (int j = 0; j < V; ++j) b[j] = _mm512_loadu_si512(w.vector(j));
    for (int m = 0; m < M; ++m) {
      int32_t four;
      __builtin_memcpy(&four, a + m * stride + k, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      for (int j = 0; j < V; ++j) acc[m][j] = (i32x16)_mm512_dpbusd_epi32((__m512i)acc[m][j], x, b[j]);
    }
  }
}
#elif defined(MOSAIC_AVX2)
constexpr bool kSumsUnsigned = false;

MOSAIC_INLINE __m256i products(__m256i x, __m256i size, __m256i w) {
  // |x| is up to 128: two products with weights up to 127 fit into 16 bits.
  return _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(w, x)), _mm256_set1_epi16(1));
}

template <int M, int V>
MOSAIC_INLINE void sum_bytes(const uint8_t* a, int64_t stride, Weights w, int depth, Ahead ahead,
                             i32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; k += 4, w.at += w.step) {
    prefetch<M, V>(w, ahead);
    for (int j = 0; j < V; ++j) {
      const i32x16 b = load_as_is<i32x16>(w.vector(j));
      for (int m = 0; m < M; ++m) {
        uint32_t four;
        __builtin_memcpy(&four, a + m * stride + k, sizeof four);
        const __m256i x = _mm256_set1_epi32((int)(four ^ 0x80808080u)), size = _mm256_abs_epi8(x);
        acc[m][j] += each([x, size](Ints bytes) { return (Ints)products(x, size, (__m256i)bytes); }, b);
      }
    }
  }
}
#else
constexpr bool kSumsUnsigned = false;

template <int M, int V>
MOSAIC_INLINE void sum_bytes(const uint8_t* a, int64_t stride, Weights w, int depth, Ahead ahead,
                             i32x16 (&acc)[M][V]) {
  for (int k = 0; k < depth; k += 4, w.at += w.step) {
    prefetch<M, V>(w, ahead);
    for (int j = 0; j < V; ++j) {
      const u32x16 fours = load_as_is<u32x16>(w.vector(j));
      for (int i = 0; i < 4; ++i) {
        const i32x16 b = as_ints(fours << (24 - 8 * i)) >> 24;
        for (int m = 0; m < M; ++m) acc[m][j] += b * ((int32_t)a[m * stride + k + i] - kZero);
      }
    }
  }
}
#endif

// Products for M rows and the V vectors of outputs from `column` of the tile on, as floats. The window is one span.
template <int M, int V>
MOSAIC_INLINE void multiply_bytes(const Window& w, int column, const Operand& x, int64_t row0, Ahead ahead,
                                  f32x16 (&acc)[M][V]) {
  const Matrix& matrix = w.matrix;
  const int64_t first = (int64_t)w.tile * matrix.width + column;
  const int32_t* offsets = matrix.offsets + (int64_t)(w.first / matrix.span) * matrix.padded_rows() + first;
  i32x16 sums[M][V] = {};
  if (x.is_signed == kSumsUnsigned) {
    for (int j = 0; j < V; ++j) {
      const i32x16 offset = load_as_is<i32x16>(offsets + j * kLanes);
      for (int m = 0; m < M; ++m) sums[m][j] = x.is_signed ? -offset : offset;
    }
  }
  sum_bytes<M, V>((const uint8_t*)x.data + row0 * x.stride, x.stride, Weights(w, column), w.depth, ahead, sums);
  for (int m = 0; m < M; ++m) {
    const float step = x.scales[(row0 + m) * x.scale_stride];
    for (int j = 0; j < V; ++j)
      acc[m][j] = to_floats(sums[m][j]) * (load(matrix.scales + first + j * kLanes) * step);
  }
}

MOSAIC_INLINE f32x16 load_some(const float* x, int count) {
  if (count >= kLanes) return load(x);
  float numbers[kLanes] = {};
  for (int i = 0; i < count; ++i) numbers[i] = x[i];
  return load(numbers);
}

// Writes a row as bytes, kZero standing for 0, padded to whole groups. Returns what one step is worth.
static float quantise(const float* x, int n, uint8_t* out) {
  f32x16 most = {};
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 v = load_some(x + i, n - i);
    most = max(most, max(v, -v));
  }
  const float top = largest(most);
  const bool is_zero = !(top > 1e-30f);  // nor so small that dividing by it overflows
  const float inverse = is_zero ? 0.0f : 127.0f / top;
  for (int i = 0; i < n; i += kLanes) {
    const u8x16 bytes = lowest_bytes(nearest(load_some(x + i, n - i) * inverse) + kZero);
    __builtin_memcpy(out + i, &bytes, n - i < kLanes ? (n - i + 3) / 4 * 4 : kLanes);
  }
  return is_zero ? 0.0f : top / 127.0f;
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
