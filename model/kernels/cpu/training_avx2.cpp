// Training's arithmetic for the processors of isa_avx2.cpp.
#include "training.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define MOSAIC_ISA avx2
#define MOSAIC_AVX2
#include "simd.inl"
#include "small_product.inl"
#include "smoothing.inl"
#include "averaging.inl"
#endif
