// The CPU walks of resample. Compiled once per instruction set (see simd.h); the widest vectors are
// 256 bits, since a row of a window is short.
//
//   filter_columns   source rows become lines: packed RGB bytes, in the order of the output
//   filter_rows      the lines under a row's taps become that row
//   emit             the row becomes entries of the output
//
// Lines live in a ring just large enough for the taps of one row, so that all stays in cache.
#include "resample.h"

#include <array>

#include "simd.h"

namespace genkl {
namespace {

using RowGroup = std::array<const uint8_t*, kRowGroup>;
using LineGroup = std::array<uint8_t*, kRowGroup>;

#if defined(GENKL_SIMD_PORTABLE)

// float32 to 16 bits, to nearest even.
inline uint16_t to_bfloat(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 2^16 on
  uint32_t half;
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, counted by 1/2 + x
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t rebiased = magnitude - 0x38000000u;
    half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline uint8_t round_mean(int32_t sum, int precision) {
  const int32_t mean = sum >> precision;
  return static_cast<uint8_t>(mean > 255 ? 255 : mean);
}

void filter_columns(const Taps& taps, int64_t columns, const RowGroup& rows,
                    const LineGroup& lines) {
  const int precision = taps.precision, count = 2 * taps.pairs;
  const int32_t half = 1 << (precision - 1);
  const int64_t stride = taps.stride;
  for (int row = 0; row < kRowGroup; ++row) {
    const int32_t* start = taps.start;
    const int16_t* weights = taps.weights;
    uint8_t* line = lines[row];
    for (int64_t x = 0; x < columns; ++x) {
      const uint8_t* pixels = rows[row] + 3 * static_cast<int64_t>(start[x]);
      int32_t r = half, g = half, b = half;
      for (int t = 0; t < count; ++t) {
        r += weights[t] * pixels[3 * t];
        g += weights[t] * pixels[3 * t + 1];
        b += weights[t] * pixels[3 * t + 2];
      }
      line[3 * x] = round_mean(r, precision);
      line[3 * x + 1] = round_mean(g, precision);
      line[3 * x + 2] = round_mean(b, precision);
      weights += stride;
    }
  }
}

void filter_rows(const Taps& taps, int64_t y, const uint8_t* const* lines, int64_t bytes,
                 uint8_t* line) {
  const int precision = taps.precision, pairs = taps.pairs;
  const int16_t* weights = taps.weights + y * taps.stride;
  for (int64_t x = 0; x < bytes; x += kLineStep) {
    int32_t sums[kLineStep];
    for (int32_t& sum : sums) sum = 1 << (precision - 1);
    for (int pair = 0; pair < pairs; ++pair) {
      const uint8_t *a = lines[2 * pair] + x, *b = lines[2 * pair + 1] + x;
      const int32_t weight_a = weights[2 * pair], weight_b = weights[2 * pair + 1];
      for (int i = 0; i < kLineStep; ++i) sums[i] += weight_a * a[i] + weight_b * b[i];
    }
    for (int i = 0; i < kLineStep; ++i) line[x + i] = round_mean(sums[i], precision);
  }
}

template <PixelKind kKind, typename T>
inline void put(T* out, uint8_t v, float scale, float shift) {
  const float x = static_cast<float>(v) * scale + shift;
  if constexpr (kKind == PixelKind::kUint8)
    *out = v;
  else if constexpr (kKind == PixelKind::kFloat32)
    *out = x;
  else if constexpr (kKind == PixelKind::kFloat16)
    *out = to_half(x);
  else
    *out = to_bfloat(x);
}

template <PixelKind kKind, typename T>
void emit(const Resampling& job, const uint8_t* line, int64_t y) {
  char* row = static_cast<char*>(job.out) + y * job.row_stride;
  for (int c = 0; c < 3; ++c) {
    T* out = reinterpret_cast<T*>(job.interleaved ? row : row + c * job.plane_stride);
    const int64_t step = job.interleaved ? 3 : 1, first = job.interleaved ? c : 0;
    for (int64_t x = 0; x < job.columns.count; ++x)
      put<kKind>(out + first + x * step, line[3 * x + c], job.scale[c], job.shift[c]);
  }
}

#else  // AVX2, also for AVX-512

inline __m256i two_halves(const uint8_t* low, const uint8_t* high) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}

inline __m256i broadcast_pair(const int16_t* weights) {
  int32_t pair;
  memcpy(&pair, weights, sizeof pair);
  return _mm256_set1_epi32(pair);
}

inline __m256i add_products(__m256i sum, __m256i pairs, __m256i weights) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, weights));
}

inline void store_half(uint8_t* p, __m128i a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a);
}

// Sums of 32 bits back to bytes: 4 x 8 sums become 32 bytes, half by half.
inline __m256i round_means(const __m256i* sums, __m128i precision) {
  const __m256i a = _mm256_sra_epi32(sums[0], precision), b = _mm256_sra_epi32(sums[1], precision);
  const __m256i c = _mm256_sra_epi32(sums[2], precision), d = _mm256_sra_epi32(sums[3], precision);
  return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}

// Rows two by two, one in the low and one in the high halves of the vectors. kPairs = 0 stands for
// any number.
template <int kPairs>
void filter_columns_of(const Taps& taps, int64_t columns, const RowGroup& rows,
                       const LineGroup& lines) {
  // Pixels 0 and 1 of the five in 16 bytes, and 2 and 3: (r r g g b b - -), 16 bits each.
  const __m256i first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i second = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  // RGB- of four pixels to RGB.
  const __m256i pack = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m128i precision = _mm_cvtsi32_si128(taps.precision);
  const __m256i half = _mm256_set1_epi32(1 << (taps.precision - 1));
  const int pairs = kPairs ? kPairs : taps.pairs;
  const int64_t stride = taps.stride;
  const int32_t* start = taps.start;
  const int16_t* w = taps.weights;
  const uint8_t *const a = rows[0], *const b = rows[1], *const c = rows[2], *const d = rows[3];
  for (int64_t x = 0; x < columns; x += kColumnGroup) {
    __m256i upper[kColumnGroup], lower[kColumnGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kColumnGroup; ++i) {
      int64_t from = 3 * static_cast<int64_t>(start[x + i]);
      __m256i ab = half, cd = half;
#pragma GCC unroll 4
      for (int pair = 0; pair < pairs; pair += 2, from += 12) {
        const __m256i pixels_ab = two_halves(a + from, b + from);
        const __m256i pixels_cd = two_halves(c + from, d + from);
        const __m256i w0 = broadcast_pair(w + 2 * pair);
        ab = add_products(ab, _mm256_shuffle_epi8(pixels_ab, first), w0);
        cd = add_products(cd, _mm256_shuffle_epi8(pixels_cd, first), w0);
        if (pair + 1 < pairs) {
          const __m256i w1 = broadcast_pair(w + 2 * pair + 2);
          ab = add_products(ab, _mm256_shuffle_epi8(pixels_ab, second), w1);
          cd = add_products(cd, _mm256_shuffle_epi8(pixels_cd, second), w1);
        }
      }
      upper[i] = ab;
      lower[i] = cd;
      w += stride;
    }
    const __m256i ab = _mm256_shuffle_epi8(round_means(upper, precision), pack);
    const __m256i cd = _mm256_shuffle_epi8(round_means(lower, precision), pack);
    store_half(lines[0] + 3 * x, _mm256_castsi256_si128(ab));
    store_half(lines[1] + 3 * x, _mm256_extracti128_si256(ab, 1));
    store_half(lines[2] + 3 * x, _mm256_castsi256_si128(cd));
    store_half(lines[3] + 3 * x, _mm256_extracti128_si256(cd, 1));
  }
}

void filter_columns(const Taps& taps, int64_t columns, const RowGroup& rows,
                    const LineGroup& lines) {
  switch (taps.pairs) {
    case 1:
      return filter_columns_of<1>(taps, columns, rows, lines);
    case 2:
      return filter_columns_of<2>(taps, columns, rows, lines);
    case 3:
      return filter_columns_of<3>(taps, columns, rows, lines);
    case 4:
      return filter_columns_of<4>(taps, columns, rows, lines);
    default:
      return filter_columns_of<0>(taps, columns, rows, lines);
  }
}

template <int kPairs>
void filter_rows_of(const Taps& taps, int64_t y, const uint8_t* const* lines, int64_t bytes,
                    uint8_t* line) {
  const __m128i precision = _mm_cvtsi32_si128(taps.precision);
  const __m256i half = _mm256_set1_epi32(1 << (taps.precision - 1));
  const __m256i zero = _mm256_setzero_si256();
  const int16_t* weights = taps.weights + y * taps.stride;
  const int pairs = kPairs ? kPairs : taps.pairs;
  for (int64_t x = 0; x < bytes; x += kLineStep) {
    __m256i sums[4] = {half, half, half, half};
#pragma GCC unroll 4
    for (int pair = 0; pair < pairs; ++pair) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines[2 * pair] + x));
      const __m256i b =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines[2 * pair + 1] + x));
      const __m256i w = broadcast_pair(weights + 2 * pair);
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      const __m256i parts[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                                _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] = add_products(sums[i], parts[i], w);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(line + x), round_means(sums, precision));
  }
}

void filter_rows(const Taps& taps, int64_t y, const uint8_t* const* lines, int64_t bytes,
                 uint8_t* line) {
  switch (taps.pairs) {
    case 1:
      return filter_rows_of<1>(taps, y, lines, bytes, line);
    case 2:
      return filter_rows_of<2>(taps, y, lines, bytes, line);
    case 3:
      return filter_rows_of<3>(taps, y, lines, bytes, line);
    default:
      return filter_rows_of<0>(taps, y, lines, bytes, line);
  }
}

// Eight entries of the output.
template <PixelKind kKind>
inline void put(void* out, __m256i v, __m256 scale, __m256 shift) {
  const __m256 x = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(v), scale), shift);
  if constexpr (kKind == PixelKind::kFloat32) {
    _mm256_storeu_ps(static_cast<float*>(out), x);
  } else {
    __m128i packed;
    if constexpr (kKind == PixelKind::kFloat16) {
      packed = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m256i bits = _mm256_castps_si256(x);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_srli_epi32(
          _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
      packed =
          _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    _mm_storeu_si128(static_cast<__m128i*>(out), packed);
  }
}

template <PixelKind kKind, typename T>
void emit_interleaved(const Resampling& job, const uint8_t* line, T* out) {
  const int64_t entries = 3 * job.columns.count;
  if constexpr (kKind == PixelKind::kUint8) {
    memcpy(out, line, static_cast<size_t>(entries));
  } else {
    __m256 scale[3], shift[3];  // of entries 0 to 23, in eights
    for (int i = 0; i < 3; ++i) {
      float scales[8], shifts[8];
      for (int lane = 0; lane < 8; ++lane) {
        scales[lane] = job.scale[(8 * i + lane) % 3];
        shifts[lane] = job.shift[(8 * i + lane) % 3];
      }
      scale[i] = _mm256_loadu_ps(scales);
      shift[i] = _mm256_loadu_ps(shifts);
    }
    const auto eight = [&](int64_t from) {
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + from)));
    };
    int64_t x = 0;
    for (; x + 24 <= entries; x += 24)
      for (int i = 0; i < 3; ++i) put<kKind>(out + x + 8 * i, eight(x + 8 * i), scale[i], shift[i]);
    for (int i = 0; x < entries; x += 8, ++i) {
      const int64_t left = entries - x < 8 ? entries - x : 8;
      T rest[8];
      put<kKind>(rest, eight(x), scale[i], shift[i]);
      memcpy(out + x, rest, sizeof(T) * static_cast<size_t>(left));
    }
  }
}

template <PixelKind kKind, typename T>
void emit_planar(const Resampling& job, const uint8_t* line, char* row) {
  T* planes[3];
  for (int c = 0; c < 3; ++c) planes[c] = reinterpret_cast<T*>(row + c * job.plane_stride);
  // Eight pixels, four in each half.
  const auto pixels = [&](int64_t x) { return two_halves(line + 3 * x, line + 3 * x + 12); };
  const int64_t columns = job.columns.count;
  if constexpr (kKind == PixelKind::kUint8) {
    const __m256i sort = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    const __m256i join = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t x = 0; x < columns; x += 8) {
      uint8_t sorted[32];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sorted),
                          _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(pixels(x), sort), join));
      const int64_t left = columns - x < 8 ? columns - x : 8;
      for (int c = 0; c < 3; ++c) {
        if (left == 8)
          memcpy(planes[c] + x, sorted + 8 * c, 8);
        else
          memcpy(planes[c] + x, sorted + 8 * c, static_cast<size_t>(left));
      }
    }
  } else {
    __m256 scale[3], shift[3];
    __m256i channel[3];  // its bytes to 32 bits
    for (int c = 0; c < 3; ++c) {
      scale[c] = _mm256_set1_ps(job.scale[c]);
      shift[c] = _mm256_set1_ps(job.shift[c]);
      const char k = static_cast<char>(c);
      channel[c] = _mm256_broadcastsi128_si256(_mm_setr_epi8(
          k, -1, -1, -1, static_cast<char>(k + 3), -1, -1, -1, static_cast<char>(k + 6), -1, -1, -1,
          static_cast<char>(k + 9), -1, -1, -1));
    }
    int64_t x = 0;
    for (; x + 8 <= columns; x += 8) {
      const __m256i v = pixels(x);
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c)
        put<kKind>(planes[c] + x, _mm256_shuffle_epi8(v, channel[c]), scale[c], shift[c]);
    }
    if (x < columns) {
      const __m256i v = pixels(x);
      for (int c = 0; c < 3; ++c) {
        T rest[8];
        put<kKind>(rest, _mm256_shuffle_epi8(v, channel[c]), scale[c], shift[c]);
        memcpy(planes[c] + x, rest, sizeof(T) * static_cast<size_t>(columns - x));
      }
    }
  }
}

template <PixelKind kKind, typename T>
void emit(const Resampling& job, const uint8_t* line, int64_t y) {
  char* row = static_cast<char*>(job.out) + y * job.row_stride;
  if (job.interleaved)
    emit_interleaved<kKind>(job, line, reinterpret_cast<T*>(row));
  else
    emit_planar<kKind, T>(job, line, row);
}

#endif

class Walk {
 public:
  Walk(const Resampling& job, const ResamplePlan& plan) : job_(job), plan_(plan) {}

  template <PixelKind kKind, typename T>
  void run() const {
    const Taps& taps = plan_.rows;
    int64_t done = taps.start[0];  // source rows before it are filtered, or not needed
    for (int64_t y = 0; y < job_.rows.count; ++y) {
      const int64_t start = taps.start[y], end = start + 2 * taps.pairs;
      const int64_t last = end < job_.source_height ? end : job_.source_height;
      for (; done < last; done += kRowGroup) filter_group(done);
      // Lines beyond the source are read, but count nothing.
      for (int64_t t = start; t < end; ++t) plan_.taps[t - start] = line(t);
      filter_rows(taps, y, plan_.taps, plan_.line_stride, plan_.line);
      emit<kKind, T>(job_, plan_.line, y);
    }
  }

 private:
  uint8_t* line(int64_t y) const { return plan_.lines + y % plan_.ring * plan_.line_stride; }

  // Filters the columns of source rows from y on; the last row stands for those beyond it.
  void filter_group(int64_t y) const {
    RowGroup rows;
    LineGroup lines;
    for (int i = 0; i < kRowGroup; ++i) {
      const int64_t row = y + i < job_.source_height ? y + i : job_.source_height - 1;
      rows[i] = readable(row, plan_.guarded + i * plan_.guarded_stride);
      lines[i] = line(row);
    }
    filter_columns(plan_.columns, job_.columns.count, rows, lines);
  }

  // Source row y, which may be read past its end.
  const uint8_t* readable(int64_t y, uint8_t* copy) const {
    const int64_t bytes = 3 * job_.source_width;
    const uint8_t* row = job_.source + y * job_.source_stride;
    const int64_t rest = (job_.source_height - 1 - y) * job_.source_stride;  // after this row
    if (rest >= plan_.read_past) return row;
    memcpy(copy, row, static_cast<size_t>(bytes));
    return copy;
  }

  const Resampling& job_;
  const ResamplePlan& plan_;
};

void resample(const Resampling& job, const ResamplePlan& plan) {
  const Walk walk(job, plan);
  switch (job.kind) {
    case PixelKind::kUint8:
      return walk.run<PixelKind::kUint8, uint8_t>();
    case PixelKind::kFloat32:
      return walk.run<PixelKind::kFloat32, float>();
    case PixelKind::kFloat16:
      return walk.run<PixelKind::kFloat16, uint16_t>();
    case PixelKind::kBFloat16:
      return walk.run<PixelKind::kBFloat16, uint16_t>();
  }
}

}  // namespace

#if defined(GENKL_SIMD_AVX512)
extern const ResampleKernel kResampleKernelAvx512;
const ResampleKernel kResampleKernelAvx512 = {kSimdName, resample};
#elif defined(GENKL_SIMD_AVX2)
extern const ResampleKernel kResampleKernelAvx2;
const ResampleKernel kResampleKernelAvx2 = {kSimdName, resample};
#else
extern const ResampleKernel kResampleKernelPortable;
const ResampleKernel kResampleKernelPortable = {kSimdName, resample};
#endif

}  // namespace genkl
