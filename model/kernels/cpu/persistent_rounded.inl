// Reads of the persistent memory by products of bfloat16: a tile of pairs at a time, some rows at a time, whose logits
// become weights in the processor's registers. Rows go through the tiles alike, so a row's result is its own.

namespace mosaic {
namespace MOSAIC_ISA {

constexpr int kTilePairs = 64;

// 2^x as bfloat16 keeps it, for x of any size: the relative error is below 1.1e-4, and 2^n exact.
MOSAIC_INLINE f32x16 rough_exp2(f32x16 x) {
  const f32x16 r = (f32x16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  f32x16 p = fma(r, splat(7.8267970e-2f), splat(2.2630768e-1f));
  p = fma(r, p, splat(6.9542435e-1f));
  p = fma(r, p, splat(1.0f));
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// What a row has read so far. Weights are 2^(logit - top): `top` is raised, and what was read faded, only once a logit
// is far above it, since a bfloat16 is as fine at 2^8 as at 1.
struct RowRead {
  static constexpr float kFar = 8.0f;
  f32x16 mass;
  float top;
};

static __attribute__((noinline, cold)) void raise(RowRead& row, float top, float* read, int64_t width) {
  const f32x16 fading = rough_exp2(splat(row.top - top));
  row.mass *= fading;
  row.top = top;
  for (int64_t d = 0; d < width; d += kLanes) store(read + d, load(read + d) * fading);
}

// One head's bank, and rows that read it.
struct Reading {
  const Matrix& keys;
  const Matrix& values;
  const uint16_t* queries;  // logits are to base 2
  int64_t query_stride;
  float* read;  // [rows, width], what the rows have read
  int64_t width;
  RowRead* rows;
};

// Some of those rows at one tile: their weights, [M, kTilePairs].
struct Weighing {
  int tile;
  int64_t row, count;
  const uint16_t* weights;
};

template <int M, int V>
static __attribute__((noinline)) void weigh_tile(const Reading& r, int tile, int64_t row, uint16_t* weights,
                                                 Fetching& fetching) {
  f32x16 acc[M][V] = {};
  const int pairs = r.keys.rows - tile * r.keys.width;
  multiply_bf16<M, V>(r.queries + row * r.query_stride, r.query_stride, Weights(whole(r.keys, tile), 0), r.keys.depth,
                      fetching.share((r.keys.depth + 1) / 2), acc);
  if (pairs < V * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const int seen = pairs - j * kLanes;
      const __mmask16 hidden = seen >= kLanes ? 0 : seen <= 0 ? 0xffff : 0xffff << seen;
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
        acc[m][j] = (f32x16)_mm512_mask_blend_ps(hidden, (__m512)acc[m][j], _mm512_set1_ps(-1e30f));
    }
  }
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    RowRead& mine = r.rows[row + m];
    f32x16 most = max(acc[m][0], acc[m][1]);
    if (V == 4) most = max(most, max(acc[m][2], acc[m][3]));
    if (_mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(mine.top + RowRead::kFar), _CMP_GT_OQ))
      raise(mine, largest(most), r.read + (row + m) * r.width, r.width);
    const f32x16 top = splat(mine.top);
#pragma GCC unroll 2
    for (int j = 0; j < V; j += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)rough_exp2(acc[m][j + 1] - top),
                                                (__m512)rough_exp2(acc[m][j] - top));
      _mm512_store_si512(weights + m * kTilePairs + j * kLanes, (__m512i)both);
      // The sum is of what will really be multiplied.
      mine.mass = (f32x16)_mm512_dpbf16_ps((__m512)mine.mass, both, ones);
    }
  }
}

template <int M, int V>
static __attribute__((noinline)) void add_values(const Reading& r, const Weighing& w, Fetching& fetching) {
  const int first = w.tile * r.keys.width, left = r.keys.rows - first;
  const int pairs = left < r.keys.width ? left : r.keys.width;
  const Ahead ahead = fetching.share((pairs + 1) / 2);
  for (int tile = 0; tile < r.values.tiles(); ++tile) {
    float* read = r.read + w.row * r.width + tile * r.values.width;
    f32x16 acc[M][V];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < V; ++j) acc[m][j] = load(read + m * r.width + j * kLanes);
    multiply_bf16<M, V>(w.weights, kTilePairs, Weights({r.values, tile, first, pairs}, 0), pairs,
                        tile == 0 ? ahead : Ahead{}, acc);
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < V; ++j) store(read + m * r.width + j * kLanes, acc[m][j]);
  }
}

template <int M>
static void weigh_rows(const Reading& r, int tile, int64_t row, uint16_t* weights, Fetching& fetching) {
  if (r.keys.width == 64) weigh_tile<M, 4>(r, tile, row, weights, fetching);
  else weigh_tile<M, 2>(r, tile, row, weights, fetching);
}

template <int M>
static void add_rows(const Reading& r, const Weighing& w, Fetching& fetching) {
  if (r.values.width == 64) add_values<M, 4>(r, w, fetching);
  else add_values<M, 2>(r, w, fetching);
}

// What `count` rows read from one bank, not yet divided by their masses. While the values of some rows are added the
// weights of the next ones are computed, as far as the processor looks ahead. `next` are weights to fetch at the end.
static void read_rounded(const Reading& r, int64_t count, const char* next) {
  for (int64_t i = 0; i < count * r.width; i += kLanes) store(r.read + i, f32x16{});
  for (int64_t i = 0; i < count; ++i) r.rows[i] = {f32x16{}, -1e30f};
  alignas(64) uint16_t weights[2][kRows * kTilePairs];
  const int64_t groups = (count + kRows - 1) / kRows;
  const int64_t value_bytes = (int64_t)r.keys.width * r.values.width * 2;
  Weighing pending = {};
  Fetching keys = {}, values = {};
  const auto add = [&] {
    if (pending.count)
      with_rows(pending.count, [&](auto m) { add_rows<m>(r, pending, values); });
    pending.count = 0;
  };
  for (int tile = 0; tile < r.keys.tiles(); ++tile) {
    const bool is_last = tile + 1 == r.keys.tiles();
    const char* later = is_last ? next : whole(r.keys, tile + 1).packed();
    keys = {later, later ? r.keys.tile_bytes() / 64 : 0, groups * ((r.keys.depth + 1) / 2)};
    int64_t row = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t some = (count - row + groups - group - 1) / (groups - group);
      uint16_t* mine = weights[pending.weights == weights[0]];
      if (groups == 1) add();
      with_rows(some, [&](auto m) { weigh_rows<m>(r, tile, row, mine, keys); });
      add();
      pending = {tile, row, some, mine};
      row += some;
    }
    const char* ahead = is_last ? nullptr : Window{r.values, 0, (tile + 1) * r.keys.width, 0}.packed();
    values = {ahead, ahead ? value_bytes / 64 : 0, groups * (r.keys.width / 2)};
  }
  add();
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
