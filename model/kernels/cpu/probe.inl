// What a core can do at best, for bounds on the time of a step: reading memory, and multiplying a tile that is at hand.

namespace mosaic {
namespace MOSAIC_ISA {

// Reads `bytes` (a multiple of 256) from `p`; the result only keeps the reading from being left out.
float read_through(const char* p, int64_t bytes) {
  f32x16 acc[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(p + i + 4096 + 64 * j);
      acc[j] += load((const float*)(p + i + 64 * j));
    }
  }
  return sum(acc[0] + acc[1] + acc[2] + acc[3]);
}

// Multiplies one tile of `m` with `rows` rows of zeros `times` times.
void multiply_often(const Matrix& m, const Model& model, const Rows& x, int64_t rows, int times, float* out) {
  const Operand asked = operand(model, x);
  for (int i = 0; i < times; ++i) multiply_tile(whole(m, 0), asked, 0, rows, {out, m.width});
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
