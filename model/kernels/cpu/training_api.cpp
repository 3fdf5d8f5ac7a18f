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

// Those of the fastest instruction set that this processor has.
const TrainingKernels* training_kernels() {
#if defined(__x86_64__)
  if (mosaic_path("avx512bf16")) return &avx512bf16::kTrainingKernels;
  if (mosaic_path("avx2")) return &avx2::kTrainingKernels;
#endif
  return nullptr;
}

// Runs f with the kernels and one team for all calls, which take turns; 1 where this processor has none.
template <typename F>
int with_team(int num_threads, F f) {
  static std::mutex turn;
  static std::unique_ptr<Team> team;
  static const TrainingKernels* const kernels = training_kernels();
  if (!kernels) return 1;
  const std::lock_guard<std::mutex> lock(turn);
  if (!team || team->size() != num_threads) team = std::make_unique<Team>(num_threads);
  f(*kernels, *team);
  return 0;
}

}  // namespace
}  // namespace mosaic

using namespace mosaic;

extern "C" {

// The instruction set that training is computed with; null where this processor has no training kernels.
const char* mosaic_training_path() {
  const TrainingKernels* const kernels = training_kernels();
  return kernels ? kernels->name : nullptr;
}

// 0, or 1 where there are none.

int mosaic_smooth(int num_threads, int backward, const Smoothing* s) {
  return with_team(num_threads, [&](const TrainingKernels& k, Team& team) { k.smooth[backward](*s, team); });
}

int mosaic_average(int num_threads, int backward, const Averaging* a) {
  return with_team(num_threads, [&](const TrainingKernels& k, Team& team) { k.average[backward](*a, team); });
}

int mosaic_normalise(int num_threads, int backward, const Normalising* n) {
  return with_team(num_threads, [&](const TrainingKernels& k, Team& team) { k.normalise[backward](*n, team); });
}

}  // extern "C"
