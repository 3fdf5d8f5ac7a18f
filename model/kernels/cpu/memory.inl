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

  // Fetches what `append` will write to: a key's numbers lie a line apart, in a block that may be anywhere.
  void expect(int64_t pair) const {
    const int bytes = cache->type == kFloat32 ? 4 : 2;
    const int64_t base = offset(pair / cache->block_size), slot = pair % cache->block_size;
    const char* key = (const char*)cache->keys + (base + slot) * bytes;
    for (int d = 0; d < dim; ++d) __builtin_prefetch(key + (int64_t)d * cache->block_size * bytes, 1);
    const char* value = (const char*)cache->values + (base + slot * dim) * bytes;
    for (int at = 0; at < dim * bytes; at += 64) __builtin_prefetch(value + at, 1);
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

}  // namespace MOSAIC_ISA
}  // namespace mosaic
