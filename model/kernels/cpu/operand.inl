// In which form a network's numbers go into its products, and how rows are brought into it.

namespace mosaic {
namespace MOSAIC_ISA {

constexpr int64_t kRowChunk = 96;  // rows of a large product, at most, that go through a tile together
constexpr int64_t kTurns = 3;      // pieces a thread, at least, that keep all busy to the end

struct Walk {
  const Model& model;
  const Cache& cache;
  const Step& step;
  Scratch& scratch;
  Team& team;
};

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
