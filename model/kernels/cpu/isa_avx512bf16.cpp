// For x86-64 processors that multiply bfloat16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include "paths.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define MOSAIC_ISA avx512bf16
#define MOSAIC_AVX512
#define MOSAIC_BF16_PRODUCT
#include "simd.inl"
#include "product.inl"
#include "bytes.inl"
#include "tile.inl"
#include "memory.inl"
#include "queries.inl"
#include "heads.inl"
#include "operand.inl"
#include "persistent_rounded.inl"
#include "persistent.inl"
#include "step.inl"
#include "step_v2.inl"
#include "probe.inl"
#endif
