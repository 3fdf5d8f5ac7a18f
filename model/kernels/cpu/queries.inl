// Reads of many queries of one head: some of them together, block after block, so that a block's pairs are widened once for
// all of them and lie in the processor's nearest cache. Every sum runs over absolute positions of pairs from the first on,
// where blocks before all windows only add zeros, so it depends neither on how the queries arrived nor on what else is read.

namespace mosaic {
namespace MOSAIC_ISA {

// A logit is four partial sums, each over every fourth dimension. How many of them are made side by side, for a number of
// queries, and against how many vectors of pairs: as many as there are registers for.
#if defined(MOSAIC_AVX512)
constexpr int partials(int queries) { return queries == 1 ? 4 : 2; }
constexpr int kPairVectors = 2;
#else
constexpr int partials(int queries) { return queries == 1 ? 4 : 1; }
constexpr int kPairVectors = 1;
#endif

// A block's numbers as floats: where they lie, or in `room`.
template <Type T>
MOSAIC_INLINE const float* widened(const void* numbers, int64_t base, int64_t count, float* room) {
  if (T == kFloat32) return (const float*)numbers + base;
  for (int64_t i = 0; i < count; i += kLanes) store(room + i, load_as<T>(numbers, base + i));
  return room;
}

// Some rows of numbers, `stride` apart.
struct FloatRows {
  float* data;
  int64_t stride;

  FloatRows from(int64_t row, int64_t column = 0) const { return {data + row * stride + column, stride}; }
};

// P partial sums from the `first` on, of Q queries against S vectors of pairs, a row of `keys` [dim][size] a dimension.
template <int Q, int S, int P>
MOSAIC_INLINE void partial_logits(const float* keys, int size, int dim, const FloatRows& queries, int first,
                                  f32x16 (&acc)[Q][S][P]) {
  const auto add = [&](int d, int i) {
    f32x16 k[S];
    for (int s = 0; s < S; ++s) k[s] = load(keys + (int64_t)d * size + s * kLanes);
    for (int q = 0; q < Q; ++q) {
      const f32x16 x = splat(queries.data[q * queries.stride + d]);
      for (int s = 0; s < S; ++s) acc[q][s][i] = added(acc[q][s][i], x, k[s]);
    }
  };
  const int whole = dim / 4 * 4;
  for (int d = first; d < whole; d += 4)
    for (int i = 0; i < P; ++i) add(d + i, i);
  for (int d = whole; d < dim && first == 0; ++d) add(d, 0);
}

// Logits of Q queries against S vectors of pairs: the same sums, whatever Q and S are.
template <int Q, int S>
MOSAIC_INLINE void some_logits(const float* keys, int size, int dim, const FloatRows& queries, const FloatRows& logits) {
  constexpr int P = partials(Q);
  f32x16 half[2][Q][S];
  for (int first = 0; first < 4; first += P) {
    f32x16 acc[Q][S][P] = {};
    partial_logits<Q, S, P>(keys, size, dim, queries, first, acc);
    for (int i = 0; i < P; ++i) {
      f32x16(&sums)[Q][S] = half[(first + i) / 2];
      for (int q = 0; q < Q; ++q)
        for (int s = 0; s < S; ++s) sums[q][s] = (first + i) % 2 ? sums[q][s] + acc[q][s][i] : acc[q][s][i];
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int s = 0; s < S; ++s) store(logits.data + q * logits.stride + s * kLanes, half[0][q][s] + half[1][q][s]);
}

template <int Q>
static void block_logits(const float* keys, int size, int dim, const FloatRows& queries, const FloatRows& logits) {
  int s = 0;
  for (; s + kPairVectors * kLanes <= size; s += kPairVectors * kLanes)
    some_logits<Q, kPairVectors>(keys + s, size, dim, queries, logits.from(0, s));
  for (; s < size; s += kLanes) some_logits<Q, 1>(keys + s, size, dim, queries, logits.from(0, s));
}

// Adds V vectors of a block's weighted values to the sums of Q queries, in each row 2 V vectors, even and odd pairs apart:
// side by side, or one after the other where registers are few.
template <int Q, int V>
MOSAIC_INLINE void some_values(const float* values, int size, int dim, const FloatRows& weights, const FloatRows& sums) {
  constexpr int kSides = kRegister == 64 ? 2 : 1;
  for (int first = 0; first < 2; first += kSides) {
    f32x16 acc[Q][V][kSides];
    const auto at = [&](int q, int v, int i) { return sums.data + q * sums.stride + (2 * v + first + i) * kLanes; };
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v)
        for (int i = 0; i < kSides; ++i) acc[q][v][i] = load(at(q, v, i));
    for (int s = first; s < size; s += 2) {
      for (int i = 0; i < kSides; ++i) {
        f32x16 value[V];
        for (int v = 0; v < V; ++v) value[v] = load(values + (int64_t)(s + i) * dim + v * kLanes);
        for (int q = 0; q < Q; ++q) {
          const f32x16 w = splat(weights.data[q * weights.stride + s + i]);
          for (int v = 0; v < V; ++v) acc[q][v][i] = added(acc[q][v][i], w, value[v]);
        }
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v)
        for (int i = 0; i < kSides; ++i) store(at(q, v, i), acc[q][v][i]);
  }
}

template <int Q>
static void block_values(const float* values, int size, int dim, const FloatRows& weights, const FloatRows& sums) {
  int d = 0;
  for (; kRegister == 64 && d + 2 * kLanes <= dim; d += 2 * kLanes)
    some_values<Q, 2>(values + d, size, dim, weights, sums.from(0, 2 * d));
  for (; d + kLanes <= dim; d += kLanes) some_values<Q, 1>(values + d, size, dim, weights, sums.from(0, 2 * d));
}

// Calls f(how many, as a constant; first) for kQueriesAtOnce after the other, and then for each query that is left.
template <typename F>
MOSAIC_INLINE void in_groups(int count, const F& f) {
  constexpr int kMany = kQueriesAtOnce;
  int q = 0;
  for (; q + kMany <= count; q += kMany) f(std::integral_constant<int, kMany>(), q);
  for (; q < count; ++q) f(std::integral_constant<int, 1>(), q);
}

// Reads `count` consecutive queries of one head; query q sees the first `visible + q` pairs, or the last `window` of them.
template <Type T>
static void read_queries(Pairs pairs, const FloatRows& queries, int count, int64_t visible, int64_t window, Private& p,
                         const FloatRows& out) {
  const int size = pairs.cache->block_size, dim = pairs.dim, whole = dim / kLanes * kLanes;
  const int64_t skipped = visible > window ? (visible - window) / size : 0;
  pairs.blocks += skipped;
  visible -= skipped * size;
  const FloatRows logits = {p.pair_logits, p.pair_stride}, sums = {p.pair_sums, 2 * whole};
  // Those that some of the first `n` queries see.
  const auto num_blocks = [&](int n) { return (visible + n - 1 + size - 1) / size; };
  for (int64_t block = 0; block < num_blocks(count); ++block) {
    const float* keys = widened<T>(pairs.cache->keys, pairs.offset(block), (int64_t)dim * size, p.pair_block);
    in_groups(count, [&](auto n, int q) {
      if (block < num_blocks(q + n)) block_logits<n>(keys, size, dim, queries.from(q), logits.from(q, block * size));
    });
  }
  float inverse[kReadQueries];
  in_groups(count, [&](auto n, int first) {
    const int64_t padded = num_blocks(first + n) * size;
    for (int q = first; q < first + n; ++q) {
      float* row = logits.from(q).data;
      const int64_t seen = visible + q, hidden = seen > window ? seen - window : 0;
      inverse[q] = seen > 0 ? 1.0f / exponentials(row, hidden, seen, padded) : 0.0f;
      for (int64_t i = 0; seen <= 0 && i < padded; ++i) row[i] = 0.0f;
    }
  });
  for (int64_t i = 0; i < count * sums.stride; ++i) sums.data[i] = 0.0f;
  for (int64_t block = 0; block < num_blocks(count); ++block) {
    const float* values = widened<T>(pairs.cache->values, pairs.offset(block), (int64_t)dim * size, p.pair_block);
    in_groups(count, [&](auto n, int q) {
      if (block < num_blocks(q + n)) block_values<n>(values, size, dim, logits.from(q, block * size), sums.from(q));
    });
  }
  for (int q = 0; q < count; ++q)
    for (int d = 0; d < whole; d += kLanes) {
      const float* sum = sums.from(q, 2 * d).data;
      store(out.from(q, d).data, (load(sum) + load(sum + kLanes)) * inverse[q]);
    }
  in_groups(count, [&](auto n, int q) {
    weighted_tail<T, n>(pairs, logits.from(q).data, logits.stride, num_blocks(q + n), whole, inverse + q,
                        out.from(q).data, out.stride);
  });
}

// As many queries together as keep their logits in the processor's caches.
template <Type T>
static void read_all(const Pairs& pairs, const FloatRows& queries, int count, int64_t visible, int64_t window, Private& p,
                     const FloatRows& out) {
  constexpr int kFew = kQueriesAtOnce;
  const int64_t fitting = kMaxLogits / p.pair_stride / kFew * kFew;
  const int together = fitting < kFew ? kFew : fitting < kReadQueries ? (int)fitting : kReadQueries;
  for (int q = 0; q < count; q += together)
    read_queries<T>(pairs, queries.from(q), count - q < together ? count - q : together, visible + q, window, p,
                    out.from(q));
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
