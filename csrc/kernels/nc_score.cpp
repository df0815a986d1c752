// The CPU walks of nc_score. Compiled once per instruction set (see simd.h).
//
//   stage     averages, converts, takes the softmax: a block of rows becomes float32 in cache.
//             One float32 array of probabilities is walked where it lies.
//   columns   few classes, or rows with many dominant entries: rows side by side in the lanes, one
//             class after the other
//   compact   more classes: the few dominant entries of a block of rows are gathered, and their
//             logarithms multiply rows of the weight matrix, lanes over the uniform-like vectors
//   single    one distinct vector (sigma = 0): lanes over the classes
//   settle    float64, one row: the definition itself
//
// Every walk hands rows too close to call, or invalid, to `settle`.
#include "nc_score.h"

#include "scratch.h"
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

constexpr int kBlockBytes = 64 * 1024;  // rows walked as one: they stay in the second-level cache
constexpr int kPrefetchBytes = 4096;    // how far ahead of the walk memory is asked for
constexpr int kColumnsUpTo = 32;        // classes
constexpr int kManyClasses = 256;       // from here on most of a line's entries are not dominant
constexpr int kWord = 64;               // classes whose dominance is noted in one integer
constexpr int kLengths = 63;            // rows with more dominant entries are not told apart
constexpr int kVectors = 4;             // staged at once: their sums do not wait for one another
constexpr int kLineFloats = kLine / 4;
constexpr int kVectorsOfLine = kLineFloats / kWidth;
constexpr int kMinNormalExponent = 126;  // 2^-126 is the smallest normal float
constexpr float kLowest = -3.402823466e38f;
// The columns walk takes this many rows at once: every weight it loads serves two lane-vectors. Its
// accumulators, two for each of kColumnsVectors, fill the register file.
constexpr int kColumnsRows = 2 * kWidth;
constexpr int kColumnsVectors = kWidth == 16 ? 10 : 5;

int block_rows(int classes) {
  const int rows = kBlockBytes / 4 / classes;
  return rows < kColumnsRows ? kColumnsRows : rows / kColumnsRows * kColumnsRows;
}

// A row of the compact walk: its place in the block, and where its dominant entries were gathered.
struct Sparse {
  int32_t row, count, begin;
};

struct Scratch {
  float* staged;     // [block_rows, classes]
  float* logs;       // columns: [classes, kColumnsRows]
  float* values;     // compact: dominant entries, row after row, then their logarithms
  int32_t* index;    // compact: their classes
  int32_t* counts;   // compact: [block_rows] how many a row has; 0 if it is not for this walk
  int32_t* begins;   // compact: [block_rows] where they are
  Sparse* sparse;    // compact: [block_rows] the same, rows with equally many side by side
  float* sums;       // a_j: columns [stride, kColumnsRows], compact [kWidth, stride]
  double* row;       // [classes] one row in float64
  int32_t* classes;  // [classes] settle: the dominant ones
  double* exps;      // [classes, rounded up to kSumLanes]
  double* cross;     // [vectors]
  float* softmax;    // [classes]

  Scratch(Carver& carver, int num_classes, int stride) {
    const size_t k = static_cast<size_t>(num_classes);
    const size_t rows = static_cast<size_t>(block_rows(num_classes));
    const size_t entries = rows * k + 2 * kWidth;  // gathering and searching reach beyond the last
    staged = carver.take<float>(rows * k + kWidth);
    logs = carver.take<float>(kColumnsRows * k);
    values = carver.take<float>(entries);
    index = carver.take<int32_t>(entries);
    begins = carver.take<int32_t>(rows);
    counts = carver.take<int32_t>(rows);
    sparse = carver.take<Sparse>(rows + kWidth);
    sums = carver.take<float>(static_cast<size_t>(stride) * kColumnsRows);
    row = carver.take<double>(k);
    classes = carver.take<int32_t>(k);
    exps = carver.take<double>(round_up<size_t>(k, kSumLanes));
    cross = carver.take<double>(static_cast<size_t>(stride));
    softmax = carver.take<float>(k);
  }
};

// kWidth rows as the walks leave them, one row per lane.
struct Group {
  F critical, divergence, top;
  I top_class, votes;
  F sum;  // of the entries
  Mask unsettled;
};

struct Max {
  F operator()(F a, F b) const { return max(a, b); }
};
struct MaxBits {
  F operator()(F a, F b) const { return max_bits(a, b); }
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
    tolerance_ = static_cast<float>(rule.tolerance) -
                 6.6e-8f * static_cast<float>(rule.classes / kWidth + 2 * kWidth);
    dense_from_ = static_cast<int>(rule.classes * int64_t{3} / 4);
    products_ = rule.vectors == 1 && equal_weights() ? product_length() : 0;
  }

  int64_t score(int64_t begin, int64_t end) {
    const bool in_place = in_.models == 1 && !in_.logits && in_.dtype == DType::kFloat32 &&
                          in_.class_stride[0] == 1 && !rule_.exact_only;
    const bool exact_only = rule_.exact_only || (in_.models > 1 && rule_.tau < kLowestMean);
    const int64_t step = block_rows(rule_.classes);
    for (int64_t r = begin; r < end; r += step) {
      const int n = static_cast<int>(end - r < step ? end - r : step);
      if (in_place) {
        walk(static_cast<const float*>(in_.data[0]) + r * in_.row_stride[0], in_.row_stride[0], r,
             n);
      } else if (!exact_only && stage(r, n)) {
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
    else if (rule_.classes <= kColumnsUpTo || mostly_dominant(rows, stride, n))
      columns(rows, stride, first_row, n);
    else
      compact(rows, stride, first_row, n);
  }

  // Whether the columns walk suits a block of rows, by the first entries of some of them.
  bool mostly_dominant(const float* rows, int64_t stride, int n) const {
    const int k = rule_.classes, seen = k < kWidth ? k : kWidth;
    if (n > kColumnsRows) n = kColumnsRows;
    int dominant = 0;
    for (int r = 0; r < n; ++r)
      dominant += __builtin_popcount(
          bits(greater_equal(load_first(rows + r * stride, seen), broadcast(tau_))));
    return static_cast<int64_t>(dominant) * k > static_cast<int64_t>(dense_from_) * seen * n;
  }

  // ---- columns ---------------------------------------------------------------------------------

  void columns(const float* rows, int64_t stride, int64_t first_row, int n) {
    for (int r = 0; r < n; r += kColumnsRows) {
      const int present = n - r < kColumnsRows ? n - r : kColumnsRows;
      const float* row[kColumnsRows];
      for (int i = 0; i < kColumnsRows; ++i) row[i] = rows + (r + (i < present ? i : 0)) * stride;
      const char* ahead = reinterpret_cast<const char*>(row[0]) + kPrefetchBytes;
      for (int64_t b = 0; b < kColumnsRows * stride * 4; b += int64_t{kLine}) prefetch(ahead + b);
      Group g[2];
      columns_groups(row, g);
      emit(g[0], first_row + r, nullptr, present < kWidth ? present : kWidth);
      if (present > kWidth) emit(g[1], first_row + r + kWidth, nullptr, present - kWidth);
    }
  }

  // What a pass over the classes gathers, one row per lane.
  struct Columns {
    F sum = broadcast(0.0f), top = broadcast(0.0f);
    I top_class = broadcast(int32_t{0});

    void take(F x, int c) {
      const Mask higher = greater(x, top);
      top = max_bits(x, top);
      top_class = select(higher, broadcast(int32_t{c}), top_class);
    }
  };

  // Scores kColumnsRows rows, kWidth of them in each group.
  void columns_groups(const float* const* row, Group* g) const {
    const int k = rule_.classes;
    F critical[2], divergence[2];
    for (int half = 0; half < 2; ++half) {
      const Columns t = read_columns(row + half * kWidth, scratch_.logs + half * kWidth);
      g[half].sum = t.sum;
      g[half].top = t.top;
      g[half].top_class = t.top_class;
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
#pragma GCC unroll 4
      for (int apart = 1; apart < kWidth; apart *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; i += 2 * apart) q[i] = add(q[i], q[i + apart]);
      t.sum = add(t.sum, q[0]);
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
      t.sum = add(t.sum, q[i]);
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
    int filled = 0;
    for (int r = 0; r < n; r += kWidth) {
      const int present = n - r < kWidth ? n - r : kWidth;
      uint32_t others = 0;
      filled = gather_group(rows + r * stride, stride, r, first_row + r, present, filled, others);
      for (; __builtin_expect(others != 0, 0); others &= others - 1) {
        const int lane = __builtin_ctz(others);
        const bool dense = scratch_.counts[r + lane] > dense_from_;
        scratch_.counts[r + lane] = 0;
        if (!dense) {
          settle(first_row + r + lane);
          continue;
        }
        number[waiting] = first_row + r + lane;
        row[waiting++] = rows + (r + lane) * stride;
        if (waiting == kColumnsRows) scattered(row, number, waiting);
      }
    }
    const int listed = sort_by_count(n);
    find_tops(listed, first_row);
    for (int t = 0; t < filled; t += kWidth)
      store(scratch_.values + t, log2(load(scratch_.values + t)));
    sparse_products(listed, first_row);
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

  // Appends the dominant entries of kWidth rows, which stand from row `at` of the block on, to the
  // `filled` ones; returns how many there are then. `others` become the rows that are not for this
  // walk: without dominant entries, with many, or doubtful.
  int gather_group(const float* rows, int64_t stride, int at, int64_t first_row, int present,
                   int filled, uint32_t& others) const {
    F sum[kWidth], top[kWidth];
    int32_t* const counts = scratch_.counts + at;
    int32_t* const begins = scratch_.begins + at;
    for (int lane = 0; lane < kWidth; ++lane) {
      const float* const row = rows + (lane < present ? lane : 0) * stride;
      const int found = gather(row, filled, sum[lane], top[lane]);
      counts[lane] = found;
      begins[lane] = filled;
      filled += found > dense_from_ ? 0 : found;
    }
    const F tops = fold_lanes(top, MaxBits());
    if (present == kWidth) {
      store(out_.top_prob + first_row, tops);
    } else {
      alignas(64) float all[kWidth];
      store(all, tops);
      for (int lane = 0; lane < present; ++lane) out_.top_prob[first_row + lane] = all[lane];
    }
    const F count = to_float(load(counts));
    const Mask not_here = either(doubtful(fold_lanes(sum, Add()), tops),
                                 either(greater(count, broadcast(static_cast<float>(dense_from_))),
                                        equal(count, broadcast(0.0f))));
    others = bits(not_here) & ((1u << present) - 1u);
    return filled;
  }

  // Appends a row's dominant entries and their classes from `at` on and returns how many. Adds up the
  // row in passing.
  int gather(const float* row, int at, F& row_sum, F& row_top) const {
    const int k = rule_.classes;
    const F tau = broadcast(tau_);
    const I step = broadcast(int32_t{kWidth});
    float* const values = scratch_.values + at;
    int32_t* const index = scratch_.index + at;
    F sum = broadcast(0.0f), top = sum;
    I classes = lane_numbers();
    int64_t found = 0;
    const auto take = [&](F x) {
      sum = add(sum, x);
      top = max_bits(top, x);
      found += compress(greater_equal(x, tau), x, classes, values + found, index + found);
      classes = add(classes, step);
    };
    int c = 0;
    if (k >= kManyClasses) {
      for (; c + kWord <= k; c += kWord) {
        uint64_t dominant = 0;
#pragma GCC unroll 16
        for (int i = 0; i < kWord; i += 2 * kWidth) {
          if (i % kLineFloats == 0)
            prefetch(reinterpret_cast<const char*>(row + c + i) + kPrefetchBytes);
          const F x = load(row + c + i), y = load(row + c + i + kWidth);
          sum = add(sum, add(x, y));
          top = max_bits(top, max_bits(x, y));
          dominant |= static_cast<uint64_t>(bits(greater_equal(x, tau))) << i;
          dominant |= static_cast<uint64_t>(bits(greater_equal(y, tau))) << (i + kWidth);
        }
        // They are taken four at a time: the number of rounds can be foretold more often than the
        // number of entries. What is taken too much is overwritten later.
        const int64_t end = found + __builtin_popcountll(dominant);
        for (int64_t t = found; t < end; t += 4) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const int entry = c + __builtin_ctzll(dominant | uint64_t{1} << (kWord - 1));
            values[t + i] = row[entry];
            index[t + i] = entry;
            dominant &= dominant - 1;
          }
        }
        found = end;
      }
      classes = add(classes, broadcast(int32_t{c}));
    }
    for (; c + kLineFloats <= k; c += kLineFloats) {
      prefetch(reinterpret_cast<const char*>(row + c) + kPrefetchBytes);
#pragma GCC unroll 4
      for (int i = 0; i < kLineFloats; i += kWidth) take(load(row + c + i));
    }
    if (c < k) prefetch(reinterpret_cast<const char*>(row + c) + kPrefetchBytes);
    for (; c + kWidth <= k; c += kWidth) take(load(row + c));
    if (c < k) take(load_first(row + c, k - c));
    row_sum = sum;
    row_top = top;
    return static_cast<int>(found);
  }

  // Lists the rows of the block that have counts, those with equally many entries next to one another:
  // how often the loops over their entries run is then foretold right. Returns how many rows.
  int sort_by_count(int n) const {
    const int32_t* const counts = scratch_.counts;
    Sparse* const sparse = scratch_.sparse;
    // Two histograms: a row need not wait for the count that its neighbour has just changed.
    int next[2][kLengths + 1] = {};
    const auto length = [](int count) { return count < kLengths ? count : kLengths; };
    for (int r = 0; r < n; ++r) ++next[r % 2][length(counts[r])];
    next[0][0] = next[1][0] = 0;
    int listed = 0;
    for (int l = 1; l <= kLengths; ++l) {
      for (int half = 0; half < 2; ++half) {
        const int here = next[half][l];
        next[half][l] = listed;
        listed += here;
      }
    }
    // Rows with nothing to list are written beyond the others.
    next[0][0] = next[1][0] = listed;
    for (int r = 0; r < n; ++r) {
      const int place = next[r % 2][length(counts[r])]++;
      sparse[place] = {r, counts[r], scratch_.begins[r]};
    }
    for (int i = 0; i < kWidth; ++i) sparse[listed + i] = {};
    return listed;
  }

  // The classes of the listed rows' highest entries: the first gathered entry equal to the top.
  void find_tops(int listed, int64_t first_row) const {
    const Sparse* const sparse = scratch_.sparse;
    int32_t* const top_class = out_.top_class + first_row;
    const float* const top_prob = out_.top_prob + first_row;
    const float* const values = scratch_.values;
    const int32_t* const index = scratch_.index;
    for (int i = 0; i < listed; ++i) {
      const F top = broadcast(top_prob[sparse[i].row]);
      for (int64_t t = sparse[i].begin;; t += 2 * kWidth) {
        const uint64_t low = bits(equal(load(values + t), top));
        const uint64_t high = bits(equal(load(values + t + kWidth), top));
        const uint64_t hit = low | high << kWidth;
        if (!hit) continue;
        top_class[sparse[i].row] = index[t + __builtin_ctzll(hit)];
        break;
      }
    }
  }

  void sparse_products(int listed, int64_t first_row) {
    const int vectors = (rule_.vectors + kWidth - 1) / kWidth;
    const F lower = broadcast(alpha_ * (1.0f - guard_all_));
    for (int i = 0; i < listed; i += kWidth) {
      const Sparse* const rows = scratch_.sparse + i;
      F critical[kWidth], divergence[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) {
        critical[lane] = broadcast(0.0f);
        divergence[lane] = broadcast(kLowest);
      }
      int v = 0;
      for (; v + 4 <= vectors; v += 4) compact_product<4>(rows, v, critical, divergence);
      if (vectors - v == 3) compact_product<3>(rows, v, critical, divergence);
      if (vectors - v == 2) compact_product<2>(rows, v, critical, divergence);
      if (vectors - v == 1) compact_product<1>(rows, v, critical, divergence);
      const int present = listed - i < kWidth ? listed - i : kWidth;
      const F a = fold_lanes(critical, Max());
      alignas(64) float highest_a[kWidth], highest_d[kWidth];
      store(highest_a, a);
      store(highest_d, fold_lanes(divergence, Max()));
      for (int lane = 0; lane < present; ++lane) {
        const int64_t r = first_row + rows[lane].row;
        out_.critical_alpha[r] = highest_a[lane];
        out_.divergence[r] = highest_d[lane];
        out_.votes[r] = 0;
      }
      uint32_t near = bits(greater_equal(a, lower)) & ((1u << present) - 1u);
      for (; near; near &= near - 1) {
        const int lane = __builtin_ctz(near);
        vote(first_row + rows[lane].row, scratch_.sums + lane * rule_.stride);
      }
    }
  }

  // Counts the votes of a row whose a_j are `sums`.
  void vote(int64_t r, const float* sums) {
    const F lower = broadcast(alpha_ * (1.0f - guard_all_));
    const F upper = broadcast(alpha_ * (1.0f + guard_all_));
    int votes = 0;
    uint32_t open = 0;
    for (int j = 0; j < rule_.vectors; j += kWidth) {
      const F a = load(sums + j);
      const Mask above = greater(a, upper);
      votes += __builtin_popcount(bits(above));
      open |= bits(both_not(greater_equal(a, lower), above));
    }
    if (open)
      settle(r);
    else
      out_.votes[r] = votes * rule_.ballot;
  }

  // kCount lane-vectors of a_j, from vector v kWidth on, for kWidth rows. They are added in the order
  // of the columns walk: the numbers of a row do not depend on the walk, hence not on its neighbours.
  template <int kCount>
  void compact_product(const Sparse* rows, int v, F* critical, F* divergence) const {
    const int first = v * kWidth;
    const float* const weights = rule_.weights + first;
    const float* const entropy = rule_.entropy + first;
    const float* const offset = rule_.offset + first;
    const float* const values = scratch_.values;
    const int32_t* const index = scratch_.index;
    const int64_t stride = rule_.stride;
    float* sums = scratch_.sums + first;
    for (int lane = 0; lane < kWidth; ++lane, sums += stride) {
      const float* log_q = values + rows[lane].begin;
      const int32_t* c = index + rows[lane].begin;
      F a[kCount];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) a[i] = broadcast(0.0f);
      for (int n = rows[lane].count; n > 0; --n) {
        const F x = broadcast(*log_q++);
        const float* const w = weights + *c++ * stride;
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) a[i] = fma(x, load(w + i * kWidth), a[i]);
      }
      F highest_a = critical[lane], highest_d = divergence[lane];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const int j = i * kWidth;
        highest_a = max(highest_a, a[i]);
        highest_d = max(highest_d, fma(load(entropy + j), a[i], load(offset + j)));
        store(sums + j, a[i]);
      }
      critical[lane] = highest_a;
      divergence[lane] = highest_d;
    }
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
    F sum = broadcast(0.0f), top = broadcast(0.0f), total = broadcast(0.0f);
    I top_class = broadcast(int32_t{0});
  };

  void single(const float* rows, int64_t stride, int64_t first_row, int n) {
    const F none = broadcast(0.0f);
    for (int r = 0; r < n; r += kWidth) {
      const int present = n - r < kWidth ? n - r : kWidth;
      F sum[kWidth], total[kWidth], tops[kWidth];
      I classes[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) {
        const float* row = rows + (r + (lane < present ? lane : 0)) * stride;
        const Single t =
            products_ >= kVectorsOfLine ? single_row<true>(row) : single_row<false>(row);
        sum[lane] = t.sum;
        total[lane] = t.total;
        tops[lane] = t.top;
        classes[lane] = t.top_class;
      }
      Group g;
      g.sum = fold_lanes(sum, Add());
      g.top = fold_lanes(tops, MaxBits());
      alignas(64) float top[kWidth];
      alignas(64) int32_t top_class[kWidth];
      store(top, g.top);
      for (int lane = 0; lane < kWidth; ++lane)
        top_class[lane] = lowest_class(equal(tops[lane], broadcast(top[lane])), classes[lane]);
      g.top_class = load(top_class);
      g.critical = max(fold_lanes(total, Add()), none);
      g.divergence = fma(broadcast(rule_.entropy[0]), g.critical, broadcast(rule_.offset[0]));
      const F lower = broadcast(alpha_ * (1.0f - guard_all_));
      const Mask vote = greater(g.critical, broadcast(alpha_ * (1.0f + guard_all_)));
      g.votes = count(broadcast(int32_t{0}), vote);
      // Rows without a dominant entry are settled too.
      g.unsettled =
          either(both_not(greater_equal(g.critical, lower), vote), greater(broadcast(tau_), g.top));
      emit(g, first_row + r, nullptr, present);
    }
  }

  // The lowest of the classes in the lanes of the mask; 0 when it is empty (NaN).
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
    return lowest;
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
    I classes = lane_numbers();
    const auto take = [&](F q, int c) {
      t.sum = add(t.sum, q);
      t.top_class = select(greater(q, t.top), classes, t.top_class);
      t.top = max_bits(q, t.top);
      classes = add(classes, step);
      const Mask counts = greater_equal(q, tau);
      if (kProducts) {
        product = mul(product, select(counts, q, one));
      } else if (any(counts)) {
        alignas(64) float w[kWidth] = {};
        for (int i = 0; i < kWidth && c + i < k; ++i)
          w[i] = rule_.weights[static_cast<int64_t>(c + i) * rule_.stride];
        t.total = fma(load(w), keep(counts, log2(q)), t.total);
      }
    };
    int c = 0, factors = kVectorsOfLine;  // of the product, and those that the next line brings
    for (; c + kLineFloats <= k; c += kLineFloats, factors += kVectorsOfLine) {
      if (kProducts && factors > products_) {
        t.total = fma(weight, log2(product), t.total);
        product = one;
        factors = kVectorsOfLine;
      }
      prefetch(reinterpret_cast<const char*>(row + c) + kPrefetchBytes);
#pragma GCC unroll 4
      for (int i = 0; i < kLineFloats; i += kWidth) take(load(row + c + i), c + i);
    }
    if (kProducts && factors > products_) {
      t.total = fma(weight, log2(product), t.total);
      product = one;
    }
    if (c < k) prefetch(reinterpret_cast<const char*>(row + c) + kPrefetchBytes);
    for (; c + kWidth <= k; c += kWidth) take(load(row + c), c);
    if (c < k) take(load_first(row + c, k - c), c);
    if (kProducts) t.total = fma(weight, log2(product), t.total);
    return t;
  }

  // ---- results ---------------------------------------------------------------------------------

  // Rows that may be no valid predictions, or have an entry above 1. A sum that its rounding errors
  // (2^-24 for each of the additions that follow one another) could carry past the tolerance counts;
  // the top of a row with a negative entry is negative or NaN (max_bits).
  Mask doubtful(F sum, F top) const {
    const F zero = broadcast(0.0f), one = broadcast(1.0f);
    return either(not_less_equal(abs(sub(sum, one)), broadcast(tolerance_)),
                  either(greater_equal(zero, top), not_less_equal(top, one)));
  }

  // Writes the first `present` lanes to the rows `number`, or to the rows from `first_row` on where
  // that is null.
  void emit(const Group& g, int64_t first_row, const int64_t* number, int present) {
    const Mask open = either(doubtful(g.sum, g.top), g.unsettled);
    const uint32_t lanes = ((1u << present) - 1u);
    if (!number && present == kWidth) {
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
    for (uint32_t rest = bits(open) & lanes; __builtin_expect(rest != 0, 0); rest &= rest - 1) {
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
    int32_t* const index = scratch_.classes;
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
      } else if constexpr (sizeof(T) == sizeof(float)) {
        for (int i = 0; i < k; ++i) values[i] = static_cast<double>(first[i]);
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
    const int padded = static_cast<int>(round_up<size_t>(k, kSumLanes));
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
  __attribute__((noinline)) static F convert(const T* const* models, int number, float* out,
                                             int64_t count) {
    const Mean mean(number);
    const F negative_zero = broadcast(-0.0f);
    F lowest = broadcast(0.0f);
    constexpr int kStep = kVectors * kWidth;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      F total[kVectors];
#pragma GCC unroll 4
      for (F& t : total) t = negative_zero;  // plus x is x, be it -0
      for (int model = 0; model < number; ++model) {
        const T* const entries = models[model] + i;
#pragma GCC unroll 4
        for (size_t b = 0; b < kStep * sizeof(T); b += kLine)
          prefetch(reinterpret_cast<const char*>(entries) + b + kPrefetchBytes);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const F x = load_as_float(entries + v * kWidth);
          lowest = min(lowest, x);
          total[v] = add(total[v], x);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        store(out + i + v * kWidth, number == 1 ? total[v] : mean(total[v]));
    }
    for (; i < count; i += kWidth) {
      const int left = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
      F total = negative_zero;
      for (int model = 0; model < number; ++model) {
        F x;
        if (left == kWidth) {
          x = load_as_float(models[model] + i);
        } else {
          T rest[kWidth] = {};
          memcpy(rest, models[model] + i, sizeof(T) * static_cast<size_t>(left));
          x = load_as_float(rest);
        }
        lowest = min(lowest, x);
        total = add(total, x);
      }
      alignas(64) float means[kWidth];
      store(means, number == 1 ? total : mean(total));
      memcpy(out + i, means, sizeof(float) * static_cast<size_t>(left));
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
  float tau_, alpha_, guard_all_, tolerance_;
  int dense_from_;
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
