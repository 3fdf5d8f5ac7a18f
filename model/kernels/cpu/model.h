// What a network looks like to the kernels: sizes, packed matrices, vectors. Plain data, no instruction-set code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mosaic {

// How numbers are stored in memory. The values are part of the C interface.
enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

constexpr int kLanes = 16;
constexpr int kMaxBlockSize = 256;  // pairs; a multiple of kLanes
constexpr int kMaxDim = 512;        // of a head
constexpr int kZero = 128;          // what stands for 0 among quantised operands, which are unsigned

// A weight matrix W [rows, depth], used as y = W x, packed so that the outputs computed together are read as one stream:
// [tile][width / strip][depth / group][strip][group], depth rounded up to the group that one instruction multiplies:
// 1 float32, 2 bfloat16, 4 int8. An int8 stands for itself times its output's scale.
struct Matrix {
  int32_t rows = 0;
  int32_t depth = 0;
  int32_t width = 64;  // outputs of a tile: 64, or 32 for matrices of fewer
  int32_t strip = 64;  // of these, as many as lie side by side: all, or kLanes
  Type type = kFloat32;
  void* packed = nullptr;
  const float* bias = nullptr;    // [rows] or null
  const float* scales = nullptr;  // int8: [rows], padded to whole tiles
  // int8: kZero times the sum of an output's weights over every `span` of the depth, [spans][rows], padded likewise.
  const int32_t* offsets = nullptr;
  int32_t span = 0;

  int32_t tiles() const { return (rows + width - 1) / width; }
  int32_t padded_rows() const { return tiles() * width; }
  int32_t group() const { return type == kInt8 ? 4 : type == kBFloat16 ? 2 : 1; }
  int32_t padded_depth() const { return (depth + group() - 1) / group() * group(); }
  int64_t tile_bytes() const { return int64_t{4} / group() * padded_depth() * width; }
};

struct Norm {
  const float* weight = nullptr;  // [n_embd]
  const float* bias = nullptr;    // [n_embd] or null
};

struct Layer {
  Norm contextual_norm, persistent_norm;
  // Key, value of the own pair, value of the pair before: `projection` yields [key | own] or [key | own | earlier].
  Matrix projection, contextual_output;
  Matrix persistent_key, persistent_output;
  Matrix* persistent_keys = nullptr;    // [pmem_count * n_head], each [pmem_size, head_dim]
  Matrix* persistent_values = nullptr;  // [pmem_count * n_head], each [head_dim, pmem_size]
  const float* decay = nullptr;             // [n_head] of the contextual keys
  const float* sharpness = nullptr;         // [n_head] factor of k . k_i
  const float* value_scale = nullptr;       // [n_head]
  const float* mix = nullptr;               // [n_head], or null where `projection` has the third part
  const float* persistent_decay = nullptr;  // [n_head]
  const float* persistent_sharpness = nullptr;
  const float* persistent_scale = nullptr;
  // The second version. Here `projection` yields [key | value] of the short-term and of the long-term memory,
  // `value_scale` and `mix` are [2 * n_head], and so are these, short-term heads first.
  const float* beta0 = nullptr;
  const float* beta1 = nullptr;
  const float* alpha = nullptr;
  const float* gates = nullptr;  // [4 * n_head, n_embd]: gate and decay of the one memory, then of the other
  Matrix persistent_gate_up, persistent_down;
};

// What the caller tells of a network when it makes one.
struct Sizes {
  int32_t version, n_layer, n_head, n_embd, head_dim, vocab_size, pmem_size, pmem_count;
  int32_t pre_norm, has_persistent;
  int32_t persistent_size, short_window, long_delay;  // of the second version
  float norm_eps, logit_scale;
  Type type;  // of the weights, and of the numbers that are multiplied with them where the processor can
};

struct Model : Sizes {
  explicit Model(const Sizes& sizes) : Sizes(sizes) {}

  int state_vectors() const { return version == 2 ? 5 : 3; }
  // Most numbers that a row has before and after a product.
  int64_t input_width() const { return version == 2 ? largest(2 * n_embd, persistent_size) : n_embd; }
  int64_t output_width() const {
    return version == 2 ? largest(4 * n_embd + 4 * n_head, 2 * persistent_size) : int64_t{3} * n_embd;
  }

  Layer* layers = nullptr;
  Norm norm;
  Matrix head;
  const void* embedding = nullptr;  // [vocab_size, n_embd] of `embedding_type`
  Type embedding_type = kFloat32;

 private:
  static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
};

// The memory cache: unit keys, dimension-major so that one load covers kLanes pairs, and unit values, pair-major.
struct Cache {
  void* keys;    // [n_layer, num_blocks, n_head, head_dim, block_size]
  void* values;  // [n_layer, num_blocks, n_head, block_size, head_dim]
  float* state;  // [n_layer, num_slots, 3 or 5, n_embd]
  int64_t num_blocks, num_slots;
  int32_t block_size;
  Type type;
};

// One call: which tokens of which sequences. Mirrors the Python MemoryBatch.
struct Step {
  int32_t num_sequences, num_tokens, max_blocks;
  const int64_t* token_ids;     // [num_tokens]
  const int64_t* slots;         // [num_sequences]
  const int64_t* block_tables;  // [num_sequences, max_blocks]
  const int64_t* short_tables;  // likewise, of the short-term memory; null in the first version
  const int32_t* num_computed;  // [num_sequences]
  const int32_t* num_new;       // [num_sequences]
  const int64_t* snapshots;     // [num_tokens] slots that keep the state after a token, -1 for none; null: none at all
  const int32_t* logit_rows;    // [num_logit_rows] tokens whose logits are wanted
  int32_t num_logit_rows;
  float* logits;  // [num_logit_rows, vocab_size]
};

}  // namespace mosaic
