// For any processor: plain C++ vectors of the compiler.
#include "paths.h"

#define MOSAIC_ISA generic
#include "simd.inl"
#include "product.inl"
#include "memory.inl"
#include "step.inl"
