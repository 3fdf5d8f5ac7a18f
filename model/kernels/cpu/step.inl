// One engine step through the whole network, phase after phase; the team shares the pieces of each.

namespace mosaic {
namespace MOSAIC_ISA {

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
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const f32x16 v = (load(x + i) - mean) * inverse * load(norm.weight + i);
    store(y + i, norm.bias ? v + load(norm.bias + i) : v);
  }
  for (; i < n; ++i) y[i] = (x[i] - mean) * inverse * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

constexpr int64_t kRowGrain = 8;  // rows a thread takes at a time where each is soon done
constexpr int64_t kHeadGrain = 16;  // heads of rows, likewise

// Phase: norms rows of the stream into operands; post-norm networks continue from the normed stream.
static void norm_rows(const Walk& w, const Norm& norm) {
  const int n = w.model.n_embd;
  Scratch& s = w.scratch;
  w.team.share(w.step.num_tokens, kRowGrain, [&](int64_t row) {
    float* x = s.stream + row * n;
    float* y = s.inputs.wide + row * s.inputs.stride;
    layer_norm(x, n, norm, y);
    if (!w.model.pre_norm) __builtin_memcpy(x, y, n * sizeof(float));
    write_operand(w.model, y, n, s.inputs, row * s.inputs.stride, row);
  });
}

// Phase: out = W rows, for the first `count` rows of the inputs.
static void product(const Walk& w, const Matrix& matrix, int64_t count, const Output& out) {
  const Operand x = operand(w.model, w.scratch.inputs);
  share_with_rows(w, matrix.tiles(), count, kRowChunk, [&](int tile, int64_t begin, int64_t end, int next) {
    const char* ahead = next == tile ? nullptr : whole(matrix, next).packed();
    multiply_tile(whole(matrix, tile), x, begin, end, out, ahead, matrix.tile_bytes());
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

// One sequence's pairs in one head.
MOSAIC_INLINE Pairs pairs_of(const Walk& w, int l, int64_t seq, int head) {
  const Cache& c = w.cache;
  const int64_t* blocks = w.step.block_tables + seq * w.step.max_blocks;
  return {&c, blocks, l * c.num_blocks, head, w.model.n_head, w.model.head_dim};
}

// How many tokens ahead a head's part of their rows is fetched: it lies rows apart, and another core may have written it.
constexpr int kTokensAhead = 4;

// Fetches what appending the pair of a token will touch: `count` vectors of its row, `n` numbers apart, and a new block.
MOSAIC_INLINE void expect_pair(const Pairs& pairs, int64_t pair, const float* row, int n, int count) {
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < pairs.dim; d += kLanes) __builtin_prefetch(row + i * n + d);
  if (pair % pairs.cache->block_size == 0) pairs.expect(pair);
}

// Appends the pairs that a sequence's new tokens complete in one head, and leaves their queries in place of their keys.
static void append_pairs(const Walk& w, const Layer& layer, int l, int64_t seq, int head) {
  const Model& m = w.model;
  const int dim = m.head_dim;
  const int64_t computed = w.step.num_computed[seq], row0 = w.scratch.first_row[seq];
  float* average = state_of(w, l, w.step.slots[seq], 0, head);
  float* pending = state_of(w, l, w.step.slots[seq], 2, head);
  const Pairs pairs = pairs_of(w, l, seq, head);
  float key[kMaxDim], value[kMaxDim];
  if (computed == 0) {
    for (int d = 0; d < dim; ++d) average[d] = pending[d] = 0;
  }
  unit(average, key, dim, m.norm_eps);
  for (int t = 0; t < w.step.num_new[seq]; ++t) {
    float* row = w.scratch.projected + (row0 + t) * w.scratch.projected_stride + head * dim;
    const float* own = row + m.n_embd;
    const float* earlier = layer.mix ? own : row + 2 * m.n_embd;
    const float mix = layer.mix ? layer.mix[head] : 1.0f, rest = layer.mix ? 1.0f - mix : 1.0f;
    if (t + kTokensAhead < w.step.num_new[seq])
      expect_pair(pairs, computed + t - 1 + kTokensAhead, row + kTokensAhead * w.scratch.projected_stride, m.n_embd,
                  layer.mix ? 2 : 3);
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
}

// Appends and reads in `count` heads of one sequence.
static void contextual_heads(const Walk& w, const Layer& layer, int l, int64_t seq, int first, int count) {
  const int dim = w.model.head_dim, tokens = w.step.num_new[seq];
  const Rows& inputs = w.scratch.inputs;
  const int64_t computed = w.step.num_computed[seq], row0 = w.scratch.first_row[seq];
  const int64_t stride = w.scratch.projected_stride;
  for (int head = first; head < first + count; ++head) {
    if (head + 1 < first + count && computed > 0) pairs_of(w, l, seq, head + 1).expect(computed - 1);
    append_pairs(w, layer, l, seq, head);
  }
  const FloatRows queries = {w.scratch.projected + row0 * stride + first * dim, stride};
  const FloatRows out = {inputs.wide + row0 * inputs.stride + first * dim, inputs.stride};
  read_pairs(pairs_of(w, l, seq, first), count, queries, tokens, computed, kAll, w.scratch.mine(w.team),
             layer.value_scale + first, out);
  narrow_heads(w, row0, tokens, first * dim, count * dim);
}

// Phase: the contextual memories.
static void contextual(const Walk& w, const Layer& layer, int l) {
  const std::vector<HeadsPiece>& pieces = w.scratch.pieces;
  w.team.share((int64_t)pieces.size(), [&](int64_t i) {
    const HeadsPiece& piece = pieces[i];
    contextual_heads(w, layer, l, piece.seq, piece.first, piece.count);
  });
}

// Phase: brings the n numbers a row that the memories gave into the form of operands, where their heads did not.
static void narrow_rows(const Walk& w, int n) {
  if (form(w.model) == Form::kWide || narrows_by_head(w.model)) return;
  const Rows& rows = w.scratch.inputs;
  w.team.share(w.step.num_tokens, kRowGrain, [&](int64_t row) {
    const int64_t at = row * rows.stride;
    write_operand(w.model, rows.wide + at, n, rows, at, row);
  });
}

// Phase: the persistent memory's queries, one head of one sequence a piece.
static void persistent_queries(const Walk& w, const Layer& layer, int l) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  const int dim = m.head_dim;
  const int64_t grain = w.step.num_tokens > w.step.num_sequences ? 1 : kHeadGrain;
  w.team.share((int64_t)w.step.num_sequences * m.n_head, grain, [&](int64_t piece) {
    const int64_t seq = piece / m.n_head;
    const int head = (int)(piece % m.n_head);
    float* average = state_of(w, l, w.step.slots[seq], 1, head);
    // Products of bfloat16 are read as logits to base 2.
    const float sharpness = layer.persistent_sharpness[head] * (form(m) == Form::kRounded ? 1.44269504f : 1.0f);
    float key[kMaxDim];
    if (w.step.num_computed[seq] == 0)
      for (int d = 0; d < dim; ++d) average[d] = 0;
    for (int t = 0; t < w.step.num_new[seq]; ++t) {
      const int64_t row = s.first_row[seq] + t;
      const float* x = s.projected + row * s.projected_stride + head * dim;
      for (int d = 0; d < dim && t + kTokensAhead < w.step.num_new[seq]; d += kLanes)
        __builtin_prefetch(x + kTokensAhead * s.projected_stride + d);
      advance(average, x, layer.persistent_decay[head], key, dim, m.norm_eps);
      keep(w, l, row, 1, head, average);
      for (int d = 0; d < dim; ++d) key[d] *= sharpness;
      // Rounding a key here costs no more than rounding the stored keys did. Measured on trained weights, it moves the
      // predictions by 2e-5 nats (mean KL), the loss by less than 0.001%.
      const int64_t at = row * s.queries.stride + head * s.query_dim;
      write_operand(m, key, dim, s.queries, at, row * m.n_head + head);
    }
  });
}

static void embed(const Walk& w) {
  const Model& m = w.model;
  w.team.share(w.step.num_tokens, kRowGrain, [&](int64_t row) {
    const int64_t from = w.step.token_ids[row] * m.n_embd;
    float* x = w.scratch.stream + row * m.n_embd;
    for (int i = 0; i < m.n_embd; ++i) x[i] = element(m.embedding, from + i, m.embedding_type);
  });
}

static void logits(const Walk& w) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  w.team.share(w.step.num_logit_rows, kRowGrain, [&](int64_t i) {
    float* y = s.inputs.wide + i * s.inputs.stride;
    layer_norm(s.stream + (int64_t)w.step.logit_rows[i] * m.n_embd, m.n_embd, m.norm, y);
    write_operand(m, y, m.n_embd, s.inputs, i * s.inputs.stride, i);
  });
  product(w, m.head, w.step.num_logit_rows, {w.step.logits, m.vocab_size, false, m.logit_scale});
}

static void second_version(const Walk& w, const Layer& layer, int l);

void run_step(const Model& m, const Cache& cache, const Step& step, Scratch& s, Team& team) {
  const Walk w = {m, cache, step, s, team};
  const Output projected = {s.projected, s.projected_stride}, stream = {s.stream, m.n_embd, true};
  team.begin();
  embed(w);
  for (int l = 0; l < m.n_layer; ++l) {
    const Layer& layer = m.layers[l];
    if (m.version == 2) {
      second_version(w, layer, l);
      continue;
    }
    norm_rows(w, layer.contextual_norm);
    product(w, layer.projection, step.num_tokens, projected);
    contextual(w, layer, l);
    narrow_rows(w, m.n_embd);
    product(w, layer.contextual_output, step.num_tokens, stream);
    if (!m.has_persistent) continue;
    norm_rows(w, layer.persistent_norm);
    product(w, layer.persistent_key, step.num_tokens, projected);
    persistent_queries(w, layer, l);
    persistent_read(w, layer);
    narrow_rows(w, m.n_embd);
    product(w, layer.persistent_output, step.num_tokens, stream);
  }
  logits(w);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
