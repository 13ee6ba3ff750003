// Stages (i), (ii) and the reduction on CPU tensors: unpack the arguments, run the kernels over chunks, merge.
#include "stages.h"

#include "class_vectors.h"
#include "stage_call.h"

namespace proac {

namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> class_statistics_of(const Tensor& features, const PixelTables& pixels,
                                                       const Tensor& prototypes, const OptionalTensor& thresholds,
                                                       const OptionalTensor& rng_state, double temperature,
                                                       bool pixel_anchor, bool hardest_negative) {
  const Kernels& kernels = cpu_kernels();
  const int64_t classes = pixels.view.num_classes, channels = features.size(1);
  const ChunkPlan plan(pixels.view.total);
  const Anchors<T> anchors(data<T>(prototypes), classes, channels, thresholds.has_value(),
                           tile_use(kernels, features, classes, thresholds.has_value(), false));

  std::vector<int64_t> shape{features.size(0)};
  for (int64_t axis = 2; axis < features.dim(); ++axis) shape.push_back(features.size(axis));
  Tensor statistics = torch::stable::new_empty(prototypes, {int64_t(kNumStatistics), classes});
  Tensor positive = torch::stable::new_empty(prototypes, {shape.data(), shape.size()});
  Tensor diagnostics = torch::stable::new_empty(features, {int64_t(4)}, ScalarType::Long);

  std::vector<double> partial(plan.count * kNumStatistics * classes);
  std::vector<Diagnostics> bad(plan.count);
  StatisticsCall call{};
  STD_TORCH_CHECK(view_features(features, &call.features), "proac_cuda: the features' spatial axes do not collapse");
  call.features.data = const_cast<void*>(features.const_data_ptr());
  call.pixels = pixels.view;
  std::optional<Thresholds<T>> sorted;
  if (thresholds && rng_state) {
    sorted.emplace(data<int64_t>(dense(*thresholds)), classes);
    call.sample = sorted->view(data<int64_t>(dense(*rng_state)));
  }
  call.anchors = anchors.view();
  call.temperature = temperature;
  call.pixel_anchor = pixel_anchor;
  call.hardest_negative = hardest_negative;
  call.positive = positive.mutable_data_ptr();
  call.partial = partial.data();
  call.diagnostics = bad.data();

  const Workspaces work = make_workspaces(plan, kernels, anchors, thresholds.has_value(), false);
  const auto kernel = kernels.class_statistics[feature_type(features)];
  for_each_chunk(plan, [&](int64_t chunk, Range range, int64_t worker) { kernel(call, range, chunk, work[worker]); });
  merge_statistics<T>(call, plan.count, static_cast<T*>(statistics.mutable_data_ptr()));
  merge_diagnostics(bad, static_cast<int64_t*>(diagnostics.mutable_data_ptr()));
  return {statistics, positive, diagnostics};
}

template <class T>
Tensor positive_sums_of(const Tensor& positive, const PixelTables& pixels, const Tensor& statistics,
                        bool negative_mean) {
  const int64_t classes = pixels.view.num_classes;
  const ChunkPlan plan(pixels.view.total);
  const std::vector<T> contrast = contrast_log_z(data<T>(statistics), classes, negative_mean);
  std::vector<double> partial(plan.count * 2 * classes);
  const PositiveCall call{pixels.view, positive.const_data_ptr(), contrast.data(), partial.data()};
  const auto kernel = cpu_kernels().positive_sums[sizeof(T) == 8];
  for_each_chunk(plan, [&](int64_t chunk, Range range, int64_t) { kernel(call, range, chunk); });

  Tensor sums = torch::stable::new_empty(statistics, {int64_t(2), classes});
  T* out = static_cast<T*>(sums.mutable_data_ptr());
  for (int64_t i = 0; i < 2 * classes; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < plan.count; ++c) sum += partial[c * 2 * classes + i];
    out[i] = static_cast<T>(sum);
  }
  return sums;
}

template <class T>
Tensor reduce_loss_of(const Tensor& statistics_tensor, const Tensor& sums_tensor, const T* class_weight,
                      double pixel_anchor_weight, int64_t reduction) {
  const T *statistics = data<T>(statistics_tensor), *sums = data<T>(sums_tensor);
  const int64_t classes = statistics_tensor.size(1);
  std::vector<int64_t> shape;
  if (reduction == kReductionNone) shape.push_back(classes);
  Tensor loss = torch::stable::new_empty(statistics_tensor, {shape.data(), shape.size()});
  T* out = static_cast<T*>(loss.mutable_data_ptr());
  double total = 0, pixel_loss = 0, weight = 0;
  for (int64_t k = 0; k < classes; ++k) {
    const double w = statistics[kWeight * classes + k];
    const double value = over(sums[k], w) * (class_weight ? class_weight[k] : 1);
    if (reduction == kReductionNone) out[k] = static_cast<T>(value);
    total += value;
    weight += w;
    pixel_loss += statistics[kPixelLossSum * classes + k];
  }
  if (reduction == kReductionNone) return loss;
  if (reduction == kReductionMean) total = over(total, total_class_weight(statistics, classes, class_weight));
  if (pixel_anchor_weight != 0) total += pixel_anchor_weight * over(pixel_loss, weight);
  *out = static_cast<T>(total);
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> class_statistics(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                                    Tensor prototypes, OptionalTensor thresholds,
                                                    OptionalTensor rng_state, double temperature, int64_t ignore_index,
                                                    bool pixel_anchor, bool hardest_negative, bool nearest_exact) {
  check_shape(features);
  const PixelTables pixels(features, 2, labels, pixel_weight, prototypes.size(0), ignore_index, nearest_exact);
  const auto run =
      compute_type(features) == ScalarType::Double ? class_statistics_of<double> : class_statistics_of<float>;
  return run(features, pixels, dense(prototypes), thresholds, rng_state, temperature, pixel_anchor, hardest_negative);
}

Tensor positive_sums(Tensor positive, Tensor labels, OptionalTensor pixel_weight, Tensor statistics,
                     int64_t ignore_index, bool negative_mean, bool nearest_exact) {
  const PixelTables pixels(positive, 1, labels, pixel_weight, statistics.size(1), ignore_index, nearest_exact);
  const auto run = statistics.scalar_type() == ScalarType::Double ? positive_sums_of<double> : positive_sums_of<float>;
  return run(dense(positive), pixels, dense(statistics), negative_mean);
}

Tensor reduce_loss(Tensor statistics, Tensor sums, OptionalTensor class_weight, double pixel_anchor_weight,
                   int64_t reduction) {
  statistics = dense(statistics);
  sums = dense(sums);
  if (class_weight) class_weight = dense(*class_weight);
  if (statistics.scalar_type() == ScalarType::Double) {
    return reduce_loss_of<double>(statistics, sums, class_weight ? data<double>(*class_weight) : nullptr,
                                  pixel_anchor_weight, reduction);
  }
  return reduce_loss_of<float>(statistics, sums, class_weight ? data<float>(*class_weight) : nullptr,
                               pixel_anchor_weight, reduction);
}

}  // namespace proac
