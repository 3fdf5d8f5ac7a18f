// The memories of one head: leaky keys, pairs, reads by kernel smoothing.

namespace mosaic {
namespace MOSAIC_ISA {

MOSAIC_INLINE float dot(const float* a, const float* b, int n) {
  f32x16 acc = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) acc = fma(load(a + i), load(b + i), acc);
  float s = sum(acc);
  for (; i < n; ++i) s += a[i] * b[i];
  return s;
}

// y = x / (|x| + eps); the zero vector stays zero.
MOSAIC_INLINE void unit(const float* x, float* y, int n, float eps) {
  const float tiny = 1.17549435e-38f;
  const float inverse = 1.0f / (__builtin_sqrtf(dot(x, x, n)) + (eps > tiny ? eps : tiny));
  for (int i = 0; i < n; ++i) y[i] = x[i] * inverse;
}

// average = decay * average + x; y = unit(average).
MOSAIC_INLINE void advance(float* average, const float* x, float decay, float* y, int n, float eps) {
  for (int i = 0; i < n; ++i) average[i] = decay * average[i] + x[i];
  unit(average, y, n, eps);
}

MOSAIC_INLINE float element(const void* p, int64_t i, Type type) {
  if (type == kFloat32) return ((const float*)p)[i];
  const uint16_t bits = ((const uint16_t*)p)[i];
  return type == kBFloat16 ? widen(bits) : half_to_float(bits);
}

// n numbers as they are stored in 16 bits.
MOSAIC_INLINE void to_stored(const float* x, int n, Type type, uint16_t* y) {
  const bool is_half = type == kFloat16;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const u16x16 r = is_half ? narrow_half(load(x + i)) : narrow(load(x + i));
    __builtin_memcpy(y + i, &r, sizeof r);
  }
  for (; i < n; ++i) y[i] = is_half ? float_to_half(x[i]) : narrow(x[i]);
}

template <Type T>
MOSAIC_INLINE f32x16 load_as(const void* p, int64_t i) {
  if (T == kFloat32) return load((const float*)p + i);
  return load((const uint16_t*)p + i, T == kFloat16);
}

// The window of a memory that shows everything.
constexpr int64_t kAll = INT64_MAX / 2;

// Where one head of one sequence remembers.
struct Pairs {
  const Cache* cache;
  const int64_t* blocks;  // block table of the sequence
  int64_t layer_block;    // layer * num_blocks
  int head, n_head, dim;

  int64_t offset(int64_t block) const {
    return ((layer_block + blocks[block]) * n_head + head) * dim * cache->block_size;
  }

  void append(int64_t pair, const float* key, const float* value) const {
    const int64_t base = offset(pair / cache->block_size), slot = pair % cache->block_size;
    if (cache->type == kFloat32) {
      put((float*)cache->keys + base, (float*)cache->values + base, slot, key, value);
    } else {
      uint16_t stored[2][kMaxDim];
      to_stored(key, dim, cache->type, stored[0]);
      to_stored(value, dim, cache->type, stored[1]);
      put((uint16_t*)cache->keys + base, (uint16_t*)cache->values + base, slot, stored[0], stored[1]);
    }
  }

 private:
  template <typename N>
  void put(N* keys, N* values, int64_t slot, const N* key, const N* value) const {
    for (int d = 0; d < dim; ++d) keys[d * cache->block_size + slot] = key[d];
    __builtin_memcpy(values + slot * dim, value, dim * sizeof(N));
  }
};

// A logit is four partial sums, each over every fourth dimension. How many of them are made side by side, for a number of
// queries: as many as there are registers for.
#if defined(MOSAIC_AVX512)
constexpr int partials(int) { return 4; }
#else
constexpr int partials(int queries) { return queries == 1 ? 4 : 1; }
#endif

// P partial sums from the `first` on, of Q queries against the vector of pairs whose first dimension lies at `base`.
template <Type T, int Q, int P>
MOSAIC_INLINE void partial_logits(const Pairs& pairs, const float* queries, int64_t query_stride, int64_t base,
                                  int first, f32x16 (&acc)[Q][P]) {
  const int size = pairs.cache->block_size, dim = pairs.dim, whole = dim / 4 * 4;
  for (int d = first; d < whole; d += 4) {
    for (int i = 0; i < P; ++i) {
      const f32x16 k = load_as<T>(pairs.cache->keys, base + (int64_t)(d + i) * size);
      for (int q = 0; q < Q; ++q) acc[q][i] = added(acc[q][i], splat(queries[q * query_stride + d + i]), k);
    }
  }
  for (int d = whole; d < dim && first == 0; ++d) {
    const f32x16 k = load_as<T>(pairs.cache->keys, base + (int64_t)d * size);
    for (int q = 0; q < Q; ++q) acc[q][0] = added(acc[q][0], splat(queries[q * query_stride + d]), k);
  }
}

// Logits of Q queries against all `num_blocks` blocks, [Q][stride]: the same sums, whatever Q is.
template <Type T, int Q>
MOSAIC_INLINE void all_logits(const Pairs& pairs, const float* queries, int64_t query_stride, int64_t num_blocks,
                              float* logits, int64_t stride) {
  constexpr int P = partials(Q);
  const int size = pairs.cache->block_size;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t base = pairs.offset(block);
    for (int s = 0; s < size; s += kLanes) {
      f32x16 half[2][Q];
      for (int first = 0; first < 4; first += P) {
        f32x16 acc[Q][P] = {};
        partial_logits<T, Q, P>(pairs, queries, query_stride, base + s, first, acc);
        for (int i = 0; i < P; ++i) {
          f32x16(&sums)[Q] = half[(first + i) / 2];
          for (int q = 0; q < Q; ++q) sums[q] = (first + i) % 2 ? sums[q] + acc[q][i] : acc[q][i];
        }
      }
      for (int q = 0; q < Q; ++q) store(logits + q * stride + block * size + s, half[0][q] + half[1][q]);
    }
  }
}

// Turns the logits from `hidden` to `visible` of a row into exponentials against their maximum and the others, up to
// `padded`, into zeros. Returns the sum, taken lane by lane over absolute positions.
MOSAIC_INLINE float exponentials(float* logits, int64_t hidden, int64_t visible, int64_t padded) {
  for (int64_t i = 0; i < hidden; ++i) logits[i] = -__builtin_inff();
  for (int64_t i = visible; i < padded; ++i) logits[i] = -__builtin_inff();
  f32x16 most = load(logits);
  for (int64_t i = kLanes; i < padded; i += kLanes) most = max(most, load(logits + i));
  const float top = largest(most);
  f32x16 mass = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const f32x16 p = exp_nonpositive(load(logits + i) - top);
    mass += p;
    store(logits + i, p);
  }
  return sum(mass);
}

// Sum over all pairs of weight * value for V vectors of dimensions from d on, even and odd pairs apart: side by side, or
// one after the other where registers are few.
template <Type T, int Q, int V>
MOSAIC_INLINE void weighted_values(const Pairs& pairs, const float* weights, int64_t stride, int64_t num_blocks, int d,
                                   const float* inverse, float* out, int64_t out_stride) {
  const int size = pairs.cache->block_size, dim = pairs.dim;
  constexpr int kSides = partials(Q) == 4 ? 2 : 1;
  f32x16 sums[Q][V];
  for (int first = 0; first < 2; first += kSides) {
    f32x16 acc[Q][V][kSides] = {};
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t base = pairs.offset(block) + d;
      const float* w = weights + block * size;
      for (int s = first; s < size; s += 2) {
        for (int i = 0; i < kSides; ++i) {
          for (int v = 0; v < V; ++v) {
            const f32x16 value = load_as<T>(pairs.cache->values, base + (int64_t)(s + i) * dim + v * kLanes);
            for (int q = 0; q < Q; ++q) acc[q][v][i] = added(acc[q][v][i], splat(w[q * stride + s + i]), value);
          }
        }
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v)
        for (int i = 0; i < kSides; ++i) sums[q][v] = first + i ? sums[q][v] + acc[q][v][i] : acc[q][v][i];
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) store(out + q * out_stride + d + v * kLanes, sums[q][v] * inverse[q]);
}

// The dimensions that do not fill a vector.
template <Type T, int Q>
MOSAIC_INLINE void weighted_tail(const Pairs& pairs, const float* weights, int64_t stride, int64_t num_blocks, int d,
                                 const float* inverse, float* out, int64_t out_stride) {
  const int size = pairs.cache->block_size, dim = pairs.dim;
  for (; d < dim; ++d) {
    for (int q = 0; q < Q; ++q) {
      float y = 0;
      for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t base = pairs.offset(block) + d;
        for (int s = 0; s < size; ++s)
          y += weights[q * stride + block * size + s] * element(pairs.cache->values, base + (int64_t)s * dim, T);
      }
      out[q * out_stride + d] = y * inverse[q];
    }
  }
}

// Reads Q consecutive queries of one head; query q sees the first `visible + q` pairs, or the last `window` of them.
// Every sum runs over absolute positions of pairs from the first on, where blocks before all windows only add zeros, so
// it depends neither on how the queries arrived nor on what else is read. `logits` is room for [Q][stride] numbers.
template <Type T, int Q>
static void read_queries(Pairs pairs, const float* queries, int64_t query_stride, int64_t visible, int64_t window,
                         float* logits, int64_t stride, float* out, int64_t out_stride) {
  const int size = pairs.cache->block_size, dim = pairs.dim;
  const int64_t skipped = visible > window ? (visible - window) / size : 0;
  pairs.blocks += skipped;
  visible -= skipped * size;
  const int64_t num_blocks = (visible + Q - 1 + size - 1) / size;
  all_logits<T, Q>(pairs, queries, query_stride, num_blocks, logits, stride);
  float inverse[Q];
  for (int q = 0; q < Q; ++q) {
    const int64_t seen = visible + q;
    if (seen > 0) {
      const int64_t hidden = seen > window ? seen - window : 0;
      inverse[q] = 1.0f / exponentials(logits + q * stride, hidden, seen, num_blocks * size);
    } else {
      inverse[q] = 0.0f;
      for (int64_t i = 0; i < num_blocks * size; ++i) logits[q * stride + i] = 0.0f;
    }
  }
  int d = 0;
  for (; partials(Q) == 4 && d + 2 * kLanes <= dim; d += 2 * kLanes)
    weighted_values<T, Q, 2>(pairs, logits, stride, num_blocks, d, inverse, out, out_stride);
  for (; d + kLanes <= dim; d += kLanes)
    weighted_values<T, Q, 1>(pairs, logits, stride, num_blocks, d, inverse, out, out_stride);
  weighted_tail<T, Q>(pairs, logits, stride, num_blocks, d, inverse, out, out_stride);
}

// The same for any number of queries.
template <Type T>
static void read_all(const Pairs& pairs, const float* queries, int64_t query_stride, int64_t visible, int64_t window,
                     int count, float* logits, int64_t stride, float* out, int64_t out_stride) {
  int q = 0;
  for (; q + kReadQueries <= count; q += kReadQueries)
    read_queries<T, kReadQueries>(pairs, queries + q * query_stride, query_stride, visible + q, window, logits,
                                  stride, out + q * out_stride, out_stride);
  for (; q < count; ++q)
    read_queries<T, 1>(pairs, queries + q * query_stride, query_stride, visible + q, window, logits, stride,
                       out + q * out_stride, out_stride);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
