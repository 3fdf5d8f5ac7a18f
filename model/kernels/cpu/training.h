// What the training kernels are given: views of float32 tensors, and what computes on them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "model.h"
#include "paths.h"
#include "threads.h"

namespace mosaic {

// [batch, rows, heads, dim] in any order of the first three; `dim` is contiguous. Mirrored by kernels/training.py.
struct View {
  float* data;
  int64_t batch_stride, row_stride, head_stride;

  float* row(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// y_q = sum_i softmax_i(query_q . key_i) value_i over pairs 0 .. pairs - 1, or 0 .. q if causal.
struct Smoothing {
  int64_t batches, heads, queries, pairs, dim, causal;
  int64_t narrow;  // all products but the logits' may round their factors to bfloat16, where the processor multiplies those
  View query, key, value, output;
  float* log_sum;  // [batch, head, query]: logarithm of the sum of exponentials
  View output_gradient, query_gradient, key_gradient, value_gradient;
};

// y_t = x_t + decay * y_{t-1} per head; backwards the same from the end, and the gradient of the decay.
struct Averaging {
  int64_t batches, heads, time, dim;
  const float* decay;  // [heads]
  View input, output;
  View output_gradient, input_gradient;
  float* decay_gradient;  // [batch, heads]
};

// y = x / (|x| + eps) for rows of `dim` numbers.
struct Normalising {
  int64_t rows, dim;
  float eps;
  const float* input;
  float *output, *scale;  // scale: [rows], 1 / (|x| + eps)
  const float* output_gradient;
  float* input_gradient;
};

enum Purpose {
  kQueries, kOutputs, kUpstream, kLogits, kSlopes,
  kKeys, kKeysAcross, kValues, kValuesAcross, kKeySums, kValueSums,
  kQueryPairs, kUpstreamPairs, kUpstreamRows, kSlopeRows, kKeyPairs, kValuePairs,
  kPurposes
};

// Memory of this thread for one purpose, aligned for vectors; it holds what it held before. Compiled
// for any processor, since the standard library's functions are shared with code that runs on one.
float* training_scratch(Purpose purpose, int64_t size);
inline uint32_t* training_words(Purpose purpose, int64_t size) {
  return reinterpret_cast<uint32_t*>(training_scratch(purpose, size));
}

// What one instruction set computes; forwards, then backwards.
struct TrainingKernels {
  const char* name;
  void (*smooth[2])(const Smoothing&, Team&);
  void (*average[2])(const Averaging&, Team&);
  void (*normalise[2])(const Normalising&, Team&);
};

#define MOSAIC_TRAINING_KERNELS(isa)                                                                        \
  namespace isa {                                                                                           \
  void smooth_forward(const Smoothing&, Team&);                                                             \
  void smooth_backward(const Smoothing&, Team&);                                                            \
  void average_forward(const Averaging&, Team&);                                                            \
  void average_backward(const Averaging&, Team&);                                                           \
  void normalise_forward(const Normalising&, Team&);                                                        \
  void normalise_backward(const Normalising&, Team&);                                                       \
  constexpr TrainingKernels kTrainingKernels = {#isa,                                                       \
                                                {smooth_forward, smooth_backward},                          \
                                                {average_forward, average_backward},                        \
                                                {normalise_forward, normalise_backward}};                   \
  }
MOSAIC_TRAINING_KERNELS(avx512bf16)
MOSAIC_TRAINING_KERNELS(avx2)
#undef MOSAIC_TRAINING_KERNELS

}  // namespace mosaic
