// The blocks of the second version: gated keys, bandwidths that grow, a short-term and a long-term memory, SwiGLU.

namespace mosaic {
namespace MOSAIC_ISA {

// Where one head of one memory keeps what a sequence needs besides its pairs.
struct GatedState {
  float *sum, *contribution;  // [head_dim]; of the key's sum, the mantissa
  float* scale;               // the logarithm of the sum's scale
};

MOSAIC_INLINE GatedState gated_state(const Walk& w, int l, int64_t slot, int memory, int head) {
  const Model& m = w.model;
  float* vectors = w.cache.state + ((int64_t)l * w.cache.num_slots + slot) * m.state_vectors() * m.n_embd;
  const int at = head * m.head_dim;
  return {vectors + memory * m.n_embd + at, vectors + (2 + memory) * m.n_embd + at,
          vectors + 4 * m.n_embd + memory * m.n_head + head};
}

MOSAIC_INLINE void copy_state(const GatedState& from, const GatedState& to, int dim) {
  __builtin_memcpy(to.sum, from.sum, dim * sizeof(float));
  __builtin_memcpy(to.contribution, from.contribution, dim * sizeof(float));
  *to.scale = *from.scale;
}

// sum = exp(log_gate) x + exp(log_decay) sum, the larger of the two at weight 1; y = unit(sum).
MOSAIC_INLINE void advance_gated(const GatedState& state, const float* x, float log_gate, float log_decay, float* y,
                                 int dim) {
  const float faded = *state.scale + log_decay;
  const float peak = faded > log_gate ? faded : log_gate;
  const float kept = exp_nonpositive(faded - peak), taken = exp_nonpositive(log_gate - peak);
  for (int d = 0; d < dim; ++d) state.sum[d] = kept * state.sum[d] + taken * x[d];
  *state.scale = peak;
  unit(state.sum, y, dim, 0.0f);
}

// What a memory shows to whom.
struct View {
  int64_t window, delay;
};

MOSAIC_INLINE View view_of(const Model& m, int memory) {
  return memory == 0 ? View{m.short_window - 1, 1} : View{kAll, m.long_delay};
}

MOSAIC_INLINE Pairs pairs_of(const Walk& w, int l, int64_t seq, int memory, int head) {
  const int64_t* tables = memory == 0 ? w.step.short_tables : w.step.block_tables;
  const int64_t* blocks = tables + seq * w.step.max_blocks;
  return {&w.cache, blocks, l * w.cache.num_blocks, head, w.model.n_head, w.model.head_dim};
}

// Appends the pairs that a sequence's new tokens complete in one head of one memory, and leaves their queries in place
// of their keys.
static void append_gated(const Walk& w, const Layer& layer, int l, int64_t seq, int memory, int head) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  const int n = m.n_embd, dim = m.head_dim, of_head = memory * m.n_head + head;
  const int count = w.step.num_new[seq];
  const int64_t computed = w.step.num_computed[seq], row0 = s.first_row[seq];
  const View view = view_of(m, memory);
  const Pairs pairs = pairs_of(w, l, seq, memory, head);
  const GatedState state = gated_state(w, l, w.step.slots[seq], memory, head);
  const float mix = layer.mix[of_head];
  float* queries = s.projected + row0 * s.projected_stride + 2 * memory * n + head * dim;
  float key[kMaxDim], value[kMaxDim];
  if (computed == 0) {
    for (int d = 0; d < dim; ++d) state.sum[d] = state.contribution[d] = 0;
    *state.scale = -__builtin_inff();
  }
  unit(state.sum, key, dim, 0.0f);
  for (int t = 0; t < count; ++t) {
    float* x = queries + t * s.projected_stride;
    const float* own = x + n;
    const float* gates = s.projected + (row0 + t) * s.projected_stride + 4 * n + 2 * memory * m.n_head + head;
    const int64_t position = computed + t;
    if (position > 0) {
      for (int d = 0; d < dim; ++d) value[d] = state.contribution[d] + (1.0f - mix) * own[d];
      unit(value, value, dim, 0.0f);
      pairs.append(position - 1, key, value);
    }
    for (int d = 0; d < dim; ++d) state.contribution[d] = mix * own[d];
    advance_gated(state, x, gates[0], -__builtin_fabsf(gates[m.n_head]), key, dim);
    if (w.step.snapshots && w.step.snapshots[row0 + t] >= 0)
      copy_state(state, gated_state(w, l, w.step.snapshots[row0 + t], memory, head), dim);
    const int64_t visible = position - view.delay + 1, seen = visible < view.window ? visible : view.window;
    const float n_alpha = __builtin_powf(seen > 1 ? (float)seen : 1.0f, layer.alpha[of_head]);
    const float beta = layer.beta1[of_head] * n_alpha + layer.beta0[of_head];
    for (int d = 0; d < dim; ++d) x[d] = key[d] * beta;
  }
}

// Appends and reads in `count` heads of one memory.
static void gated_heads(const Walk& w, const Layer& layer, int l, int64_t seq, int memory, int first, int count) {
  const int n = w.model.n_embd, dim = w.model.head_dim;
  const Rows& inputs = w.scratch.inputs;
  const int64_t row0 = w.scratch.first_row[seq], stride = w.scratch.projected_stride;
  for (int head = first; head < first + count; ++head) append_gated(w, layer, l, seq, memory, head);
  const View view = view_of(w.model, memory);
  const FloatRows queries = {w.scratch.projected + row0 * stride + 2 * memory * n + first * dim, stride};
  const FloatRows out = {inputs.wide + row0 * inputs.stride + memory * n + first * dim, inputs.stride};
  read_pairs(pairs_of(w, l, seq, memory, first), count, queries, w.step.num_new[seq],
             w.step.num_computed[seq] - view.delay + 1, view.window, w.scratch.mine(w.team),
             layer.value_scale + memory * w.model.n_head + first, out);
  narrow_heads(w, row0, w.step.num_new[seq], memory * n + first * dim, count * dim);
}

// Phase: gates and decays, in full precision whatever the type of the weights.
static void gate_rows(const Walk& w, const Layer& layer) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  w.team.share(w.step.num_tokens, kRowGrain, [&](int64_t row) {
    const float* x = s.inputs.wide + row * s.inputs.stride;
    float* y = s.projected + row * s.projected_stride + 4 * m.n_embd;
    for (int i = 0; i < 4 * m.n_head; ++i) y[i] = dot(layer.gates + (int64_t)i * m.n_embd, x, m.n_embd);
  });
}

// Phase: both contextual memories, some heads of one sequence in one of them a piece.
static void gated_memories(const Walk& w, const Layer& layer, int l) {
  const std::vector<HeadsPiece>& pieces = w.scratch.pieces;
  w.team.share(2 * (int64_t)pieces.size(), [&](int64_t i) {
    const HeadsPiece& piece = pieces[i / 2];
    gated_heads(w, layer, l, piece.seq, (int)(i % 2), piece.first, piece.count);
  });
}

// x / (1 + exp(-x)), by exponentials of what is not positive alone.
MOSAIC_INLINE f32x16 silu(f32x16 x) {
  const f32x16 e = exp_nonpositive(-max(x, -x));
  return x * where_below(x, 0.0f, e, splat(1.0f)) / (e + 1.0f);
}

// Phase: SiLU(gate) * up, as operands.
static void swish_rows(const Walk& w) {
  const Model& m = w.model;
  Scratch& s = w.scratch;
  const int n = m.persistent_size;
  w.team.share(w.step.num_tokens, kRowGrain, [&](int64_t row) {
    const float* gate = s.projected + row * s.projected_stride;
    float* y = s.inputs.wide + row * s.inputs.stride;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, silu(load(gate + i)) * load(gate + n + i));
    for (; i < n; ++i) y[i] = first_of(silu(splat(gate[i]))) * gate[n + i];
    write_operand(m, y, n, s.inputs, row * s.inputs.stride, row);
  });
}

static void second_version(const Walk& w, const Layer& layer, int l) {
  const int64_t tokens = w.step.num_tokens;
  const Output projected = {w.scratch.projected, w.scratch.projected_stride};
  const Output stream = {w.scratch.stream, w.model.n_embd, true};
  norm_rows(w, layer.contextual_norm);
  product(w, layer.projection, tokens, projected);
  gate_rows(w, layer);
  gated_memories(w, layer, l);
  narrow_rows(w, 2 * w.model.n_embd);
  product(w, layer.contextual_output, tokens, stream);
  norm_rows(w, layer.persistent_norm);
  product(w, layer.persistent_gate_up, tokens, projected);
  swish_rows(w);
  product(w, layer.persistent_down, tokens, stream);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
