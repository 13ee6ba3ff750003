// What the blocks of a launch leave is merged by the last of them to come, in the order of the blocks: no launch for it, and
// nobody waits.
#pragma once
#include "math.cuh"
#include "pixels.cuh"

namespace proac::cuda {

// The last of so many neighbouring blocks merges their rows, and of those that did so the last merges theirs: one block alone
// would read hundreds of rows, one after the other.
constexpr int kMergeGroup = 16;
// Counters of a launch of so many blocks. They are zero before it.
inline int merge_counters(int blocks) { return 1 + (blocks + kMergeGroup - 1) / kMergeGroup; }

// Whether the calling block is the last of `count` to come here; it then sees what those wrote before. `last` is shared memory.
__device__ __forceinline__ bool is_last(unsigned* counter, int count, int* last) {
  SYNC_THREADS(row_is_written);
  if (threadIdx.x == 0) *last = count_arrival(counter) == static_cast<unsigned>(count) - 1;
  SYNC_THREADS(arrival_is_counted);
  return *last;
}

// Calls merge(first, step, count, whole) for the rows of blocks first, first + step, ...: whole is false where the result takes the
// place of the first of them, true where it is that of all blocks. Returns whether this block has merged the whole.
template <class Merge>
__device__ __forceinline__ bool merge_blocks(unsigned* counters, int* last, Merge merge) {
  int blocks = static_cast<int>(gridDim.x), groups = (blocks + kMergeGroup - 1) / kMergeGroup;
  int group = static_cast<int>(blockIdx.x) / kMergeGroup, first = group * kMergeGroup, step = 1;
  int count = blocks - first < kMergeGroup ? blocks - first : kMergeGroup;
  unsigned* counter = counters + (groups > 1 ? 1 + group : 0);
  while (is_last(counter, count, last)) {
    bool whole = counter == counters;
    merge(first, step, count, whole);
    if (whole) return true;
    counter = counters, first = 0, step = kMergeGroup, count = groups;
  }
  return false;
}

// The sum of `count` numbers that lie `stride` apart.
template <class C>
__device__ __forceinline__ C sum_rows(const C* row, int64_t stride, int count) {
  C sum = C(0);
#pragma unroll 8
  for (int b = 0; b < count; ++b) sum += row[b * stride];
  return sum;
}

struct MergeStatistics {
  void* partial;             // C (blocks, kPartialRows, K)
  unsigned* counters;        // merge_counters
  Diagnostics* diagnostics;  // zero before the launch
  void* statistics;          // out C (kNumStatistics, K)
  int64_t* first_values;     // out (4), see proac_cuda/stages/pixels.py
};

// The end of stage (i): the rows of `partial` become the statistics. `others`: every pixel of another class is a negative, so that
// their weights are those of the other classes; no difference of sums.
template <class C>
__device__ __forceinline__ void merge_statistics(const MergeStatistics& m, const Pixels& pixels, bool others,
                                                 const Diagnostics& mine, int* last) {
  int n = static_cast<int>(pixels.num_classes);
  C* out = static_cast<C*>(m.statistics);
  Diagnostics& all = *m.diagnostics;
  if (threadIdx.x == 0) {
    add_invalid(all.labels, all.first_label, mine.labels, mine.first_label);
    add_invalid(all.weights, all.first_weight, mine.weights, mine.first_weight);
  }
  bool done = merge_blocks(m.counters, last, [&](int first, int step, int count, bool whole) {
    C* rows = static_cast<C*>(m.partial) + static_cast<int64_t>(first) * kPartialRows * n;
    int64_t stride = static_cast<int64_t>(step) * kPartialRows * n;
    for (int i = threadIdx.x; i < kNumStatistics * n; i += blockDim.x) {
      C* row = rows + i + (i < n ? 0 : n);  // log Z has two rows, all others follow in the same order
      C merged;
      if (i < n) {
        LogSum<C> sum = empty_sum<C>();
#pragma unroll 8
        for (int b = 0; b < count; ++b) sum = merge(sum, LogSum<C>{row[b * stride], row[b * stride + n]});
        if (!whole) row[0] = sum.maximum, row[n] = sum.sum;
        if (whole) out[i] = value(sum);
        continue;
      }
      if (i < kHardestNegative * n) {
        merged = sum_rows(row, stride, count);
      } else {
        merged = static_cast<C>(minus_infinity());
#pragma unroll 8
        for (int b = 0; b < count; ++b) merged = larger(merged, row[b * stride]);
      }
      (whole ? out + i : row)[0] = merged;
    }
  });
  if (!done) return;
  SYNC_THREADS(weights_are_merged);
  for (int k = threadIdx.x; others && k < n; k += blockDim.x) {
    C sum = C(0);
#pragma unroll 8
    for (int other = 0; other < n; ++other) sum += other == k ? C(0) : out[kW * n + other];
    out[kNegW * n + k] = sum;
  }
  if (threadIdx.x) return;
  m.first_values[0] = static_cast<int64_t>(all.labels), m.first_values[2] = static_cast<int64_t>(all.weights);
  m.first_values[1] = m.first_values[3] = 0;
  if (all.labels)
    m.first_values[1] = read_label(pixels, place_of(pixels, static_cast<int64_t>(~all.first_label)).label);
  if (all.weights) {
    Place place = place_of(pixels, static_cast<int64_t>(~all.first_weight));
    m.first_values[3] = __double_as_longlong(static_cast<double>(static_cast<const C*>(pixels.weight)[place.weight]));
  }
}

}  // namespace proac::cuda
