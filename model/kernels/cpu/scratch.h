// Working memory of a step, grown when a larger step comes and kept.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "model.h"
#include "threads.h"

namespace mosaic {

// Aligned memory whose content does not survive growth.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void reserve(int64_t count) {
    if (count <= count_) return;
    std::free(data_);
    count_ = 0;
    data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64));
    if (!data_) throw std::bad_alloc();
    count_ = count;
  }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Memory for weights: never given back before the end, zero, and in huge pages where the system has them. Reading
// weights through pages of 4 KiB costs half of the memory's bandwidth.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (char* chunk : chunks_) std::free(chunk);
  }

  void* take(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) {
      const size_t size = std::max<size_t>((bytes + kPage - 1) / kPage * kPage, 16 * kPage);
      chunks_.push_back(nullptr);
      chunks_.back() = static_cast<char*>(std::aligned_alloc(kPage, size));
      if (!chunks_.back()) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      madvise(chunks_.back(), size, MADV_HUGEPAGE);
#endif
      memset(chunks_.back(), 0, size);
      next_ = chunks_.back();
      left_ = size;
    }
    void* taken = next_;
    next_ += bytes;
    left_ -= bytes;
    return taken;
  }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
  std::vector<char*> chunks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

// What one thread needs to read memories.
struct Private {
  Buffer<float> pair_logits;  // [kReadQueries, pair_stride]
  int64_t pair_stride = 0;
  Buffer<float> logits, read;  // of a persistent memory
  Buffer<uint16_t> weights;
  int64_t stride = 0;
};

struct Scratch {
  Buffer<float> stream;     // [tokens, n_embd]
  Buffer<float> normed;     // [tokens, stride] what a product is asked with, or what a memory gave
  Buffer<uint16_t> rounded;  // [tokens, stride] the same as bfloat16
  Buffer<float> projected;  // [tokens, projected_stride]
  Buffer<float> query;      // [tokens, query_stride] of n_head * query_dim
  Buffer<uint16_t> query_rounded;
  std::vector<int64_t> first_row;  // [sequences]
  int64_t stride = 0, projected_stride = 0, query_dim = 0, query_stride = 0;
  std::vector<Private> privates;

  Private& mine(const Team&) { return privates[Team::index()]; }

  void prepare(const Model& m, const Cache& cache, const Step& step, int num_threads, int read_queries,
               int64_t read_chunk) {
    const int64_t n = step.num_tokens;
    stride = (m.n_embd + 31) / 32 * 32;
    projected_stride = 3 * static_cast<int64_t>(m.n_embd);
    query_dim = (m.head_dim + 1) / 2 * 2;
    query_stride = query_dim * m.n_head;
    stream.reserve(n * m.n_embd);
    normed.reserve(n * stride);
    rounded.reserve(n * stride);
    projected.reserve(n * projected_stride);
    query.reserve(n * query_stride);
    query_rounded.reserve(n * query_stride);
    first_row.resize(step.num_sequences);
    for (int64_t s = 0, row = 0; s < step.num_sequences; row += step.num_new[s], ++s) first_row[s] = row;
    if (privates.size() != static_cast<size_t>(num_threads)) privates = std::vector<Private>(num_threads);
    int64_t most_pairs = 0;
    for (int s = 0; s < step.num_sequences; ++s)
      most_pairs = std::max(most_pairs, static_cast<int64_t>(step.num_computed[s]) + step.num_new[s]);
    for (auto& p : privates) {
      p.pair_stride = (most_pairs / cache.block_size + 1) * cache.block_size;
      p.pair_logits.reserve(read_queries * p.pair_stride);
      p.stride = (m.pmem_size + 63) / 64 * 64;
      p.logits.reserve(read_chunk * p.stride);
      p.weights.reserve(read_chunk * p.stride);
      p.read.reserve(read_chunk * m.head_dim);
    }
  }
};

}  // namespace mosaic
