// The CPU walks of nc_score. Compiled once per instruction set (see simd.h).
//
//   stage     averages, converts, takes the softmax: a block of rows becomes float32 in cache.
//             One float32 array of probabilities is walked where it lies.
//   columns   few classes, or rows with many dominant entries: rows side by side in the lanes, one
//             class after the other
//   compact   many classes: the few dominant entries of a row are gathered, and their logarithms
//             multiply rows of the weight matrix, lanes over the uniform-like vectors
//   single    one distinct vector (sigma = 0): lanes over the classes
//   settle    float64, one row: the definition itself
//
// Every walk ends in `emit`, which hands rows too close to call, or invalid, to `settle`.
#include "nc_score.h"

#include "simd.h"

namespace genkl {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
template <typename T>
struct Type {
  using type = T;
};

inline F load_as_float(const float* p) { return load(p); }
inline F load_as_float(const Half* p) { return load_half(&p->bits); }
inline F load_as_float(const BFloat* p) { return load_bfloat(&p->bits); }
inline F load_as_float(const double* p) { return load_double(p); }

constexpr int kBlockBytes = 64 * 1024;   // staged rows: they must stay in the second-level cache
constexpr int kPrefetchBytes = 4096;     // how far ahead of the walk memory is asked for
constexpr int kColumnsUpTo = 32;         // classes
constexpr int kWord = 64;                // classes whose dominance is noted in one integer
constexpr int kPad = 4;                  // entries of a compacted row come in fours
constexpr int kLine = 64;                // bytes of a cache line
constexpr int kMinNormalExponent = 126;  // 2^-126 is the smallest normal float
constexpr float kLowest = -3.402823466e38f;
// The columns walk takes this many rows at once: every weight it loads serves two lane-vectors. Its
// accumulators, two for each of kColumnsVectors, fill the register file.
constexpr int kColumnsRows = 2 * kWidth;
constexpr int kColumnsVectors = kWidth == 16 ? 10 : 5;

constexpr size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Cuts a thread's scratch memory into arrays of whole cache lines.
class Carver {
 public:
  explicit Carver(uintptr_t memory) : next_(memory) {}
  template <typename T>
  T* take(size_t count) {
    const uintptr_t here = next_;
    next_ += round_up(count * sizeof(T), kLine);
    return reinterpret_cast<T*>(here);
  }
  uintptr_t next() const { return next_; }

 private:
  uintptr_t next_;
};

int block_rows(int classes) {
  const int rows = kBlockBytes / 4 / classes;
  return rows < kWidth ? kWidth : rows / kWidth * kWidth;
}

struct Scratch {
  float* staged;   // [block_rows, classes]
  float* logs;     // columns: [classes, kColumnsRows]; compact: logarithms of `values`
  float* values;   // compact: dominant entries, row after row
  int32_t* index;  // compact: their classes
  float* sums;     // a_j: columns [stride, kColumnsRows], compact [kWidth, stride]
  double* row;     // [classes] one row in float64
  double* exps;    // [classes, rounded up to kSumLanes]
  double* cross;   // [vectors]
  float* softmax;  // [classes]

  Scratch(Carver& carver, int classes, int stride) {
    const size_t k = static_cast<size_t>(classes);
    const size_t entries = kColumnsRows * (k + kPad + 2 * kWidth);
    staged = carver.take<float>(static_cast<size_t>(block_rows(classes)) * k + kWidth);
    logs = carver.take<float>(entries);
    values = carver.take<float>(entries);
    index = carver.take<int32_t>(entries);
    sums = carver.take<float>(static_cast<size_t>(stride) * kColumnsRows);
    row = carver.take<double>(k);
    exps = carver.take<double>(round_up(k, kSumLanes));
    cross = carver.take<double>(static_cast<size_t>(stride));
    softmax = carver.take<float>(k);
  }
};

// kWidth rows as the walks leave them, one row per lane.
struct Group {
  F critical, divergence, top;
  I top_class, votes;
  F sum, lowest;  // of the entries
  int additions;  // that went into one sum, one after the other
  Mask unsettled;
};

struct Max {
  F operator()(F a, F b) const { return max(a, b); }
};
struct Min {
  F operator()(F a, F b) const { return min(a, b); }
};
struct Add {
  F operator()(F a, F b) const { return add(a, b); }
};

class Scorer {
 public:
  Scorer(const Predictions& predictions, const NcRule& rule, const Scratch& scratch,
         const NcOutputs& outputs)
      : in_(predictions), rule_(rule), scratch_(scratch), out_(outputs) {
    tau_ = static_cast<float>(rule.tau);
    alpha_ = static_cast<float>(rule.alpha);
    guard_all_ = guard(rule.classes);
    products_ = rule.vectors == 1 && equal_weights() ? product_length() : 1;
  }

  int64_t score(int64_t begin, int64_t end) {
    const bool in_place = in_.models == 1 && !in_.logits && in_.dtype == DType::kFloat32 &&
                          in_.class_stride[0] == 1 && !rule_.exact_only;
    const int64_t step = block_rows(rule_.classes);
    for (int64_t r = begin; r < end; r += step) {
      const int n = static_cast<int>(end - r < step ? end - r : step);
      if (in_place) {
        walk(static_cast<const float*>(in_.data[0]) + r * in_.row_stride[0], in_.row_stride[0], r,
             n);
      } else if (!rule_.exact_only && stage(r, n)) {
        walk(scratch_.staged, rule_.classes, r, n);
      } else {
        for (int i = 0; i < n; ++i) settle(r + i);
      }
    }
    return first_bad_;
  }

 private:
  void walk(const float* rows, int64_t stride, int64_t first_row, int n) {
    if (rule_.vectors == 1 && rule_.classes > kColumnsUpTo)
      single(rows, stride, first_row, n);
    else if (rule_.classes <= kColumnsUpTo)
      columns(rows, stride, first_row, n);
    else
      compact(rows, stride, first_row, n);
  }

  // ---- columns ---------------------------------------------------------------------------------

  void columns(const float* rows, int64_t stride, int64_t first_row, int n) {
    for (int r = 0; r < n; r += kColumnsRows) {
      const int present = n - r < kColumnsRows ? n - r : kColumnsRows;
      const float* row[kColumnsRows];
      for (int i = 0; i < kColumnsRows; ++i) row[i] = rows + (r + (i < present ? i : 0)) * stride;
      const char* ahead = reinterpret_cast<const char*>(row[0]) + kPrefetchBytes;
      for (int64_t b = 0; b < kColumnsRows * stride * 4; b += kLine) prefetch(ahead + b);
      Group g[2];
      columns_groups(row, g);
      emit(g[0], first_row + r, nullptr, present < kWidth ? present : kWidth);
      if (present > kWidth) emit(g[1], first_row + r + kWidth, nullptr, present - kWidth);
    }
  }

  // What a pass over the classes gathers, one row per lane.
  struct Columns {
    F sum = broadcast(0.0f), lowest = broadcast(0.0f), top = broadcast(-1.0f);
    I top_class = broadcast(int32_t{0});  // plus one

    void take(F x, int c) {
      sum = add(sum, x);
      lowest = min(lowest, x);
      const Mask higher = greater(x, top);
      top = max(x, top);
      top_class =
          max(top_class, keep(higher, broadcast(int32_t{c + 1})));  // c grows: the last wins
    }
  };

  // Scores kColumnsRows rows, kWidth of them in each group.
  void columns_groups(const float* const* row, Group* g) const {
    const int k = rule_.classes;
    F critical[2], divergence[2];
    for (int half = 0; half < 2; ++half) {
      const Columns t = read_columns(row + half * kWidth, scratch_.logs + half * kWidth);
      g[half].additions = k;
      g[half].sum = t.sum;
      g[half].lowest = t.lowest;
      g[half].top = t.top;
      g[half].top_class = sub(t.top_class, broadcast(int32_t{1}));
      critical[half] = broadcast(0.0f);
      divergence[half] = broadcast(kLowest);
    }
    keep_logs(scratch_.logs, k);
    if (rule_.vectors == 1) {
      columns_product<1>(0, critical, divergence);
    } else {
      for (int j = 0; j < rule_.vectors; j += kColumnsVectors)
        columns_product<kColumnsVectors>(j, critical, divergence);
    }
    const F lower = broadcast(alpha_ * (1.0f - guard_all_));
    for (int half = 0; half < 2; ++half) {
      g[half].critical = critical[half];
      g[half].divergence = divergence[half];
      g[half].votes = broadcast(int32_t{0});
      g[half].unsettled = greater(broadcast(0.0f), broadcast(0.0f));
      if (any(greater_equal(critical[half], lower)))
        count_votes(scratch_.sums + half * kWidth, lower, g[half]);
    }
  }

  // Turns kWidth rows into columns: entries[c * kColumnsRows ...] are their entries of class c.
  Columns read_columns(const float* const* row, float* entries) const {
    const int k = rule_.classes;
    Columns t;
    F q[kWidth];
    int c = 0;
    for (; c + kWidth <= k; c += kWidth) {
      load_transposed(row, c, q);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        t.take(q[i], c + i);
        store(entries + (c + i) * kColumnsRows, q[i]);
      }
    }
    if (c == k) return t;
    if (k >= kWidth) {  // the last vectors end with the row; classes taken before are passed over
      load_transposed(row, k - kWidth, q);
    } else {
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) q[lane] = load_first(row[lane], k);
      transpose(q);
    }
    const int start = k >= kWidth ? k - kWidth : 0;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (start + i < c || start + i >= k) continue;
      t.take(q[i], start + i);
      store(entries + (start + i) * kColumnsRows, q[i]);
    }
    return t;
  }

  // Replaces every entry of [classes, kColumnsRows] by its logarithm if it is dominant, else by 0.
  void keep_logs(float* entries, int classes) const {
    const F tau = broadcast(tau_);
    const float* const end = entries + static_cast<int64_t>(classes) * kColumnsRows;
    for (; entries < end; entries += kColumnsRows) {
      const F x = load(entries), y = load(entries + kWidth);
      store(entries, keep(greater_equal(x, tau), log2(x)));
      store(entries + kWidth, keep(greater_equal(y, tau), log2(y)));
    }
  }

  // Votes of kWidth rows: the a_j above the band around alpha; a_j within it are unsettled.
  void count_votes(const float* sums, F lower, Group& g) const {
    const F upper = broadcast(alpha_ * (1.0f + guard_all_));
    I votes = broadcast(int32_t{0});
    Mask unsettled = g.unsettled;
    for (int j = 0; j < rule_.vectors; ++j) {
      const F a = load(sums + j * kColumnsRows);
      const Mask vote = greater(a, upper);
      votes = count(votes, vote);
      unsettled = either(unsettled, both_not(greater_equal(a, lower), vote));
    }
    g.votes = votes;
    g.unsettled = unsettled;
  }

  // a_j of kCount vectors from j on, for kColumnsRows rows: kept logarithms times weights.
  template <int kCount>
  void columns_product(int j, F* critical, F* divergence) const {
    F a[kCount], b[kCount];
#pragma GCC unroll 10
    for (int i = 0; i < kCount; ++i) a[i] = b[i] = broadcast(0.0f);
    const float* w = rule_.weights + j;
    const float* log_q = scratch_.logs;
    const int64_t stride = rule_.stride;
    for (int c = rule_.classes; c > 0; --c, w += stride, log_q += kColumnsRows) {
      const F x = load(log_q), y = load(log_q + kWidth);
#pragma GCC unroll 10
      for (int i = 0; i < kCount; ++i) {
        const F weight = broadcast(w[i]);
        a[i] = fma(x, weight, a[i]);
        b[i] = fma(y, weight, b[i]);
      }
    }
    float* const sums = scratch_.sums + j * kColumnsRows;
    const float* const entropy = rule_.entropy + j;
    const float* const offset = rule_.offset + j;
    F critical_a = critical[0], critical_b = critical[1];
    F divergence_a = divergence[0], divergence_b = divergence[1];
#pragma GCC unroll 10
    for (int i = 0; i < kCount; ++i) {
      const F h = broadcast(entropy[i]), shift = broadcast(offset[i]);
      critical_a = max(critical_a, a[i]);
      critical_b = max(critical_b, b[i]);
      divergence_a = max(divergence_a, fma(h, a[i], shift));
      divergence_b = max(divergence_b, fma(h, b[i], shift));
      store(sums + i * kColumnsRows, a[i]);
      store(sums + i * kColumnsRows + kWidth, b[i]);
    }
    critical[0] = critical_a;
    critical[1] = critical_b;
    divergence[0] = divergence_a;
    divergence[1] = divergence_b;
  }

  // ---- compact ---------------------------------------------------------------------------------

  void compact(const float* rows, int64_t stride, int64_t first_row, int n) {
    int waiting = 0;  // rows with many dominant entries, for the columns walk
    int64_t number[kColumnsRows];
    const float* row[kColumnsRows];
    for (int r = 0; r < n; r += kWidth) {
      const int present = n - r < kWidth ? n - r : kWidth;
      uint32_t dense = compact_group(rows + r * stride, stride, first_row + r, present);
      for (; dense; dense &= dense - 1) {
        const int lane = __builtin_ctz(dense);
        number[waiting] = first_row + r + lane;
        row[waiting++] = rows + (r + lane) * stride;
        if (waiting == kColumnsRows) scattered(row, number, waiting);
      }
    }
    if (waiting) scattered(row, number, waiting);
  }

  // The columns walk over rows from anywhere; leaves none waiting.
  void scattered(const float** row, const int64_t* number, int& waiting) {
    for (int i = waiting; i < kColumnsRows; ++i) row[i] = row[0];
    Group g[2];
    columns_groups(row, g);
    emit(g[0], 0, number, waiting < kWidth ? waiting : kWidth);
    if (waiting > kWidth) emit(g[1], 0, number + kWidth, waiting - kWidth);
    waiting = 0;
  }

  // Scores the rows with few dominant entries; returns which rows have many and are left.
  uint32_t compact_group(const float* rows, int64_t stride, int64_t first_row, int present) {
    const F none = broadcast(0.0f);
    F sum[kWidth], lowest[kWidth], tops[kWidth], critical[kWidth], divergence[kWidth];
    int32_t begin[kWidth];
    alignas(64) int32_t dominant[kWidth], top_class[kWidth];
    uint32_t dense = 0;
    int filled = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      sum[lane] = lowest[lane] = tops[lane] = critical[lane] = divergence[lane] = none;
      dominant[lane] = top_class[lane] = 0;
      begin[lane] = filled;
      if (lane >= present) continue;
      const int end = gather(rows + lane * stride, filled, sum[lane], lowest[lane], tops[lane]);
      if (end < 0) {
        dense |= 1u << lane;
        continue;
      }
      dominant[lane] = end - filled;
      // Entries of 1, whose logarithm is 0, fill the row up to whole fours.
      for (int i = 0; i < kPad; ++i) {
        scratch_.values[end + i] = 1.0f;
        scratch_.index[end + i] = 0;
      }
      filled += static_cast<int>(
          round_up(static_cast<size_t>(dominant[lane] > 0 ? dominant[lane] : 1), kPad));
    }
    store(scratch_.values + filled, broadcast(1.0f));
    for (int t = 0; t < filled; t += kWidth)
      store(scratch_.logs + t, log2(load(scratch_.values + t)));

    for (int lane = 0; lane < present; ++lane) {
      if (dense >> lane & 1) continue;
      const int end =
          begin[lane] + static_cast<int>(round_up(
                            static_cast<size_t>(dominant[lane] > 0 ? dominant[lane] : 1), kPad));
      const Maxima maxima = compact_products(begin[lane], end, scratch_.sums + lane * rule_.stride);
      critical[lane] = maxima.critical;
      divergence[lane] = maxima.divergence;
    }

    Group g;
    g.additions = rule_.classes / kWidth + kWidth;
    g.sum = fold_lanes(sum, Add());
    g.lowest = fold_lanes(lowest, Min());
    g.top = fold_lanes(tops, Max());
    g.critical = fold_lanes(critical, Max());
    g.divergence = fold_lanes(divergence, Max());
    alignas(64) float top[kWidth];
    store(top, g.top);
    for (int lane = 0; lane < present; ++lane)
      if (dominant[lane]) top_class[lane] = class_of(top[lane], begin[lane]);
    g.top_class = load(top_class);

    const F n = to_float(load(dominant));
    const F guards = mul(broadcast(guard(0) / 16.0f), add(n, broadcast(16.0f)));
    const F alpha = broadcast(alpha_);
    const F lower = sub(alpha, mul(alpha, guards));
    const F upper = add(alpha, mul(alpha, guards));
    g.unsettled = equal(n, none);
    alignas(64) int32_t votes[kWidth] = {};
    uint32_t near = bits(greater_equal(g.critical, lower));
    if (near) {
      alignas(64) float low[kWidth], high[kWidth], open[kWidth] = {};
      store(low, lower);
      store(high, upper);
      for (; near; near &= near - 1) {
        const int lane = __builtin_ctz(near);
        const float* sums = scratch_.sums + lane * rule_.stride;
        for (int j = 0; j < rule_.vectors; j += kWidth) {
          const F a = load(sums + j);
          const Mask vote = greater(a, broadcast(high[lane]));
          votes[lane] += __builtin_popcount(bits(vote));
          if (any(both_not(greater_equal(a, broadcast(low[lane])), vote))) open[lane] = 1.0f;
        }
      }
      g.unsettled = either(g.unsettled, greater(load(open), none));
    }
    g.votes = load(votes);
    emit(g, first_row, nullptr, present, dense);
    return dense;
  }

  // Appends a row's dominant entries and their classes from `at` on; returns the end, or -1 when
  // most of the first classes are dominant and the columns walk is the better one. Adds up the row
  // in passing.
  int gather(const float* row, int at, F& row_sum, F& row_lowest, F& row_top) const {
    const int k = rule_.classes;
    const F tau = broadcast(tau_);
    F sum = broadcast(0.0f), lowest = sum, top = sum;
    int first = 0;
    for (; first + kWord <= k; first += kWord) {
      const float* const entries = row + first;
#pragma GCC unroll 4
      for (int b = 0; b < kWord * 4; b += kLine)
        prefetch(reinterpret_cast<const char*>(entries) + b + kPrefetchBytes);
      uint64_t dominant = 0;
#pragma GCC unroll 16
      for (int i = 0; i < kWord; i += 2 * kWidth) {
        const F x = load(entries + i), y = load(entries + i + kWidth);
        sum = add(sum, add(x, y));
        lowest = min(lowest, min(x, y));
        top = max(top, max(x, y));
        dominant |= static_cast<uint64_t>(bits(greater_equal(x, tau))) << i;
        dominant |= static_cast<uint64_t>(bits(greater_equal(y, tau))) << (i + kWidth);
      }
      if (first == 0 && __builtin_popcountll(dominant) > kWord / 2) return -1;
      at = append(entries, first, kWord, dominant, at);
    }
    if (first < k) {
      const float* const entries = row + first;
      for (int64_t b = 0; b < (k - first) * 4; b += kLine)
        prefetch(reinterpret_cast<const char*>(entries) + b + kPrefetchBytes);
      uint64_t dominant = 0;
      for (int i = 0; first + i < k; i += kWidth) {
        const int left = k - first - i;
        const F x = left < kWidth ? load_first(entries + i, left) : load(entries + i);
        sum = add(sum, x);
        lowest = min(lowest, x);
        top = max(top, x);
        dominant |= static_cast<uint64_t>(bits(greater_equal(x, tau))) << i;
      }
      if (first == 0 && __builtin_popcountll(dominant) > k / 2) return -1;
      at = append(entries, first, k - first, dominant, at);
    }
    row_sum = sum;
    row_lowest = lowest;
    row_top = top;
    return at;
  }

  // Appends the entries whose bits are set, of `count` in reach. They are taken four at a time: the
  // number of rounds can be foretold more often than the number of entries. What is taken too much
  // is overwritten later.
  int append(const float* entries, int first_class, int count, uint64_t dominant, int at) const {
    const int n = __builtin_popcountll(dominant);
    const uint64_t last = uint64_t{1} << (count - 1);
    float* const values = scratch_.values + at;
    int32_t* const index = scratch_.index + at;
    for (int t = 0; t < n; t += kPad) {
#pragma GCC unroll 4
      for (int i = 0; i < kPad; ++i) {
        const int c = __builtin_ctzll(dominant | last);
        values[t + i] = entries[c];
        index[t + i] = first_class + c;
        dominant &= dominant - 1;
      }
    }
    return at + n;
  }

  // The class of the first gathered entry equal to `top`, which is among them.
  int class_of(float top, int begin) {
    for (int t = begin;; t += kWidth) {
      const uint32_t hit = bits(equal(load(scratch_.values + t), broadcast(top)));
      if (hit) return scratch_.index[t + __builtin_ctz(hit)];
    }
  }

  // The largest a_j and D_j of a row, each in some lane.
  struct Maxima {
    F critical = broadcast(0.0f), divergence = broadcast(kLowest);
  };

  Maxima compact_products(int begin, int end, float* sums) const {
    Maxima maxima;
    const int vectors = (rule_.vectors + kWidth - 1) / kWidth;
    int v = 0;
    for (; v + 4 <= vectors; v += 4) maxima = compact_product<4>(begin, end, v, sums, maxima);
    switch (vectors - v) {
      case 3:
        return compact_product<3>(begin, end, v, sums, maxima);
      case 2:
        return compact_product<2>(begin, end, v, sums, maxima);
      case 1:
        return compact_product<1>(begin, end, v, sums, maxima);
      default:
        return maxima;
    }
  }

  // kCount lane-vectors of a_j for one row, two chains each.
  template <int kCount>
  Maxima compact_product(int begin, int end, int v, float* sums, Maxima maxima) const {
    F a[kCount], b[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) a[i] = b[i] = broadcast(0.0f);
    const int first = v * kWidth;
    const float* const weights = rule_.weights + first;
    const float* const entropy = rule_.entropy + first;
    const float* const offset = rule_.offset + first;
    const float* const logs = scratch_.logs;
    const int32_t* const index = scratch_.index;
    const int64_t stride = rule_.stride;
    for (int t = begin; t < end; t += 2) {
      const F log_a = broadcast(logs[t]), log_b = broadcast(logs[t + 1]);
      const float* const wa = weights + index[t] * stride;
      const float* const wb = weights + index[t + 1] * stride;
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        a[i] = fma(log_a, load(wa + i * kWidth), a[i]);
        b[i] = fma(log_b, load(wb + i * kWidth), b[i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const int j = i * kWidth;
      const F total = add(a[i], b[i]);
      maxima.critical = max(maxima.critical, total);
      maxima.divergence = max(maxima.divergence, fma(load(entropy + j), total, load(offset + j)));
      store(sums + first + j, total);
    }
    return maxima;
  }

  // ---- single ----------------------------------------------------------------------------------

  bool equal_weights() const {
    for (int i = 1; i < rule_.classes; ++i)
      if (rule_.weights[static_cast<int64_t>(i) * rule_.stride] != rule_.weights[0]) return false;
    return true;
  }

  // How many dominant entries can be multiplied before their logarithm is taken, with the product
  // still a normal number.
  int product_length() const {
    const float bits_each = -log2_fast(tau_);
    const int length =
        bits_each < 1.0f ? 8 : static_cast<int>((kMinNormalExponent - 1) / bits_each);
    return length < 1 ? 1 : length > 8 ? 8 : length;
  }

  // What a walk over the classes of one row gathers, lane by lane.
  struct Single {
    F sum = broadcast(0.0f), lowest = broadcast(0.0f), total = broadcast(0.0f);
    F top = broadcast(-1.0f);
    I top_class = broadcast(int32_t{0});  // plus one
    Mask dominant = greater(broadcast(0.0f), broadcast(0.0f));
  };

  void single(const float* rows, int64_t stride, int64_t first_row, int n) {
    const F none = broadcast(0.0f);
    for (int r = 0; r < n; r += kWidth) {
      const int present = n - r < kWidth ? n - r : kWidth;
      F sum[kWidth], lowest[kWidth], total[kWidth], tops[kWidth];
      I classes[kWidth];
      uint32_t empty = 0;  // rows without a dominant entry
      for (int lane = 0; lane < kWidth; ++lane) {
        const float* row = rows + (r + (lane < present ? lane : 0)) * stride;
        const Single t = products_ > 1 ? single_row<true>(row) : single_row<false>(row);
        sum[lane] = t.sum;
        lowest[lane] = t.lowest;
        total[lane] = t.total;
        tops[lane] = t.top;
        classes[lane] = t.top_class;
        empty |= static_cast<uint32_t>(!any(t.dominant)) << lane;
      }
      Group g;
      g.additions = rule_.classes / kWidth + kWidth;
      g.sum = fold_lanes(sum, Add());
      g.lowest = fold_lanes(lowest, Min());
      g.top = fold_lanes(tops, Max());
      alignas(64) float top[kWidth], settle[kWidth];
      alignas(64) int32_t top_class[kWidth];
      store(top, g.top);
      for (int lane = 0; lane < kWidth; ++lane) {
        top_class[lane] = lowest_class(equal(tops[lane], broadcast(top[lane])), classes[lane]);
        settle[lane] = static_cast<float>(empty >> lane & 1);
      }
      g.top_class = load(top_class);
      g.critical = max(fold_lanes(total, Add()), none);
      g.divergence = fma(broadcast(rule_.entropy[0]), g.critical, broadcast(rule_.offset[0]));
      const F lower = broadcast(alpha_ * (1.0f - guard_all_));
      const Mask vote = greater(g.critical, broadcast(alpha_ * (1.0f + guard_all_)));
      g.votes = count(broadcast(int32_t{0}), vote);
      g.unsettled =
          either(both_not(greater_equal(g.critical, lower), vote), greater(load(settle), none));
      emit(g, first_row + r, nullptr, present);
    }
  }

  // The lowest class, of those one too high in the lanes of the mask; 0 when it is empty (NaN).
  static int32_t lowest_class(Mask highest, I classes) {
    uint32_t lanes = bits(highest);
    if (lanes == 0) return 0;
    alignas(64) int32_t all[kWidth];
    store(all, classes);
    int32_t lowest = all[__builtin_ctz(lanes)];
    for (lanes &= lanes - 1; lanes; lanes &= lanes - 1) {
      const int32_t other = all[__builtin_ctz(lanes)];
      lowest = other < lowest ? other : lowest;
    }
    return lowest - 1;
  }

  // One row, lanes over the classes. With kProducts all weights are equal, and up to eight dominant
  // entries are multiplied before one logarithm is taken of them. A product of several has a relative
  // error of 7 e at most, hence 7 log2(e) e absolute in its logarithm; two entries of a row that sums
  // to 1 have a product of at most 1/4, so the logarithm is at least 2 and its relative error below
  // 5.1 e. The guard's proof has that to spare: here a term takes part in n / 8 sums, and the guard is
  // that of all classes.
  template <bool kProducts>
  Single single_row(const float* row) const {
    const int k = rule_.classes;
    const F tau = broadcast(tau_), one = broadcast(1.0f), weight = broadcast(rule_.weights[0]);
    const I step = broadcast(int32_t{kWidth});
    Single t;
    F product = one;
    I classes = add(lane_numbers(), broadcast(int32_t{1}));
    int factors = 0;
    for (int c = 0; c < k; c += kWidth, classes = add(classes, step)) {
      prefetch(reinterpret_cast<const char*>(row + c) + kPrefetchBytes);
      const F q = k - c < kWidth ? load_first(row + c, k - c) : load(row + c);
      t.sum = add(t.sum, q);
      t.lowest = min(t.lowest, q);
      const Mask higher = greater(q, t.top);
      t.top = max(q, t.top);
      t.top_class = max(t.top_class, keep(higher, classes));
      const Mask counts = greater_equal(q, tau);
      t.dominant = either(t.dominant, counts);
      if (kProducts) {
        product = mul(product, select(counts, q, one));
        if (++factors < products_) continue;
        t.total = fma(weight, log2(product), t.total);
        product = one;
        factors = 0;
      } else if (any(counts)) {
        alignas(64) float w[kWidth] = {};
        for (int i = 0; i < kWidth && c + i < k; ++i)
          w[i] = rule_.weights[static_cast<int64_t>(c + i) * rule_.stride];
        t.total = fma(load(w), keep(counts, log2(q)), t.total);
      }
    }
    if (kProducts) t.total = fma(weight, log2(product), t.total);
    return t;
  }

  // ---- results ---------------------------------------------------------------------------------

  // Writes the first `present` lanes, but for those in `skip`, to the rows `number`, or to the rows
  // from `first_row` on where that is null.
  void emit(const Group& g, int64_t first_row, const int64_t* number, int present,
            uint32_t skip = 0) {
    const F one = broadcast(1.0f);
    // A sum that its rounding errors (2^-24 for each addition) could carry past the tolerance is
    // settled too.
    const F tolerance = broadcast(static_cast<float>(rule_.tolerance) - 6.6e-8f * g.additions);
    const Mask doubtful = either(
        either(not_less_equal(abs(sub(g.sum, one)), tolerance), greater(broadcast(0.0f), g.lowest)),
        either(greater(g.top, one), g.unsettled));
    const uint32_t lanes = ((present < 32 ? 1u << present : 0u) - 1u) & ~skip;
    if (!number && present == kWidth && !skip) {
      store(out_.critical_alpha + first_row, g.critical);
      store(out_.divergence + first_row, g.divergence);
      store(out_.votes + first_row, rule_.ballot == 1 ? g.votes : times_ballot(g.votes));
      store(out_.top_class + first_row, g.top_class);
      store(out_.top_prob + first_row, g.top);
    } else {
      alignas(64) float critical[kWidth], divergence[kWidth], top[kWidth];
      alignas(64) int32_t votes[kWidth], top_class[kWidth];
      store(critical, g.critical);
      store(divergence, g.divergence);
      store(top, g.top);
      store(votes, g.votes);
      store(top_class, g.top_class);
      for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const int64_t r = number ? number[lane] : first_row + lane;
        out_.critical_alpha[r] = critical[lane];
        out_.divergence[r] = divergence[lane];
        out_.votes[r] = votes[lane] * rule_.ballot;
        out_.top_class[r] = top_class[lane];
        out_.top_prob[r] = top[lane];
      }
    }
    for (uint32_t rest = bits(doubtful) & lanes; __builtin_expect(rest != 0, 0); rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      settle(number ? number[lane] : first_row + lane);
    }
  }

  I times_ballot(I votes) {
    alignas(64) int32_t v[kWidth];
    store(v, votes);
    for (int lane = 0; lane < kWidth; ++lane) v[lane] *= rule_.ballot;
    return load(v);
  }

  // Scores one row by the definition (genkl_ext/reference.py), bit for bit, and checks it.
  void settle(int64_t r) {
    const int k = rule_.classes, m = rule_.vectors;
    double* q = scratch_.row;
    double* cross = scratch_.cross;
    const bool valid = read_row(r, q);
    if (!valid && (first_bad_ < 0 || r < first_bad_)) first_bad_ = r;
    double* const logs = scratch_.exps;
    int32_t* const index = scratch_.index;
    const int top = top_of(q, k);
    int dominant = 0;
    for (int i = 0; i < k; ++i) {
      if (q[i] < rule_.tau) continue;
      logs[dominant] = q[i];
      index[dominant++] = i;
    }
    for (int t = 0; t < dominant; ++t) logs[t] = log2_exact(logs[t]);
    for (int j = 0; j < m; ++j) cross[j] = 0.0;
    for (int t = 0; t < dominant; ++t) {
      const double log_q = logs[t];
      const double* const u = rule_.vectors_exact + static_cast<int64_t>(index[t]) * m;
      for (int j = 0; j < m; ++j) cross[j] = cross[j] + log_q * u[j];
    }
    double critical = exact_ratio(rule_, 0, cross[0]);
    double divergence = exact_divergence(rule_, 0, cross[0]);
    int votes = divergence >= 0.0;
    for (int j = 1; j < m; ++j) {
      const double d = exact_divergence(rule_, j, cross[j]);
      critical = max_or_nan(critical, exact_ratio(rule_, j, cross[j]));
      divergence = max_or_nan(divergence, d);
      votes += d >= 0.0;
    }
    out_.critical_alpha[r] = round_on_side(critical, rule_.alpha, votes > 0);
    out_.divergence[r] = round_on_side(divergence, 0.0, votes > 0);
    out_.votes[r] = votes * rule_.ballot;
    out_.top_class[r] = top;
    out_.top_prob[r] = static_cast<float>(q[top]);
  }

  // ---- input -----------------------------------------------------------------------------------

  // Calls f with the Type of the input's entries.
  template <typename Function>
  auto with_type(Function f) const {
    switch (in_.dtype) {
      case DType::kFloat16:
        return f(Type<Half>());
      case DType::kBFloat16:
        return f(Type<BFloat>());
      case DType::kFloat64:
        return f(Type<double>());
      default:
        return f(Type<float>());
    }
  }

  static double to_double(const float* p) { return static_cast<double>(*p); }
  static double to_double(const double* p) { return *p; }
  template <typename T>
  static double to_double(const T* p) {  // Half, BFloat: exact in float32
    T padded[kWidth] = {*p};
    alignas(64) float values[kWidth];
    store(values, load_as_float(padded));
    return static_cast<double>(values[0]);
  }

  template <typename T>
  const T* entry(int model, int64_t row, int64_t i) const {
    return static_cast<const T*>(in_.data[model]) + row * in_.row_stride[model] +
           i * in_.class_stride[model];
  }

  // One model's row in float64.
  void read_model(int model, int64_t row, double* values) const {
    with_type([&](auto type) {
      using T = typename decltype(type)::type;
      const T* const first = entry<T>(model, row, 0);
      const int k = rule_.classes;
      if (in_.class_stride[model] != 1) {
        for (int i = 0; i < k; ++i) values[i] = to_double(first + i * in_.class_stride[model]);
      } else if constexpr (sizeof(T) == sizeof(double)) {
        memcpy(values, first, sizeof(double) * static_cast<size_t>(k));
      } else {
        float* const floats = scratch_.softmax;
        convert(&first, 1, floats, k);
        for (int i = 0; i < k; ++i) values[i] = static_cast<double>(floats[i]);
      }
    });
  }

  static bool all_finite(const double* values, int count) {
    int finite = 1;
    for (int i = 0; i < count; ++i) finite &= fabs(values[i]) <= 1.7976931348623157e308;
    return finite;
  }

  // The averaged row, exact in float64; returns whether it is a valid prediction.
  bool read_row(int64_t r, double* q) {
    const int k = rule_.classes;
    bool valid = true;
    for (int model = 0; model < in_.models; ++model) {
      double* values = scratch_.exps;
      read_model(model, r, values);
      valid &= all_finite(values, k);
      if (!in_.logits)
        for (int i = 0; i < k; ++i) valid &= values[i] >= 0.0;
      if (in_.models == 1 && !in_.logits) {
        memcpy(q, values, sizeof(double) * static_cast<size_t>(k));
      } else {
        float* p = scratch_.softmax;
        if (in_.logits)
          softmax(values, p);
        else
          for (int i = 0; i < k; ++i) p[i] = static_cast<float>(values[i]);
        // Sums of float32 numbers kept in q are rounded to float32 after every addition.
        for (int i = 0; i < k; ++i) q[i] = model == 0 ? p[i] : static_cast<float>(q[i]) + p[i];
      }
    }
    if (in_.models > 1)
      for (int i = 0; i < k; ++i) q[i] = static_cast<float>(q[i]) / static_cast<float>(in_.models);
    if (in_.logits) return valid;
    return valid && sums_to_one(q, k);
  }

  // Whether the sum in class order is 1 within the tolerance. A sum in four chains, which takes a
  // quarter of the time, answers for all rows but those where the order could matter.
  bool sums_to_one(const double* q, int count) const {
    double chains[4] = {};
    for (int i = 0; i < count; ++i) chains[i % 4] += q[i];
    const double off = fabs(chains[0] + chains[1] + chains[2] + chains[3] - 1.0);
    constexpr double kOrder = 1e-9;  // far above the rounding of 2^24 additions of a sum near 1
    if (fabs(off - rule_.tolerance) > kOrder) return off <= rule_.tolerance;
    double total = 0.0;
    for (int i = 0; i < count; ++i) total = total + q[i];
    return fabs(total - 1.0) <= rule_.tolerance;
  }

  // The first of the highest entries; NaN is the highest of all.
  static int top_of(const double* q, int count) {
    for (int i = 0; i < count; ++i)
      if (q[i] != q[i]) return i;
    const double highest = highest_of(q, count);
    int i = 0;
    while (q[i] != highest) ++i;
    return i;
  }

  static double highest_of(const double* values, int count) {
    constexpr int kChains = 8;  // maxima that do not wait for one another
    double highest[kChains];
    for (double& h : highest) h = values[0];
    int i = 0;
    for (; i + kChains <= count; i += kChains)
      for (int c = 0; c < kChains; ++c)
        highest[c] = values[i + c] > highest[c] ? values[i + c] : highest[c];
    for (; i < count; ++i) highest[0] = values[i] > highest[0] ? values[i] : highest[0];
    for (int c = 1; c < kChains; ++c)
      highest[0] = highest[c] > highest[0] ? highest[c] : highest[0];
    return highest[0];
  }

  // Softmax of a row of logits; `values` is overwritten and padded to whole kSumLanes.
  void softmax(double* values, float* q) {
    const int k = rule_.classes;
    const int padded = static_cast<int>(round_up(static_cast<size_t>(k), kSumLanes));
    const double highest = highest_of(values, k);
    for (int i = 0; i < k; ++i) values[i] = exp_exact(values[i] - highest);
    for (int i = k; i < padded; ++i) values[i] = 0.0;
    double lanes[kSumLanes] = {};
    for (int i = 0; i < padded; i += kSumLanes)
      for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] = lanes[lane] + values[i + lane];
    for (int half = kSumLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] = lanes[lane] + lanes[lane + half];
    for (int i = 0; i < k; ++i) q[i] = static_cast<float>(values[i] / lanes[0]);
  }

  // Averages n rows into scratch; false when they must be looked at one by one.
  bool stage(int64_t first_row, int n) {
    const int64_t k = rule_.classes;
    if (in_.logits) return stage_logits(first_row, n);
    return with_type([&](auto type) {
      using T = typename decltype(type)::type;
      bool unit = true, flat = true;
      for (int model = 0; model < in_.models; ++model) {
        unit &= in_.class_stride[model] == 1;
        flat &= in_.row_stride[model] == k;
      }
      if (!unit) return stage_strided<T>(first_row, n);
      bool clean = true;
      const T* models[kMaxModels];
      for (int r = 0; r < (flat ? 1 : n); ++r) {
        for (int model = 0; model < in_.models; ++model)
          models[model] = entry<T>(model, first_row + r, 0);
        const F lowest = convert(models, in_.models, scratch_.staged + r * k, flat ? n * k : k);
        clean &= in_.models == 1 || !any(greater(broadcast(0.0f), lowest));
      }
      return clean;
    });
  }

  // Means of `count` entries of some models as float32; returns the lowest entry seen, lane by lane.
  template <typename T>
  static F convert(const T* const* models, int number, float* out, int64_t count) {
    const F divisor = broadcast(static_cast<float>(number));
    F lowest = broadcast(0.0f);
    for (int64_t i = 0; i < count; i += kWidth) {
      const int left = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
      F total = broadcast(0.0f);
      for (int model = 0; model < number; ++model) {
        F x;
        if (left == kWidth) {
          prefetch(reinterpret_cast<const char*>(models[model] + i) + kPrefetchBytes);
          x = load_as_float(models[model] + i);
        } else {
          T rest[kWidth] = {};
          memcpy(rest, models[model] + i, sizeof(T) * static_cast<size_t>(left));
          x = load_as_float(rest);
        }
        lowest = min(lowest, x);
        total = model == 0 ? x : add(total, x);
      }
      const F mean = number == 1 ? total : div(total, divisor);
      if (left == kWidth) {
        store(out + i, mean);
      } else {
        alignas(64) float rest[kWidth];
        store(rest, mean);
        memcpy(out + i, rest, sizeof(float) * static_cast<size_t>(left));
      }
    }
    return lowest;
  }

  template <typename T>
  bool stage_strided(int64_t first_row, int n) {
    const int k = rule_.classes;
    bool clean = true;
    for (int model = 0; model < in_.models; ++model) {
      const auto put = [&](int r, int i) {
        const float x = static_cast<float>(to_double(entry<T>(model, first_row + r, i)));
        float& q = scratch_.staged[static_cast<int64_t>(r) * k + i];
        clean &= !(x < 0.0f);
        q = model == 0 ? x : q + x;
      };
      if (in_.row_stride[model] < in_.class_stride[model]) {  // a transposed array
        for (int i = 0; i < k; ++i)
          for (int r = 0; r < n; ++r) put(r, i);
      } else {
        for (int r = 0; r < n; ++r)
          for (int i = 0; i < k; ++i) put(r, i);
      }
    }
    if (in_.models > 1)
      for (int64_t i = 0; i < static_cast<int64_t>(n) * k; ++i)
        scratch_.staged[i] = scratch_.staged[i] / static_cast<float>(in_.models);
    return clean || in_.models == 1;
  }

  bool stage_logits(int64_t first_row, int n) {
    const int k = rule_.classes;
    bool finite = true;
    for (int r = 0; r < n; ++r) {
      float* q = scratch_.staged + static_cast<int64_t>(r) * k;
      for (int model = 0; model < in_.models; ++model) {
        read_model(model, first_row + r, scratch_.exps);
        finite &= all_finite(scratch_.exps, k);
        softmax(scratch_.exps, scratch_.softmax);
        for (int i = 0; i < k; ++i)
          q[i] = model == 0 ? scratch_.softmax[i] : q[i] + scratch_.softmax[i];
      }
      if (in_.models > 1)
        for (int i = 0; i < k; ++i) q[i] = q[i] / static_cast<float>(in_.models);
    }
    return finite;
  }

  const Predictions& in_;
  const NcRule& rule_;
  const Scratch& scratch_;
  const NcOutputs& out_;
  float tau_, alpha_, guard_all_;
  int products_;
  int64_t first_bad_ = -1;
};

size_t scratch_bytes(int classes, int stride) {
  Carver carver(0);
  Scratch(carver, classes, stride);
  return carver.next();
}

int64_t score(const Predictions& predictions, const NcRule& rule, int64_t begin, int64_t end,
              void* scratch_memory, const NcOutputs& outputs) {
  Carver carver(reinterpret_cast<uintptr_t>(scratch_memory));
  const Scratch scratch(carver, rule.classes, rule.stride);
  return Scorer(predictions, rule, scratch, outputs).score(begin, end);
}

}  // namespace

#if defined(GENKL_SIMD_AVX512)
extern const NcKernel kNcKernelAvx512;
const NcKernel kNcKernelAvx512 = {kSimdName, scratch_bytes, score};
#elif defined(GENKL_SIMD_AVX2)
extern const NcKernel kNcKernelAvx2;
const NcKernel kNcKernelAvx2 = {kSimdName, scratch_bytes, score};
#else
extern const NcKernel kNcKernelPortable;
const NcKernel kNcKernelPortable = {kSimdName, scratch_bytes, score};
#endif

}  // namespace genkl
