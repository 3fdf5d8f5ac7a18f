// For any processor: plain C++ vectors of the compiler.
#include "paths.h"

#define MOSAIC_ISA generic
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
