// The C interface of the training kernels. Every call is whole: it returns when its outputs are written.
#include <memory>
#include <mutex>
#include <string>
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

struct TrainingPath {
  const char* name;
  void (*smooth[2])(const Smoothing&, Team&);
  void (*average[2])(const Averaging&, Team&);
  void (*normalise[2])(const Normalising&, Team&);
};

#define MOSAIC_TRAINING_PATH(isa)                                                                   \
  {                                                                                                 \
    #isa, {isa::smooth_forward, isa::smooth_backward}, {isa::average_forward, isa::average_backward}, { \
      isa::normalise_forward, isa::normalise_backward                                               \
    }                                                                                               \
  }

const TrainingPath kTrainingPaths[] = {
#if defined(__x86_64__)
    MOSAIC_TRAINING_PATH(avx512bf16),
    MOSAIC_TRAINING_PATH(avx2),
#endif
    MOSAIC_TRAINING_PATH(generic),
};

// The path of that name, and one team for all calls: they take turns.
template <typename F>
int with_path(const char* name, int num_threads, F f) {
  static std::mutex turn;
  static std::unique_ptr<Team> team;
  if (!mosaic_path(name)) return 1;
  for (const TrainingPath& path : kTrainingPaths) {
    if (std::string(path.name) != name) continue;
    const std::lock_guard<std::mutex> lock(turn);
    if (!team || team->size() != num_threads) team = std::make_unique<Team>(num_threads);
    f(path, *team);
    return 0;
  }
  return 1;
}

}  // namespace
}  // namespace mosaic

using namespace mosaic;

// 0, or 1 where this processor has no path of that name.
extern "C" {

int mosaic_smooth(const char* path, int num_threads, int backward, const Smoothing* smoothing) {
  return with_path(path, num_threads, [&](const TrainingPath& p, Team& t) { p.smooth[backward](*smoothing, t); });
}

int mosaic_average(const char* path, int num_threads, int backward, const Averaging* averaging) {
  return with_path(path, num_threads, [&](const TrainingPath& p, Team& t) { p.average[backward](*averaging, t); });
}

int mosaic_normalise(const char* path, int num_threads, int backward, const Normalising* normalising) {
  return with_path(path, num_threads, [&](const TrainingPath& p, Team& t) { p.normalise[backward](*normalising, t); });
}

}  // extern "C"
