// Training's arithmetic for the processors of isa_generic.cpp.
#include "training.h"

#define MOSAIC_ISA generic
#include "simd.inl"
#include "small_product.inl"
#include "smoothing.inl"
#include "averaging.inl"
