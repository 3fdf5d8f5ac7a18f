// Leaky averages and norms for training in float32, forwards and backwards.

namespace mosaic {
namespace MOSAIC_ISA {

// The sum of a[d] * b[d].
static float dot_any(const float* a, const float* b, int64_t dim) {
  f32x16 total{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) total = fma(load(a + d), load(b + d), total);
  float rest = 0;
  for (; d < dim; ++d) rest += a[d] * b[d];
  return sum(total) + rest;
}

// to = x + factor * y
static void add_scaled(const float* x, float factor, const float* y, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, fma(splat(factor), load(y + d), load(x + d)));
  for (; d < dim; ++d) to[d] = x[d] + factor * y[d];
}

static void scale_to(const float* x, float factor, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, splat(factor) * load(x + d));
  for (; d < dim; ++d) to[d] = factor * x[d];
}

void average_forward(const Averaging& a, Team& team) {
  team.begin();
  team.share(a.batches * a.heads, [&](int64_t i) {
    const int64_t batch = i / a.heads, head = i % a.heads;
    memcpy(a.output.row(batch, head, 0), a.input.row(batch, head, 0), a.dim * sizeof(float));
    for (int64_t t = 1; t < a.time; ++t)
      add_scaled(a.input.row(batch, head, t), a.decay[head], a.output.row(batch, head, t - 1), a.dim,
                 a.output.row(batch, head, t));
  });
}

void average_backward(const Averaging& a, Team& team) {
  team.begin();
  team.share(a.batches * a.heads, [&](int64_t i) {
    const int64_t batch = i / a.heads, head = i % a.heads, last = a.time - 1;
    memcpy(a.input_gradient.row(batch, head, last), a.output_gradient.row(batch, head, last), a.dim * sizeof(float));
    double slope = 0;
    for (int64_t t = last; t > 0; --t) {
      const float* const x = a.input_gradient.row(batch, head, t);
      slope += dot_any(x, a.output.row(batch, head, t - 1), a.dim);
      add_scaled(a.output_gradient.row(batch, head, t - 1), a.decay[head], x, a.dim,
                 a.input_gradient.row(batch, head, t - 1));
    }
    a.decay_gradient[i] = static_cast<float>(slope);
  });
}

constexpr int64_t kNormRows = 1024;  // rows that one thread takes at a time

void normalise_forward(const Normalising& n, Team& team) {
  team.begin();
  team.share((n.rows + kNormRows - 1) / kNormRows, [&](int64_t piece) {
    for (int64_t r = piece * kNormRows; r < n.rows && r < (piece + 1) * kNormRows; ++r) {
      const float* const x = n.input + r * n.dim;
      n.scale[r] = 1 / (sqrtf(dot_any(x, x, n.dim)) + n.eps);
      scale_to(x, n.scale[r], n.dim, n.output + r * n.dim);
    }
  });
}

// dx = s (g - y (y . g) / |y|) with s = 1 / (|x| + eps); |y| is 1 but for eps.
void normalise_backward(const Normalising& n, Team& team) {
  team.begin();
  team.share((n.rows + kNormRows - 1) / kNormRows, [&](int64_t piece) {
    for (int64_t r = piece * kNormRows; r < n.rows && r < (piece + 1) * kNormRows; ++r) {
      const float *const y = n.output + r * n.dim, *const g = n.output_gradient + r * n.dim;
      float* const x = n.input_gradient + r * n.dim;
      const float norm = sqrtf(dot_any(y, y, n.dim));
      add_scaled(g, norm > 0 ? -dot_any(y, g, n.dim) / norm : 0, y, n.dim, x);
      scale_to(x, n.scale[r], n.dim, x);
    }
  });
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
