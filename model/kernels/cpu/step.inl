// One engine step through the whole network, phase after phase; the team shares the pieces of each.

namespace mosaic {
namespace MOSAIC_ISA {

constexpr int64_t kRowChunk = 96;    // rows of a large product that one piece covers

struct Walk {
  const Model& model;
  const Cache& cache;
  const Step& step;
  Scratch& scratch;
  Team& team;
};

// Operands of a product: float rows `x`, and where the weights want bfloat16 their rounded copies in scratch.
MOSAIC_INLINE bool rounds(const Model& model) { return kHasBf16Product && model.type == kBFloat16; }

static void write_operand(const Model& model, const float* x, int n, float* wide, uint16_t* rounded) {
  if (!rounds(model)) {
    if (wide != x) __builtin_memcpy(wide, x, n * sizeof(float));
    return;
  }
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const u16x16 r = narrow(load(x + i));
    __builtin_memcpy(rounded + i, &r, sizeof r);
  }
  for (; i < n; ++i) rounded[i] = narrow(x[i]);
  if (n & 1) rounded[n] = 0;
}

static void layer_norm(const float* x, int n, const Norm& norm, float* y) {
  f32x16 acc = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) acc += load(x + i);
  float total = sum(acc);
  for (; i < n; ++i) total += x[i];
  const float mean = total / n;
  f32x16 squares = {};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const f32x16 c = load(x + i) - mean;
    squares = fma(c, c, squares);
  }
  float spread = sum(squares);
  for (; i < n; ++i) spread += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / __builtin_sqrtf(spread / n + 1e-5f);
  for (i = 0; i < n; ++i) y[i] = (x[i] - mean) * inverse * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

// Phase: norms rows of the stream into operands; post-norm networks continue from the normed stream.
static void norm_rows(const Walk& w, const Norm& norm) {
  const int n = w.model.n_embd;
  Scratch& s = w.scratch;
  w.team.share(w.step.num_tokens, [&](int64_t row) {
    float* x = s.stream + row * n;
    float* y = s.normed + row * s.stride;
    layer_norm(x, n, norm, y);
    if (!w.model.pre_norm) __builtin_memcpy(x, y, n * sizeof(float));
    write_operand(w.model, y, n, y, s.rounded + row * s.stride);
  });
}

MOSAIC_INLINE Operand operand(const Walk& w) {
  Scratch& s = w.scratch;
  return rounds(w.model) ? Operand{s.rounded, s.stride} : Operand{s.normed, s.stride};
}

// Phase: out = W operand for all rows.
static void product(const Walk& w, const Matrix& matrix, const Operand& x, int64_t rows, float* out, int64_t stride,
                    Store mode, float scale = 1.0f) {
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  w.team.share(matrix.tiles() * chunks, [&](int64_t piece) {
    const int64_t begin = piece % chunks * kRowChunk;
    const int64_t end = begin + kRowChunk < rows ? begin + kRowChunk : rows;
    multiply_tile(matrix, (int)(piece / chunks), x, begin, end, out, stride, mode, scale);
  });
}

// One head's part of one of the three vectors of state in a slot.
MOSAIC_INLINE float* state_of(const Walk& w, int l, int64_t slot, int vector, int head) {
  const Model& m = w.model;
  return w.cache.state + (((int64_t)l * w.cache.num_slots + slot) * 3 + vector) * m.n_embd + head * m.head_dim;
}

// Keeps such a part as it is after one token, where a snapshot is wanted there.
MOSAIC_INLINE void keep(const Walk& w, int l, int64_t token, int vector, int head, const float* x) {
  if (!w.step.snapshots || w.step.snapshots[token] < 0) return;
  __builtin_memcpy(state_of(w, l, w.step.snapshots[token], vector, head), x, w.model.head_dim * sizeof(float));
}

// Appends the pairs that a sequence's new tokens complete in one head, and reads.
static void contextual_head(const Walk& w, const Layer& layer, int l, int64_t seq, int head) {
  const Model& m = w.model;
  const Cache& c = w.cache;
  Scratch& s = w.scratch;
  const int dim = m.head_dim;
  const int count = w.step.num_new[seq];
  const int64_t computed = w.step.num_computed[seq], row0 = s.first_row[seq];
  float* average = state_of(w, l, w.step.slots[seq], 0, head);
  float* pending = state_of(w, l, w.step.slots[seq], 2, head);
  const Pairs pairs = {&c, w.step.block_tables + seq * w.step.max_blocks, l * c.num_blocks, head, m.n_head, dim};
  float key[kMaxDim], value[kMaxDim];
  if (computed == 0) {
    for (int d = 0; d < dim; ++d) average[d] = pending[d] = 0;
  }
  unit(average, key, dim, m.norm_eps);
  for (int t = 0; t < count; ++t) {
    float* row = s.projected + (row0 + t) * s.projected_stride + head * dim;
    const float* own = row + m.n_embd;
    const float* earlier = layer.mix ? own : row + 2 * m.n_embd;
    const float mix = layer.mix ? layer.mix[head] : 1.0f, rest = layer.mix ? 1.0f - mix : 1.0f;
    if (computed + t > 0) {
      for (int d = 0; d < dim; ++d) value[d] = pending[d] + rest * earlier[d];
      unit(value, value, dim, m.norm_eps);
      pairs.append(computed + t - 1, key, value);
    }
    for (int d = 0; d < dim; ++d) pending[d] = mix * own[d];
    advance(average, row, layer.decay[head], key, dim, m.norm_eps);
    keep(w, l, row0 + t, 0, head, average);
    keep(w, l, row0 + t, 2, head, pending);
    for (int d = 0; d < dim; ++d) row[d] = key[d] * layer.sharpness[head];
  }
  float* queries = s.projected + row0 * s.projected_stride + head * dim;
  float* out = s.normed + row0 * s.stride + head * dim;
  Private& p = s.mine(w.team);
  const auto read =
      c.type == kFloat32 ? read_all<kFloat32> : c.type == kFloat16 ? read_all<kFloat16> : read_all<kBFloat16>;
  read(pairs, queries, s.projected_stride, computed, count, p.pair_logits, p.pair_stride, out, s.stride);
  for (int t = 0; t < count; ++t)
    for (int d = 0; d < dim; ++d) out[t * s.stride + d] *= layer.value_scale[head];
}

// Phase: the contextual memories. A piece is one head of one sequence, or all heads where there are sequences enough to
// keep every thread busy: then a thread meets the heads in the order in which they lie in memory.
static void contextual(const Walk& w, const Layer& layer, int l) {
  const int n_head = w.model.n_head;
  const int heads = w.step.num_sequences >= 4 * w.team.size() ? n_head : 1, groups = n_head / heads;
  w.team.share((int64_t)w.step.num_sequences * groups, [&](int64_t piece) {
    const int first = (int)(piece % groups) * heads;
    for (int head = first; head < first + heads; ++head) contextual_head(w, layer, l, piece / groups, head);
  });
}

// Phase: rounds what the memories gave into operands.
static void round_rows(const Walk& w) {
  if (!rounds(w.model)) return;
  Scratch& s = w.scratch;
  w.team.share(w.step.num_tokens, [&](int64_t row) {
    write_operand(w.model, s.normed + row * s.stride, w.model.n_embd, nullptr, s.rounded + row * s.stride);
  });
}

// Phase: the persistent memory's queries, one head of one sequence a piece.
static void persistent_queries(const Walk& w, const Layer& layer, int l) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  const int dim = m.head_dim;
  w.team.share((int64_t)w.step.num_sequences * m.n_head, [&](int64_t piece) {
    const int64_t seq = piece / m.n_head;
    const int head = (int)(piece % m.n_head);
    float* average = state_of(w, l, w.step.slots[seq], 1, head);
    float key[kMaxDim];
    if (w.step.num_computed[seq] == 0)
      for (int d = 0; d < dim; ++d) average[d] = 0;
    for (int t = 0; t < w.step.num_new[seq]; ++t) {
      const int64_t row = s.first_row[seq] + t;
      const float* x = s.projected + row * s.projected_stride + head * dim;
      advance(average, x, layer.persistent_decay[head], key, dim, m.norm_eps);
      keep(w, l, row, 1, head, average);
      for (int d = 0; d < dim; ++d) key[d] *= layer.persistent_sharpness[head];
      // Rounding a key here costs no more than rounding the stored keys did. Measured on trained weights, it moves the
      // predictions by 2e-5 nats (mean KL), the loss by less than 0.001%.
      const int64_t at = row * s.query_stride + head * s.query_dim;
      write_operand(m, key, dim, s.query + at, s.query_rounded + at);
    }
  });
}

// Softmax weights of one row of logits, not yet divided by their sum, as operands; returns the sum.
static float weigh(const Model& m, float* logits, int n, uint16_t* rounded) {
  f32x16 most = splat(-__builtin_inff());
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max(most, load(logits + i));
  float top = largest(most);
  for (; i < n; ++i) top = logits[i] > top ? logits[i] : top;
  const bool narrows = rounds(m);
  f32x16 mass = {};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    f32x16 p = exp_nonpositive(load(logits + i) - top);
    if (narrows) {
      const u16x16 r = narrow(p);
      __builtin_memcpy(rounded + i, &r, sizeof r);
      p = (f32x16)(__builtin_convertvector(r, u32x16) << 16);  // the sum is of what will really be multiplied
    } else {
      store(logits + i, p);
    }
    mass += p;
  }
  float total = sum(mass);
  for (; i < n; ++i) {
    float p = exp_nonpositive(logits[i] - top);
    if (narrows) p = widen(rounded[i] = narrow(p));
    else logits[i] = p;
    total += p;
  }
  if (narrows && (n & 1)) rounded[n] = 0;
  return total;
}

// Phase: reads the persistent memory, some rows of one head a piece.
static void persistent_read(const Walk& w, const Layer& layer) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  const int dim = m.head_dim, size = m.pmem_size;
  const int64_t rows = w.step.num_tokens, chunks = (rows + kReadChunk - 1) / kReadChunk;
  w.team.share(m.n_head * chunks, [&](int64_t piece) {
    const int head = (int)(piece / chunks);
    const int64_t begin = piece % chunks * kReadChunk;
    const int64_t count = rows - begin < kReadChunk ? rows - begin : kReadChunk;
    Private& p = s.mine(w.team);
    const int64_t at = begin * s.query_stride + head * s.query_dim;
    const Operand asked =
        rounds(m) ? Operand{s.query_rounded + at, s.query_stride} : Operand{s.query + at, s.query_stride};
    float* out = s.normed + begin * s.stride + head * dim;
    for (int bank = 0; bank < m.pmem_count; ++bank) {
      const Matrix& keys = layer.persistent_keys[bank * m.n_head + head];
      const Matrix& values = layer.persistent_values[bank * m.n_head + head];
      for (int tile = 0; tile < keys.tiles(); ++tile)
        multiply_tile(keys, tile, asked, 0, count, p.logits, p.stride, kWrite, 1.0f);
      float factor[kReadChunk];
      for (int64_t r = 0; r < count; ++r)
        factor[r] = layer.persistent_scale[head] /
                    (weigh(m, p.logits + r * p.stride, size, p.weights + r * p.stride) * m.pmem_count);
      const Operand weights = rounds(m) ? Operand{p.weights, p.stride} : Operand{p.logits, p.stride};
      for (int tile = 0; tile < values.tiles(); ++tile)
        multiply_tile(values, tile, weights, 0, count, p.read, dim, kWrite, 1.0f);
      for (int64_t r = 0; r < count; ++r)
        for (int d = 0; d < dim; ++d) {
          const float y = p.read[r * dim + d] * factor[r];
          out[r * s.stride + d] = bank == 0 ? y : out[r * s.stride + d] + y;
        }
    }
  });
}

static void embed(const Walk& w) {
  const Model& m = w.model;
  w.team.share(w.step.num_tokens, [&](int64_t row) {
    const int64_t from = w.step.token_ids[row] * m.n_embd;
    float* x = w.scratch.stream + row * m.n_embd;
    for (int i = 0; i < m.n_embd; ++i) x[i] = element(m.embedding, from + i, m.embedding_type);
  });
}

static void logits(const Walk& w) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  w.team.share(w.step.num_logit_rows, [&](int64_t i) {
    float* y = s.normed + i * s.stride;
    layer_norm(s.stream + (int64_t)w.step.logit_rows[i] * m.n_embd, m.n_embd, m.norm, y);
    write_operand(m, y, m.n_embd, y, s.rounded + i * s.stride);
  });
  product(w, m.head, operand(w), w.step.num_logit_rows, w.step.logits, m.vocab_size, kWrite, m.logit_scale);
}

void run_step(const Model& m, const Cache& cache, const Step& step, Scratch& s, Team& team) {
  const Walk w = {m, cache, step, s, team};
  team.begin();
  embed(w);
  for (int l = 0; l < m.n_layer; ++l) {
    const Layer& layer = m.layers[l];
    norm_rows(w, layer.contextual_norm);
    product(w, layer.projection, operand(w), w.step.num_tokens, s.projected, s.projected_stride, kWrite);
    contextual(w, layer, l);
    round_rows(w);
    product(w, layer.contextual_output, operand(w), w.step.num_tokens, s.stream, m.n_embd, kAdd);
    if (!m.has_persistent) continue;
    norm_rows(w, layer.persistent_norm);
    product(w, layer.persistent_key, operand(w), w.step.num_tokens, s.projected, s.projected_stride, kWrite);
    persistent_queries(w, layer, l);
    persistent_read(w, layer);
    round_rows(w);
    product(w, layer.persistent_output, operand(w), w.step.num_tokens, s.stream, m.n_embd, kAdd);
  }
  logits(w);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
