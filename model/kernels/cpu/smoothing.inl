// Kernel smoothing for training, forwards and backwards, in blocks of logits that stay in the cache: never as a whole
// matrix.

namespace mosaic {
namespace MOSAIC_ISA {

constexpr int kQueryBlock = 48, kPairBlock = 96;  // multiples of every tile's rows; pairs of a whole vector too

// Rows of a view as [count, width], zeros behind dim and behind the last row.
static void gather(const View& view, int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t count,
                   int64_t dim, int64_t width, float* to) {
  for (int64_t r = 0; r < count; ++r, to += width) {
    if (r < rows) memcpy(to, view.row(batch, head, first + r), dim * sizeof(float));
    const int64_t written = r < rows ? dim : 0;
    memset(to + written, 0, (width - written) * sizeof(float));
  }
}

static void scatter(const float* from, int64_t width, const View& view, int64_t batch, int64_t head, int64_t first,
                    int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) memcpy(view.row(batch, head, first + r), from + r * width, dim * sizeof(float));
}

// [rows, width] -> blocks of [width, kPairBlock]: vectors hold neighbouring rows.
static void turn(const float* from, int64_t width, int64_t rows, float* to) {
  for (int64_t block = 0; block < rows; block += kPairBlock)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t r = 0; r < kPairBlock; ++r) *to++ = from[(block + r) * width + d];
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many of a block's pairs query q sees; q counts from the first query, `first` is the block's first pair.
static int64_t visible(const Smoothing& s, int64_t q, int64_t first) {
  const int64_t end = s.causal && q + 1 < s.pairs ? q + 1 : s.pairs;
  return end <= first ? 0 : end - first < kPairBlock ? end - first : kPairBlock;
}

// Sets the logits of a row from `count` on to what exp turns into 0.
static void hide(float* logits, int64_t count) {
  for (int64_t j = count; j < kPairBlock; ++j) logits[j] = -1e30f;
}

static float dot(const float* a, const float* b, int64_t width) {
  f32x16 total{};
  for (int64_t d = 0; d < width; d += kLanes) total = fma(load(a + d), load(b + d), total);
  return sum(total);
}

// One row of logits into weights exp(logit - highest) with the highest logit so far; `output` holds the sums before.
static void weigh(float* logits, int64_t width, float* output, float& highest, float& total) {
  f32x16 most = splat(highest);
  for (int j = 0; j < kPairBlock; j += kLanes) most = max(most, load(logits + j));
  const float now = largest(most);
  f32x16 added{};
  for (int j = 0; j < kPairBlock; j += kLanes) {
    const f32x16 weight = exp_nonpositive(load(logits + j) - splat(now));
    store(logits + j, weight);
    added += weight;
  }
  if (now != highest) {
    const float fades = exp_nonpositive(highest - now);
    for (int64_t d = 0; d < width; d += kLanes) store(output + d, load(output + d) * splat(fades));
    total *= fades;
    highest = now;
  }
  total += sum(added);
}

// With kNarrow the weights and `value_pairs` are multiplied as bfloat16; logits never are.
template <bool kNarrow>
static void smooth_block(const Smoothing& s, int64_t batch, int64_t head, int64_t first, const float* keys_across,
                         const float* values, const uint32_t* value_pairs, int64_t width) {
  const int64_t rows = s.queries - first < kQueryBlock ? s.queries - first : kQueryBlock;
  float* const queries = training_scratch(kQueries, kQueryBlock * width);
  float* const outputs = training_scratch(kOutputs, kQueryBlock * width);
  float* const logits = training_scratch(kLogits, kQueryBlock * kPairBlock);
  float highest[kQueryBlock], total[kQueryBlock] = {};
  for (float& h : highest) h = -1e30f;
  gather(s.query, batch, head, first, rows, kQueryBlock, s.dim, width, queries);
  memset(outputs, 0, kQueryBlock * width * sizeof(float));
  for (int64_t pair = 0; pair < s.pairs && visible(s, first + rows - 1, pair) > 0; pair += kPairBlock) {
    product<false>(queries, width, 1, keys_across + pair * width, kPairBlock, logits, kPairBlock, kQueryBlock,
                   kPairBlock, s.dim);
    for (int64_t r = 0; r < kQueryBlock; ++r) {
      float* const row = logits + r * kPairBlock;
      hide(row, r < rows ? visible(s, first + r, pair) : 0);
      weigh(row, width, outputs + r * width, highest[r], total[r]);
      if constexpr (kNarrow) narrow_all(row, kPairBlock, reinterpret_cast<uint16_t*>(row));
    }
    if constexpr (kNarrow)
      product<true>(reinterpret_cast<const uint32_t*>(logits), kPairBlock, 1, value_pairs + pair / 2 * width, width,
                    outputs, width, kQueryBlock, width, kPairBlock / 2);
    else
      product<true>(logits, kPairBlock, 1, values + pair * width, width, outputs, width, kQueryBlock, width,
                    kPairBlock);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float share = 1 / total[r];
    for (int64_t d = 0; d < width; d += kLanes)
      store(outputs + r * width + d, load(outputs + r * width + d) * splat(share));
    s.log_sum[(batch * s.heads + head) * s.queries + first + r] = highest[r] + logf(total[r]);
  }
  scatter(outputs, width, s.output, batch, head, first, rows, s.dim);
}

template <bool kNarrow>
static void smooth_all(const Smoothing& s, Team& team) {
  const int64_t width = round_up(s.dim, kLanes), pairs = round_up(s.pairs, kPairBlock);
  constexpr int64_t kPiece = 8 * kQueryBlock;  // enough for the keys to be worth turning
  const int64_t pieces = (s.queries + kPiece - 1) / kPiece;
  team.begin();
  team.share(s.batches * s.heads * pieces, [&](int64_t i) {
    const int64_t batch = i / pieces / s.heads, head = i / pieces % s.heads, first = i % pieces * kPiece;
    float* const keys = training_scratch(kKeys, pairs * width);
    float* const keys_across = training_scratch(kKeysAcross, pairs * width);
    float* const values = training_scratch(kValues, pairs * width);
    gather(s.key, batch, head, 0, s.pairs, pairs, s.dim, width, keys);
    turn(keys, width, pairs, keys_across);
    gather(s.value, batch, head, 0, s.pairs, pairs, s.dim, width, values);
    uint32_t* const value_pairs = training_words(kValuePairs, kNarrow ? pairs / 2 * width : 0);
    if constexpr (kNarrow) pair_rows(values, width, pairs, value_pairs);
    for (int64_t q = first; q < s.queries && q < first + kPiece; q += kQueryBlock)
      smooth_block<kNarrow>(s, batch, head, q, keys_across, values, value_pairs, width);
  });
}

void smooth_forward(const Smoothing& s, Team& team) {
  if constexpr (kHasNarrowProducts)
    if (s.narrow) return smooth_all<true>(s, team);
  smooth_all<false>(s, team);
}

// One head's pairs in the forms that products read, and the sums of their gradients.
struct HeadPairs {
  const float *keys, *keys_across, *values_across;
  const uint32_t *key_pairs, *value_pairs_across;
  float *key_sums, *value_sums;
};

// One row's logits and slopes into weights and the logits' gradients, a vector at a time.
MOSAIC_INLINE void slope(const float* logits, const float* slopes, float log_sum, float mean, f32x16& weight,
                         f32x16& gradient) {
  weight = exp_nonpositive(load(logits) - splat(log_sum));
  gradient = weight * (load(slopes) - splat(mean));
}

// The gradients of a block of logits, added to what the queries, keys and values get.
static void add_gradients(float* weights, float* slopes, const float* log_sum, const float* mean, const float* queries,
                          const float* upstream, const HeadPairs& head, int64_t pair, int64_t width, float* sums) {
  for (int64_t r = 0; r < kQueryBlock; ++r)
    for (int64_t j = r * kPairBlock; j < (r + 1) * kPairBlock; j += kLanes) {
      f32x16 weight, gradient;
      slope(weights + j, slopes + j, log_sum[r], mean[r], weight, gradient);
      store(weights + j, weight);
      store(slopes + j, gradient);
    }
  product<true>(slopes, kPairBlock, 1, head.keys + pair * width, width, sums, width, kQueryBlock, width, kPairBlock);
  product<true>(slopes, 1, kPairBlock, queries, width, head.key_sums + pair * width, width, kPairBlock, width,
                kQueryBlock);
  product<true>(weights, 1, kPairBlock, upstream, width, head.value_sums + pair * width, width, kPairBlock, width,
                kQueryBlock);
}

// The same by products of bfloat16; `queries` and `upstream` are pairs of rows.
static void add_gradients(float* weights, float* slopes, const float* log_sum, const float* mean,
                          const uint32_t* queries, const uint32_t* upstream, const HeadPairs& head, int64_t pair_index,
                          int64_t width, float* sums);

#if defined(MOSAIC_BF16_PRODUCT)
static void add_gradients(float* weights, float* slopes, const float* log_sum, const float* mean,
                          const uint32_t* queries, const uint32_t* upstream, const HeadPairs& head, int64_t pair_index,
                          int64_t width, float* sums) {
  uint32_t* const slope_rows = training_words(kSlopeRows, kQueryBlock * kPairBlock / 2);
  uint32_t* const weight_pairs = reinterpret_cast<uint32_t*>(weights);
  uint32_t* const slope_pairs = reinterpret_cast<uint32_t*>(slopes);
  for (int64_t r = 0; r < kQueryBlock; r += 2)
    for (int64_t j = 0; j < kPairBlock; j += kLanes) {
      const int64_t one = r * kPairBlock + j, other = one + kPairBlock;
      f32x16 weight[2], gradient[2];
      slope(weights + one, slopes + one, log_sum[r], mean[r], weight[0], gradient[0]);
      slope(weights + other, slopes + other, log_sum[r + 1], mean[r + 1], weight[1], gradient[1]);
      store(weight_pairs + one, pair(weight[0], weight[1]));
      store(slope_pairs + one, pair(gradient[0], gradient[1]));
      uint16_t* const row = reinterpret_cast<uint16_t*>(slope_rows) + one;
      store(row, narrow(gradient[0]));
      store(row + kPairBlock, narrow(gradient[1]));
    }
  product<true>(slope_rows, kPairBlock / 2, 1, head.key_pairs + pair_index / 2 * width, width, sums, width, kQueryBlock,
                width, kPairBlock / 2);
  product<true>(slope_pairs, 1, 2 * kPairBlock, queries, width, head.key_sums + pair_index * width, width, kPairBlock,
                width, kQueryBlock / 2);
  product<true>(weight_pairs, 1, 2 * kPairBlock, upstream, width, head.value_sums + pair_index * width, width,
                kPairBlock, width, kQueryBlock / 2);
}
#endif

// The gradients that one block of queries gives, added to the sums of its head's keys and values.
template <bool kNarrow>
static void smooth_block_backward(const Smoothing& s, int64_t batch, int64_t head, int64_t first, int64_t width,
                                  const HeadPairs& pairs) {
  const int64_t rows = s.queries - first < kQueryBlock ? s.queries - first : kQueryBlock;
  float* const queries = training_scratch(kQueries, kQueryBlock * width);
  float* const sums = training_scratch(kOutputs, kQueryBlock * width);
  float* const upstream = training_scratch(kUpstream, kQueryBlock * width);
  float* const weights = training_scratch(kLogits, kQueryBlock * kPairBlock);
  float* const slopes = training_scratch(kSlopes, kQueryBlock * kPairBlock);
  float mean[kQueryBlock] = {}, log_sum[kQueryBlock] = {};
  gather(s.query, batch, head, first, rows, kQueryBlock, s.dim, width, queries);
  gather(s.output_gradient, batch, head, first, rows, kQueryBlock, s.dim, width, upstream);
  gather(s.output, batch, head, first, rows, kQueryBlock, s.dim, width, sums);
  // Before the means: where one weight is all but 1, its slope must be the mean, to the last bit.
  if constexpr (kNarrow) round_all(upstream, kQueryBlock * width);
  for (int64_t r = 0; r < rows; ++r) {
    mean[r] = dot(upstream + r * width, sums + r * width, width);
    log_sum[r] = s.log_sum[(batch * s.heads + head) * s.queries + first + r];
  }
  const int64_t words = kNarrow ? kQueryBlock / 2 * width : 0;
  uint32_t* const query_pairs = training_words(kQueryPairs, words);
  uint32_t* const upstream_pairs = training_words(kUpstreamPairs, words);
  uint32_t* const upstream_rows = training_words(kUpstreamRows, words);
  if constexpr (kNarrow) {
    pair_rows(queries, width, kQueryBlock, query_pairs);
    pair_rows(upstream, width, kQueryBlock, upstream_pairs);
    narrow_all(upstream, kQueryBlock * width, reinterpret_cast<uint16_t*>(upstream_rows));
  }
  memset(sums, 0, kQueryBlock * width * sizeof(float));
  for (int64_t pair = 0; pair < s.pairs && visible(s, first + rows - 1, pair) > 0; pair += kPairBlock) {
    product<false>(queries, width, 1, pairs.keys_across + pair * width, kPairBlock, weights, kPairBlock, kQueryBlock,
                   kPairBlock, s.dim);
    for (int64_t r = 0; r < kQueryBlock; ++r)
      hide(weights + r * kPairBlock, r < rows ? visible(s, first + r, pair) : 0);
    if constexpr (kNarrow) {
      product<false>(upstream_rows, width / 2, 1, pairs.value_pairs_across + pair / 2 * width, kPairBlock, slopes,
                     kPairBlock, kQueryBlock, kPairBlock, width / 2);
      add_gradients(weights, slopes, log_sum, mean, query_pairs, upstream_pairs, pairs, pair, width, sums);
    } else {
      product<false>(upstream, width, 1, pairs.values_across + pair * width, kPairBlock, slopes, kPairBlock,
                     kQueryBlock, kPairBlock, s.dim);
      add_gradients(weights, slopes, log_sum, mean, queries, upstream, pairs, pair, width, sums);
    }
  }
  scatter(sums, width, s.query_gradient, batch, head, first, rows, s.dim);
}

template <bool kNarrow>
static void smooth_all_backward(const Smoothing& s, Team& team) {
  const int64_t width = round_up(s.dim, kLanes), pairs = round_up(s.pairs, kPairBlock);
  team.begin();
  // A head's sums over its queries are made by one thread, in order: equal bits, however many threads there are.
  team.share(s.batches * s.heads, [&](int64_t i) {
    const int64_t batch = i / s.heads, head = i % s.heads;
    float* const keys = training_scratch(kKeys, pairs * width);
    float* const keys_across = training_scratch(kKeysAcross, pairs * width);
    float* const values = training_scratch(kValues, pairs * width);
    float* const values_across = training_scratch(kValuesAcross, pairs * width);
    float* const key_sums = training_scratch(kKeySums, pairs * width);
    float* const value_sums = training_scratch(kValueSums, pairs * width);
    const int64_t words = kNarrow ? pairs / 2 * width : 0;
    uint32_t* const key_pairs = training_words(kKeyPairs, words);
    uint32_t* const value_pairs = training_words(kValuePairs, words);
    gather(s.key, batch, head, 0, s.pairs, pairs, s.dim, width, keys);
    turn(keys, width, pairs, keys_across);
    gather(s.value, batch, head, 0, s.pairs, pairs, s.dim, width, values);
    turn(values, width, pairs, values_across);
    if constexpr (kNarrow) {
      pair_rows(keys, width, pairs, key_pairs);
      pair_rows(values_across, kPairBlock, pairs / kPairBlock * width, value_pairs);
    }
    memset(key_sums, 0, pairs * width * sizeof(float));
    memset(value_sums, 0, pairs * width * sizeof(float));
    const HeadPairs given{keys, keys_across, values_across, key_pairs, value_pairs, key_sums, value_sums};
    for (int64_t q = 0; q < s.queries; q += kQueryBlock)
      smooth_block_backward<kNarrow>(s, batch, head, q, width, given);
    scatter(key_sums, width, s.key_gradient, batch, head, 0, s.pairs, s.dim);
    scatter(value_sums, width, s.value_gradient, batch, head, 0, s.pairs, s.dim);
  });
}

void smooth_backward(const Smoothing& s, Team& team) {
  if constexpr (kHasNarrowProducts)
    if (s.narrow) return smooth_all_backward<true>(s, team);
  smooth_all_backward<false>(s, team);
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
