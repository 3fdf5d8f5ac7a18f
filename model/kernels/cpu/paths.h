// The same step, compiled for several instruction sets; api.cpp picks one when the library is loaded.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "model.h"
#include "scratch.h"
#include "threads.h"

namespace mosaic {

constexpr int kReadQueries = 32;    // queries, at most, that read a head of the contextual memory together
constexpr int kMaxHeads = 64;       // heads whose single queries read it together
constexpr int64_t kMaxLogits = 65536;  // of those queries in all
constexpr int64_t kReadChunk = 64;  // rows, at most, that read a head of the persistent memory together

// Pairs of the persistent memory whose softmax is taken together; quantised weights are relative to the largest of them.
constexpr int read_block(Type type) { return type == kInt8 ? 128 : 256; }

// What measures a path's bounds.
struct Probe {
  float (*read)(const char*, int64_t);
  void (*multiply)(const Matrix&, const Model&, const Rows&, int64_t, int, float*);
};

// Of the path of this name, or null.
const Probe* find_probe(const char* path);

using RunStep = void (*)(const Model&, const Cache&, const Step&, Scratch&, Team&);

namespace avx512bf16 {
void run_step(const Model&, const Cache&, const Step&, Scratch&, Team&);
float read_through(const char*, int64_t);
void multiply_often(const Matrix&, const Model&, const Rows&, int64_t, int, float*);
}
namespace avx2 {
void run_step(const Model&, const Cache&, const Step&, Scratch&, Team&);
float read_through(const char*, int64_t);
void multiply_often(const Matrix&, const Model&, const Rows&, int64_t, int, float*);
}
namespace generic {
void run_step(const Model&, const Cache&, const Step&, Scratch&, Team&);
float read_through(const char*, int64_t);
void multiply_often(const Matrix&, const Model&, const Rows&, int64_t, int, float*);
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 0x1f, fraction = h & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &small, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
  }
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// To nearest, ties to even. For the unit vectors of a cache: nothing here overflows.
static inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to
    float y;
    memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    memcpy(&bits, &y, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

}  // namespace mosaic
