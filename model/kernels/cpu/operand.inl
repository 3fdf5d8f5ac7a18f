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

}  // namespace MOSAIC_ISA
}  // namespace mosaic
