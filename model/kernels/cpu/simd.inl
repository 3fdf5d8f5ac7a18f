// Sixteen floats at a time, for whatever instruction set this is compiled for. No include guard: each isa_*.cpp has its
// own copy in a namespace of its own, so that no function compiled for a newer processor is ever linked into an older path.
#include "twice.inl"

namespace mosaic {
namespace MOSAIC_ISA {

#if defined(MOSAIC_AVX512)
constexpr int kRegister = 64;  // bytes
#elif defined(MOSAIC_AVX2)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// What one register holds.
typedef float Floats __attribute__((vector_size(kRegister)));
typedef int32_t Ints __attribute__((vector_size(kRegister)));
typedef uint32_t Words __attribute__((vector_size(kRegister)));

template <typename T>
struct Sixteen {
#if defined(MOSAIC_AVX512)
  using Type = T;
#elif defined(MOSAIC_AVX2)
  using Type = Twice<T>;
#else
  using Type = Twice<Twice<T>>;
#endif
};

using f32x16 = Sixteen<Floats>::Type;
using i32x16 = Sixteen<Ints>::Type;
using u32x16 = Sixteen<Words>::Type;
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// The same bits.
MOSAIC_INLINE f32x16 as_floats(u32x16 v) {
  return each([](Words w) { return (Floats)w; }, v);
}
MOSAIC_INLINE u32x16 as_words(f32x16 v) {
  return each([](Floats f) { return (Words)f; }, v);
}
MOSAIC_INLINE i32x16 as_ints(u32x16 v) {
  return each([](Words w) { return (Ints)w; }, v);
}

// The same numbers.
MOSAIC_INLINE f32x16 to_floats(i32x16 v) {
  return each([](Ints i) { return __builtin_convertvector(i, Floats); }, v);
}

template <typename T>
MOSAIC_INLINE T load_as_is(const void* p) {
  using Register = typename RegisterOf<T>::Type;
  return build<T>([p](int i) {
    Register v;
    __builtin_memcpy(&v, (const char*)p + 4 * i, sizeof v);
    return v;
  });
}

MOSAIC_INLINE f32x16 load(const float* p) { return load_as_is<f32x16>(p); }

MOSAIC_INLINE void store(float* p, f32x16 v) {
  spread(v, [p](Floats f, int i) { __builtin_memcpy(p + i, &f, sizeof f); });
}

MOSAIC_INLINE f32x16 splat(float x) {
  return build<f32x16>([x](int) { return x - Floats{}; });
}

MOSAIC_INLINE f32x16 load(const uint16_t* p, bool is_half) {
#if defined(MOSAIC_AVX512)
  u16x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  if (!is_half) return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
  return (f32x16)_mm512_cvtph_ps((__m256i)v);
#elif defined(MOSAIC_AVX2)
  return build<f32x16>([p, is_half](int i) {
    const __m128i v = _mm_loadu_si128((const __m128i*)(p + i));
    return is_half ? (Floats)_mm256_cvtph_ps(v) : (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
  });
#else
  float r[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t wide = (uint32_t)p[i] << 16;
    if (is_half) r[i] = half_to_float(p[i]);
    else __builtin_memcpy(r + i, &wide, sizeof wide);
  }
  return load(r);
#endif
}

// a * b + c with one rounding where the processor can; the same everywhere on one path.
MOSAIC_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(MOSAIC_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MOSAIC_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <typename T>
MOSAIC_INLINE Twice<T> fma(Twice<T> a, Twice<T> b, Twice<T> c) {
  const T low = fma(a.low, b.low, c.low), high = fma(a.high, b.high, c.high);
  return {low, high};
}

// a * b + sum where sums take most of the registers: each stays in its own. GCC else moves them about and spills some.
MOSAIC_INLINE Floats added(Floats sum, Floats a, Floats b) {
#if defined(MOSAIC_AVX2)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

template <typename T>
MOSAIC_INLINE Twice<T> added(Twice<T> sum, Twice<T> a, Twice<T> b) {
  const T low = added(sum.low, a.low, b.low), high = added(sum.high, a.high, b.high);
  return {low, high};
}

MOSAIC_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return each(
      [](Floats x, Floats y) {
#if defined(MOSAIC_AVX512)
        return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(MOSAIC_AVX2)
        return (Floats)_mm256_max_ps((__m256)x, (__m256)y);
#else
        return x > y ? x : y;
#endif
      },
      a, b);
}

// x where `a` is below the number, else y.
MOSAIC_INLINE f32x16 where_below(f32x16 a, float number, f32x16 x, f32x16 y) {
  const auto is_below = each([number](Floats f) { return (Words)(f < number); }, a);
  const u32x16 from_x = as_words(x) & is_below;
  const u32x16 from_y = each([](Words bits, Words hidden) { return bits & ~hidden; }, as_words(y), is_below);
  return as_floats(from_x + from_y);
}

// The lower or the upper half of a register.
template <int kFrom, typename V, int... I>
MOSAIC_INLINE auto part_of(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (kFrom + I)...);
}

// All lanes as one by f, always in the same order: halves, quarters, ...
template <typename F, typename T>
MOSAIC_INLINE float fold(const F& f, T v) {
  constexpr int half = sizeof(T) / 8;
  if constexpr (half == 1) {
    return f(v[0], v[1]);
  } else {
    const std::make_integer_sequence<int, half> lanes;
    return fold(f, f(part_of<0>(v, lanes), part_of<half>(v, lanes)));
  }
}

template <typename F, typename T>
MOSAIC_INLINE float fold(const F& f, Twice<T> v) {
  return fold(f, each(f, v.low, v.high));
}

MOSAIC_INLINE float sum(f32x16 v) {
  return fold([](auto a, auto b) { return a + b; }, v);
}

MOSAIC_INLINE float largest(f32x16 v) {
  return fold([](auto a, auto b) { return a > b ? a : b; }, v);
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
  p = fma(p, r * r, r + 1.0f);
  const f32x16 power = each([](Floats f) { return (Floats)((__builtin_convertvector(f, Ints) + 127) << 23); }, n);
  return where_below(x, -87.3f, f32x16{}, p * power);
#endif
}

// The same for results of which eight bits are kept: the relative error is below 4e-6, exp(0) still 1, and what is below
// exp(-87) is as good as 0.
MOSAIC_INLINE f32x16 rough_exp(f32x16 x) {
  const f32x16 y = max(x * 1.44269504f, splat(-126.0f)), magic = splat(12582912.0f);
  const f32x16 shifted = y + magic, r = y - (shifted - magic);
  f32x16 p = splat(9.58285e-3f);
  p = fma(p, r, splat(5.590643e-2f));
  p = fma(p, r, splat(2.4024099e-1f));
  p = fma(p, r, splat(6.9312419e-1f));
  p = fma(p, r, splat(1.0f));
  return as_floats(as_words(p) + (as_words(shifted) << 23));
}

MOSAIC_INLINE float first_of(f32x16 v) {
  float numbers[kLanes];
  store(numbers, v);
  return numbers[0];
}

MOSAIC_INLINE float exp_nonpositive(float x) { return first_of(exp_nonpositive(splat(x))); }

// The nearest integers, ties to even, of numbers between -2^22 and 2^22.
MOSAIC_INLINE i32x16 nearest(f32x16 v) {
#if defined(MOSAIC_AVX512)
  return (i32x16)_mm512_cvtps_epi32((__m512)v);
#elif defined(MOSAIC_AVX2)
  return each([](Floats f) { return (Ints)_mm256_cvtps_epi32((__m256)f); }, v);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  return each([magic](Floats f) { return (Ints)(f + magic) - (Ints)(magic - Floats{}); }, v);
#endif
}

// The lowest 16 bits of each.
MOSAIC_INLINE u16x16 lowest_halves(u32x16 v) {
#if defined(MOSAIC_AVX512)
  return (u16x16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(MOSAIC_AVX2)
  const u32x16 low = v & 0xffff;
  const __m256i packed = _mm256_packus_epi32((__m256i)low.low, (__m256i)low.high);
  return (u16x16)_mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
#else
  u16x16 r;
  spread(v, [&r](Words w, int i) {
    for (int k = 0; k < kRegister / 4; ++k) r[i + k] = (uint16_t)w[k];
  });
  return r;
#endif
}

// The lowest 8 bits of each.
MOSAIC_INLINE u8x16 lowest_bytes(i32x16 v) {
#if defined(MOSAIC_AVX512)
  return (u8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
  const u32x16 words = each([](Ints i) { return (Words)i; }, v);
  return __builtin_convertvector(lowest_halves(words & 0xff), u8x16);
#endif
}

// To bfloat16, to nearest, ties to even.
MOSAIC_INLINE u16x16 narrow(f32x16 v) {
#if defined(MOSAIC_BF16_PRODUCT)
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 bits = as_words(v);
  return lowest_halves((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// To float16, likewise.
MOSAIC_INLINE u16x16 narrow_half(f32x16 v) {
#if defined(MOSAIC_AVX512)
  return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MOSAIC_AVX2)
  const __m128i low = _mm256_cvtps_ph((__m256)v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i high = _mm256_cvtps_ph((__m256)v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (u16x16)_mm256_set_m128i(high, low);
#else
  float numbers[kLanes];
  store(numbers, v);
  u16x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = float_to_half(numbers[i]);
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
