// A few threads that walk through a step together: every phase's work is shared out piece by piece, then all meet.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace mosaic {

// Which thread does a piece of work never changes what the piece computes, so results do not depend on timing.
class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int i = 1; i < size; ++i) {
      workers_.emplace_back([this, i] {
        index_ = i;
        work();
      });
    }
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  // Which of the team's threads this is; 0 is the one that calls run().
  static int index() { return index_; }

  // Runs job(context) on every thread of the team, this one included, and returns when all have ended.
  void run(void (*job)(void*), void* context) {
    next_.store(0, std::memory_order_relaxed);
    if (size_ == 1) {
      job(context);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      context_ = context;
      ++generation_;
    }
    wake_.notify_all();
    job(context);
    meet();
  }

  // Waits until every thread of the team is here, then resets the counter of pieces.
  void meet() {
    if (size_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    // A short spin covers the usual wait. Longer, and another process needs this core more than we do.
    for (int i = 0; i < kSpins; ++i) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      relax();
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  // The next piece of the current phase; counts on past the last one.
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  static constexpr int kSpins = 3000;
  static inline thread_local int index_ = 0;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (stop_) return;
      }
      job_(context_);
      meet();
    }
  }

  const int size_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  uint64_t generation_ = 0;
  bool stop_ = false;
  void (*job_)(void*) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace mosaic
