// In which form a network's numbers go into its products, and how rows are brought into it.

namespace mosaic {
namespace MOSAIC_ISA {

constexpr int64_t kRowChunk = 96;  // rows of a large product, at most, that go through a tile together
constexpr int kTurns = 3;          // pieces a thread, at least, that keep all busy to the end

struct Walk {
  const Model& model;
  const Cache& cache;
  const Step& step;
  Scratch& scratch;
  Team& team;
};

// Shares out `count` tiles or heads, for `rows` rows each, at most `chunk` of them at a time: work(which, begin, end, next).
// One is one piece with all its rows, one chunk after the other, so that one thread alone has to have its weights, unless
// there are too few to go round. `next` is the one whose weights the thread will most likely need then, or `which` itself.
template <typename Work>
static void share_with_rows(const Walk& w, int count, int64_t rows, int64_t chunk, const Work& work) {
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const int64_t apart = count < kTurns * w.team.size() ? chunks : 1, together = chunks / apart;
  w.team.share(count * apart, [&](int64_t piece) {
    const int which = (int)(piece / apart), later = (int)((piece + 1) / apart);
    for (int64_t i = piece % apart * together, end = i + together; i < end; ++i)
      work(which, i * rows / chunks, (i + 1) * rows / chunks, i + 1 < end || later == count ? which : later);
  });
}

enum class Form { kWide, kRounded, kBytes };

MOSAIC_INLINE Form form(const Model& model) {
  if (model.type == kInt8) return Form::kBytes;
  return kHasBf16Product && model.type == kBFloat16 ? Form::kRounded : Form::kWide;
}

// The rows of a buffer as operands, from element `at` and, of quantised rows, scale `scale_at` on.
MOSAIC_INLINE Operand operand(const Model& model, const Rows& rows, int64_t at = 0, int64_t scale_at = 0) {
  switch (form(model)) {
    case Form::kBytes:
      return {(const uint8_t*)(void*)rows.narrow + at, rows.stride, rows.scales + scale_at, rows.scale_stride};
    case Form::kRounded: return {rows.narrow + at, rows.stride};
    default: return {rows.wide + at, rows.stride};
  }
}

// Brings the n numbers `x`, which may be those of `rows` itself, to element `at` of it.
static void write_operand(const Model& model, const float* x, int n, const Rows& rows, int64_t at, int64_t scale_at) {
  if (form(model) == Form::kBytes) {
    rows.scales[scale_at] = quantise(x, n, (uint8_t*)(void*)rows.narrow + at);
    return;
  }
  if (form(model) == Form::kWide) {
    if (rows.wide + at != x) __builtin_memcpy(rows.wide + at, x, n * sizeof(float));
    return;
  }
  uint16_t* rounded = rows.narrow + at;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const u16x16 r = narrow(load(x + i));
    __builtin_memcpy(rounded + i, &r, sizeof r);
  }
  for (; i < n; ++i) rounded[i] = narrow(x[i]);
  if (n & 1) rounded[n] = 0;
}

// Whether a head may bring what it gave into that form by itself: bytes need the whole row, and odd ends are padded.
MOSAIC_INLINE bool narrows_by_head(const Model& model) {
  return form(model) == Form::kRounded && model.head_dim % 2 == 0;
}

// Brings what some heads gave to `count` rows, n numbers each from `column` on, into the form of operands.
static void narrow_heads(const Walk& w, int64_t row0, int64_t count, int64_t column, int n) {
  if (!narrows_by_head(w.model)) return;
  const Rows& rows = w.scratch.inputs;
  for (int64_t row = row0; row < row0 + count; ++row) {
    const int64_t at = row * rows.stride + column;
    write_operand(w.model, rows.wide + at, n, rows, at, row);
  }
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
