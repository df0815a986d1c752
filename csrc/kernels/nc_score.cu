// The CUDA kernels of nc_score. One call launches, on one stream:
//
//   fill      one thread per class and vector slot: the rule's arrays
//   compact   many classes: one warp per row; the few dominant entries are gathered into a list, and
//             their logarithms multiply rows of the weight matrix, four vectors to a lane
//   columns   few classes, or rows with many dominant entries: two rows per lane, one class after the
//             other, so that all lanes multiply by the same weights
//   settle    one warp per row, float64: the definition itself
//
// The first two walks work in float32. Rows too close to call, or invalid, they leave to `settle`, and
// rows with many dominant entries `compact` leaves to `columns`, by a mark in the row's votes.
// Nothing here waits for the device or allocates, so a call can be captured in a graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <climits>

#include "nc_score.h"
#include "warp.cuh"

extern __shared__ uint4 shared_memory[];

namespace genkl {
namespace {

constexpr int kWarps = 4;  // per block; they never wait for each other
constexpr int kThreads = kWarps * kLanes;
constexpr int64_t kMaxBlocks = 1 << 14;  // beyond, warps take several turns

constexpr int32_t kToSettle = -1;   // votes of a row left to `settle`
constexpr int32_t kToColumns = -2;  // votes of a row left to `columns`

constexpr int kColumnsUpTo = 256;  // classes
constexpr int kLaneRows = 2;
constexpr int kTileRows = kLaneRows * kLanes;
constexpr int kChunk = 32;                                  // classes staged at a time
constexpr int kBlockVectors = 20;                           // vectors whose sums stay in registers
constexpr int64_t kMaxRowStride = INT_MAX / kTileRows / 4;  // offsets in a tile are 32 bits wide
constexpr int kColumnsBlocks = 4;  // per multiprocessor: what the registers must leave room for
constexpr int kStageLoads = 4;     // packs that a lane has under way
constexpr int kSearchRows = 256;   // rows that a warp searches for marks

constexpr int kQuad = 4;             // vectors of a lane in `compact`
constexpr int kStepLoads = 2;        // wide loads of a lane per step of a row
constexpr int kListLoads = 4;        // entries of a list that a lane has under way
constexpr int kListSpare = 64;       // entries that may stay in a list while a step is added
constexpr float kDenseShare = 0.3f;  // of the first step's entries: above, `columns` is faster

__device__ __forceinline__ int64_t warp_number() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
}
__device__ __forceinline__ int64_t warp_count() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// This warp's part of the block's dynamic shared memory.
__device__ __forceinline__ unsigned char* warp_memory(int bytes) {
  return reinterpret_cast<unsigned char*>(shared_memory) + (threadIdx.x / kLanes) * bytes;
}

// log2 of a positive normal float by the special function unit: off by 2 ulp at most, and between 1/2
// and 2 by 2^-22 (CUDA C++ Programming Guide, intrinsic functions, __log2f). Up to x = 0.6 that is a
// relative error below 5.5 2^-24.
static_assert(kLog2Error >= 6, "log2_approx must be as good as the proof in nc_score.h assumes");
__device__ __forceinline__ float log2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulated_log2_approx(x);
#endif
}

// Division by a number of models, rounded as IEEE-754 says, in three operations. The remainder of the
// first quotient is exact from kMinDividend on; that the corrected quotient is then the nearest float
// tests/csrc/test_nc_score_cuda.cpp tries for every significand and divisor.
constexpr float kMinDividend = 7.888609052210118e-31f;  // 2^-100
struct Divisor {
  float number, reciprocal;
  __device__ __forceinline__ float divide(float x) const {
    const float quotient = x * reciprocal;
    return fmaf(fmaf(-quotient, number, x), reciprocal, quotient);
  }
};

// ---- input ---------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// kWide neighbouring entries as they lie in memory, read in words of up to 16 bytes whose alignment `p`
// must have. They are read once: the first-level cache is for the weights.
template <typename T, int kWide>
struct Pack {
  static constexpr int kBytes = kWide * static_cast<int>(sizeof(T));
  using WordType = typename Word < kBytes<16 ? kBytes : 16>::type;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(WordType));
  WordType words[kWords];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(reinterpret_cast<const WordType*>(p) + i);
  }

  // q = the entries, or NaN, which no row survives unsettled, when one of them has a minus sign: all of
  // them, since a pack may lie across two rows.
  __device__ __forceinline__ void unpack(float (&q)[kWide]) const {
    T entries[kWide];
    memcpy(entries, words, kBytes);
    uint32_t signs = 0;
#pragma unroll
    for (int z = 0; z < kWide; ++z) {
      q[z] = to_float(entries[z]);
      signs |= bit_cast<uint32_t>(q[z]);
    }
#pragma unroll
    for (int z = 0; z < kWide; ++z) q[z] = signs >> 31 ? bit_cast<float>(0x7fffffff) : q[z];
  }
};

template <int kWide>
__device__ __forceinline__ void load_tile(const float* p, float (&q)[kWide]) {
  const auto word = *reinterpret_cast<const typename Word<4 * kWide>::type*>(p);
  memcpy(q, &word, sizeof(q));
}

template <int kWide>
__device__ __forceinline__ void store_tile(float* p, const float (&q)[kWide]) {
  typename Word<4 * kWide>::type word;
  memcpy(&word, q, sizeof(q));
  *reinterpret_cast<typename Word<4 * kWide>::type*>(p) = word;
}

// What the float32 passes hold rows against.
struct FastRule {
  float tau;
  float tolerance;  // of a row's sum, less what its rounding may be wrong by
};

// Whether a float32 pass cannot answer for a row whose entries sum to `sum` and whose largest is `top`.
__device__ __forceinline__ bool is_doubtful(const FastRule& fast, float sum, float top) {
  return !(fabsf(sum - 1.0f) <= fast.tolerance) || top > 1.0f || top < fast.tau;
}

// What the sums a_j of a row say about it. In terms of D_j = H_j (a_j - alpha), a_j lies outside the
// band of nc_score.h, and D_j has the right sign, when |D_j| > guard alpha H_j.
struct Verdict {
  float critical = 0.0f, divergence = -FLT_MAX;
  float clearance = FLT_MAX;  // min_j |D_j| - guard alpha H_j
  int votes = 0;
  // Slots beyond the vectors have H_j = 0 and the lowest offset: they change nothing.
  __device__ __forceinline__ void add(float a, float entropy, float offset, float guard) {
    const float d = fmaf(entropy, a, offset);
    critical = fmaxf(critical, a);
    divergence = fmaxf(divergence, d);
    clearance = fminf(clearance, fmaf(guard, offset, fabsf(d)));
    votes += d >= 0.0f;
  }
};

// ---- fill ----------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    fill(const __grid_constant__ NcRule rule,
         const double* __restrict__ vectors,    // [vectors, classes]
         const double* __restrict__ entropies,  // [vectors]
         int64_t* __restrict__ first_bad_row) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t count = static_cast<int64_t>(rule.classes) * rule.stride;
  if (thread == 0) *first_bad_row = -1;
  for (int64_t n = thread; n < count; n += static_cast<int64_t>(gridDim.x) * kThreads)
    fill_rule(rule, vectors, entropies, static_cast<int>(n / rule.stride),
              static_cast<int>(n % rule.stride));
}

// ---- columns -------------------------------------------------------------------------------------

// How tiles of rows lie in shared memory, chosen on the host.
struct TileLayout {
  int wide;    // entries of a load: 1, 2 or 4
  int stride;  // floats per row; an odd multiple of `wide`, so that lanes reading their rows side by
               // side meet no bank twice
  bool flat;   // one model, whose rows lie in global memory as in the tile: copied as one stretch
};

// The rows of one tile: consecutive ones, or those whose marks were found.
struct TileRows {
  int64_t first;
  const int64_t* numbers;  // in shared memory; null for consecutive rows
  int count;
};

// Adds one model's entries to the tile: up to kStageLoads packs of a lane, pack i from `from + i jump`
// to `to + i tile_jump`, for as long as i step < left. After the last of several models the sums are
// divided.
template <bool kFirst, int kWide, typename T>
__device__ __forceinline__ void stage_packs(const T* from, int jump, float* to, int tile_jump,
                                            int step, int left, bool last, const Divisor& divisor) {
  Pack<T, kWide> packs[kStageLoads];
#pragma unroll
  for (int i = 0; i < kStageLoads; ++i)
    if (i * step < left) packs[i].load(from + i * jump);
#pragma unroll
  for (int i = 0; i < kStageLoads; ++i) {
    if (i * step >= left) continue;
    float q[kWide];
    packs[i].unpack(q);
    if constexpr (!kFirst) {
      float total[kWide];
      load_tile(to + i * tile_jump, total);
#pragma unroll
      for (int z = 0; z < kWide; ++z) {
        total[z] += q[z];
        q[z] = last ? divisor.divide(total[z]) : total[z];
      }
    }
    store_tile(to + i * tile_jump, q);
  }
}

// Adds one model's entries (rows, [first_class, first_class + count)) to the tile.
template <bool kFirst, int kWide, typename T>
__device__ __forceinline__ void stage_model(const Predictions& in, int model,
                                            const TileLayout& layout, const TileRows& rows,
                                            int first_class, int count, const Divisor& divisor,
                                            float* tile) {
  const T* data = static_cast<const T*>(in.data[model]);
  const bool last = model + 1 == in.models;
  const int lane = lane_number();
  if constexpr (kFirst) {
    if (layout.flat && !rows.numbers) {
      constexpr int kFlat = 4, kStep = kFlat * kLanes;
      const T* from = data + rows.first * in.classes;
      const int entries = rows.count * in.classes;
      const int whole = entries / kFlat * kFlat;
      for (int e = kFlat * lane; e < whole; e += kStageLoads * kStep)
        stage_packs<true, kFlat>(from + e, kStep, tile + e, kStep, kStep, whole - e, last, divisor);
      const int e = whole + lane;
      stage_packs<true, 1>(from + e, 0, tile + e, 0, kLanes, entries - e, last, divisor);
      return;
    }
  }
  // Lanes lie along what is dense in memory: the classes of some rows, or the rows of a transposed
  // array.
  const int64_t row_stride = in.row_stride[model], class_stride = in.class_stride[model];
  const int packs = count / kWide;
  const int abreast = row_stride < class_stride ? 1 : packs;
  const int step = kLanes / abreast;
  const int begin = lane / abreast;
  if (begin >= step) return;
  for (int pack = lane % abreast; pack < packs; pack += abreast) {
    const T* column = data + (first_class + pack * kWide) * class_stride;
    float* to = tile + begin * layout.stride + pack * kWide;
    if (rows.numbers) {
      for (int r = begin; r < rows.count; r += step, to += step * layout.stride)
        stage_packs<kFirst, kWide>(column + rows.numbers[r] * row_stride, 0, to, 0, kLanes, 1, last,
                                   divisor);
    } else {
      const int jump = step * static_cast<int>(row_stride);  // fits: kMaxRowStride
      const T* from = column + (rows.first + begin) * row_stride;
      for (int r = begin; r < rows.count; r += kStageLoads * step) {
        stage_packs<kFirst, kWide>(from, jump, to, step * layout.stride, step, rows.count - r, last,
                                   divisor);
        from += kStageLoads * jump;
        to += kStageLoads * step * layout.stride;
      }
    }
  }
}

// What a lane knows of the entries of one of its rows.
struct ColumnsRow {
  float sum = 0.0f, top = -1.0f;
  int top_class = 0;
};

// Adds a chunk of classes to the rows' sums a[r][j] over kVectors vectors. `mine` is the lane's first
// row in the tile, `weights` those of the chunk's first class.
template <int kWide, int kVectors>
__device__ __forceinline__ void add_chunk(const float* mine, int tile_stride, int first_class,
                                          int count, const float* weights, int weight_stride,
                                          float tau, ColumnsRow (&row)[kLaneRows],
                                          float (&a)[kLaneRows][kVectors]) {
  float top[kLaneRows], log_top[kLaneRows];
  int top_class[kLaneRows];
  const float* from[kLaneRows];
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    from[r] = mine + r * kLanes * tile_stride;
    top[r] = -1.0f;
    top_class[r] = 0;
  }
#pragma unroll 4
  for (int i = 0; i < count; i += kWide) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      float q[kWide];
      load_tile(from[r], q);
      from[r] += kWide;
#pragma unroll
      for (int z = 0; z < kWide; ++z) {
        row[r].sum += q[z];
        top[r] = fmaxf(top[r], q[z]);
      }
    }
  }
  // Of a row that sums to 1 only the largest entry can lie above 0.6, where log2_approx is not good
  // enough.
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) log_top[r] = log2_fast(top[r]);
  // Back again, so that of equal entries the first class is seen last.
  weights += count * weight_stride;
  for (int i = first_class + count; i > first_class;) {
    float q[kLaneRows][kWide];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      from[r] -= kWide;
      load_tile(from[r], q[r]);
    }
#pragma unroll
    for (int z = kWide - 1; z >= 0; --z) {
      --i;
      weights -= weight_stride;
      float log_q[kLaneRows];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const bool is_top = q[r][z] == top[r];
        const float log = is_top ? log_top[r] : log2_approx(q[r][z]);
        log_q[r] = q[r][z] >= tau ? log : 0.0f;
        top_class[r] = is_top ? i : top_class[r];
      }
      if constexpr (kVectors == 1) {
        const float w = __ldg(weights);
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) a[r][0] = fmaf(log_q[r], w, a[r][0]);
      } else {
#pragma unroll
        for (int j = 0; j < kVectors; j += 4) {
          const float4 w = __ldg(reinterpret_cast<const float4*>(weights + j));
#pragma unroll
          for (int r = 0; r < kLaneRows; ++r) {
            a[r][j] = fmaf(log_q[r], w.x, a[r][j]);
            a[r][j + 1] = fmaf(log_q[r], w.y, a[r][j + 1]);
            a[r][j + 2] = fmaf(log_q[r], w.z, a[r][j + 2]);
            a[r][j + 3] = fmaf(log_q[r], w.w, a[r][j + 3]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    if (!(top[r] > row[r].top)) continue;
    row[r].top = top[r];
    row[r].top_class = top_class[r];
  }
}

// Finds up to kTileRows rows with a mark, from row `next` on and before `end`; moves `next` on.
__device__ __forceinline__ int find_marked(const int32_t* votes, int32_t mark, int64_t& next,
                                           int64_t end, int64_t* numbers) {
  int found = 0;
  for (; next < end && found <= kTileRows - kLanes; next += kLanes) {
    const int64_t r = next + lane_number();
    const bool marked = r < end && votes[r] == mark;
    const unsigned ballot = __ballot_sync(kAllLanes, marked);
    if (marked) numbers[found + __popc(ballot & ((1u << lane_number()) - 1u))] = r;
    found += __popc(ballot);
  }
  __syncwarp();
  return found;
}

// One warp per tile of 64 rows, two rows per lane: rows `lane` and `lane + 32` of the tile. The warp
// stages a chunk of classes of all 64 rows in shared memory, then all lanes walk its classes together
// and multiply by the same weights. With `marked_only`, tiles are made of the rows marked kToColumns.
template <typename T, int kWide, int kVectors>
__global__ void __launch_bounds__(kThreads, kColumnsBlocks)
    columns(const __grid_constant__ Predictions in, int64_t rows,
            const __grid_constant__ NcRule rule, const FastRule fast, const TileLayout layout,
            const Divisor divisor, bool marked_only, const NcOutputs out) {
  const int tile_bytes = kTileRows * layout.stride * static_cast<int>(sizeof(float));
  unsigned char* memory = warp_memory(tile_bytes + kTileRows * static_cast<int>(sizeof(int64_t)));
  float* tile = reinterpret_cast<float*>(memory);                      // [kTileRows, stride]
  int64_t* numbers = reinterpret_cast<int64_t*>(memory + tile_bytes);  // [kTileRows]
  const float band = guard(rule.classes);

  const int64_t share = marked_only ? kSearchRows : kTileRows;
  for (int64_t begin = warp_number() * share; begin < rows; begin += warp_count() * share) {
    const int64_t end = min(begin + share, rows);
    for (int64_t next = begin; next < end;) {
      TileRows these = {begin, nullptr, static_cast<int>(end - begin)};
      if (marked_only)
        these = {0, numbers, find_marked(out.votes, kToColumns, next, end, numbers)};
      else
        next = end;
      if (these.count == 0) break;

      ColumnsRow row[kLaneRows];
      Verdict verdict[kLaneRows];
      for (int j0 = 0; j0 < rule.vectors; j0 += kVectors) {
        float a[kLaneRows][kVectors] = {};
        for (int r = 0; r < kLaneRows; ++r) row[r] = ColumnsRow();
        for (int c = 0; c < rule.classes; c += kChunk) {
          const int count = min(rule.classes - c, kChunk);
          stage_model<true, kWide, T>(in, 0, layout, these, c, count, divisor, tile);
          for (int model = 1; model < in.models; ++model)
            stage_model<false, kWide, T>(in, model, layout, these, c, count, divisor, tile);
          __syncwarp();
          add_chunk<kWide>(tile + lane_number() * layout.stride, layout.stride, c, count,
                           rule.weights + static_cast<int64_t>(c) * rule.stride + j0, rule.stride,
                           fast.tau, row, a);
          __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          const float entropy = __ldg(rule.entropy + j0 + j), offset = __ldg(rule.offset + j0 + j);
#pragma unroll
          for (int r = 0; r < kLaneRows; ++r) verdict[r].add(a[r][j], entropy, offset, band);
        }
      }
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const int place = lane_number() + r * kLanes;
        if (place >= these.count) continue;
        const int64_t n = these.numbers ? these.numbers[place] : these.first + place;
        const bool settle =
            !(verdict[r].clearance > 0.0f) || is_doubtful(fast, row[r].sum, row[r].top);
        out.critical_alpha[n] = verdict[r].critical;
        out.divergence[n] = verdict[r].divergence;
        out.votes[n] = settle ? kToSettle : verdict[r].votes * rule.ballot;
        out.top_class[n] = row[r].top_class;
        out.top_prob[n] = row[r].top;
      }
      __syncwarp();
    }
  }
}

// ---- compact -------------------------------------------------------------------------------------

// q[i] = kWide entries each of one model: a lane's share of one step of a row. `left` is how many
// entries the row has from the lane's first one on; beyond them all is 0.
template <typename T, int kWide>
__device__ __forceinline__ void load_step(const T* from, int left, float (&q)[kStepLoads][kWide]) {
  Pack<T, kWide> packs[kStepLoads];
#pragma unroll
  for (int i = 0; i < kStepLoads; ++i)
    if (i * kLanes * kWide < left) packs[i].load(from + i * kLanes * kWide);
#pragma unroll
  for (int i = 0; i < kStepLoads; ++i) {
#pragma unroll
    for (int z = 0; z < kWide; ++z) q[i][z] = 0.0f;
    if (i * kLanes * kWide < left) packs[i].unpack(q[i]);
  }
}

// The mean of q and the same entries of the other models.
template <typename T, int kWide>
__device__ __forceinline__ void average_step(const Predictions& in, const Divisor& divisor,
                                             int64_t row, int first_class, int left,
                                             float (&q)[kStepLoads][kWide]) {
  for (int model = 1; model < in.models; ++model) {
    const T* data = static_cast<const T*>(in.data[model]);
    float x[kStepLoads][kWide];
    load_step(data + row * in.row_stride[model] + first_class, left, x);
#pragma unroll
    for (int i = 0; i < kStepLoads; ++i) {
#pragma unroll
      for (int z = 0; z < kWide; ++z) q[i][z] += x[i][z];
    }
  }
#pragma unroll
  for (int i = 0; i < kStepLoads; ++i) {
#pragma unroll
    for (int z = 0; z < kWide; ++z) q[i][z] = divisor.divide(q[i][z]);
  }
}

struct ListEntry {
  float value;     // q, then log2 q
  int32_t number;  // its class
};

// The lanes of a warp as groups that take the entries of a list in turn, each lane with four vectors.
struct QuadGroups {
  int lanes;  // per group
  int count;
  int group, quad;  // of this lane; lanes left over have group >= count
  __device__ __forceinline__ explicit QuadGroups(int vectors)
      : lanes(min((vectors + kQuad - 1) / kQuad, kLanes)),
        count(kLanes / lanes),
        group(lane_number() / lanes),
        quad(lane_number() % lanes) {}
};

// What a warp gathers from one row; every lane holds its part of sum, top and a.
struct CompactRow {
  float sum = 0.0f;
  float top = 0.0f;
  int top_class = INT_MAX;
  int dominant = 0;
  float a[kQuad] = {0.0f, 0.0f, 0.0f, 0.0f};  // of vectors [4 quad, 4 quad + 4)
};

// Adds a list of dominant entries to the row. `weights` are those of the lane's first vector.
__device__ __forceinline__ void add_list(ListEntry* list, int length, const QuadGroups& groups,
                                         const float* weights, int weight_stride, CompactRow& row) {
  __syncwarp();
  for (int t = lane_number(); t < length; t += kLanes) {
    const ListEntry entry = list[t];
    if (entry.value > row.top || (entry.value == row.top && entry.number < row.top_class)) {
      row.top = entry.value;
      row.top_class = entry.number;
    }
    list[t].value = log2_fast(entry.value);
  }
  __syncwarp();
  if (groups.group < groups.count) {
    const char* bytes = reinterpret_cast<const char*>(weights);
    const uint32_t row_bytes = static_cast<uint32_t>(weight_stride) * sizeof(float);
    const ListEntry* end = list + length;
    const ListEntry* from = list + groups.group;
    while (from < end) {
      ListEntry entries[kListLoads];
      float4 w[kListLoads];
#pragma unroll
      for (int i = 0; i < kListLoads; ++i, from += groups.count) {
        entries[i] = {0.0f, 0};
        if (from < end) entries[i] = *from;
        w[i] = __ldg(reinterpret_cast<const float4*>(
            bytes + static_cast<uint64_t>(static_cast<uint32_t>(entries[i].number)) * row_bytes));
      }
#pragma unroll
      for (int i = 0; i < kListLoads; ++i) {
        row.a[0] = fmaf(entries[i].value, w[i].x, row.a[0]);
        row.a[1] = fmaf(entries[i].value, w[i].y, row.a[1]);
        row.a[2] = fmaf(entries[i].value, w[i].z, row.a[2]);
        row.a[3] = fmaf(entries[i].value, w[i].w, row.a[3]);
      }
    }
  }
  __syncwarp();
  row.dominant += length;
}

// Adds the sums of all groups to those of group 0.
__device__ __forceinline__ void fold_groups(const QuadGroups& groups, float (&a)[kQuad]) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    if (apart >= groups.count) continue;
#pragma unroll
    for (int z = 0; z < kQuad; ++z) {
      const float other = __shfl_down_sync(kAllLanes, a[z], apart * groups.lanes);
      if (groups.group + apart < groups.count) a[z] += other;
    }
  }
}

// One warp per row: lanes stride over the classes in wide loads and gather the dominant entries into
// a list in shared memory; groups of lanes then multiply them by the weights, four vectors to a lane.
// Rows whose first step is dense are marked and left to `columns`.
template <typename T, int kWide>
__global__ void __launch_bounds__(kThreads)
    compact(const __grid_constant__ Predictions in, int64_t rows,
            const __grid_constant__ NcRule rule, const FastRule fast, const Divisor divisor,
            const NcOutputs out) {
  constexpr int kStep = kStepLoads * kLanes * kWide;
  ListEntry* list =
      reinterpret_cast<ListEntry*>(warp_memory((kStep + kListSpare) * sizeof(ListEntry)));
  const int mine = lane_number() * kWide;

  for (int64_t r = warp_number(); r < rows; r += warp_count()) {
    const T* first = static_cast<const T*>(in.data[0]) + r * in.row_stride[0] + mine;
    CompactRow row;
    Verdict verdict;
    bool dense = false;
    for (int j0 = 0; j0 < rule.vectors && !dense; j0 += kQuad * kLanes) {
      const QuadGroups groups(rule.vectors - j0);
      row = CompactRow();
      int length = 0;
      for (int c = 0; c < rule.classes; c += kStep) {
        float q[kStepLoads][kWide];
        const int left = rule.classes - c - mine;
        load_step(first + c, left, q);
        if (in.models > 1) average_step<T>(in, divisor, r, c + mine, left, q);
        float highest = 0.0f;
#pragma unroll
        for (int i = 0; i < kStepLoads; ++i) {
#pragma unroll
          for (int z = 0; z < kWide; ++z) {
            row.sum += q[i][z];
            highest = fmaxf(highest, q[i][z]);
          }
        }
        if (__any_sync(kAllLanes, highest >= fast.tau)) {
          int found = 0, total;
#pragma unroll
          for (int i = 0; i < kStepLoads; ++i) {
#pragma unroll
            for (int z = 0; z < kWide; ++z) found += q[i][z] >= fast.tau;
          }
          ListEntry* to = list + length + warp_sum_before(found, total);
#pragma unroll
          for (int i = 0; i < kStepLoads; ++i) {
#pragma unroll
            for (int z = 0; z < kWide; ++z)
              if (q[i][z] >= fast.tau) *to++ = {q[i][z], c + mine + i * kLanes * kWide + z};
          }
          length += total;
        }
        dense = c == 0 && length > kDenseShare * kStep;
        if (dense) break;
        if (length <= kListSpare && c + kStep < rule.classes) continue;
        add_list(list, length, groups, rule.weights + j0 + kQuad * groups.quad, rule.stride, row);
        length = 0;
      }
      if (dense) break;
      fold_groups(groups, row.a);
      if (groups.group > 0) continue;
      const float band = guard(row.dominant);
#pragma unroll
      for (int z = 0; z < kQuad; ++z) {
        const int j = j0 + kQuad * groups.quad + z;
        verdict.add(row.a[z], __ldg(rule.entropy + j), __ldg(rule.offset + j), band);
      }
    }
    if (dense) {
      if (lane_number() == 0) out.votes[r] = kToColumns;
      __syncwarp();
      continue;
    }
    const float sum = warp_sum(row.sum);
    const float top = warp_max(row.top);
    const unsigned top_class =
        ~warp_max(~static_cast<unsigned>(row.top == top ? row.top_class : INT_MAX));
    verdict.critical = warp_max(verdict.critical);
    verdict.divergence = warp_max(verdict.divergence);
    verdict.clearance = warp_min(verdict.clearance);
    verdict.votes = warp_sum(verdict.votes);
    if (lane_number() == 0) {
      const bool settle = !(verdict.clearance > 0.0f) || is_doubtful(fast, sum, top);
      out.critical_alpha[r] = verdict.critical;
      out.divergence[r] = verdict.divergence;
      out.votes[r] = settle ? kToSettle : verdict.votes * rule.ballot;
      out.top_class[r] = static_cast<int32_t>(top_class);
      out.top_prob[r] = top;
    }
  }
}

// ---- settle --------------------------------------------------------------------------------------

// exp(x - highest) / total is the softmax of one model's logits.
struct SoftmaxScale {
  double highest, total;
};

__device__ __forceinline__ double read_entry(const Predictions& in, int model, int64_t row, int c) {
  const int64_t at = row * in.row_stride[model] + c * in.class_stride[model];
  const void* data = in.data[model];
  switch (in.dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(data)[at]);
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    case DType::kFloat64:
      return static_cast<const double*>(data)[at];
    default:
      return static_cast<const float*>(data)[at];
  }
}

// The averaged entry of the definition, exact in float64. Clears `valid` when a model's entry is none.
__device__ double read_mean(const Predictions& in, const SoftmaxScale* scales, int64_t row, int c,
                            bool& valid) {
  float mean = 0.0f;
  for (int model = 0; model < in.models; ++model) {
    const double x = read_entry(in, model, row, c);
    valid = valid && fabs(x) <= DBL_MAX && (in.logits || x >= 0.0);
    if (in.models == 1 && !in.logits) return x;
    const float q =
        in.logits ? static_cast<float>(exp_exact(x - scales[model].highest) / scales[model].total)
                  : static_cast<float>(x);
    mean = model == 0 ? q : mean + q;
  }
  return in.models > 1 ? mean / static_cast<float>(in.models) : mean;
}

// Every lane receives the scale of one model's row. Lane l sums the classes l, l + 32, ... and the
// lanes are folded in halves, as the definition says.
__device__ SoftmaxScale softmax_scale(const Predictions& in, int model, int64_t row) {
  SoftmaxScale scale;
  double highest = -INFINITY;
  for (int c = lane_number(); c < in.classes; c += kLanes) {
    const double x = read_entry(in, model, row, c);
    highest = x > highest ? x : highest;
  }
  scale.highest = warp_fold(highest, [](double a, double b) { return a > b ? a : b; });
  double total = 0.0;
  for (int c = lane_number(); c < in.classes; c += kLanes)
    total = total + exp_exact(read_entry(in, model, row, c) - scale.highest);
  scale.total = warp_sum(total);
  return scale;
}

// Whether entry (q, c) comes before (other, d) as the top class: NaN is the highest of all, of equal
// entries the first class wins.
__device__ __forceinline__ bool is_higher(double q, int c, double other, int d) {
  if (q != q || other != other) return q != q && (other == other || c < d);
  return q > other || (q == other && c < d);
}

// Whether the row sums to 1 within the tolerance when it is added up in class order. `sum` is its sum
// in some other order: only where that is too close to call are the entries added one by one.
__device__ bool sums_to_one(const Predictions& in, const NcRule& rule, int64_t row, double sum) {
  const double margin = 4.0 * rule.classes * DBL_EPSILON;
  const double off = fabs(sum - 1.0);
  if (!(fabs(off - rule.tolerance) <= margin)) return off <= rule.tolerance;
  double total = 0.0;
  bool valid = true;
  for (int c = 0; c < rule.classes; ++c) total = total + read_mean(in, nullptr, row, c, valid);
  return fabs(total - 1.0) <= rule.tolerance;
}

// Scores one row by the definition (genkl_ext/reference.py), bit for bit, and checks it: lanes read 32
// classes and take their logarithms, then every lane adds them, class after class, for its vector.
__device__ void settle_row(const Predictions& in, const NcRule& rule, const NcOutputs& out,
                           int64_t row, SoftmaxScale* scales, int64_t* first_bad_row) {
  if (in.logits) {
    for (int model = 0; model < in.models; ++model) {
      const SoftmaxScale scale = softmax_scale(in, model, row);
      if (lane_number() == 0) scales[model] = scale;
    }
    __syncwarp();
  }
  bool valid = true;
  double sum = 0.0, top = -INFINITY, critical = -INFINITY, divergence = -INFINITY;
  int top_class = INT_MAX, votes = 0;
  for (int j0 = 0; j0 < rule.vectors; j0 += kLanes) {
    const int j = j0 + lane_number();
    const bool has_vector = j < rule.vectors;
    double cross = 0.0;
    for (int c0 = 0; c0 < rule.classes; c0 += kLanes) {
      const int c = c0 + lane_number();
      bool dominant = false;
      double log_q = 0.0;
      if (c < rule.classes) {
        const double q = read_mean(in, scales, row, c, valid);
        if (j0 == 0) {
          sum += q;
          if (is_higher(q, c, top, top_class)) {
            top = q;
            top_class = c;
          }
        }
        dominant = !(q < rule.tau);
        if (dominant) log_q = log2_exact(q);
      }
      unsigned rest = __ballot_sync(kAllLanes, dominant);
      for (; rest; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1;
        const double log_i = __shfl_sync(kAllLanes, log_q, lane);
        const int64_t i = c0 + lane;
        if (has_vector) cross = cross + log_i * rule.vectors_exact[i * rule.vectors + j];
      }
    }
    if (has_vector) {
      const double d = exact_divergence(rule, j, cross);
      critical = max_or_nan(critical, exact_ratio(rule, j, cross));
      divergence = max_or_nan(divergence, d);
      votes += d >= 0.0;
    }
  }
  const auto larger = [](double a, double b) { return max_or_nan(a, b); };
  critical = warp_fold(critical, larger);
  divergence = warp_fold(divergence, larger);
  votes = warp_sum(votes);
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, top, apart);
    const int other_class = __shfl_xor_sync(kAllLanes, top_class, apart);
    if (is_higher(other, other_class, top, top_class)) {
      top = other;
      top_class = other_class;
    }
  }
  valid = __all_sync(kAllLanes, valid);
  if (!in.logits) {
    sum = warp_sum(sum);
    valid = valid && sums_to_one(in, rule, row, sum);
  }
  if (lane_number() == 0) {
    out.critical_alpha[row] = round_on_side(critical, rule.alpha, votes > 0);
    out.divergence[row] = round_on_side(divergence, 0.0, votes > 0);
    out.votes[row] = votes * rule.ballot;
    out.top_class[row] = top_class;
    out.top_prob[row] = static_cast<float>(top);
    // As an unsigned number, -1 (none so far) is above every row.
    if (!valid)
      atomicMin(reinterpret_cast<unsigned long long*>(first_bad_row),
                static_cast<unsigned long long>(row));
  }
  __syncwarp();
}

// One warp per row when all are to be settled; else one warp searches 32 rows for marks and settles
// the marked ones.
__global__ void __launch_bounds__(kThreads)
    settle(const __grid_constant__ Predictions in, int64_t rows,
           const __grid_constant__ NcRule rule, bool marked_only, const NcOutputs out,
           int64_t* first_bad_row) {
  SoftmaxScale* scales =
      reinterpret_cast<SoftmaxScale*>(warp_memory(in.models * sizeof(SoftmaxScale)));

  const int64_t share = marked_only ? kLanes : 1;
  for (int64_t begin = warp_number() * share; begin < rows; begin += warp_count() * share) {
    unsigned rest = 1;
    if (marked_only) {
      const int64_t r = begin + lane_number();
      rest = __ballot_sync(kAllLanes, r < rows && out.votes[r] == kToSettle);
    }
    for (; rest; rest &= rest - 1)
      settle_row(in, rule, out, begin + __ffs(static_cast<int>(rest)) - 1, scales, first_bad_row);
  }
}

// ---- launches ------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

constexpr int64_t blocks_for(int64_t items, int64_t items_per_block) {
  return (items + items_per_block - 1) / items_per_block;
}

constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Whether a model's first entry is where a pack of `wide` entries may lie.
bool is_aligned(const Predictions& in, int model, int wide) {
  const int bytes = wide * size_of(in.dtype);
  return reinterpret_cast<uintptr_t>(in.data[model]) % (bytes < 16 ? bytes : 16) == 0;
}

// Whether all rows of all models can be read in packs of `wide` entries.
bool is_packed(const Predictions& in, int wide) {
  bool packed = in.classes % wide == 0;
  for (int model = 0; model < in.models; ++model)
    packed = packed && is_aligned(in, model, wide) && in.row_stride[model] % wide == 0 &&
             (wide == 1 || in.class_stride[model] == 1);
  return packed;
}

bool has_unit_classes(const Predictions& in) {
  bool unit = true;
  for (int model = 0; model < in.models; ++model) unit = unit && in.class_stride[model] == 1;
  return unit;
}

// For rows that are summed in chains of `additions`, each wrong by 2^-24 at most.
FastRule fast_rule(const NcRule& rule, int additions) {
  return {static_cast<float>(rule.tau),
          static_cast<float>(rule.tolerance) - 6.6e-8f * static_cast<float>(additions)};
}

Divisor divisor_of(const Predictions& in) {
  const float number = static_cast<float>(in.models);
  return {number, 1.0f / number};
}

TileLayout tile_layout(const Predictions& in) {
  TileLayout layout;
  layout.wide = is_packed(in, 4) ? 4 : is_packed(in, 2) ? 2 : 1;
  const int classes = in.classes < kChunk ? in.classes : kChunk;
  layout.stride = classes / layout.wide % 2 ? classes : classes + layout.wide;
  layout.flat = in.models == 1 && in.class_stride[0] == 1 && in.row_stride[0] == in.classes &&
                in.classes <= kChunk && layout.stride == in.classes && is_aligned(in, 0, 4);
  return layout;
}

// Whether the float32 passes are of use. A softmax and float64 entries cost float64 arithmetic in any
// case; quotients must be right down to tau; and a tile's rows must not lie too far apart.
bool is_fast(const Predictions& in, const NcRule& rule) {
  bool fast = !rule.exact_only && !in.logits && in.dtype != DType::kFloat64 &&
              (in.models == 1 || rule.tau >= kMinDividend);
  for (int model = 0; model < in.models; ++model)
    fast = fast && in.row_stride[model] < kMaxRowStride && in.row_stride[model] > -kMaxRowStride;
  return fast;
}

// Calls f with a zero of the type of the float32 passes' input.
template <typename Function>
cudaError_t with_type(DType dtype, Function f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(__half());
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(float());
  }
}

cudaError_t launch_columns(const Predictions& in, int64_t rows, const NcRule& rule,
                           bool marked_only, const NcOutputs& out, cudaStream_t stream) {
  const TileLayout layout = tile_layout(in);
  const size_t shared_bytes =
      kWarps * kTileRows * (layout.stride * sizeof(float) + sizeof(int64_t));
  const int64_t blocks = blocks_for(rows, kWarps * (marked_only ? kSearchRows : kTileRows));
  const bool single = rule.vectors == 1;
  return with_type(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launch_with = [&](auto kernel) {
      return launch(kernel, blocks, shared_bytes, stream, in, rows, rule,
                    fast_rule(rule, rule.classes), layout, divisor_of(in), marked_only, out);
    };
    switch (layout.wide) {
      case 4:
        return launch_with(single ? columns<T, 4, 1> : columns<T, 4, kBlockVectors>);
      case 2:
        return launch_with(single ? columns<T, 2, 1> : columns<T, 2, kBlockVectors>);
      default:
        return launch_with(single ? columns<T, 1, 1> : columns<T, 1, kBlockVectors>);
    }
  });
}

cudaError_t launch_compact(const Predictions& in, int64_t rows, const NcRule& rule,
                           const NcOutputs& out, cudaStream_t stream) {
  const bool packed = is_packed(in, 4);
  const size_t list = kStepLoads * kLanes * (packed ? 4 : 1) + kListSpare;
  return with_type(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(packed ? compact<T, 4> : compact<T, 1>, blocks_for(rows, kWarps),
                  kWarps * list * sizeof(ListEntry), stream, in, rows, rule,
                  fast_rule(rule, rule.classes / kLanes + 6), divisor_of(in), out);
  });
}

}  // namespace

int nc_score_cuda(const Predictions& predictions, int64_t rows, const NcRule& rule,
                  const double* vectors, const double* entropies, const NcOutputs& outputs,
                  int64_t* first_bad_row, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t slots = static_cast<int64_t>(rule.classes) * rule.stride;
  cudaError_t error =
      launch(fill, blocks_for(slots, kThreads), 0, stream, rule, vectors, entropies, first_bad_row);
  if (rows == 0 || error != cudaSuccess) return error;

  const bool fast = is_fast(predictions, rule);
  const bool compacted = predictions.classes > kColumnsUpTo && has_unit_classes(predictions);
  if (fast && compacted) error = launch_compact(predictions, rows, rule, outputs, stream);
  if (fast && error == cudaSuccess)
    error = launch_columns(predictions, rows, rule, compacted, outputs, stream);
  if (error != cudaSuccess) return error;
  return launch(settle, blocks_for(rows, kWarps * (fast ? kLanes : 1)),
                kWarps * predictions.models * sizeof(SoftmaxScale), stream, predictions, rows, rule,
                fast, outputs, first_bad_row);
}

}  // namespace genkl
