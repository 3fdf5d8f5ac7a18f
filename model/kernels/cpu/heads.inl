// Reads of one query per head, by several heads of a sequence together: block after block, the heads within each side
// by side, as pairs lie in memory. Every sum runs as `read_queries` runs it for one query, so the bits are the same.

namespace mosaic {
namespace MOSAIC_ISA {

// Vectors whose sums there are registers for: of values, each in two parts; of logits half as many, each in four.
constexpr int kVectors = kRegister == 64 ? 4 : 2;

// Neighbouring heads of one sequence, and the blocks that their queries see.
struct Heads {
  Pairs pairs;  // of the first head, from the first block seen on
  int count;
  int64_t num_blocks;

  int64_t unit() const { return (int64_t)pairs.dim * pairs.cache->block_size; }

  // Where the keys or values of unit `i` lie: head after head, block after block. Past the end, the last.
  int64_t at(int64_t i) const {
    const int64_t last = num_blocks * count - 1, u = i < last ? i : last;
    return pairs.offset(u / count) + u % count * unit();
  }
};

// What is to be read soon, a line asked for with every line read. Blocks lie anywhere: the processor cannot guess them.
template <Type T>
struct Stream {
  static constexpr int kBytes = T == kFloat32 ? 4 : 2;
  const char* next;
  int left;  // bytes

  Stream(const Heads& heads, const void* numbers, int64_t i)
      : next((const char*)numbers + heads.at(i + kAhead) * kBytes), left((int)heads.unit() * kBytes) {}

  __attribute__((always_inline)) void advance(int numbers) {
    for (int bytes = numbers * kBytes; bytes > 0 && left > 0; bytes -= 64, left -= 64, next += 64)
      __builtin_prefetch(next);
  }

 private:
  static constexpr int kAhead = 2;
};

// Logits of one query against S vectors of a block's pairs.
template <Type T, int S>
MOSAIC_INLINE void some_logits(const void* keys, int64_t base, int size, int dim, const float* query, float* logits,
                               Stream<T>& stream) {
  f32x16 acc[S][4] = {};
  int d = 0;
  for (; d + 4 <= dim; d += 4) {
    for (int i = 0; i < 4; ++i) {
      const f32x16 x = splat(query[d + i]);
      const int64_t row = base + (int64_t)(d + i) * size;
      for (int s = 0; s < S; ++s) acc[s][i] = added(acc[s][i], x, load_as<T>(keys, row + s * kLanes));
      stream.advance(S * kLanes);
    }
  }
  for (; d < dim; ++d)
    for (int s = 0; s < S; ++s)
      acc[s][0] = fma(splat(query[d]), load_as<T>(keys, base + (int64_t)d * size + s * kLanes), acc[s][0]);
  for (int s = 0; s < S; ++s) store(logits + s * kLanes, (acc[s][0] + acc[s][1]) + (acc[s][2] + acc[s][3]));
}

// Adds V vectors of a block's weighted values to `sums` [V][2]: even and odd pairs apart.
template <Type T, int V>
MOSAIC_INLINE void some_values(const void* values, int64_t base, int size, int dim, const float* weights, float* sums,
                               Stream<T>& stream) {
  f32x16 acc[V][2];
  for (int v = 0; v < V; ++v)
    for (int odd = 0; odd < 2; ++odd) acc[v][odd] = load(sums + (2 * v + odd) * kLanes);
  for (int s = 0; s < size; s += 2) {
    for (int odd = 0; odd < 2; ++odd) {
      const f32x16 w = splat(weights[s + odd]);
      const int64_t row = base + (int64_t)(s + odd) * dim;
      for (int v = 0; v < V; ++v) acc[v][odd] = added(acc[v][odd], w, load_as<T>(values, row + v * kLanes));
      stream.advance(V * kLanes);
    }
  }
  for (int v = 0; v < V; ++v)
    for (int odd = 0; odd < 2; ++odd) store(sums + (2 * v + odd) * kLanes, acc[v][odd]);
}

// `queries` and `out` are [count][dim]; `logits` is room for [count][stride] numbers, `sums` for [count][2 * dim].
template <Type T>
static void read_heads(Pairs pairs, int count, const float* queries, int64_t visible, int64_t window, float* logits,
                       int64_t stride, float* sums, float* out) {
  const int size = pairs.cache->block_size, dim = pairs.dim, whole = dim / kLanes * kLanes;
  const int64_t skipped = visible > window ? (visible - window) / size : 0;
  pairs.blocks += skipped;
  visible -= skipped * size;
  for (int i = 0; visible <= 0 && i < count * dim; ++i) out[i] = 0.0f;
  if (visible <= 0) return;
  const Heads heads = {pairs, count, (visible + size - 1) / size};
  const void *keys = pairs.cache->keys, *values = pairs.cache->values;
  for (int64_t i = 0; i < heads.num_blocks * count; ++i) {
    const int64_t base = heads.at(i), head = i % count;
    Stream<T> stream(heads, keys, i);
    float* row = logits + head * stride + i / count * size;
    int s = 0;
    for (; kVectors > 2 && s + 2 * kLanes <= size; s += 2 * kLanes)
      some_logits<T, 2>(keys, base + s, size, dim, queries + head * dim, row + s, stream);
    for (; s < size; s += kLanes) some_logits<T, 1>(keys, base + s, size, dim, queries + head * dim, row + s, stream);
  }
  float inverse[kMaxHeads];
  const int64_t hidden = visible > window ? visible - window : 0;
  for (int h = 0; h < count; ++h)
    inverse[h] = 1.0f / exponentials(logits + h * stride, hidden, visible, heads.num_blocks * size);
  for (int64_t i = 0; i < count * 2 * whole; ++i) sums[i] = 0.0f;
  for (int64_t i = 0; i < heads.num_blocks * count; ++i) {
    const int64_t base = heads.at(i), head = i % count;
    Stream<T> stream(heads, values, i);
    const float* weights = logits + head * stride + i / count * size;
    float* sum = sums + head * 2 * whole;
    int d = 0;
    for (; kVectors > 2 && d + 4 * kLanes <= dim; d += 4 * kLanes)
      some_values<T, 4>(values, base + d, size, dim, weights, sum + 2 * d, stream);
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes)
      some_values<T, 2>(values, base + d, size, dim, weights, sum + 2 * d, stream);
    for (; d + kLanes <= dim; d += kLanes)
      some_values<T, 1>(values, base + d, size, dim, weights, sum + 2 * d, stream);
  }
  for (int h = 0; h < count; ++h, ++pairs.head) {
    for (int d = 0; d < whole; d += kLanes) {
      const float* sum = sums + h * 2 * whole + 2 * d;
      store(out + h * dim + d, (load(sum) + load(sum + kLanes)) * inverse[h]);
    }
    weighted_tail<T, 1>(pairs, logits + h * stride, stride, heads.num_blocks, whole, inverse + h, out + h * dim, dim);
  }
}

// As many heads together as keep their logits in the processor's caches.
template <Type T>
static void read_single_queries(Pairs pairs, int count, const float* queries, int64_t visible, int64_t window,
                                Private& p, float* out) {
  const int64_t fitting = kMaxLogits / p.pair_stride, most = fitting < kMaxHeads ? fitting : kMaxHeads;
  const int together = most > 1 ? (int)most : 1;
  for (int first = 0; first < count; first += together, pairs.head += together) {
    const int n = count - first < together ? count - first : together;
    read_heads<T>(pairs, n, queries + first * pairs.dim, visible, window, p.pair_logits, p.pair_stride, p.pair_sums,
                  out + first * pairs.dim);
  }
}

// Reads the memories of `count` heads from `pairs` on with every token's queries; the first token sees `visible` pairs,
// each later one another, or the last `window` of them. Multiplies what was read by `scales` [count]. Rows are of a token,
// in them one head after the other.
template <Type T>
static void read_pairs(const Pairs& pairs, int count, const FloatRows& queries, int tokens, int64_t visible,
                       int64_t window, Private& p, const float* scales, const FloatRows& out) {
  const int dim = pairs.dim;
  if (tokens == 1) {
    read_single_queries<T>(pairs, count, queries.data, visible, window, p, out.data);
  } else {
    Pairs one = pairs;
    for (int h = 0; h < count; ++h, ++one.head)
      read_all<T>(one, queries.from(0, h * dim), tokens, visible, window, p, out.from(0, h * dim));
  }
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < count; ++h)
      for (int d = 0; d < dim; ++d) out.data[t * out.stride + h * dim + d] *= scales[h];
}

static void read_pairs(const Pairs& pairs, int count, const FloatRows& queries, int tokens, int64_t visible,
                       int64_t window, Private& p, const float* scales, const FloatRows& out) {
  const Type type = pairs.cache->type;
  const auto read = type == kFloat32   ? read_pairs<kFloat32>
                    : type == kFloat16 ? read_pairs<kFloat16>
                                       : read_pairs<kBFloat16>;
  read(pairs, count, queries, tokens, visible, window, p, scales, out);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
