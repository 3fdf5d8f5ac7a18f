// Sixteen floats at a time, for whatever instruction set this is compiled for. No include guard: each isa_*.cpp has its
// own copy in a namespace of its own, so that no function compiled for a newer processor is ever linked into an older path.

namespace mosaic {
namespace MOSAIC_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#define MOSAIC_INLINE static inline __attribute__((always_inline))

MOSAIC_INLINE f32x16 load(const float* p) {
  f32x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

MOSAIC_INLINE void store(float* p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

MOSAIC_INLINE f32x16 splat(float x) { return x - f32x16{}; }

MOSAIC_INLINE f32x16 load(const uint16_t* p, bool is_half) {
  u16x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  if (!is_half) return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
#if defined(MOSAIC_AVX512)
  return (f32x16)_mm512_cvtph_ps((__m256i)v);
#elif defined(MOSAIC_AVX2)
  union { struct { __m256 low, high; } half; f32x16 all; } r;
  const __m128i* q = (const __m128i*)p;
  r.half.low = _mm256_cvtph_ps(_mm_loadu_si128(q));
  r.half.high = _mm256_cvtph_ps(_mm_loadu_si128(q + 1));
  return r.all;
#else
  f32x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = half_to_float(p[i]);
  return r;
#endif
}

// a * b + c with one rounding where the processor can; the same everywhere on one path.
MOSAIC_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(MOSAIC_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MOSAIC_AVX2)
  union U { struct { __m256 low, high; } half; f32x16 all; };
  U x, y, z;
  x.all = a;
  y.all = b;
  z.all = c;
  z.half.low = _mm256_fmadd_ps(x.half.low, y.half.low, z.half.low);
  z.half.high = _mm256_fmadd_ps(x.half.high, y.half.high, z.half.high);
  return z.all;
#else
  return a * b + c;
#endif
}

MOSAIC_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(MOSAIC_AVX512)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Sums and maxima over lanes, always in the same order: halves, quarters, ...
MOSAIC_INLINE float sum(f32x16 v) {
  v += __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  v += __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3});
  v += __builtin_shuffle(v, i32x16{2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1});
  return v[0] + v[1];
}

MOSAIC_INLINE float largest(f32x16 v) {
  v = max(v, __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = max(v, __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3}));
  v = max(v, __builtin_shuffle(v, i32x16{2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1}));
  return v[0] > v[1] ? v[0] : v[1];
}

// exp(x) for x <= 0; exp(0) is exactly 1. The relative error is below 7e-7 down to x = -10 and below 4e-6 at -87, where
// the result no longer matters beside that 1.
MOSAIC_INLINE f32x16 exp_nonpositive(f32x16 x) {
#if defined(MOSAIC_AVX512)
  // 2^(n + r) with n the nearest integer: the processor rounds and scales by powers of two itself, down to 0.
  const __m512 y = (__m512)(max(x, splat(-1e4f)) * 1.44269504f);
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32x16 r = (f32x16)y - (f32x16)n;
  f32x16 p = splat(1.5403530e-4f);
  p = fma(p, r, splat(1.3333558e-3f));
  p = fma(p, r, splat(9.6181291e-3f));
  p = fma(p, r, splat(5.5504109e-2f));
  p = fma(p, r, splat(2.4022651e-1f));
  p = fma(p, r, splat(6.9314718e-1f));
  p = fma(p, r, splat(1.0f));
  return (f32x16)_mm512_scalef_ps((__m512)p, n);
#else
  const f32x16 clamped = max(x, splat(-87.3f));
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const f32x16 n = fma(clamped, splat(1.44269504f), magic) - magic;
  f32x16 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  const i32x16 exponent = (__builtin_convertvector(n, i32x16) + 127) << 23;
  const f32x16 y = p * (f32x16)exponent;
  return x < splat(-87.3f) ? f32x16{} : y;
#endif
}

// The same for results of which eight bits are kept: the relative error is below 4e-6, exp(0) still 1, and what is below
// exp(-87) is as good as 0.
MOSAIC_INLINE f32x16 rough_exp(f32x16 x) {
  const f32x16 y = max(x * splat(1.44269504f), splat(-126.0f)), magic = splat(12582912.0f);
  const f32x16 shifted = y + magic, r = y - (shifted - magic);
  f32x16 p = splat(9.58285e-3f);
  p = fma(p, r, splat(5.590643e-2f));
  p = fma(p, r, splat(2.4024099e-1f));
  p = fma(p, r, splat(6.9312419e-1f));
  p = fma(p, r, splat(1.0f));
  return (f32x16)((u32x16)p + ((u32x16)shifted << 23));
}

MOSAIC_INLINE float exp_nonpositive(float x) { return exp_nonpositive(splat(x))[0]; }

// The nearest integers, ties to even, of numbers between -2^22 and 2^22.
MOSAIC_INLINE i32x16 nearest(f32x16 v) {
#if defined(MOSAIC_AVX512)
  return (i32x16)_mm512_cvtps_epi32((__m512)v);
#else
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds
  return (i32x16)(v + magic) - (i32x16)magic;
#endif
}

// The lowest 8 bits of each.
MOSAIC_INLINE u8x16 lowest_bytes(i32x16 v) {
#if defined(MOSAIC_AVX512)
  return (u8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector((u32x16)v & 0xff, u8x16);
#endif
}

// To bfloat16, to nearest, ties to even.
MOSAIC_INLINE u16x16 narrow(f32x16 v) {
#if defined(MOSAIC_BF16_PRODUCT)
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 bits = (u32x16)v;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
#endif
}

// To float16, likewise.
MOSAIC_INLINE u16x16 narrow_half(f32x16 v) {
#if defined(MOSAIC_AVX512)
  return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MOSAIC_AVX2)
  union { f32x16 all; struct { __m256 low, high; } half; } x;
  union { struct { __m128i low, high; } half; u16x16 all; } r;
  x.all = v;
  r.half.low = _mm256_cvtps_ph(x.half.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  r.half.high = _mm256_cvtps_ph(x.half.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return r.all;
#else
  u16x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = float_to_half(v[i]);
  return r;
#endif
}

MOSAIC_INLINE uint16_t narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MOSAIC_INLINE float widen(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  __builtin_memcpy(&x, &wide, sizeof x);
  return x;
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
