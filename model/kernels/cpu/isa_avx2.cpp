// For x86-64 processors with AVX2, FMA and F16C (2013 and later).
#include "paths.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define MOSAIC_ISA avx2
#define MOSAIC_AVX2
#include "simd.inl"
#include "product.inl"
#include "bytes.inl"
#include "tile.inl"
#include "memory.inl"
#include "queries.inl"
#include "heads.inl"
#include "operand.inl"
#include "persistent.inl"
#include "step.inl"
#include "step_v2.inl"
#include "probe.inl"
#endif
