// Stage (0), (2): the last member of each sampled set, exactly, by radix selection over (key, index).
// A pixel's rank number is its 32-bit Philox key followed by the bits of its index, so that no two are equal. Each pass
// takes 8 more bits: a histogram of those pixels of V \ P_k which agree with class k's prefix, then the bin that holds the
// num_negatives-th of them. The first pass, where all agree, counts each class's own pixels and subtracts. Counts are
// integers, so the atomics' order does not matter; nothing is read back by the host.
#include "device.h"
#include "math.cuh"
#include "pixels.cuh"

namespace proac::cuda {

constexpr int kSelectThreads = 256, kBins = 256;
constexpr unsigned long long kAllTaken = ~0ull;

struct SelectKernel {
  SelectNegatives a;
  unsigned long long* histogram;  // (K + 1, kBins): counts, zero between passes; the last row for all classes
  unsigned long long* prefix;     // (K): bits found so far; kAllTaken where V \ P_k has no more than num_negatives
  unsigned long long* rank;       // (K): how many of the agreeing pixels are still to be passed
  int shift, index_bits;          // this pass looks at bits [shift, shift + 8) of the rank number
  bool first;
};

__global__ void __launch_bounds__(kSelectThreads) select_start_kernel(SelectKernel job) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i < (job.a.pixels.num_classes + 1) * kBins) job.histogram[i] = 0;
  if (i < job.a.pixels.num_classes)
    job.prefix[i] = 0, job.rank[i] = static_cast<unsigned long long>(job.a.num_negatives - 1);
}

template <class C>
__global__ void __launch_bounds__(kSelectThreads) select_histogram_kernel(SelectKernel job) {
  const Pixels& pixels = job.a.pixels;
  int num_classes = static_cast<int>(pixels.num_classes);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < pixels.count;
       i += static_cast<int64_t>(gridDim.x) * kSelectThreads) {
    Pixel<C> pixel = read_pixel<C>(pixels, i);
    if (pixel.label < 0) continue;
    unsigned long long number = static_cast<unsigned long long>(philox_key(job.a.rng[0], i + job.a.rng[1]))
                                    << job.index_bits |
                                static_cast<unsigned long long>(i);
    int bin = static_cast<int>(number >> job.shift & (kBins - 1));
    if (job.first) {
      atomicAdd(job.histogram + static_cast<int64_t>(pixel.label) * kBins + bin, 1ull);
      atomicAdd(job.histogram + static_cast<int64_t>(num_classes) * kBins + bin, 1ull);
      continue;
    }
    unsigned long long mine = number >> job.shift >> 8;
    for (int k = 0; k < num_classes; ++k)
      if (mine == job.prefix[k] && k != pixel.label)
        atomicAdd(job.histogram + static_cast<int64_t>(k) * kBins + bin, 1ull);
  }
}

// Block k: the bin of class k, by a scan over its 256 counts.
__global__ void __launch_bounds__(kBins) select_pick_kernel(SelectKernel job) {
  SHARED(unsigned long long[kBins / 32], warp_total);
  SHARED(unsigned long long, found);
  int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  int64_t k = blockIdx.x, num_classes = job.a.pixels.num_classes;
  unsigned long long prefix = job.prefix[k], rank = job.rank[k], count = job.histogram[k * kBins + t];
  if (job.first) count = job.histogram[num_classes * kBins + t] - count;
  unsigned long long sum = count;
  for (int o = 1; o < 32; o <<= 1) {
    unsigned long long below = __shfl_up_sync(kAllLanes, sum, o);
    if (lane >= o) sum += below;
  }
  if (lane == 31) warp_total[warp] = sum;
  if (t == 0) found = kAllTaken;
  SYNC_THREADS(warps_have_counted);
  unsigned long long total = 0;
  for (int w = 0; w < kBins / 32; ++w) {
    if (w < warp) sum += warp_total[w];
    total += warp_total[w];
  }
  if (job.first && total == rank + 1) prefix = kAllTaken;  // no more than wanted: all are taken
  bool mine = prefix != kAllTaken && sum > rank && sum - count <= rank;
  if (mine) {
    found = prefix << 8 | static_cast<unsigned long long>(t);
    job.rank[k] = rank - (sum - count);
  }
  SYNC_THREADS(bin_is_found);
  job.histogram[k * kBins + t] = 0;
  if (t) return;
  job.prefix[k] = found;
  if (job.shift) return;
  bool all = found == kAllTaken;
  job.a.thresholds[2 * k] = all ? 1ll << 32 : static_cast<int64_t>(found >> job.index_bits);
  job.a.thresholds[2 * k + 1] = all ? 0 : static_cast<int64_t>(found & ((1ull << job.index_bits) - 1)) + job.a.rng[1];
}

size_t workspace_bytes(const SelectNegatives& a) {
  return ((a.pixels.num_classes + 1) * kBins + 2 * a.pixels.num_classes) * 8;
}

cudaError_t run(const SelectNegatives& a, cudaStream_t stream) {
  int64_t num_classes = a.pixels.num_classes;
  int bits = 0;
  while (bits < 32 && (a.pixels.count - 1) >> bits > 0) ++bits;  // up to 2^32 pixels
  SelectKernel job = {};
  job.a = a;
  job.histogram = static_cast<unsigned long long*>(a.workspace);
  job.prefix = job.histogram + (num_classes + 1) * kBins;
  job.rank = job.prefix + num_classes;
  job.index_bits = (bits + 7) / 8 * 8;
  cudaError_t error = launch(select_start_kernel, ((num_classes + 1) * kBins + kSelectThreads - 1) / kSelectThreads,
                             kSelectThreads, 0, stream, job);
  int64_t blocks = few_blocks((a.pixels.count + kSelectThreads - 1) / kSelectThreads, 1024);
  auto histogram = a.compute == Type::float64 ? select_histogram_kernel<double> : select_histogram_kernel<float>;
  for (job.shift = 24 + job.index_bits; job.shift >= 0 && error == cudaSuccess; job.shift -= 8) {
    job.first = job.shift == 24 + job.index_bits;
    error = launch(histogram, blocks, kSelectThreads, 0, stream, job);
    if (error == cudaSuccess) error = launch(select_pick_kernel, num_classes, kBins, 0, stream, job);
  }
  return error;
}

}  // namespace proac::cuda
