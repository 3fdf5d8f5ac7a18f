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

// Rows of numbers, and the same in the narrow form in which they go into a product: bfloat16, or bytes with a scale each.
struct Rows {
  float* wide = nullptr;
  uint16_t* narrow = nullptr;  // or bytes
  float* scales = nullptr;
  int64_t stride = 0;  // elements from row to row, whatever the form
  int64_t scale_stride = 1;
};

class RowsBuffer {
 public:
  Rows reserve(int64_t rows, int64_t stride, int64_t scale_stride) {
    wide_.reserve(rows * stride);
    narrow_.reserve(rows * stride);
    scales_.reserve(rows * scale_stride);
    return {wide_, narrow_, scales_, stride, scale_stride};
  }

 private:
  Buffer<float> wide_, scales_;
  Buffer<uint16_t> narrow_;
};

// One row's softmax so far: the largest logit, and the sum of exponentials against it.
struct Softmax {
  float top = -1e30f;
  float mass = 0.0f;
};

constexpr int kQueriesAtOnce = 4;  // whose sums are made side by side: so many read together, however long the memory

// What one thread needs to read memories.
struct Private {
  Buffer<float> pair_logits;  // [queries, or heads, read together, pair_stride]
  Buffer<float> pair_sums;    // [the same, 2 * head_dim]
  Buffer<float> pair_block;   // [head_dim, block_size] or [block_size, head_dim]
  int64_t pair_stride = 0;
  RowsBuffer weights_buffer;
  Rows weights;        // [read_chunk, block] of a persistent memory: logits, then their weights
  Buffer<float> read;  // [read_chunk, head_dim, up to whole tiles]
  Buffer<Softmax> softmaxes;
};

// Some heads of one sequence: what a thread takes at a time in the contextual memories.
struct HeadsPiece {
  int64_t seq;
  int first, count;
};

struct Scratch {
  Buffer<float> stream;     // [tokens, n_embd]
  Buffer<float> projected;  // [tokens, projected_stride]
  Rows inputs;              // [tokens, input_width] what a product is asked with, or what a memory gave
  Rows queries;             // [tokens, n_head * query_dim] of the persistent memory
  std::vector<int64_t> first_row;  // [sequences]
  std::vector<HeadsPiece> pieces;  // all heads of all sequences
  int64_t projected_stride = 0, query_dim = 0;
  std::vector<Private> privates;

  Private& mine(const Team&) { return privates[Team::index()]; }

  void prepare(const Model& m, const Cache& cache, const Step& step, int num_threads, int read_queries,
               int64_t most_logits, int64_t read_chunk, int read_block) {
    const int64_t n = step.num_tokens;
    projected_stride = m.output_width();
    query_dim = (m.head_dim + 3) / 4 * 4;
    stream.reserve(n * m.n_embd);
    projected.reserve(n * projected_stride);
    inputs = inputs_buffer_.reserve(n, (m.input_width() + 31) / 32 * 32, 1);
    queries = queries_buffer_.reserve(n, query_dim * m.n_head, m.n_head);
    first_row.resize(step.num_sequences);
    for (int64_t s = 0, row = 0; s < step.num_sequences; row += step.num_new[s], ++s) first_row[s] = row;
    share_out_heads(m, step, num_threads);
    if (privates.size() != static_cast<size_t>(num_threads)) privates = std::vector<Private>(num_threads);
    int64_t most_pairs = 0;
    for (int s = 0; s < step.num_sequences; ++s)
      most_pairs = std::max(most_pairs, static_cast<int64_t>(step.num_computed[s]) + step.num_new[s]);
    for (auto& p : privates) {
      p.pair_stride = (most_pairs / cache.block_size + 1) * cache.block_size;
      const int64_t together = std::max<int64_t>(read_queries, m.n_head);
      p.pair_logits.reserve(std::max(kQueriesAtOnce * p.pair_stride, std::min(together * p.pair_stride, most_logits)));
      p.pair_sums.reserve(2 * together * m.head_dim);
      p.pair_block.reserve(static_cast<int64_t>(m.head_dim) * cache.block_size);
      p.weights = p.weights_buffer.reserve(read_chunk, read_block + 32, 1);
      p.read.reserve(read_chunk * ((m.head_dim + 63) / 64 * 64));
      p.softmaxes.reserve(read_chunk);
    }
  }

 private:
  // Side by side the heads of one query are read faster, apart they keep more threads busy. Those of a sequence with many
  // queries are a piece each: beside sequences that have one, it would else be most of the work in one thread's hands.
  void share_out_heads(const Model& m, const Step& step, int num_threads) {
    const int64_t fair = static_cast<int64_t>(m.n_head) * step.num_sequences / (4 * num_threads);
    pieces.clear();
    for (int64_t seq = 0; seq < step.num_sequences; ++seq) {
      const auto heads = static_cast<int>(std::clamp<int64_t>(fair / std::max(step.num_new[seq], 1), 1, m.n_head));
      for (int first = 0; first < m.n_head; first += heads)
        pieces.push_back({seq, first, std::min(heads, m.n_head - first)});
    }
  }

  RowsBuffer inputs_buffer_, queries_buffer_;
};

}  // namespace mosaic
