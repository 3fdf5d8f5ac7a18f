// A few threads that share out the pieces of one phase of work after another.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mosaic {

// The caller's thread leads: it names each phase, works on it like the others, and goes on as soon as every piece is
// done. Helpers that the system keeps from running are not waited for unless they hold a piece, so a busy machine slows
// the team down by what it takes and no more. Which thread does a piece never changes what the piece computes.
//
// Every thread begins with a range of its own, the same in each phase as far as it can be, and then takes from the others'
// what is left: it finds in its cache what it wrote in the phase before, and seldom meets others at a counter.
class Team {
 public:
  explicit Team(int size) : size_(size), ranges_(size < kMaxRanges ? size : kMaxRanges) {
    for (int i = 1; i < size; ++i) {
      helpers_.emplace_back([this, i] {
        index_ = i;
        help();
      });
    }
  }

  ~Team() {
    stop_.store(true, std::memory_order_relaxed);
    begin();
    for (auto& helper : helpers_) helper.join();
  }

  int size() const { return size_; }

  // Which of the team's threads this is; 0 is the leader.
  static int index() { return index_; }

  // Wakes the helpers that sleep: work is about to come. Costs next to nothing where none does.
  void begin() {
    if (size_ == 1) return;
    gate_.fetch_add(1, std::memory_order_release);
    gate_.notify_all();
  }

  // Calls work(i) once for every i below `pieces`, on any thread of the team, and returns when all are done.
  template <typename Work>
  void share(int64_t pieces, const Work& work) {
    if (size_ == 1 || pieces == 1) {
      for (int64_t i = 0; i < pieces; ++i) work(i);
      return;
    }
    const auto call = [](const void* context, int64_t i) { (*static_cast<const Work*>(context))(i); };
    for (int64_t first = 0; first < pieces; first += kMaxPieces) {
      const Offset<Work> rest{work, first};
      if (first == 0 && pieces <= kMaxPieces) run(pieces, call, &work);
      else run(pieces - first < kMaxPieces ? pieces - first : kMaxPieces, Offset<Work>::call, &rest);
    }
  }

  // The same, `grain` neighbours at a time: for work so small that taking a piece of it would cost as much.
  template <typename Work>
  void share(int64_t count, int64_t grain, const Work& work) {
    share((count + grain - 1) / grain, [&](int64_t piece) {
      const int64_t end = (piece + 1) * grain < count ? (piece + 1) * grain : count;
      for (int64_t i = piece * grain; i < end; ++i) work(i);
    });
  }

 private:
  using Call = void (*)(const void*, int64_t);

  template <typename Work>
  struct Offset {
    const Work& work;
    int64_t first;
    static void call(const void* self, int64_t i) {
      const auto& offset = *static_cast<const Offset*>(self);
      offset.work(offset.first + i);
    }
  };

  // What is left of a range: which phase, where it ends, which piece is next. In one word, so that whoever takes a number
  // learns from the same word whether it is worth anything; only then may the phase's call and context be looked at.
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};
  };

  static constexpr int kBits = 20;
  static constexpr int64_t kMaxPieces = (int64_t{1} << kBits) - 4096;  // each thread may overshoot by one
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  static constexpr int kMaxRanges = 8;  // who has done all of one looks into every other
  static constexpr int kSpins = 2000;

  void run(int64_t pieces, Call call, const void* context) {
    call_ = call;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    ++phase_;
    for (int i = 0; i < ranges_; ++i) {
      const auto first = static_cast<uint64_t>(pieces * i / ranges_), end = static_cast<uint64_t>(pieces * (i + 1) / ranges_);
      range_[i].left.store(phase_ << (2 * kBits) | end << kBits | first, std::memory_order_release);
    }
    begin();  // whoever fell asleep over a long last piece of the phase before is wanted again
    const int64_t others = pieces - work();
    for (int spins = 0; done_.load(std::memory_order_acquire) != others; ++spins) {
      // A helper holds the last piece. If it does not run, it may be waiting for this very core.
      if (spins < kSpins) relax();
      else std::this_thread::yield();
    }
  }

  // Does pieces of the current phase until none is left to take. Returns how many: the phase lasts until they are counted.
  int64_t work() {
    int64_t count = 0;
    const int own = index_ % ranges_;
    for (int i = own; i < own + ranges_; ++i) {
      std::atomic<uint64_t>& left = range_[i < ranges_ ? i : i - ranges_].left;
      for (uint64_t seen = left.load(std::memory_order_acquire); (seen & kMask) < (seen >> kBits & kMask);
           seen = left.load(std::memory_order_acquire)) {
        const uint64_t mine = left.fetch_add(1, std::memory_order_acquire);
        if ((mine & kMask) >= (mine >> kBits & kMask)) break;
        call_(context_, static_cast<int64_t>(mine & kMask));
        ++count;
      }
    }
    return count;
  }

  void help() {
    uint32_t opened = 0;
    for (;;) {
      gate_.wait(opened, std::memory_order_acquire);
      opened = gate_.load(std::memory_order_acquire);
      if (stop_.load(std::memory_order_relaxed)) return;
      for (int spins = 0; spins < kSpins; ++spins) {
        if (const int64_t count = work()) {
          done_.fetch_add(count, std::memory_order_release);
          spins = 0;
        } else {
          relax();
        }
      }
    }
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static inline thread_local int index_ = 0;

  const int size_, ranges_;
  std::vector<std::thread> helpers_;
  uint64_t phase_ = 0;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  Range range_[kMaxRanges];
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> gate_{0};
};

}  // namespace mosaic
