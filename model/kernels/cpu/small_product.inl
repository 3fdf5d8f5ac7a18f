// Products of small matrices in the cache, of float32 or, where the processor multiplies those, of pairs of bfloat16.

namespace mosaic {
namespace MOSAIC_ISA {

// What a product is made of: float32 numbers, or neighbours along its depth as pairs of bfloat16 in one word.
MOSAIC_INLINE f32x16 load_row(const float* p) { return load(p); }

MOSAIC_INLINE f32x16 add_product(float factor, f32x16 row, f32x16 sum) { return added(sum, splat(factor), row); }

#if defined(MOSAIC_BF16_PRODUCT)
constexpr bool kHasNarrowProducts = true;

MOSAIC_INLINE u32x16 load_row(const uint32_t* p) { return load_as_is<u32x16>(p); }

MOSAIC_INLINE f32x16 add_product(uint32_t factor, u32x16 row, f32x16 sum) {
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(factor), (__m512bh)row);
}
#else
constexpr bool kHasNarrowProducts = false;
#endif

// As many sums as there are registers for beside what they are made of, and over how many vectors of columns a tile has
// them where `left` of these are to come.
#if defined(MOSAIC_AVX512)
constexpr int kSums = 24;
constexpr int vectors_of(int64_t left) { return left == 4 || left == 8 ? 4 : left >= 3 ? 3 : static_cast<int>(left); }
#else
constexpr int kSums = 6;
constexpr int vectors_of(int64_t) { return 1; }
#endif

// c[M, 16 N] (+)= a[M, depth] b[depth, 16 N]; a is read at any strides, b and c in rows. T is float, or a word of two
// numbers, whose depth counts words.
template <int M, int N, bool kAdds, typename T>
static inline void tile(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_row, float* c, int64_t c_row,
                        int64_t depth) {
  f32x16 sums[M][N];
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = kAdds ? load(c + m * c_row + n * kLanes) : f32x16{};
  for (int64_t p = 0; p < depth; ++p) {
    decltype(load_row(b)) row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load_row(b + p * b_row + n * kLanes);
#pragma GCC unroll 24
    for (int m = 0; m < M; ++m) {
      const T factor = a[m * a_row + p * a_depth];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = add_product(factor, row[n], sums[m][n]);
    }
  }
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * kLanes, sums[m][n]);
}

// The same for `rows` a multiple of 24 and `columns` of 16.
template <bool kAdds, typename T>
static void product(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_row, float* c, int64_t c_row,
                    int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t n = 0; n < columns;) {
    const int64_t left = (columns - n) / kLanes;
    const int vectors = vectors_of(left), step = kSums / vectors;
    for (int64_t m = 0; m < rows; m += step) {
      const T* const am = a + m * a_row;
      float* const cm = c + m * c_row + n;
#if defined(MOSAIC_AVX512)
      switch (vectors) {
        case 4: tile<6, 4, kAdds>(am, a_row, a_depth, b + n, b_row, cm, c_row, depth); break;
        case 3: tile<8, 3, kAdds>(am, a_row, a_depth, b + n, b_row, cm, c_row, depth); break;
        case 2: tile<12, 2, kAdds>(am, a_row, a_depth, b + n, b_row, cm, c_row, depth); break;
        default: tile<24, 1, kAdds>(am, a_row, a_depth, b + n, b_row, cm, c_row, depth);
      }
#else
      tile<6, 1, kAdds>(am, a_row, a_depth, b + n, b_row, cm, c_row, depth);
#endif
    }
    n += vectors * kLanes;
  }
}

// [rows, width] -> [rows / 2, width] pairs of neighbouring rows.
static void pair_rows(const float* from, int64_t width, int64_t rows, uint32_t* to);

// `count` numbers as bfloat16; may write over what it reads.
static void narrow_all(const float* from, int64_t count, uint16_t* to);

static void round_all(float* numbers, int64_t count);

#if defined(MOSAIC_BF16_PRODUCT)
// Two vectors as one of pairs: `low` along the depth before `high`.
MOSAIC_INLINE u32x16 pair(f32x16 low, f32x16 high) {
  return __builtin_convertvector(narrow(low), u32x16) | __builtin_convertvector(narrow(high), u32x16) << 16;
}

MOSAIC_INLINE void store(uint32_t* p, u32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

MOSAIC_INLINE void store(uint16_t* p, u16x16 v) { __builtin_memcpy(p, &v, sizeof v); }

static void pair_rows(const float* from, int64_t width, int64_t rows, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t d = 0; d < width; d += kLanes, to += kLanes)
      store(to, pair(load(from + r * width + d), load(from + (r + 1) * width + d)));
}

static void narrow_all(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, narrow(load(from + i)));
}

static void round_all(float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(numbers + i, (f32x16)(__builtin_convertvector(narrow(load(numbers + i)), u32x16) << 16));
}
#endif

}  // namespace MOSAIC_ISA
}  // namespace mosaic
