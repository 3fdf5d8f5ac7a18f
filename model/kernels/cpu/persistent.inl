// Reads of the persistent memory: a softmax over learned pairs, taken block after block so that any number of rows reads
// each block while it is in the processor's cache. Blocks lie at absolute positions: a row's result is its own. Products
// of bfloat16 have a way of their own.

namespace mosaic {
namespace MOSAIC_ISA {

constexpr float kNothing = -1e30f;  // a logit whose exponential is 0

// Turns `n` logits, followed by room up to a whole vector, into the operands of a block's weights, and `read`, what the
// row has read so far, into what it weighs against the new largest logit.
static void weigh(const Model& m, float* logits, int n, Softmax& softmax, float* read, const Rows& weights,
                  int64_t row) {
  const int padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int i = n; i < padded; ++i) logits[i] = kNothing;
  f32x16 most = load(logits);
  for (int i = kLanes; i < padded; i += kLanes) most = max(most, load(logits + i));
  const float here = largest(most), top = here > softmax.top ? here : softmax.top;
  f32x16 mass = {};
  float worth = 1.0f;
  if (form(m) == Form::kBytes) {
    // Bytes against the block's own largest: a block that matters little is still read finely.
    uint8_t* bytes = (uint8_t*)(void*)weights.narrow + row * weights.stride;
    i32x16 total = {};
    for (int i = 0; i < padded; i += kLanes) {
      const i32x16 p = nearest(rough_exp(load(logits + i) - here) * 255.0f);
      const u8x16 b = lowest_bytes(p);
      __builtin_memcpy(bytes + i, &b, sizeof b);
      total += p;
    }
    mass = to_floats(total);
    worth = exp_nonpositive(here - top);
    weights.scales[row] = worth;
  } else {
    for (int i = 0; i < padded; i += kLanes) {
      const f32x16 p = exp_nonpositive(load(logits + i) - top);
      store(logits + i, p);
      mass += p;
    }
  }
  const float fading = exp_nonpositive(softmax.top - top);
  if (fading != 1.0f)
    for (int d = 0; d < m.head_dim; ++d) read[d] *= fading;
  softmax.mass = softmax.mass * fading + sum(mass) * worth;
  softmax.top = top;
}

// What `count` rows read from one bank of one head, not yet divided by the mass of each. `next` are weights to fetch.
static void read_bank(const Model& m, const Matrix& keys, const Matrix& values, const Operand& asked, int64_t count,
                      Private& p, const char* next) {
#if defined(MOSAIC_BF16_PRODUCT)
  if (form(m) == Form::kRounded) {
    RowRead rows[kReadChunk];
    read_rounded({keys, values, (const uint16_t*)asked.data, asked.stride, p.read, values.padded_rows(), rows}, count,
                 next);
    for (int64_t r = 0; r < count; ++r) p.softmaxes[r].mass = sum(rows[r].mass);
    return;
  }
#endif
  const int block = read_block(m.type), tiles = block / keys.width;
  const int64_t window_bytes = (int64_t)block * values.width * 4 / values.group();
  for (int64_t i = 0; i < count * values.padded_rows(); ++i) p.read[i] = 0.0f;
  for (int64_t r = 0; r < count; ++r) p.softmaxes[r] = {};
  Operand weighed = operand(m, p.weights);
  weighed.is_signed = false;
  for (int first = 0; first < m.pmem_size; first += block) {
    const int n = m.pmem_size - first < block ? m.pmem_size - first : block;
    const bool is_last = first + block >= m.pmem_size;
    const int tile = first / keys.width;
    for (int t = tile; t < tile + tiles && t < keys.tiles(); ++t) {
      const Output logits = {p.weights.wide - first, p.weights.stride};
      const char* later = is_last ? next : whole(keys, t + tiles).packed();
      multiply_tile(whole(keys, t), asked, 0, count, logits, later, keys.tile_bytes());
    }
    for (int64_t r = 0; r < count; ++r)
      weigh(m, p.weights.wide + r * p.weights.stride, n, p.softmaxes[r], p.read + r * values.padded_rows(),
            p.weights, r);
    for (int t = 0; t < values.tiles(); ++t) {
      const Window w = {values, t, first, n};
      // In strips, a window lies in several places: the processor sees for itself where each goes on.
      const char* later = is_last || kHasStrips ? nullptr : Window{values, t, first + block, 0}.packed();
      multiply_tile(w, weighed, 0, count, {p.read, values.padded_rows(), true}, later, window_bytes);
    }
  }
}

// What rows [begin, end) read in one head, brought to the inputs of the next product. `next` is the head read after that.
static void persistent_rows(const Walk& w, const Layer& layer, int head, int64_t begin, int64_t end, int next) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  const int dim = m.head_dim;
  Private& p = s.mine(w.team);
  const Operand asked = operand(m, s.queries, begin * s.queries.stride + head * s.query_dim, begin * m.n_head + head);
  float* out = s.inputs.wide + begin * s.inputs.stride + head * dim;
  for (int bank = 0; bank < m.pmem_count; ++bank) {
    const Matrix* keys = layer.persistent_keys + bank * m.n_head;
    const Matrix& values = layer.persistent_values[bank * m.n_head + head];
    const char* ahead = next == head ? nullptr : (const char*)keys[next].packed;
    read_bank(m, keys[head], values, asked, end - begin, p, ahead);
    const int64_t width = values.padded_rows();
    for (int64_t r = 0; r < end - begin; ++r) {
      const float factor = layer.persistent_scale[head] / (p.softmaxes[r].mass * m.pmem_count);
      for (int d = 0; d < dim; ++d) {
        const float y = p.read[r * width + d] * factor;
        out[r * s.inputs.stride + d] = bank == 0 ? y : out[r * s.inputs.stride + d] + y;
      }
    }
  }
  narrow_heads(w, begin, end - begin, head * dim, dim);
}

// Phase: reads the persistent memory.
static void persistent_read(const Walk& w, const Layer& layer) {
  share_with_rows(w, w.model.n_head, w.step.num_tokens, kReadChunk, [&](int head, int64_t begin, int64_t end, int next) {
    persistent_rows(w, layer, head, begin, end, next);
  });
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
