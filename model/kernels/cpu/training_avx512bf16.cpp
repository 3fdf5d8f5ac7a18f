// Training's arithmetic for the processors of isa_avx512bf16.cpp.
#include "training.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define MOSAIC_ISA avx512bf16
#define MOSAIC_AVX512
#define MOSAIC_BF16_PRODUCT
#include "simd.inl"
#include "small_product.inl"
#include "smoothing.inl"
#include "averaging.inl"
#endif
