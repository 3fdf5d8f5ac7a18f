// Training's arithmetic for the processors of isa_generic.cpp.
#include "training.h"

#define MOSAIC_ISA generic
#include "simd.inl"
#include "training.inl"
