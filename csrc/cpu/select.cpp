// Stage (0): the last member of each sampled set, equation (2), without keys being stored for every pixel.
//
// N_k holds the M smallest (key, index) of the valid pixels that are not of class k. One sorted list of the smallest keys
// serves all classes, if it is long enough: a histogram of the keys' upper bits says how far to collect. The list's length
// is M plus what lies between of the class itself.
#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "parallel.h"
#include "stages.h"

namespace proac {

namespace {

constexpr int64_t kBins = int64_t(1) << kHistogramBits;

// How many pixels of each class, and with each value of the keys' upper bits, are in a set of pixels.
struct Counts {
  std::vector<int64_t> by_class, by_key;
  explicit Counts(int64_t classes) : by_class(classes), by_key(kBins) {}
};

// All candidates with key bits <= limit, sorted by (key, index).
std::vector<Candidate> collect(const Kernels& kernels, const SelectCall& call, const ChunkPlan& plan,
                               const std::vector<Counts>& counts, int64_t limit) {
  std::vector<int64_t> begin(plan.count + 1);
  for (int64_t c = 0; c < plan.count; ++c) {
    int64_t found = 0;
    for (int64_t bin = 0; bin <= limit; ++bin) found += counts[c].by_key[bin];
    begin[c + 1] = begin[c] + found;
  }
  std::vector<Candidate> candidates(begin[plan.count]);
  for_each_chunk(plan, [&](int64_t chunk, Range range, int64_t) {
    Candidate* out = candidates.data() + begin[chunk];
    kernels.collect_keys(call, range, limit, out);
    std::sort(out, candidates.data() + begin[chunk + 1], [](const Candidate& a, const Candidate& b) {
      return a.key != b.key ? a.key < b.key : a.index < b.index;
    });
  });
  const auto less = [](const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key < b.key : a.index < b.index;
  };
  for (int64_t width = 1; width < plan.count; width *= 2) {  // merge neighbouring chunks
    for (int64_t c = 0; c + width < plan.count; c += 2 * width) {
      std::inplace_merge(candidates.begin() + begin[c], candidates.begin() + begin[c + width],
                         candidates.begin() + begin[std::min(c + 2 * width, plan.count)], less);
    }
  }
  return candidates;
}

}  // namespace

Tensor select_negatives(Tensor features, Tensor labels, OptionalTensor pixel_weight, Tensor rng_state,
                        int64_t num_negatives, int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
  const Kernels& kernels = cpu_kernels();
  const PixelTables pixels(features, 2, labels, pixel_weight, num_classes, ignore_index, nearest_exact);
  const Tensor state = torch::stable::contiguous(rng_state);
  const int64_t* rng = state.const_data_ptr<int64_t>();
  const SelectCall call{pixels.view, static_cast<uint64_t>(rng[0]), rng[1],
                        compute_type(features) == ScalarType::Double};
  const ChunkPlan plan(pixels.view.total);

  std::vector<Counts> counts(plan.count, Counts(num_classes));
  for_each_chunk(plan, [&](int64_t chunk, Range range, int64_t) {
    kernels.count_keys(call, range, counts[chunk].by_class.data(), counts[chunk].by_key.data());
  });
  Counts all(num_classes);
  for (const Counts& part : counts) {
    for (int64_t k = 0; k < num_classes; ++k) all.by_class[k] += part.by_class[k];
    for (int64_t bin = 0; bin < kBins; ++bin) all.by_key[bin] += part.by_key[bin];
  }
  int64_t total = 0;
  for (const int64_t count : all.by_class) total += count;

  Tensor thresholds = torch::stable::new_empty(rng_state, {num_classes, 2});
  int64_t* out = thresholds.mutable_data_ptr<int64_t>();
  double others_share = 1;  // least share of non-members of a class, over the classes that have more than M of them
  bool any = false;
  for (int64_t k = 0; k < num_classes; ++k) {
    out[2 * k] = int64_t(1) << 32;
    out[2 * k + 1] = 0;
    const int64_t others = total - all.by_class[k];
    if (others <= num_negatives) continue;
    any = true;
    others_share = std::min(others_share, static_cast<double>(others) / static_cast<double>(total));
  }
  if (!any) return thresholds;

  double length = (num_negatives + 4 * std::sqrt(static_cast<double>(num_negatives))) / others_share + 16;
  for (;; length *= 2) {
    int64_t limit = 0, listed = all.by_key[0];
    while (limit + 1 < kBins && static_cast<double>(listed) < length) listed += all.by_key[++limit];
    const std::vector<Candidate> list = collect(kernels, call, plan, counts, limit);

    // Positions of each class in the list, class after class.
    std::vector<int64_t> begin(num_classes + 1), position(list.size());
    for (const Candidate& c : list) ++begin[c.label + 1];
    for (int64_t k = 0; k < num_classes; ++k) begin[k + 1] += begin[k];
    std::vector<int64_t> cursor(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < list.size(); ++i) position[cursor[list[i].label]++] = static_cast<int64_t>(i);

    bool enough = true;
    for (int64_t k = 0; k < num_classes; ++k) {
      if (total - all.by_class[k] <= num_negatives) continue;
      int64_t last = num_negatives - 1;  // position of the M-th that is not of class k
      for (int64_t i = begin[k]; i < begin[k + 1] && position[i] <= last; ++i) ++last;
      if (last >= static_cast<int64_t>(list.size())) {
        enough = false;
        break;
      }
      out[2 * k] = list[last].key;
      out[2 * k + 1] = list[last].index;
    }
    if (enough) return thresholds;
  }
}

}  // namespace proac
