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

MOSAIC_INLINE void put(void* p, int64_t i, Type type, float x) {
  if (type == kFloat32) ((float*)p)[i] = x;
  else ((uint16_t*)p)[i] = type == kBFloat16 ? narrow(x) : float_to_half(x);
}

template <Type T>
MOSAIC_INLINE f32x16 load_as(const void* p, int64_t i) {
  if (T == kFloat32) return load((const float*)p + i);
  return load((const uint16_t*)p + i, T == kFloat16);
}

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
    const int size = cache->block_size;
    const int64_t base = offset(pair / size), slot = pair % size;
    for (int d = 0; d < dim; ++d) {
      put(cache->keys, base + d * size + slot, cache->type, key[d]);
      put(cache->values, base + slot * dim + d, cache->type, value[d]);
    }
  }
};

// Logits of Q queries against the `size` pairs of a block. Four partial sums over the dimensions, whatever Q is.
template <Type T, int Q>
MOSAIC_INLINE void block_logits(const float* const (&queries)[Q], const void* keys, int64_t base, int size, int dim,
                                float (&logits)[Q][kMaxBlockSize]) {
  for (int s = 0; s < size; s += kLanes) {
    f32x16 acc[Q][4] = {};
    int d = 0;
    for (; d + 4 <= dim; d += 4) {
      for (int i = 0; i < 4; ++i) {
        const f32x16 k = load_as<T>(keys, base + (int64_t)(d + i) * size + s);
        for (int q = 0; q < Q; ++q) acc[q][i] = fma(splat(queries[q][d + i]), k, acc[q][i]);
      }
    }
    for (; d < dim; ++d) {
      const f32x16 k = load_as<T>(keys, base + (int64_t)d * size + s);
      for (int q = 0; q < Q; ++q) acc[q][0] = fma(splat(queries[q][d]), k, acc[q][0]);
    }
    for (int q = 0; q < Q; ++q) store(&logits[q][s], (acc[q][0] + acc[q][1]) + (acc[q][2] + acc[q][3]));
  }
}

// y += sum over pairs of p * value, even and odd pairs apart.
template <Type T>
MOSAIC_INLINE void add_values(const float* p, const void* values, int64_t base, int count, int dim, float* y) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    f32x16 even = load(y + d), odd = {};
    int s = 0;
    for (; s + 2 <= count; s += 2) {
      even = fma(splat(p[s]), load_as<T>(values, base + (int64_t)s * dim + d), even);
      odd = fma(splat(p[s + 1]), load_as<T>(values, base + (int64_t)(s + 1) * dim + d), odd);
    }
    if (s < count) even = fma(splat(p[s]), load_as<T>(values, base + (int64_t)s * dim + d), even);
    store(y + d, even + odd);
  }
  for (; d < dim; ++d)
    for (int s = 0; s < count; ++s) y[d] += p[s] * element(values, base + (int64_t)s * dim + d, T);
}

struct Smoothing {
  float top, mass;
  float y[kMaxDim];
};

// Takes `count` more pairs into a running softmax.
template <Type T>
MOSAIC_INLINE void absorb(Smoothing& state, float (&logits)[kMaxBlockSize], int size, int count, const void* values,
                          int64_t base, int dim) {
  for (int s = count; s < size; ++s) logits[s] = -__builtin_inff();
  f32x16 most = load(logits);
  for (int s = kLanes; s < size; s += kLanes) most = max(most, load(logits + s));
  const float block_top = largest(most);
  if (block_top > state.top) {
    const float fade = exp_nonpositive(state.top - block_top);
    state.mass *= fade;
    for (int d = 0; d < dim; ++d) state.y[d] *= fade;
    state.top = block_top;
  }
  f32x16 mass = {};
  for (int s = 0; s < size; s += kLanes) {
    const f32x16 p = exp_nonpositive(load(logits + s) - state.top);
    mass += p;
    store(logits + s, p);
  }
  state.mass += sum(mass);
  add_values<T>(logits, values, base, count, dim, state.y);
}

// Reads Q consecutive queries of one head; query q sees the first `visible + q` pairs. Blocks are taken one by one from
// the first, so the sum depends neither on how the queries arrived nor on what else is read.
template <Type T, int Q>
static void read_queries(const Pairs& pairs, const float* queries, int64_t stride, int64_t visible, float* out,
                         int64_t out_stride) {
  const int size = pairs.cache->block_size, dim = pairs.dim;
  Smoothing states[Q];
  const float* rows[Q];
  float logits[Q][kMaxBlockSize];
  for (int q = 0; q < Q; ++q) {
    rows[q] = queries + q * stride;
    states[q].top = -__builtin_inff();
    states[q].mass = 0;
    for (int d = 0; d < dim; ++d) states[q].y[d] = 0;
  }
  for (int64_t block = 0; block * size < visible + Q - 1; ++block) {
    const int64_t base = pairs.offset(block);
    block_logits<T, Q>(*(const float* const(*)[Q])rows, pairs.cache->keys, base, size, dim, logits);
    for (int q = 0; q < Q; ++q) {
      const int64_t left = visible + q - block * size;
      if (left > 0)
        absorb<T>(states[q], logits[q], size, left < size ? (int)left : size, pairs.cache->values, base, dim);
    }
  }
  for (int q = 0; q < Q; ++q) {
    const float inverse = states[q].mass > 0 ? 1.0f / states[q].mass : 0.0f;
    for (int d = 0; d < dim; ++d) out[q * out_stride + d] = states[q].y[d] * inverse;
  }
}

template <Type T>
static void read_all(const Pairs& pairs, const float* queries, int64_t stride, int64_t visible, int count, float* out,
                     int64_t out_stride) {
  int q = 0;
  for (; q + 4 <= count; q += 4)
    read_queries<T, 4>(pairs, queries + q * stride, stride, visible + q, out + q * out_stride, out_stride);
  for (; q < count; ++q)
    read_queries<T, 1>(pairs, queries + q * stride, stride, visible + q, out + q * out_stride, out_stride);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
