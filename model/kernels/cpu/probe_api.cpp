// The C interface to what this machine can do at best, measured on several threads at once.
#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "paths.h"

namespace mosaic {
namespace {

constexpr int kRepeats = 8;

// Seconds that `work(thread)` takes on all threads together, the shortest of several.
template <typename F>
double shortest(int num_threads, F work) {
  double best = 1e9;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto started = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) threads.emplace_back(work, i);
    for (auto& thread : threads) thread.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
  }
  return best;
}

// A tile that fits the fastest cache, of zeros.
struct Tile {
  static constexpr int kRows = 96, kDepth = 256, kTimes = 200;
  Arena arena;
  RowsBuffer buffer;
  Matrix matrix;
  Rows rows;
  Buffer<float> out;

  explicit Tile(Type type) {
    matrix.rows = matrix.strip = matrix.width;
    matrix.depth = matrix.span = kDepth;
    matrix.type = type;
    matrix.packed = arena.take(matrix.tile_bytes());
    matrix.scales = static_cast<const float*>(arena.take(matrix.width * sizeof(float)));
    matrix.offsets = static_cast<const int32_t*>(arena.take(matrix.width * sizeof(int32_t)));
    rows = buffer.reserve(kRows, kDepth, 1);
    std::fill(rows.wide, rows.wide + kRows * kDepth, 0.0f);
    std::fill(rows.narrow, rows.narrow + kRows * kDepth, uint16_t{0});
    std::fill(rows.scales, rows.scales + kRows, 0.0f);
    out.reserve(kRows * matrix.width);
  }

  static double operations() { return 2.0 * kRows * kDepth * 64 * kTimes; }
};

}  // namespace
}  // namespace mosaic

using namespace mosaic;

extern "C" {

// Bytes a second that `num_threads` threads read from memory together.
double mosaic_read_rate(const char* path, int num_threads) {
  const Probe* probe = find_probe(path);
  if (!probe) return 0;
  constexpr int64_t kBytes = int64_t{128} << 20;
  Arena arena;
  const char* memory = static_cast<const char*>(arena.take(kBytes * num_threads));
  volatile float sink = 0;
  return kBytes * num_threads / shortest(num_threads, [&](int i) { sink = probe->read(memory + i * kBytes, kBytes); });
}

// Operations a second (a product counts two) of `num_threads` threads that multiply with weights of `type`.
double mosaic_product_rate(const char* path, int type, int num_threads) {
  const Probe* probe = find_probe(path);
  if (!probe) return 0;
  Sizes sizes = {};
  sizes.type = static_cast<Type>(type);
  const Model model(sizes);
  std::vector<std::unique_ptr<Tile>> own;
  for (int i = 0; i < num_threads; ++i) own.push_back(std::make_unique<Tile>(model.type));
  const double seconds = shortest(num_threads, [&](int i) {
    Tile& tile = *own[i];
    probe->multiply(tile.matrix, model, tile.rows, Tile::kRows, Tile::kTimes, tile.out);
  });
  return Tile::operations() * num_threads / seconds;
}

}  // extern "C"
