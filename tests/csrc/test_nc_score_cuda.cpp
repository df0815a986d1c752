// The CUDA kernels of nc_score, run on the host by tests/cuda_emulation, against the definition.
//
//   test_nc_score_cuda [--quick] [--stop] [--seed N]
//
// Votes, top class and top probability must equal the definition on every row; settled rows must equal
// it in every bit of the other results, the rest within the proven bound; and what the float32 passes
// can answer they must answer. The portable CPU walk is held against the same definition. --quick leaves
// out the larger cases, --stop ends with the first failure.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "bindings/common.h"
#include "kernels/nc_score.cu"

namespace genkl {
extern const NcKernel kNcKernelPortable;
// dispatch.cpp names these too; this test links the portable walk alone.
#if defined(__x86_64__)
extern const NcKernel kNcKernelAvx512, kNcKernelAvx2;
const NcKernel kNcKernelAvx512 = {}, kNcKernelAvx2 = {};
#endif

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int failures = 0;
bool stop_at_failure = false;

void fail(const std::string& where, const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s: %s\n", where.c_str(), what.c_str());
  if (stop_at_failure) std::exit(1);
}

using Random = std::mt19937_64;
double uniform(Random& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }
double normal(Random& random) {
  return std::sqrt(-2.0 * std::log(1.0 - uniform(random))) *
         std::cos(6.283185307179586 * uniform(random));
}

// ---- arrays --------------------------------------------------------------------------------------

// float64 to the nearest number of a coarser format with `fraction_bits` and exponents from `lowest`.
double round_to(double x, int fraction_bits, int lowest) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double quantum = std::ldexp(1.0, std::max(exponent, lowest) - fraction_bits);
  return std::nearbyint(x / quantum) * quantum;
}

double round_to(double x, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return round_to(x, 11, -13);
    case DType::kBFloat16:
      return round_to(x, 8, -125);
    case DType::kFloat32:
      return static_cast<double>(static_cast<float>(x));
    default:
      return x;
  }
}

double step_up(double x, DType dtype) {
  const double up = std::nextafter(x, kInfinity);
  for (double step = up - x;; step *= 2.0)
    if (round_to(x + step, dtype) > x) return round_to(x + step, dtype);
}

uint16_t half_bits(double x) {  // of a number that float16 holds
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  int exponent;
  const double f = std::frexp(std::fabs(x), &exponent);
  if (x == 0.0) return sign;
  if (exponent < -13)
    return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(f, exponent + 24)));
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) |
                               (static_cast<int>(std::ldexp(f, 11)) & 1023));
}

enum class Layout { kDense, kPadded, kOffset, kTransposed, kEverySecond };

const char* const kLayoutNames[] = {"dense", "padded", "offset", "transposed", "every second"};

// One model's predictions in memory of exactly the size they need.
struct Array {
  std::unique_ptr<unsigned char[]> memory;
  const void* data;
  int64_t row_stride, class_stride;

  Array(const std::vector<double>& values, int64_t rows, int classes, DType dtype, Layout layout) {
    const int size = size_of(dtype);
    int64_t offset = 0, k = classes;
    row_stride = k;
    class_stride = 1;
    if (layout == Layout::kPadded) row_stride = k + 3;
    if (layout == Layout::kOffset) offset = 1;
    if (layout == Layout::kTransposed) row_stride = 1, class_stride = rows;
    if (layout == Layout::kEverySecond) row_stride = 2 * k, class_stride = 2;
    const int64_t count =
        rows == 0 ? 0 : offset + (rows - 1) * row_stride + (k - 1) * class_stride + 1;
    memory.reset(new unsigned char[static_cast<size_t>(count * size)]);
    std::memset(memory.get(), 0xff, static_cast<size_t>(count * size));
    data = memory.get() + offset * size;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < k; ++i) {
        unsigned char* to = memory.get() + (offset + r * row_stride + i * class_stride) * size;
        const double x = values[static_cast<size_t>(r * k + i)];
        const float f = static_cast<float>(x);
        uint16_t bits = half_bits(x);
        switch (dtype) {
          case DType::kFloat64:
            std::memcpy(to, &x, 8);
            break;
          case DType::kFloat32:
            std::memcpy(to, &f, 4);
            break;
          case DType::kBFloat16:
            bits = static_cast<uint16_t>(bit_cast<uint32_t>(f) >> 16);
            [[fallthrough]];
          case DType::kFloat16:
            std::memcpy(to, &bits, 2);
            break;
        }
      }
  }
};

// ---- rows ----------------------------------------------------------------------------------------

enum class Kind {
  kPeaked,
  kFlat,
  kOneHot,
  kTwoPeaks,
  kTinyEntries,  // zeros and subnormal numbers
  kAtTau,        // entries equal to tau, one step below and one above
  kUniform,
  kManyTies,   // a sixth of the classes share all, or classes that `compact` lists in another order
  kLateDense,  // few dominant entries in the first classes, all later ones are
  kBarelyAboveOne,
  kNegativeZero,
  kValid,  // how many kinds are valid; those from here on are not
  kNan = kValid,
  kInfinite,
  kNegative,
  kSumOff,
  kSumAtEdge,  // sums to 1 + tolerance or 1 - tolerance, give or take the last bits
  kAboveOne,
  kAllZero,
  kCount
};

struct Case {
  int classes;
  int64_t rows;
  int models = 1;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kDense;
  int vectors = 20;
  int ballot = 1;
  double alpha = 1.05;
  double beta_share = 0.4;  // beta = beta_share / classes
  double tau = 0.0;         // instead of 1/classes - beta, unless 0
  bool logits = false;
  bool invalid = false;      // with rows that are no predictions
  Kind only = Kind::kCount;  // rows of one kind
  bool seldom = false;       // every third row, the rest peaked
  double sigma_share = 0.7;  // sigma = sigma_share / classes

  std::string name() const {
    static const char* const kTypes[] = {"float32", "float16", "bfloat16", "float64"};
    return "k=" + std::to_string(classes) + " N=" + std::to_string(rows) +
           " M=" + std::to_string(models) + " m=" + std::to_string(vectors) + " " +
           kTypes[static_cast<int>(dtype)] + " " + kLayoutNames[static_cast<int>(layout)] +
           (logits ? " logits" : "") + (invalid ? " with invalid rows" : "") +
           (only == Kind::kCount ? "" : " kind " + std::to_string(static_cast<int>(only)));
  }
};

double sum_tolerance(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2e-2 : 1e-3;
}

void softmax_row(Random& random, double scale, double* row, int k) {
  double total = 0.0;
  for (int i = 0; i < k; ++i) total += row[i] = std::exp(scale * normal(random));
  for (int i = 0; i < k; ++i) row[i] /= total;
}

// One model's row, as float64 numbers that the dtype holds.
void make_row(Random& random, Kind kind, double tau, DType dtype, double* row, int k) {
  const auto any_class = [&] { return static_cast<int>(random() % static_cast<uint64_t>(k)); };
  softmax_row(random, 3.0, row, k);
  switch (kind) {
    case Kind::kFlat:
      softmax_row(random, 0.2, row, k);
      break;
    case Kind::kOneHot:
      for (int i = 0; i < k; ++i) row[i] = 0.0;
      row[any_class()] = 1.0;
      break;
    case Kind::kTwoPeaks: {
      for (int i = 0; i < k; ++i) row[i] = 0.0;
      const int a = any_class(), b = any_class();
      row[a] += 0.5;
      row[b] += 0.5;
      break;
    }
    case Kind::kTinyEntries: {
      const double tiny[3] = {0.0, dtype == DType::kFloat16 ? 0x1p-24 : 1e-45, 1e-30};
      for (int i = 0; i < k; ++i) row[i] = tiny[random() % 3];
      const int a = any_class(), b = any_class();
      row[a] = 0.25;
      row[b] = a == b ? 1.0 : 0.75;
      break;
    }
    case Kind::kAtTau: {
      const double q = round_to(tau, dtype);
      const double around[4] = {0.0, q, step_up(q, dtype), -step_up(-q, dtype)};
      double rest = 1.0;
      const int top = any_class();
      const uint64_t one_of = k < 64 ? 4 : 12;
      for (int i = 0; i < k; ++i) {
        const uint64_t drawn = random() % one_of;
        row[i] = i == top || drawn > 3 ? 0.0 : around[drawn];
        if (rest - row[i] < 0.3) row[i] = 0.0;
        rest -= row[i];
      }
      row[top] = rest;
      break;
    }
    case Kind::kUniform:
      for (int i = 0; i < k; ++i) row[i] = 1.0 / k;
      break;
    case Kind::kManyTies: {
      for (int i = 0; i < k; ++i) row[i] = 0.0;
      if (k >= 164 && random() % 2) {
        row[36] = 1.0 / 37.0;
        for (int i = 128; i < 164; ++i) row[i] = 1.0 / 37.0;
        break;
      }
      const int share = k / 6 + 1;
      for (int left = share; left > 0;) {
        double& entry = row[any_class()];
        if (entry > 0.0) continue;
        entry = 1.0 / share;
        --left;
      }
      break;
    }
    case Kind::kLateDense:
      softmax_row(random, 0.2, row, k);
      for (int i = 0; i < k / 2; ++i) row[i] *= i % 4 ? 0.0 : 4.0;
      break;
    case Kind::kBarelyAboveOne:
      for (int i = 0; i < k; ++i) row[i] = 0.0;
      row[any_class()] = 1.0 + sum_tolerance(dtype) / 2.0;
      break;
    case Kind::kNegativeZero:
      row[any_class()] = -0.0;
      break;
    case Kind::kNan:
      row[any_class()] = kNan;
      break;
    case Kind::kInfinite:
      row[any_class()] = random() % 2 ? kInfinity : -kInfinity;
      break;
    case Kind::kNegative: {  // in a row that sums to 1
      const int a = any_class(), b = (a + 1 + static_cast<int>(random() % 2)) % k;
      const double moved = row[a] + 0.0003;
      row[a] = -0.0003;
      row[b] += b == a ? 0.0 : moved;
      break;
    }
    case Kind::kSumOff:
      for (int i = 0; i < k; ++i) row[i] *= random() % 2 ? 1.05 : 0.95;
      break;
    case Kind::kSumAtEdge: {
      const double tolerance = sum_tolerance(dtype);
      double target = 1.0 + (random() % 2 ? tolerance : -tolerance);
      target += static_cast<double>(static_cast<int>(random() % 7) - 3) * 0x1p-53;
      for (int i = 0; i < k; ++i) row[i] = round_to(row[i], dtype);
      double before = 0.0;
      for (int i = 0; i + 1 < k; ++i) before = before + row[i];
      row[k - 1] = std::max(target - before, 0.0);
      break;
    }
    case Kind::kAboveOne:
      row[any_class()] = 1.5;
      break;
    case Kind::kAllZero:
      for (int i = 0; i < k; ++i) row[i] = 0.0;
      break;
    default:
      break;
  }
  for (int i = 0; i < k; ++i) row[i] = round_to(row[i], dtype);
}

struct Problem {
  std::vector<std::vector<double>> values;  // per model [rows, classes]
  std::vector<Kind> kinds;                  // per row
  std::vector<double> vectors;              // [vectors, classes]
  std::vector<double> entropies;            // [vectors]
  double tau;
};

Problem make_problem(const Case& c, Random& random) {
  Problem p;
  const size_t k = static_cast<size_t>(c.classes), m = static_cast<size_t>(c.vectors);
  p.tau = c.tau > 0.0 ? c.tau : (1.0 - c.beta_share) / c.classes;
  p.vectors.resize(m * k);
  for (size_t j = 0; j < m; ++j) {
    double total = 0.0;
    for (size_t i = 0; i < k; ++i) {
      double u = (1.0 + c.sigma_share * normal(random)) / c.classes;
      if (u < 0.0) u = 0.005;
      total += p.vectors[j * k + i] = u;
    }
    for (size_t i = 0; i < k; ++i) p.vectors[j * k + i] /= total;
  }
  p.entropies.resize(m);
  entropies_cpu(p.vectors.data(), c.vectors, c.classes, p.entropies.data());
  for (int64_t r = 0; r < c.rows; ++r) {
    const Kind last = c.invalid ? Kind::kCount : Kind::kValid;
    const bool ordinary = random() % 3 != 0;
    p.kinds.push_back(c.seldom && r % 3 != 1   ? Kind::kPeaked
                      : c.only != Kind::kCount ? c.only
                      : ordinary ? static_cast<Kind>(random() % 2)
                                 : static_cast<Kind>(random() % static_cast<uint64_t>(last)));
  }
  p.values.resize(static_cast<size_t>(c.models));
  for (auto& values : p.values) {
    values.resize(static_cast<size_t>(c.rows) * k);
    for (size_t r = 0; r < p.kinds.size(); ++r) {
      // Of several models only one need be at fault.
      const bool at_fault = &values == &p.values.back() || p.kinds[r] < Kind::kValid;
      double* row = values.data() + r * k;
      make_row(random, at_fault ? p.kinds[r] : Kind::kPeaked, p.tau, c.dtype, row, c.classes);
      if (!c.logits) continue;
      for (size_t i = 0; i < k; ++i)
        row[i] = round_to(std::isfinite(row[i]) ? std::log(row[i] + 1e-30) - 2.0 : row[i], c.dtype);
    }
  }
  return p;
}

// ---- the definition ------------------------------------------------------------------------------

struct Expected {
  double critical, divergence;
  int votes, top_class;
  float top_prob;
  bool valid;
  double sum;
  double clearance;  // min_j |a_j - alpha|
};

// The sum of exp(x - highest) as the definition adds it up.
double define_total(const double* x, int k, double highest) {
  std::vector<double> lanes(32, 0.0);
  for (int i = 0; i < k; ++i) lanes[static_cast<size_t>(i % 32)] += exp_exact(x[i] - highest);
  for (size_t half = 16; half > 0; half /= 2)
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] = lanes[lane] + lanes[lane + half];
  return lanes[0];
}

std::vector<float> define_softmax(const double* x, int k) {
  double highest = x[0];
  for (int i = 1; i < k; ++i) highest = x[i] > highest ? x[i] : highest;
  const double total = define_total(x, k, highest);
  std::vector<float> q;
  for (int i = 0; i < k; ++i) q.push_back(static_cast<float>(exp_exact(x[i] - highest) / total));
  return q;
}

Expected define_row(const Case& c, const Problem& p, size_t r) {
  const size_t k = static_cast<size_t>(c.classes);
  std::vector<double> q(k);
  Expected expected = {};
  expected.valid = true;
  std::vector<float> mean(k);
  for (size_t model = 0; model < p.values.size(); ++model) {
    const double* x = p.values[model].data() + r * k;
    for (size_t i = 0; i < k; ++i)
      if (!std::isfinite(x[i]) || (!c.logits && x[i] < 0.0)) expected.valid = false;
    const std::vector<float> softmax =
        c.logits ? define_softmax(x, c.classes) : std::vector<float>();
    for (size_t i = 0; i < k; ++i) {
      const float part = c.logits ? softmax[i] : static_cast<float>(x[i]);
      mean[i] = model == 0 ? part : mean[i] + part;
      q[i] = x[i];
    }
  }
  if (c.models > 1 || c.logits)
    for (size_t i = 0; i < k; ++i)
      q[i] = c.models > 1 ? static_cast<double>(mean[i] / static_cast<float>(c.models))
                          : static_cast<double>(mean[i]);

  double sum = 0.0;
  for (size_t i = 0; i < k; ++i) sum = sum + q[i];
  if (!c.logits && !(std::fabs(sum - 1.0) <= sum_tolerance(c.dtype))) expected.valid = false;

  size_t top = 0;
  for (size_t i = 1; i < k && !std::isnan(q[top]); ++i)
    if (std::isnan(q[i]) || q[i] > q[top]) top = i;
  expected.top_class = static_cast<int>(top);
  expected.top_prob = static_cast<float>(q[top]);

  const double tau = round_to(p.tau, c.models > 1 || c.logits ? DType::kFloat32 : c.dtype);
  bool nan = false;
  double clearance = kInfinity;
  for (size_t j = 0; j < p.entropies.size(); ++j) {
    double cross = 0.0;
    for (size_t i = 0; i < k; ++i)
      if (!(q[i] < tau)) cross = cross + log2_exact(q[i]) * p.vectors[j * k + i];
    const double d = c.alpha * p.entropies[j] - cross;
    const double a = cross / p.entropies[j];
    nan |= std::isnan(a);
    clearance = std::min(clearance, std::fabs(a - c.alpha));
    expected.votes += d >= 0.0;
    expected.critical = j == 0 ? a : std::max(expected.critical, a);
    expected.divergence = j == 0 ? d : std::max(expected.divergence, d);
  }
  if (nan) expected.critical = expected.divergence = kNan;
  expected.votes *= c.ballot;
  expected.clearance = clearance;
  expected.sum = sum;
  return expected;
}

// ---- comparison ----------------------------------------------------------------------------------

struct Results {
  std::vector<float> critical_alpha, divergence, top_prob;
  std::vector<int32_t> votes, top_class;
  int64_t first_bad_row = -7;
  explicit Results(int64_t rows)
      : critical_alpha(static_cast<size_t>(rows), -7.0f),
        divergence(critical_alpha),
        top_prob(critical_alpha),
        votes(static_cast<size_t>(rows), -7),
        top_class(votes) {}
  NcOutputs outputs() {
    return {critical_alpha.data(), divergence.data(), votes.data(), top_class.data(),
            top_prob.data()};
  }
};

bool same(float a, float b) {
  return bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

// Rows that no float32 pass may answer for.
bool must_settle(const Case& c, Kind kind, const Expected& expected) {
  return c.logits || c.dtype == DType::kFloat64 || !expected.valid || kind == Kind::kNan ||
         expected.critical == c.alpha;
}

// Rows that the float32 passes must answer: nothing about them is close. Their neighbours' minus signs
// may have been laid to their charge.
bool must_answer(const Case& c, const Problem& p, size_t r, const Expected& expected) {
  const auto has_sign = [&](size_t other) {
    for (const auto& values : p.values)
      for (size_t i = 0; i < static_cast<size_t>(c.classes); ++i)
        if (std::signbit(values[other * static_cast<size_t>(c.classes) + i])) return true;
    return false;
  };
  if (c.logits || c.dtype == DType::kFloat64 || c.classes > kMaxFastClasses) return false;
  return expected.valid &&
         expected.clearance > 3.0 * c.alpha * static_cast<double>(guard(c.classes)) &&
         std::fabs(expected.sum - 1.0) < sum_tolerance(c.dtype) / 2.0 &&
         expected.top_prob <= 1.0f && static_cast<double>(expected.top_prob) >= p.tau * 1.01 &&
         !has_sign(r) && !has_sign(r > 0 ? r - 1 : r) &&
         !has_sign(r + 1 < p.kinds.size() ? r + 1 : r);
}

// What the float32 passes leave for `settle` is marked, and is no more than it must be.
void check_fast(const Case& c, const Problem& p, const Predictions& predictions) {
  const HostRule held(predictions, p.vectors.data(), p.entropies.data(), c.vectors, c.ballot,
                      c.alpha, p.tau);
  if (c.rows == 0 || !is_fast(predictions, held.rule)) return;
  Results results(c.rows);
  const bool compacted = c.classes > kColumnsUpTo && has_unit_classes(predictions);
  if (compacted) launch_compact(predictions, c.rows, held.rule, results.outputs(), nullptr);
  launch_columns(predictions, c.rows, held.rule, compacted, results.outputs(), nullptr);
  for (size_t r = 0; r < p.kinds.size(); ++r) {
    const Expected expected = define_row(c, p, r);
    const int votes = results.votes[r];
    const std::string row = "float32 pass, " + c.name() + ", row " + std::to_string(r) +
                            " of kind " + std::to_string(static_cast<int>(p.kinds[r]));
    if (votes != kToSettle && votes != expected.votes)
      fail(row, "votes is " + std::to_string(votes) + ", not " + std::to_string(expected.votes));
    if (votes == kToSettle && must_answer(c, p, r, expected))
      fail(row, "it is left to settle without need");
    if (votes != kToSettle && must_settle(c, p.kinds[r], expected))
      fail(row, "it is not left to settle");
  }
}

void compare(const std::string& where, const Case& c, const Problem& p, const Results& results,
             bool check_bits, int& settled) {
  int64_t first_bad = -1;
  for (size_t r = 0; r < p.kinds.size(); ++r) {
    const Expected e = define_row(c, p, r);
    if (!e.valid && first_bad < 0) first_bad = static_cast<int64_t>(r);
    const std::string row = where + ", row " + std::to_string(r) + " of kind " +
                            std::to_string(static_cast<int>(p.kinds[r]));
    const auto differs = [&](const char* what, double got, double wanted) {
      char text[160];
      std::snprintf(text, sizeof(text), "%s is %.17g, not %.17g", what, got, wanted);
      fail(row, text);
    };
    if (results.votes[r] != e.votes) differs("votes", results.votes[r], e.votes);
    if (results.top_class[r] != e.top_class)
      differs("top_class", results.top_class[r], e.top_class);
    if (!same(results.top_prob[r], e.top_prob))
      differs("top_prob", static_cast<double>(results.top_prob[r]),
              static_cast<double>(e.top_prob));
    const float critical = round_on_side(e.critical, c.alpha, e.votes > 0);
    const float divergence = round_on_side(e.divergence, 0.0, e.votes > 0);
    if (same(results.critical_alpha[r], critical) && same(results.divergence[r], divergence)) {
      ++settled;
      continue;
    }
    const double error = (c.classes + 16) * 0x1p-24;
    const double got_critical = static_cast<double>(results.critical_alpha[r]);
    const double got_divergence = static_cast<double>(results.divergence[r]);
    const bool bits = check_bits && must_settle(c, p.kinds[r], e);
    if (bits || !(std::fabs(got_critical - e.critical) <= error * e.critical))
      differs("critical_alpha", got_critical, e.critical);
    if (bits || !(std::fabs(got_divergence - e.divergence) <=
                  error * (e.critical + c.alpha) * std::log2(c.classes)))
      differs("divergence", got_divergence, e.divergence);
  }
  if (results.first_bad_row != first_bad)
    fail(where, "first_bad_row is " + std::to_string(results.first_bad_row) + ", not " +
                    std::to_string(first_bad));
}

struct Inputs {
  std::vector<Array> arrays;
  Predictions predictions{};
  Inputs(const Case& c, const Problem& p) {
    for (const auto& values : p.values)
      arrays.emplace_back(values, c.rows, c.classes, c.dtype, c.layout);
    predictions.models = c.models;
    predictions.classes = c.classes;
    predictions.dtype = c.dtype;
    predictions.logits = c.logits;
    for (size_t model = 0; model < arrays.size(); ++model) {
      predictions.data[model] = arrays[model].data;
      predictions.row_stride[model] = arrays[model].row_stride;
      predictions.class_stride[model] = arrays[model].class_stride;
    }
  }
};

void run_inputs(const Case& c, const Problem& p, const Predictions& predictions) {
  int settled = 0;
  {
    const AlignedMemory memory = allocate_aligned(rule_bytes(c.classes, c.vectors));
    const NcRule rule = layout_rule(memory.get(), predictions, c.vectors, c.ballot, c.alpha, p.tau);
    Results results(c.rows);
    const std::string where = "CUDA, " + c.name();
    try {
      check_fast(c, p, predictions);
      const int error =
          nc_score_cuda(predictions, c.rows, rule, p.vectors.data(), p.entropies.data(),
                        results.outputs(), &results.first_bad_row, nullptr);
      if (error != cudaSuccess) fail(where, "launch error " + std::to_string(error));
      compare(where, c, p, results, true, settled);
    } catch (const cuda_emulation::Failure& failure) {
      fail(where, failure.what());
    }
  }
  {
    const HostRule held(predictions, p.vectors.data(), p.entropies.data(), c.vectors, c.ballot,
                        c.alpha, p.tau);
    Results results(c.rows);
    std::atomic<int64_t> first_bad{-1};
    const AlignedMemory scratch = allocate_scratch(kNcKernelPortable, held.rule);
    score_rows(kNcKernelPortable, predictions, held.rule, 0, c.rows, scratch.get(),
               results.outputs(), first_bad);
    results.first_bad_row = first_bad;
    int unused = 0;
    compare("CPU, " + c.name(), c, p, results, false, unused);
  }
  std::printf("%-70s %4d of %lld rows to the bit\n", c.name().c_str(), settled,
              static_cast<long long>(c.rows));
}

void run_problem(const Case& c, const Problem& p) { run_inputs(c, p, Inputs(c, p).predictions); }

void run_case(const Case& c, Random& random) { run_problem(c, make_problem(c, random)); }

// Sets alpha so that a row lies on the threshold, and a hair to either side of it.
void run_on_threshold(Case c, Random& random) {
  const Problem p = make_problem(c, random);
  for (size_t r = 0; r < 2; ++r) {
    const double critical = define_row(c, p, r).critical;
    for (double off : {0.0, 1e-16, -1e-16, 1e-7, -1e-7}) {
      c.alpha = critical * (1.0 + off);
      run_problem(c, p);
    }
  }
}

// Dense rows of many classes are left to `columns`.
void check_dense_marks(Random& random) {
  Case c;
  c.classes = 300;
  c.rows = 64;
  for (Kind kind : {Kind::kFlat, Kind::kPeaked}) {
    c.only = kind;
    const Problem p = make_problem(c, random);
    const Inputs inputs(c, p);
    const HostRule held(inputs.predictions, p.vectors.data(), p.entropies.data(), c.vectors,
                        c.ballot, c.alpha, p.tau);
    Results results(c.rows);
    launch_compact(inputs.predictions, c.rows, held.rule, results.outputs(), nullptr);
    int64_t marked = 0;
    for (int32_t votes : results.votes) marked += votes == kToColumns;
    if (marked != (kind == Kind::kFlat ? c.rows : 0))
      fail("dense marks, " + c.name(), std::to_string(marked) + " rows are left to columns");
  }
}

__global__ void write_softmax_scales(const Predictions in, int64_t rows, SoftmaxScale* scales) {
  for (int64_t r = 0; r < rows; ++r) scales[r * kLanes + lane_number()] = softmax_scale(in, 0, r);
}

// The sum under a softmax, whose last bits seldom show in a float32 quotient.
void check_softmax_scale(Random& random) {
  for (int k : {2, 31, 33, 100, 333}) {
    Case c;
    c.classes = k;
    c.rows = 10;
    c.logits = true;
    const Problem p = make_problem(c, random);
    const Inputs inputs(c, p);
    std::vector<SoftmaxScale> scales(static_cast<size_t>(c.rows * kLanes));
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kLanes);
    cudaLaunchKernelEx(&config, write_softmax_scales, inputs.predictions, c.rows, scales.data());
    for (size_t i = 0; i < scales.size(); ++i) {
      const double* x = p.values[0].data() + i / kLanes * static_cast<size_t>(k);
      const double highest = *std::max_element(x, x + k);
      const double total = define_total(x, k, highest);
      if (scales[i].highest != highest || scales[i].total != total)
        fail("softmax_scale, " + c.name(), "lane " + std::to_string(i % kLanes) + " is off");
    }
  }
}

// Rows so far apart that offsets need 64 bits; pages between them are never touched.
void check_distant_rows(int64_t rows, int64_t row_stride, Random& random) {
  Case c;
  c.classes = 14;
  c.rows = rows;
  c.dtype = DType::kFloat16;
  const Problem p = make_problem(c, random);
  Inputs inputs(c, p);
  const size_t bytes = static_cast<size_t>((rows - 1) * row_stride * 2 + 64);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return fail("distant rows", "no address space");
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(static_cast<unsigned char*>(memory) + r * row_stride * 2,
                static_cast<const unsigned char*>(inputs.predictions.data[0]) + r * 14 * 2, 14 * 2);
  inputs.predictions.data[0] = memory;
  inputs.predictions.row_stride[0] = row_stride;
  run_inputs(c, p, inputs.predictions);
  munmap(memory, bytes);
}

// The float32 passes are kept from what they cannot do.
void check_is_fast() {
  unsigned char memory[64];
  Predictions in{};
  in.models = 3;
  in.classes = 14;
  in.data[0] = in.data[1] = in.data[2] = memory;
  const auto expect = [&](bool wanted, double tau, const char* what) {
    const AlignedMemory rule = allocate_aligned(rule_bytes(in.classes, 2));
    if (is_fast(in, layout_rule(rule.get(), in, 2, 1, 1.0, tau)) != wanted) fail("is_fast", what);
  };
  expect(true, 0.05, "three models");
  expect(true, 1.01 * static_cast<double>(kMinDividend), "the smallest dividend");
  expect(false, 0.99 * static_cast<double>(kMinDividend), "quotients that may be off");
  in.models = 1;
  expect(true, 0.99 * static_cast<double>(kMinDividend), "no quotients");
  expect(false, 1e-39, "a subnormal tau");
  in.row_stride[0] = kMaxRowStride;
  expect(false, 0.05, "rows too far apart");
  in.row_stride[0] = 14;
  in.classes = kMaxFastClasses + 1;
  expect(false, 0.05, "too many classes");
  in.classes = 14;
  in.logits = true;
  expect(false, 0.05, "logits");
  in.logits = false;
  in.dtype = DType::kFloat64;
  in.models = 3;
  expect(false, 0.05, "float64");
}

// Divisor rounds as the division does, for every significand.
[[gnu::always_inline]] inline uint32_t count_wrong_quotients(int n) {
  const float number = static_cast<float>(n);
  const Divisor divisor = {number, 1.0f / number};
  uint32_t wrong = 0;
  for (uint32_t bits = 0x3f800000u; bits < 0x40000000u; ++bits) {
    const float x = bit_cast<float>(bits);
    wrong += divisor.divide(x) != x / number;
  }
  return wrong;
}

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] uint32_t count_with_fma(int n) { return count_wrong_quotients(n); }
const bool kHasFma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
uint32_t count_with_fma(int n) { return count_wrong_quotients(n); }
const bool kHasFma = true;
#endif
uint32_t count_without_fma(int n) { return count_wrong_quotients(n); }

void check_divisor() {
  for (int n = 2; n <= kMaxModels; ++n)
    if (const uint32_t wrong = kHasFma ? count_with_fma(n) : count_without_fma(n))
      fail("Divisor by " + std::to_string(n), std::to_string(wrong) + " wrong quotients");
  for (int n : {3, 7, 63}) {
    const float number = static_cast<float>(n);
    const Divisor divisor = {number, 1.0f / number};
    for (float x = kMinDividend; x < 1.0f; x *= 1.37f)
      if (divisor.divide(x) != x / number) fail("Divisor", "wrong for a small dividend");
  }
}

void run_all(bool quick, Random& random) {
  check_divisor();
  check_is_fast();
  check_dense_marks(random);
  check_softmax_scale(random);
  const auto run = [&](Case c) { run_case(c, random); };
  Case c;
  for (int64_t rows : {0, 1, 31, 33, 64, 65, 257}) {
    c = {};
    c.classes = 14;
    c.rows = rows;
    run(c);
    c.invalid = true;
    run(c);
  }
  for (int k : {2, 3, 8, 31, 32, 33, 50, 101, 128, 256, 257, 300}) {
    c = {};
    c.classes = k;
    c.rows = k < 64 ? 129 : 40;
    c.invalid = k % 2 == 1;
    run(c);
    c.vectors = 1;
    c.ballot = 20;
    c.sigma_share = 0.0;
    run(c);
  }
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
    for (int k : {14, 33, 50, 260})
      for (int models : {1, 3, 5}) {
        if (quick && (models == 5 || k == 33)) continue;
        c = {};
        c.classes = k;
        c.rows = k < 64 ? 67 : 12;
        c.models = models;
        c.dtype = dtype;
        c.invalid = models != 3;
        run(c);
      }
  for (Layout layout :
       {Layout::kPadded, Layout::kOffset, Layout::kTransposed, Layout::kEverySecond})
    for (int k : {14, 16, 50, 260}) {
      c = {};
      c.classes = k;
      c.rows = k < 64 ? 67 : 20;
      c.models = k == 50 ? 3 : 1;
      c.layout = layout;
      c.invalid = true;
      run(c);
      c.dtype = DType::kFloat16;
      if (!quick) run(c);
    }
  for (int k : {2, 14, 50, 101}) {
    c = {};
    c.classes = k;
    c.rows = 20;
    c.logits = true;
    c.models = k == 14 ? 3 : 1;
    c.dtype = k == 50 ? DType::kFloat16 : DType::kFloat32;
    c.invalid = k == 101;
    run(c);
  }
  for (int vectors : {2, 21, 33, 100, 150}) {  // several blocks of vectors in every walk
    c = {};
    c.classes = 14;
    c.rows = 66;
    c.vectors = vectors;
    run(c);
    c.classes = 270;
    c.rows = 10;
    if (!quick || vectors == 150) run(c);
  }
  for (Kind kind : {Kind::kAtTau, Kind::kOneHot, Kind::kUniform, Kind::kTwoPeaks, Kind::kManyTies,
                    Kind::kLateDense, Kind::kBarelyAboveOne})
    for (int k : {14, 101, 300, 600}) {
      if (k == 600 && kind != Kind::kLateDense) continue;
      c = {};
      c.classes = k;
      c.rows = 24;
      c.only = kind;
      run(c);
      c.dtype = DType::kFloat16;
      c.beta_share = 0.0;
      run(c);
    }
  for (int k : {3, 14, 50, 300})
    for (Kind kind : {Kind::kPeaked, Kind::kFlat}) {
      c = {};
      c.classes = k;
      c.rows = 9;
      c.only = kind;
      run_on_threshold(c, random);
      c.models = 3;
      if (!quick) run_on_threshold(c, random);
    }
  for (DType dtype : {DType::kFloat32, DType::kFloat64})
    for (int k : {2, 14, 270})
      for (int i = 0; i < (k == 14 ? 60 : 5); ++i) {  // one row each: the first bad row tells
        c = {};
        c.classes = k;
        c.rows = 1;
        c.dtype = dtype;
        c.only = Kind::kSumAtEdge;
        run(c);
      }
  check_distant_rows(3, (int64_t{1} << 31) + 8, random);  // too far for the float32 passes
  check_distant_rows(330, kMaxRowStride - 7, random);
  for (int k : {14, 50}) {
    c = {};
    c.classes = k;
    c.rows = 193;
    c.only = Kind::kNegative;
    c.seldom = true;  // so that a minus sign is not laid to another row's charge alone
    run(c);
    c.rows = 65;
    c.seldom = false;
    c.models = 3;
    c.only = Kind::kAtTau;
    for (double tau : {1e-30, 1e-33, 1e-36}) {  // quotients at the end of float32
      c.tau = tau;
      run(c);
    }
  }
  c = {};  // more classes than the float32 passes take
  c.classes = kMaxFastClasses + 1;
  c.rows = 1;
  c.vectors = 2;
  c.only = Kind::kOneHot;
  run(c);
  for (int k : {14, 300}) {  // tau above every entry of most rows: nothing is dominant
    c = {};
    c.classes = k;
    c.rows = 30;
    c.beta_share = -0.5 * k;
    run(c);
    c.alpha = 0.0;
    run(c);
  }
  if (quick) return;
  c = {};  // dense rows among sparse ones, and many of them
  c.classes = 1000;
  c.rows = 8;
  run(c);
  c.classes = 300;
  c.rows = 300;
  c.invalid = true;
  run(c);
}

}  // namespace
}  // namespace genkl

int main(int count, char** arguments) {
  bool quick = false;
  uint64_t seed = 1;
  for (int i = 1; i < count; ++i) {
    if (std::string(arguments[i]) == "--quick")
      quick = true;
    else if (std::string(arguments[i]) == "--stop")
      genkl::stop_at_failure = true;
    else if (std::string(arguments[i]) == "--seed" && i + 1 < count)
      seed = std::strtoull(arguments[++i], nullptr, 10);
  }
  genkl::Random random(seed);
  cuda_emulation::machine().seed(seed);
  genkl::run_all(quick, random);
  std::printf("%llu launches, %llu meetings, %d failures\n",
              static_cast<unsigned long long>(cuda_emulation::machine().launches()),
              static_cast<unsigned long long>(cuda_emulation::machine().meetings()),
              genkl::failures);
  return genkl::failures ? 1 : 0;
}
