// Vectors of floats for the walks of nc_score.cpp: one vocabulary, three instruction sets. The build
// compiles nc_score.cpp once for each, with GENKL_SIMD_AVX512, GENKL_SIMD_AVX2 or
// GENKL_SIMD_PORTABLE defined. Everything has internal linkage: code of one instruction set must
// never be linked into another.
//
//   F, I     kWidth floats, kWidth int32
//   Mask     one truth value per lane; bits(mask) gives them as an integer, lane 0 lowest
//
//   max_bits   the larger bits, taken as integers without sign: of numbers >= 0 the larger one, but a
//              negative number (-0 too) or a NaN outdoes them all
//   compress   writes the lanes of the mask one after another, and their `numbers`: kWidth of each, of
//              which only the first count; returns how many
#pragma once

#include <cstdint>
#include <cstring>

#include "elementary.h"

#if defined(GENKL_SIMD_AVX512) || defined(GENKL_SIMD_AVX2)
#include <immintrin.h>
#endif

namespace genkl {
namespace {

#if defined(GENKL_SIMD_AVX512)

constexpr const char* kSimdName = "avx512";
constexpr int kWidth = 16;
using F = __m512;
using I = __m512i;
using Mask = __mmask16;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline I load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline F load_first(const float* p, int n) {  // lanes from n on are 0
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
inline F broadcast(float x) { return _mm512_set1_ps(x); }
inline I broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline I lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I max(I a, I b) { return _mm512_max_epi32(a, b); }
inline I shift_left_23(I a) { return _mm512_slli_epi32(a, 23); }
inline I shift_right_23(I a) { return _mm512_srai_epi32(a, 23); }
inline I as_int(F a) { return _mm512_castps_si512(a); }
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline Mask greater_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask not_less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
inline Mask both_not(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }  // a and not b
inline uint32_t bits(Mask a) { return a; }
inline bool any(Mask a) { return a != 0; }
inline F keep(Mask m, F a) { return _mm512_maskz_mov_ps(m, a); }  // 0 elsewhere
inline I keep(Mask m, I a) { return _mm512_maskz_mov_epi32(m, a); }
inline F select(Mask m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
inline I select(Mask m, I a, I b) { return _mm512_mask_mov_epi32(b, m, a); }
inline I count(I total, Mask m) { return _mm512_mask_add_epi32(total, m, total, broadcast(1)); }
inline F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load_bfloat(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline F load_double(const double* p) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p));
  const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
inline F max_bits(F a, F b) { return as_float(_mm512_max_epu32(as_int(a), as_int(b))); }
inline int compress(Mask m, F a, I numbers, float* values, int32_t* index) {
  store(values, _mm512_maskz_compress_ps(m, a));
  store(index, _mm512_maskz_compress_epi32(m, numbers));
  return __builtin_popcount(bits(m));
}
inline F pairs_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
inline F pairs_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
inline F quads_low(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline F quads_high(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// v[i] becomes the i-th entries of the sixteen vectors.
inline void transpose(F* v) {
  F t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = pairs_low(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = pairs_high(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = quads_low(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = quads_high(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = quads_low(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = quads_high(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    v[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    v[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Lane r of the result folds all lanes of v[r].
template <typename Fold>
inline F fold_lanes(const F* v, Fold fold) {
  F pairs[8], quads[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = fold(pairs_low(v[2 * i], v[2 * i + 1]), pairs_high(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    quads[i] =
        fold(quads_low(pairs[2 * i], pairs[2 * i + 1]), quads_high(pairs[2 * i], pairs[2 * i + 1]));
  const F x = fold(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
  const F y = fold(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44),
                   _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
  return fold(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

#elif defined(GENKL_SIMD_AVX2)

constexpr const char* kSimdName = "avx2";
constexpr int kWidth = 8;
using F = __m256;
using I = __m256i;
using Mask = __m256;  // all bits of a lane, or none

alignas(64) constexpr int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
inline F load_first(const float* p, int n) { return _mm256_maskload_ps(p, load(kFirst + 8 - n)); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<I*>(p), a); }
inline F broadcast(float x) { return _mm256_set1_ps(x); }
inline I broadcast(int32_t x) { return _mm256_set1_epi32(x); }
inline I lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I max(I a, I b) { return _mm256_max_epi32(a, b); }
inline I shift_left_23(I a) { return _mm256_slli_epi32(a, 23); }
inline I shift_right_23(I a) { return _mm256_srai_epi32(a, 23); }
inline I as_int(F a) { return _mm256_castps_si256(a); }
inline F as_float(I a) { return _mm256_castsi256_ps(a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline Mask greater_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline Mask not_less_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
inline Mask equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
inline Mask both_not(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }  // a and not b
inline uint32_t bits(Mask a) { return static_cast<uint32_t>(_mm256_movemask_ps(a)); }
inline bool any(Mask a) { return bits(a) != 0; }
inline F keep(Mask m, F a) { return _mm256_and_ps(m, a); }  // 0 elsewhere
inline I keep(Mask m, I a) { return _mm256_and_si256(as_int(m), a); }
inline F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
inline I select(Mask m, I a, I b) { return as_int(select(m, as_float(a), as_float(b))); }
inline I count(I total, Mask m) { return sub(total, as_int(m)); }
inline F load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_bfloat(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline F load_double(const double* p) {
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)),
                         _mm256_cvtpd_ps(_mm256_loadu_pd(p)));
}
inline F max_bits(F a, F b) { return as_float(_mm256_max_epu32(as_int(a), as_int(b))); }

// The numbers of the set bits of 0 to 255, a byte each.
struct SetBits {
  uint64_t of[256] = {};
  constexpr SetBits() {
    for (int m = 0; m < 256; ++m)
      for (int i = 0, n = 0; i < 8; ++i)
        if (m >> i & 1) of[m] |= static_cast<uint64_t>(i) << 8 * n++;
  }
};
alignas(64) constexpr SetBits kSetBits;

inline int compress(Mask m, F a, I numbers, float* values, int32_t* index) {
  const uint32_t set = bits(m);
  const I lanes =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.of + set)));
  store(values, _mm256_permutevar8x32_ps(a, lanes));
  store(index, _mm256_permutevar8x32_epi32(numbers, lanes));
  return __builtin_popcount(set);
}
inline F pairs_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
inline F pairs_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
inline F quads_low(F a, F b) { return _mm256_shuffle_ps(a, b, 0x44); }
inline F quads_high(F a, F b) { return _mm256_shuffle_ps(a, b, 0xee); }
inline F halves_low(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x20); }
inline F halves_high(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x31); }

// Rows 0 to 3 stand in the low halves of h[0 ... 3], and again in those of h[4 ... 7], which hold their
// last four entries; rows 4 to 7 in the high halves. v[i] becomes the i-th entries of the rows.
inline void transpose_halves(const F* h, F* v) {
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const F a = pairs_low(h[i], h[i + 1]), b = pairs_high(h[i], h[i + 1]);
    const F c = pairs_low(h[i + 2], h[i + 3]), d = pairs_high(h[i + 2], h[i + 3]);
    v[i] = quads_low(a, c);
    v[i + 1] = quads_high(a, c);
    v[i + 2] = quads_low(b, d);
    v[i + 3] = quads_high(b, d);
  }
}

// v[i] becomes the i-th entries of the eight vectors.
inline void transpose(F* v) {
  F h[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    h[i] = halves_low(v[i], v[4 + i]);
    h[4 + i] = halves_high(v[i], v[4 + i]);
  }
  transpose_halves(h, v);
}

// v[i] becomes the entries c + i of kWidth rows.
inline void load_transposed(const float* const* row, int c, F* v) {
  F h[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // halves put together by loads spare the shuffles
    const int r = i % 4, from = c + i / 4 * 4;
    h[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[r] + from)),
                                _mm_loadu_ps(row[r + 4] + from), 1);
  }
  transpose_halves(h, v);
}

// Lane r of the result folds all lanes of v[r].
template <typename Fold>
inline F fold_lanes(const F* v, Fold fold) {
  F pairs[4], quads[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pairs[i] = fold(pairs_low(v[2 * i], v[2 * i + 1]), pairs_high(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    quads[i] =
        fold(quads_low(pairs[2 * i], pairs[2 * i + 1]), quads_high(pairs[2 * i], pairs[2 * i + 1]));
  return fold(halves_low(quads[0], quads[1]), halves_high(quads[0], quads[1]));
}

#else  // GENKL_SIMD_PORTABLE: four lanes by the compiler's vector extension; no FMA assumed

constexpr const char* kSimdName = "portable";
constexpr int kWidth = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
using Mask = I;  // all bits of a lane, or none

inline F load(const float* p) {
  F a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline I load(const int32_t* p) {
  I a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline F load_first(const float* p, int n) {  // lanes from n on are 0
  F a = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
inline void store(float* p, F a) { memcpy(p, &a, sizeof a); }
inline void store(int32_t* p, I a) { memcpy(p, &a, sizeof a); }
inline F broadcast(float x) { return F{x, x, x, x}; }
inline I broadcast(int32_t x) { return I{x, x, x, x}; }
inline I lane_numbers() { return I{0, 1, 2, 3}; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline I as_int(F a) { return reinterpret_cast<I>(a); }
inline F as_float(I a) { return reinterpret_cast<F>(a); }
inline F to_float(I a) { return __builtin_convertvector(a, F); }
inline Mask greater_equal(F a, F b) { return a >= b; }
inline Mask greater(F a, F b) { return a > b; }
inline Mask not_less_equal(F a, F b) { return ~(a <= b); }
inline Mask equal(F a, F b) { return a == b; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask both_not(Mask a, Mask b) { return a & ~b; }         // a and not b
inline F keep(Mask m, F a) { return as_float(m & as_int(a)); }  // 0 elsewhere
inline I keep(Mask m, I a) { return m & a; }
inline I select(Mask m, I a, I b) { return (m & a) | (~m & b); }
inline F select(Mask m, F a, F b) { return as_float(select(m, as_int(a), as_int(b))); }
inline F min(F a, F b) { return select(a < b, a, b); }
inline I max(I a, I b) { return select(a > b, a, b); }
inline F max(F a, F b) { return select(a > b, a, b); }
inline F abs(F a) { return as_float(as_int(a) & broadcast(int32_t{0x7fffffff})); }
inline I add(I a, I b) { return a + b; }
inline I sub(I a, I b) { return a - b; }
inline I shift_left_23(I a) { return a << 23; }
inline I shift_right_23(I a) { return a >> 23; }
inline I count(I total, Mask m) { return total - m; }
inline uint32_t bits(Mask a) {
  return static_cast<uint32_t>((a[0] & 1) | (a[1] & 2) | (a[2] & 4) | (a[3] & 8));
}
inline bool any(Mask a) { return bits(a) != 0; }
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00)  // infinity and NaN
    return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // As a float the same bits are the number over 2^112, subnormal or not.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}
inline F load_half(const uint16_t* p) {
  return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
inline F load_bfloat(const uint16_t* p) { return as_float(I{p[0], p[1], p[2], p[3]} << 16); }
inline F load_double(const double* p) {
  return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}
inline F max_bits(F a, F b) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return select(reinterpret_cast<U>(a) > reinterpret_cast<U>(b), a, b);
}
inline int compress(Mask m, F a, I numbers, float* values, int32_t* index) {
  int n = 0;
#pragma GCC unroll 4
  for (int i = 0; i < kWidth; ++i) {
    values[n] = a[i];
    index[n] = numbers[i];
    n -= m[i];
  }
  return n;
}

// v[i] becomes the i-th entries of the four vectors.
inline void transpose(F* v) {
  const F a = __builtin_shuffle(v[0], v[1], I{0, 4, 1, 5});
  const F b = __builtin_shuffle(v[0], v[1], I{2, 6, 3, 7});
  const F c = __builtin_shuffle(v[2], v[3], I{0, 4, 1, 5});
  const F d = __builtin_shuffle(v[2], v[3], I{2, 6, 3, 7});
  v[0] = __builtin_shuffle(a, c, I{0, 1, 4, 5});
  v[1] = __builtin_shuffle(a, c, I{2, 3, 6, 7});
  v[2] = __builtin_shuffle(b, d, I{0, 1, 4, 5});
  v[3] = __builtin_shuffle(b, d, I{2, 3, 6, 7});
}

// Lane r of the result folds all lanes of v[r].
template <typename Fold>
inline F fold_lanes(const F* v, Fold fold) {
  F t[4] = {v[0], v[1], v[2], v[3]};
  transpose(t);
  return fold(fold(t[0], t[1]), fold(t[2], t[3]));
}

#endif

#if !defined(GENKL_SIMD_AVX2)
// v[i] becomes the entries c + i of kWidth rows.
inline void load_transposed(const float* const* row, int c, F* v) {
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) v[lane] = load(row[lane] + c);
  transpose(v);
}
#endif

inline F log2(F x) {  // log2_fast, lane by lane
  const I xi = as_int(x);
  const I exponent = shift_right_23(sub(xi, broadcast(kThreeQuarters)));
  const F r = sub(as_float(sub(xi, shift_left_23(exponent))), broadcast(1.0f));
  const auto c = [](int n) { return broadcast(kLog2Coefficients[n]); };
  const F r2 = mul(r, r), r4 = mul(r2, r2);
  const F low = fma(fma(c(3), r, c(2)), r2, fma(c(1), r, c(0)));
  const F high = fma(fma(c(7), r, c(6)), r2, fma(c(5), r, c(4)));
  const F top = fma(fma(c(9), r, c(8)), r4, high);
  return fma(r, fma(top, r4, low), to_float(exponent));
}

// The quotient by a whole number n up to kMaxModels, rounded as a division rounds it where it is at
// least kLowestMean: with y = 1/n rounded and q = x y rounded, the remainder x - n q is exact, and q
// plus y times it rounds to x / n (Markstein 1990; held against the division for every mantissa and
// every n). Infinity becomes NaN. A division takes several times as long.
constexpr float kLowestMean = 1e-28f;  // well above 2^-102: no remainder is subnormal

class Mean {
 public:
  explicit Mean(int n)
      : n_(broadcast(static_cast<float>(n))), y_(broadcast(1.0f / static_cast<float>(n))) {}
  F operator()(F x) const {
#if defined(GENKL_SIMD_PORTABLE)
    return div(x, n_);
#else
    const F q = mul(x, y_);
    return fma(fma(sub(broadcast(0.0f), q), n_, x), y_, q);
#endif
  }

 private:
  F n_, y_;
};

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace genkl
