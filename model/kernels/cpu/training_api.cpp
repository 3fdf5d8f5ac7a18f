// The C interface of the training kernels. Every call is whole: it returns when its outputs are written.
#include <memory>
#include <mutex>
#include <vector>

#include "training.h"

extern "C" const char* mosaic_path(const char* wanted);

namespace mosaic {

float* training_scratch(Purpose purpose, int64_t size) {
  static thread_local std::vector<float> pieces[kPurposes];
  auto& piece = pieces[purpose];
  if (static_cast<int64_t>(piece.size()) < size + kLanes) piece.resize(size + kLanes);
  const auto address = reinterpret_cast<uintptr_t>(piece.data());
  return piece.data() + (64 - address % 64) % 64 / sizeof(float);
}

namespace {

// Runs f with one team for all calls, which take turns; 1 where this processor cannot.
template <typename F>
int with_team(int num_threads, F f) {
  static std::mutex turn;
  static std::unique_ptr<Team> team;
  if (!mosaic_path("avx512bf16")) return 1;
  const std::lock_guard<std::mutex> lock(turn);
  if (!team || team->size() != num_threads) team = std::make_unique<Team>(num_threads);
  f(*team);
  return 0;
}

}  // namespace
}  // namespace mosaic

using namespace mosaic;

// 0, or 1 where this processor has no training kernels.
extern "C" {

#if defined(__x86_64__)
int mosaic_smooth(int num_threads, int backward, const Smoothing* s) {
  return with_team(num_threads, [&](Team& team) {
    backward ? avx512bf16::smooth_backward(*s, team) : avx512bf16::smooth_forward(*s, team);
  });
}

int mosaic_average(int num_threads, int backward, const Averaging* a) {
  return with_team(num_threads, [&](Team& team) {
    backward ? avx512bf16::average_backward(*a, team) : avx512bf16::average_forward(*a, team);
  });
}

int mosaic_normalise(int num_threads, int backward, const Normalising* n) {
  return with_team(num_threads, [&](Team& team) {
    backward ? avx512bf16::normalise_backward(*n, team) : avx512bf16::normalise_forward(*n, team);
  });
}
#endif

}  // extern "C"
