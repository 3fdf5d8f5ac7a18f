// The C interface that Python loads. Every function answers 0 or a pointer; an error leaves a text for mosaic_error().
#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "paths.h"

namespace mosaic {
namespace {

thread_local std::string last_error;

struct Path {
  const char* name;
  RunStep run;
  bool has_strips;  // whether matrices are packed in strips of one vector
  Probe probe;
};

bool supports(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512bf16")
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
  if (name == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return name == "generic";
}

const Path kPaths[] = {
#if defined(__x86_64__)
    {"avx512bf16", avx512bf16::run_step, false, {avx512bf16::read_through, avx512bf16::multiply_often}},
    {"avx2", avx2::run_step, true, {avx2::read_through, avx2::multiply_often}},
#endif
    {"generic", generic::run_step, true, {generic::read_through, generic::multiply_often}},
};

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

class Network {
 public:
  Network(const Sizes& sizes, const Path& path, int num_threads) : model_(sizes), path_(path), team_(num_threads) {
    layers_.resize(model_.n_layer);
    banks_.resize(static_cast<size_t>(model_.n_layer) * 2);
    for (int l = 0; l < model_.n_layer; ++l) {
      for (int kind = 0; kind < 2; ++kind) banks_[2 * l + kind].resize(model_.pmem_count * model_.n_head);
      layers_[l].persistent_keys = banks_[2 * l].data();
      layers_[l].persistent_values = banks_[2 * l + 1].data();
    }
    model_.layers = layers_.data();
  }

  Matrix* matrix(int layer, const std::string& name, int index) {
    if (name == "head") return &model_.head;
    Layer& l = layers_.at(layer);
    if (name == "projection") return &l.projection;
    if (name == "contextual_output") return &l.contextual_output;
    if (name == "persistent_key") return &l.persistent_key;
    if (name == "persistent_output") return &l.persistent_output;
    if (name == "persistent_gate_up") return &l.persistent_gate_up;
    if (name == "persistent_down") return &l.persistent_down;
    if (name == "persistent_keys") return &banks_.at(2 * layer).at(index);
    if (name == "persistent_values") return &banks_.at(2 * layer + 1).at(index);
    throw std::runtime_error("no matrix is called " + name);
  }

  const float** vector(int layer, const std::string& name) {
    if (name == "norm.weight") return &model_.norm.weight;
    if (name == "norm.bias") return &model_.norm.bias;
    Layer& l = layers_.at(layer);
    if (name == "contextual_norm.weight") return &l.contextual_norm.weight;
    if (name == "contextual_norm.bias") return &l.contextual_norm.bias;
    if (name == "persistent_norm.weight") return &l.persistent_norm.weight;
    if (name == "persistent_norm.bias") return &l.persistent_norm.bias;
    if (name == "decay") return &l.decay;
    if (name == "sharpness") return &l.sharpness;
    if (name == "value_scale") return &l.value_scale;
    if (name == "mix") return &l.mix;
    if (name == "beta0") return &l.beta0;
    if (name == "beta1") return &l.beta1;
    if (name == "alpha") return &l.alpha;
    if (name == "gates") return &l.gates;
    if (name == "persistent_decay") return &l.persistent_decay;
    if (name == "persistent_sharpness") return &l.persistent_sharpness;
    if (name == "persistent_scale") return &l.persistent_scale;
    throw std::runtime_error("no vector is called " + name);
  }

  const float* keep(const float* values, int64_t count, int64_t padded) {
    vectors_.emplace_back(padded, 0.0f);
    std::copy(values, values + count, vectors_.back().begin());
    return vectors_.back().data();
  }

  void set_matrix(Matrix& m, const float* weights, const float* bias, int rows, int depth) {
    shape(m, model_.type, bias, rows, depth);
    const int group = m.group();
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < depth; ++k) {
        const float w = weights[static_cast<int64_t>(r) * depth + k];
        const int64_t at = place(m, group, r, k);
        if (m.type == kFloat32) static_cast<float*>(m.packed)[at] = w;
        else static_cast<uint16_t*>(m.packed)[at] = to_bfloat16(w);
      }
    }
  }

  // `span`: depths that are summed apart, 0 for all together.
  void set_bytes(Matrix& m, const int8_t* weights, const float* scales, const float* bias, int rows, int depth,
                 int span) {
    if (depth > kMaxByteDepth) throw std::runtime_error("too deep for int8 sums");
    shape(m, kInt8, bias, rows, depth);
    m.span = span ? span : m.padded_depth();
    m.scales = keep(scales, rows, m.padded_rows());
    const int spans = (depth + m.span - 1) / m.span;
    offsets_.emplace_back(static_cast<size_t>(spans) * m.padded_rows(), 0);
    m.offsets = offsets_.back().data();
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < depth; ++k) {
        const int8_t w = weights[static_cast<int64_t>(r) * depth + k];
        static_cast<int8_t*>(m.packed)[place(m, 4, r, k)] = w;
        offsets_.back()[static_cast<size_t>(k / m.span) * m.padded_rows() + r] += kZero * w;
      }
    }
  }

  void run(const Cache& cache, const Step& step) {
    check(cache, step);
    scratch_.prepare(model_, cache, step, team_.size(), kReadQueries, kMaxLogits, kReadChunk,
                     read_block(model_.type));
    path_.run(model_, cache, step, scratch_, team_);
  }

  void set_embedding(const void* table, Type type) {
    model_.embedding = table;
    model_.embedding_type = type;
  }

 private:
  // Sums of products of bytes and int8 fit into 32 bits.
  static constexpr int kMaxByteDepth = 65536;

  void shape(Matrix& m, Type type, const float* bias, int rows, int depth) {
    m.rows = rows;
    m.depth = depth;
    m.width = rows <= 32 ? 32 : 64;
    m.strip = path_.has_strips ? kLanes : m.width;
    m.type = type;
    if (bias) m.bias = keep(bias, rows, m.padded_rows());
    m.packed = packed_.take(m.tiles() * m.tile_bytes());
  }

  // Where a weight lies in a packed matrix.
  static int64_t place(const Matrix& m, int group, int row, int k) {
    const int64_t strip = static_cast<int64_t>(row / m.strip) * m.padded_depth() * m.strip;
    return strip + (static_cast<int64_t>(k / group) * m.strip + row % m.strip) * group + k % group;
  }

  // What would read or write outside of the caller's memory is refused before anything is touched.
  void check(const Cache& cache, const Step& step) const {
    const auto require = [](bool ok, const char* what) {
      if (!ok) throw std::runtime_error(what);
    };
    require(cache.block_size > 0 && cache.block_size % kLanes == 0 && cache.block_size <= kMaxBlockSize,
            "block size out of range");
    require(step.max_blocks == 0 || (model_.version == 2) == (step.short_tables != nullptr),
            "short-term tables and version do not agree");
    for (int i = 0; i < step.num_tokens; ++i)
      require(step.token_ids[i] >= 0 && step.token_ids[i] < model_.vocab_size, "token id out of range");
    for (int i = 0; i < step.num_logit_rows; ++i)
      require(step.logit_rows[i] >= 0 && step.logit_rows[i] < step.num_tokens, "logit row out of range");
    require(step.num_logit_rows <= step.num_tokens, "more logit rows than tokens");
    for (int i = 0; step.snapshots && i < step.num_tokens; ++i)
      require(step.snapshots[i] >= -1 && step.snapshots[i] < cache.num_slots, "snapshot slot out of range");
    for (int s = 0; s < step.num_sequences; ++s) {
      require(step.slots[s] >= 0 && step.slots[s] < cache.num_slots, "slot out of range");
      const int64_t pairs = static_cast<int64_t>(step.num_computed[s]) + step.num_new[s] - 1;
      const int64_t blocks = (pairs + cache.block_size - 1) / cache.block_size;
      require(blocks <= step.max_blocks, "block table too short");
      for (const int64_t* tables : {step.block_tables, step.short_tables}) {
        for (int64_t b = 0; tables && b < blocks; ++b) {
          const int64_t block = tables[static_cast<int64_t>(s) * step.max_blocks + b];
          require(block >= 0 && block < cache.num_blocks, "block out of range");
        }
      }
    }
  }

  Model model_;
  const Path path_;
  Team team_;
  std::vector<Layer> layers_;
  std::vector<std::vector<Matrix>> banks_;
  std::vector<std::vector<float>> vectors_;
  std::vector<std::vector<int32_t>> offsets_;
  Arena packed_;
  Scratch scratch_;
};

template <typename F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

const Probe* find_probe(const char* wanted) {
  for (const Path& path : kPaths)
    if (supports(path.name) && std::string(wanted) == path.name) return &path.probe;
  return nullptr;
}

}  // namespace mosaic

using namespace mosaic;

extern "C" {

// The fastest path this processor has among those compiled in, or the one asked for; null when that is not supported.
const char* mosaic_path(const char* wanted) {
  for (const Path& path : kPaths)
    if (supports(path.name) && (!wanted || std::string(wanted) == path.name)) return path.name;
  return nullptr;
}

// Equal to REVISION of cpu_library.py, which refuses a library that was built from other sources.
int mosaic_revision() { return 3; }

const char* mosaic_error() { return last_error.c_str(); }

void* mosaic_new(const Sizes* sizes, const char* path_name, int num_threads) {
  Network* network = nullptr;
  guarded([&] {
    for (const Path& path : kPaths)
      if (supports(path.name) && std::string(path_name) == path.name) network = new Network(*sizes, path, num_threads);
    if (!network) throw std::runtime_error(std::string("this processor has no kernel path ") + path_name);
  });
  return network;
}

void mosaic_free(void* network) { delete static_cast<Network*>(network); }

// Packs weights [rows, depth] and keeps the copy; bias is [rows] or null.
int mosaic_set_matrix(void* network, int layer, const char* name, int index, const float* weights, const float* bias,
                      int rows, int depth) {
  return guarded([&] {
    auto* n = static_cast<Network*>(network);
    n->set_matrix(*n->matrix(layer, name, index), weights, bias, rows, depth);
  });
}

// The same for weights that were quantised: each stands for itself times its row's scale.
int mosaic_set_bytes(void* network, int layer, const char* name, int index, const int8_t* weights, const float* scales,
                     const float* bias, int rows, int depth) {
  return guarded([&] {
    auto* n = static_cast<Network*>(network);
    const bool is_read_in_blocks = std::string(name) == "persistent_values";
    n->set_bytes(*n->matrix(layer, name, index), weights, scales, bias, rows, depth,
                 is_read_in_blocks ? read_block(kInt8) : 0);
  });
}

int mosaic_set_vector(void* network, int layer, const char* name, const float* values, int count) {
  return guarded([&] {
    auto* n = static_cast<Network*>(network);
    *n->vector(layer, name) = n->keep(values, count, count);
  });
}

// The table [vocab_size, n_embd] stays the caller's and must outlive the network.
void mosaic_set_embedding(void* network, const void* table, int type) {
  static_cast<Network*>(network)->set_embedding(table, static_cast<Type>(type));
}

int mosaic_step(void* network, const Cache* cache, const Step* step) {
  return guarded([&] { static_cast<Network*>(network)->run(*cache, *step); });
}

}  // extern "C"
