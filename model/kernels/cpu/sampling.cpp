// Drawing tokens from logits, and what the logits say of a token: the arithmetic of model/kernels/sampling.py, operation
// by operation, so that both draw the same token from the same number. Knows no network and no threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// Vectors as wide as the processor has. Which ones changes no result: every lane does what its source says, and products
// are never contracted with sums.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MOSAIC_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MOSAIC_CLONES
#endif

namespace {

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

constexpr int kLanes = 8;          // partial sums of a block
constexpr int kBlock = 256;        // ids that are summed together
constexpr int kBuckets = 256;      // of weights: four to an octave, the last for all that is smaller
constexpr int kBucketShift = 50;   // leaves the exponent and two bits behind it
constexpr double kLowest = -700;   // below it a weight is 0
constexpr uint64_t kOne = 0x3ff0000000000000;

// 1 / 13!, 1 / 12!, ... 1 / 0!
constexpr double kTaylor[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                              1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                              1.0 / 6,          0.5,             1.0,            1.0};
constexpr double kRounder = 6755399441055744;  // 1.5 * 2^52: adding it rounds to the nearest integer
constexpr int64_t kRounderBits = 0x4338000000000000;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2High = 0.6931471805582987;  // so few bits that its product with an exponent is exact
constexpr double kLn2Low = 1.6465949582897082e-12;

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int bucket_of(double weight) {
  const uint64_t distance = (kOne >> kBucketShift) - (bits_of(weight) >> kBucketShift);
  return static_cast<int>(std::min<uint64_t>(distance, kBuckets - 1));
}

// Of a bucket, by the eight bits behind those that name it; the last bucket, which has many octaves, is one part.
inline int part_of(double weight, int bucket) {
  return bucket == kBuckets - 1 ? 0 : 255 - static_cast<int>(bits_of(weight) >> (kBucketShift - 8) & 255);
}

// What is not a number is drawn last of all.
MOSAIC_CLONES float largest(const float* x, int64_t n) {
  float lanes[16];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int64_t i = whole; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  for (int j = 1; j < 16; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
  return lanes[0];
}

MOSAIC_CLONES int64_t first_equal(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += 64) {
    const int64_t end = std::min<int64_t>(i + 64, n);
    int found = 0;
    for (int64_t k = i; k < end; ++k) found |= x[k] == value;
    if (!found) continue;
    for (int64_t k = i; k < end; ++k)
      if (x[k] == value) return k;
  }
  return 0;  // all are less than minus infinity, or nothing
}

// exp((x - largest) / temperature), 1 for the largest. `weights` has room for whole blocks and gets zeros at the end.
MOSAIC_CLONES void weigh(const float* x, int64_t n, float top, double temperature, double* weights) {
  const f64x8 high = top - f64x8{}, lowest = kLowest - f64x8{}, divisor = temperature - f64x8{};
  for (int64_t i = 0; i < n; i += kLanes) {
    f32x8 some;
    if (i + kLanes <= n) std::memcpy(&some, x + i, sizeof some);
    else for (int j = 0; j < kLanes; ++j) some[j] = i + j < n ? x[i + j] : std::numeric_limits<float>::quiet_NaN();
    const f64x8 value = __builtin_convertvector(some, f64x8);
    const f64x8 scaled = (value == high ? f64x8{} : value - high) / divisor;
    const i64x8 is_kept = scaled > lowest;  // not where it is no number
    const f64x8 y = is_kept ? scaled : lowest;
    const f64x8 rounded = y * kLog2E + kRounder;
    const f64x8 exponent = rounded - kRounder;
    const f64x8 r = (y - exponent * kLn2High) - exponent * kLn2Low;
    f64x8 p = kTaylor[0] - f64x8{};
#pragma GCC unroll 13
    for (int k = 1; k < 14; ++k) p = p * r + kTaylor[k];
    const f64x8 power = (f64x8)(((i64x8)rounded - kRounderBits + 1023) << 52);
    const f64x8 weight = is_kept ? p * power : f64x8{};
    std::memcpy(weights + i, &weight, sizeof weight);
  }
  for (int64_t i = (n + kLanes - 1) / kLanes * kLanes; i % kBlock; ++i) weights[i] = 0.0;
}

// Lane j sums ids j, j + 8, ... in their order; then halves of the lanes.
MOSAIC_CLONES void block_sums(const double* weights, int64_t num_blocks, double* sums) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    const double* w = weights + b * kBlock;
    double lanes[kLanes];
    for (int j = 0; j < kLanes; ++j) lanes[j] = w[j];
    for (int i = kLanes; i < kBlock; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lanes[j] += w[i + j];
    for (int half = kLanes / 2; half; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    sums[b] = lanes[0];
  }
}

MOSAIC_CLONES int64_t count_before(const float* x, int64_t n, float value, int64_t token_id) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] > value;
  for (int64_t i = 0; i < token_id; ++i) count += x[i] == value;
  return count;
}

MOSAIC_CLONES void drop_below(double* weights, int64_t n, double least) {
  for (int64_t i = 0; i < n; ++i) weights[i] = weights[i] >= least ? weights[i] : 0.0;
}

struct Candidate {
  double weight;
  int64_t id;
  bool operator<(const Candidate& other) const {
    return weight > other.weight || (weight == other.weight && id < other.id);
  }
};

// One row at a time; its memory is used again for the next.
class Drawer {
 public:
  explicit Drawer(int64_t vocab)
      : vocab_(vocab), num_blocks_((vocab + kBlock - 1) / kBlock), weights_(num_blocks_ * kBlock), sums_(num_blocks_) {}

  int64_t draw(const float* x, double temperature, int64_t top_k, double top_p, double min_p, double u) {
    weigh(x, vocab_, largest(x, vocab_), temperature, weights_.data());
    if (min_p > 0) drop_below(weights_.data(), vocab_, min_p);
    if (top_k > 0 && top_k < vocab_) keep_most(top_k);
    if (top_p < 1) keep_nucleus(top_p);
    return invert(u);
  }

  double total(const float* x, float top) {
    weigh(x, vocab_, top, 1.0, weights_.data());
    return sum();
  }

 private:
  double sum() {
    block_sums(weights_.data(), num_blocks_, sums_.data());
    double total = 0;
    for (const double block : sums_) total += block;
    return total;
  }

  // The `count` largest weights, the lower id first of equals.
  void keep_most(int64_t count) {
    const auto one = [](double) { return 1.0; };
    double counts[kBuckets] = {};
    fill(counts, one);
    keep_until(static_cast<double>(count), counts, one);
  }

  // As few of the largest as reach `top_p` of what there is; the first of them in any case.
  void keep_nucleus(double top_p) {
    const auto itself = [](double weight) { return weight; };
    double masses[kBuckets] = {};
    fill(masses, itself);
    double mass = 0;
    for (const double bucket : masses) mass += bucket;
    keep_until(top_p * mass, masses, itself);
  }

  template <typename Size>
  void fill(double* sizes, Size size) const {
    for (int64_t i = 0; i < vocab_; ++i)
      if (weights_[i] > 0) sizes[bucket_of(weights_[i])] += size(weights_[i]);
  }

  // Keeps the largest weights until the sum of their sizes is `wanted`. The bucket in which that happens is divided once
  // more, and only what is left is sorted: a flat distribution has thousands of weights in one bucket.
  template <typename Size>
  void keep_until(double wanted, const double* sizes, Size size) {
    double before = 0;
    int bucket = 0, part = 0;
    for (; bucket < kBuckets - 1 && before + sizes[bucket] < wanted; ++bucket) before += sizes[bucket];
    candidates_.clear();
    for (int64_t i = 0; i < vocab_; ++i)
      if (weights_[i] > 0 && bucket_of(weights_[i]) == bucket) candidates_.push_back({weights_[i], i});
    double parts[kBuckets] = {};
    for (const Candidate& candidate : candidates_) parts[part_of(candidate.weight, bucket)] += size(candidate.weight);
    for (; part < kBuckets - 1 && before + parts[part] < wanted; ++part) before += parts[part];
    last_.clear();
    for (const Candidate& candidate : candidates_) {
      const int its_part = part_of(candidate.weight, bucket);
      if (its_part > part) weights_[candidate.id] = 0.0;
      else if (its_part == part) last_.push_back(candidate);
    }
    std::sort(last_.begin(), last_.end());
    bool is_reached = false;
    for (const Candidate& candidate : last_) {
      if (is_reached) weights_[candidate.id] = 0.0;
      before += size(candidate.weight);
      is_reached = is_reached || before >= wanted;
    }
    drop_after(bucket);
  }

  void drop_after(int bucket) {
    if (bucket == kBuckets - 1) return;
    // The smallest that the bucket can have.
    drop_below(weights_.data(), vocab_, from_bits(((kOne >> kBucketShift) - bucket) << kBucketShift));
  }

  // The first id at which the sum of the weights so far exceeds u times that of all.
  int64_t invert(double u) {
    const double target = u * sum();
    double before = 0;
    int64_t block = 0, last = 0;
    double before_last = 0;
    for (; block < num_blocks_; ++block) {
      if (sums_[block] > 0) last = block, before_last = before;
      if (before + sums_[block] > target) break;
      before += sums_[block];
    }
    if (block == num_blocks_) block = last, before = before_last;  // the product was rounded up to all there is
    int64_t drawn = 0;
    for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
      before += weights_[i];
      if (weights_[i] > 0) drawn = i;
      if (before > target) break;
    }
    return drawn;
  }

  int64_t vocab_, num_blocks_;
  std::vector<double> weights_, sums_;
  std::vector<Candidate> candidates_, last_;
};

}  // namespace

extern "C" {

// How many rows of logits there are, of how many ids, and how far apart they begin.
struct Logits {
  const float* values;
  int64_t num_rows, vocab, stride;
};

// The id of each row's largest logit, the lowest of equals.
void mosaic_argmax(const Logits* logits, int64_t* token_ids) {
  for (int64_t r = 0; r < logits->num_rows; ++r) {
    const float* x = logits->values + r * logits->stride;
    token_ids[r] = first_equal(x, logits->vocab, largest(x, logits->vocab));
  }
}

// A token for each of `count` rows: `rows` names them, all else is one number a draw.
void mosaic_draw(const Logits* logits, int64_t count, const int64_t* rows, const double* temperatures,
                 const int64_t* top_ks, const double* top_ps, const double* min_ps, const double* us,
                 int64_t* token_ids) {
  Drawer drawer(logits->vocab);
  for (int64_t i = 0; i < count; ++i)
    token_ids[i] = drawer.draw(logits->values + rows[i] * logits->stride, temperatures[i], top_ks[i], top_ps[i],
                               min_ps[i], us[i]);
}

// Of each row: its largest logit, the sum of exp(logit - largest), how many ids come before `token_ids` (a higher logit,
// or the same and a lower id), and the `num_top` first of that order.
void mosaic_score(const Logits* logits, const int64_t* token_ids, int64_t num_top, double* largest_logits,
                  double* totals, int64_t* counts, int64_t* tops) {
  Drawer drawer(logits->vocab);
  const int64_t n = logits->vocab;
  for (int64_t r = 0; r < logits->num_rows; ++r) {
    const float* x = logits->values + r * logits->stride;
    const float top = largest(x, n);
    largest_logits[r] = top;
    totals[r] = drawer.total(x, top);
    counts[r] = count_before(x, n, x[token_ids[r]], token_ids[r]);
    int64_t* best = tops + r * num_top;
    int64_t found = 0;
    for (int64_t i = 0; i < n && num_top; ++i) {
      if (found == num_top && !(x[i] > x[best[found - 1]])) continue;
      int64_t place = found < num_top ? found++ : num_top - 1;
      for (; place > 0 && x[i] > x[best[place - 1]]; --place) best[place] = best[place - 1];
      best[place] = i;
    }
  }
}

}  // extern "C"
