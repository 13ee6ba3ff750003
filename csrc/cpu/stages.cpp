// Stages (i), (ii), (iii) and the reduction on CPU tensors: unpack the arguments, run the kernels over chunks, merge.
#include "stages.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "anchors.h"
#include "dispatch.h"
#include "parallel.h"

namespace proac {

namespace {

constexpr int64_t kReductionNone = 0, kReductionMean = 1;  // as proac_cuda/stages.py has them

// Gradients of this size do not stay in the caches anyway.
constexpr size_t kStreamBytes = size_t(16) << 20;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// numerator / denominator, 0 where the denominator is 0.
double over(double numerator, double denominator) { return denominator == 0 ? 0 : numerator / denominator; }

// log(sum of exp) of `count` values that lie `stride` apart.
double log_sum_exp(const double* values, int64_t count, int64_t stride) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, values[i * stride]);
  if (top == -std::numeric_limits<double>::infinity()) {
    for (int64_t i = 0; i < count; ++i) sum += values[i * stride];  // -inf, or a NaN
    return count ? sum : top;
  }
  for (int64_t i = 0; i < count; ++i) sum += std::exp(values[i * stride] - top);
  return top + std::log(sum);
}

// The log Z_k of equations (4) and (7), from the rows of `statistics`.
template <class T>
std::vector<T> contrast_log_z(const T* statistics, int64_t classes, bool negative_mean) {
  std::vector<T> log_z(statistics + kLogZ * classes, statistics + (kLogZ + 1) * classes);
  for (int64_t k = 0; k < classes && negative_mean; ++k) {
    const double weight = statistics[kNegativeWeight * classes + k];
    if (weight > 0) log_z[k] = static_cast<T>(log_z[k] - std::log(weight));
  }
  return log_z;
}

// Into how many bfloat16 numbers the tile unit splits a feature; 0: it is not used.
int pixel_parts(const Kernels& kernels, const Tensor& features) {
  const FeatureType type = feature_type(features);
  return !kernels.has_tile_unit ? 0 : type == kBFloat16 ? 1 : type == kHalf ? 2 : 0;
}

template <class T>
Workspaces make_workspaces(const ChunkPlan& plan, const Kernels& kernels, const Anchors<T>& anchors, bool sampled,
                           bool anchor_gradient) {
  return Workspaces(num_workers(plan), {anchors.classes, anchors.channels, sizeof(T), kernels.vector_bytes, sampled,
                                        anchor_gradient, anchors.pixel_parts > 0});
}

template <class T>
void merge_statistics(const StatisticsCall& call, const ChunkPlan& plan, T* out) {
  const int64_t classes = call.pixels.num_classes, size = kNumStatistics * classes;
  std::vector<double> merged(size);
  for (int64_t c = 0; c < plan.count; ++c) {
    for (int64_t i = 0; i < size; ++i) merged[i] += call.partial[c * size + i];
  }
  const bool sampled = call.sample.rank;
  double before = 0;  // weight of the classes before k
  std::vector<double> after(classes + 1);
  for (int64_t k = classes - 1; k >= 0; --k) after[k] = after[k + 1] + merged[kWeight * classes + k];
  for (int64_t k = 0; k < classes; ++k) {
    merged[kLogZ * classes + k] = log_sum_exp(call.partial + kLogZ * classes + k, plan.count, size);
    // Not the total minus W_k, which would lose the small remainder where one class has almost everything.
    if (!sampled) merged[kNegativeWeight * classes + k] = before + after[k + 1];
    before += merged[kWeight * classes + k];
    double hardest = -std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < plan.count; ++c) {
      const double value = call.partial[c * size + kHardest * classes + k];
      if (!(value <= hardest) && hardest == hardest) hardest = value;
    }
    merged[kHardest * classes + k] = hardest;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(merged[i]);
}

void merge_diagnostics(const std::vector<Diagnostics>& parts, int64_t* out) {
  Diagnostics all{0, 0, 0, 0};
  for (const Diagnostics& part : parts) {
    if (all.bad_labels == 0) all.first_label = part.first_label;
    if (all.bad_weights == 0) all.first_weight = part.first_weight;
    all.bad_labels += part.bad_labels;
    all.bad_weights += part.bad_weights;
  }
  out[0] = all.bad_labels;
  out[1] = all.first_label;
  out[2] = all.bad_weights;
  std::memcpy(out + 3, &all.first_weight, sizeof(double));
}

// Fresh memory of many megabytes costs more in page faults than in anything else: ask for huge pages, where the system
// gives them on request. PROAC_HUGE_PAGES=0 switches that off. Returns whether they were promised.
bool advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  const char* wish = std::getenv("PROAC_HUGE_PAGES");
  if (end < begin + 2 * page || (wish && std::strcmp(wish, "0") == 0)) return false;
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;  // only a hint
#else
  (void)memory, (void)bytes;
  return false;
#endif
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> class_statistics_of(const Tensor& features, const PixelTables& pixels,
                                                       const Tensor& prototypes, const OptionalTensor& thresholds,
                                                       const OptionalTensor& rng_state, double temperature,
                                                       bool pixel_anchor, bool hardest_negative) {
  const Kernels& kernels = cpu_kernels();
  const int64_t classes = pixels.view.num_classes, channels = features.size(1);
  const ChunkPlan plan(pixels.view.total);
  const Anchors<T> anchors(data<T>(prototypes), classes, channels, thresholds.has_value(),
                           pixel_parts(kernels, features));

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
  if (thresholds) {
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
  merge_statistics<T>(call, plan, static_cast<T*>(statistics.mutable_data_ptr()));
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

// Sum of c_k over the classes that are present.
template <class T>
double total_class_weight(const T* statistics, int64_t classes, const T* class_weight) {
  double total = 0;
  for (int64_t k = 0; k < classes; ++k) {
    if (statistics[kWeight * classes + k] > 0) total += class_weight ? class_weight[k] : 1;
  }
  return total;
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

// The factors of equations (8) to (10), which depend on the class alone.
template <class T>
struct GradientScales {
  std::vector<T> log_z, contrast, positive, negative;
  double pixel;

  GradientScales(const Tensor& statistics_tensor, const Tensor& sums_tensor, const T* class_weight,
                 const Tensor& grad_loss, bool negative_mean, double pixel_anchor_weight, int64_t reduction)
      : log_z(statistics_tensor.size(1)),
        contrast(contrast_log_z(data<T>(statistics_tensor), statistics_tensor.size(1), negative_mean)),
        positive(log_z.size()),
        negative(log_z.size()) {
    const T *statistics = data<T>(statistics_tensor), *sums = data<T>(sums_tensor), *grad = data<T>(grad_loss);
    const int64_t classes = statistics_tensor.size(1), stride = grad_loss.dim() == 0 ? 0 : grad_loss.stride(0);
    const double total = total_class_weight(statistics, classes, class_weight);
    double all_weight = 0;
    for (int64_t k = 0; k < classes; ++k) {
      const double weight = statistics[kWeight * classes + k];
      double upstream = grad[k * stride] * (weight > 0 ? 1.0 : 0.0);  // A_k
      if (class_weight) upstream *= class_weight[k];
      if (reduction == kReductionMean) upstream = over(upstream, total);
      const double scale = over(upstream, weight);
      positive[k] = static_cast<T>(scale);
      negative[k] = static_cast<T>(scale * sums[classes + k]);
      // An empty N_k has log Z = -inf. No exponential of the class is ever used: any finite value does.
      const T value = statistics[kLogZ * classes + k];
      log_z[k] = value == -std::numeric_limits<T>::infinity() ? T(0) : value;
      all_weight += weight;
    }
    pixel = pixel_anchor_weight * over(pixel_anchor_weight != 0 ? grad[0] : 0, all_weight);
  }
};

// Equation (11) with the roles exchanged, from the chunks' sums (chunks, D, K padded).
template <class T>
Tensor prototype_gradient(const Tensor& prototypes, const Anchors<T>& anchors, const std::vector<double>& partial,
                          int64_t chunks, double temperature) {
  const int64_t classes = anchors.classes, channels = anchors.channels;
  const int64_t padded = (classes + kClassPad - 1) / kClassPad * kClassPad;
  Tensor gradient = torch::stable::new_empty(prototypes, {classes, channels});
  T* out = static_cast<T*>(gradient.mutable_data_ptr());
  std::vector<double> g(channels);
  for (int64_t k = 0; k < classes; ++k) {
    const double* unit = anchors.unit.data() + k * channels;
    double along = 0;
    for (int64_t d = 0; d < channels; ++d) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[(c * channels + d) * padded + k];
      g[d] = sum / temperature;
      along += g[d] * unit[d];
    }
    for (int64_t d = 0; d < channels; ++d) {
      const double value = (g[d] - along * unit[d]) / anchors.norm[k];
      out[k * channels + d] = anchors.norm[k] <= kEps ? T(0) : static_cast<T>(value);
    }
  }
  return gradient;
}

struct GradientOptions {
  double temperature;
  bool negative_mean;
  double pixel_anchor_weight;
  int64_t reduction;
  bool features_need_grad, prototypes_need_grad;
};

template <class T>
std::tuple<Tensor, Tensor> loss_gradients_of(const Tensor& features, const PixelTables& pixels,
                                             const Tensor& prototypes, const OptionalTensor& thresholds,
                                             const OptionalTensor& rng_state, const GradientScales<T>& scales,
                                             const GradientOptions& options) {
  const Kernels& kernels = cpu_kernels();
  const int64_t classes = pixels.view.num_classes, channels = features.size(1);
  const int64_t padded = (classes + kClassPad - 1) / kClassPad * kClassPad;
  const ChunkPlan plan(pixels.view.total, options.prototypes_need_grad ? 32 : 64);  // half as many, of doubles
  const Anchors<T> anchors(data<T>(prototypes), classes, channels, thresholds.has_value(),
                           pixel_parts(kernels, features));

  GradientCall call{};
  STD_TORCH_CHECK(view_features(features, &call.features), "proac_cuda: the features' spatial axes do not collapse");
  call.features.data = const_cast<void*>(features.const_data_ptr());
  Tensor gradient, wanted;
  if (options.features_need_grad) {
    gradient = wanted = torch::stable::empty_like(features);
    if (!view_features(gradient, &call.gradient)) {  // features whose elements overlap, for one
      std::vector<int64_t> shape(features.sizes().begin(), features.sizes().end());
      gradient = torch::stable::new_empty(features, {shape.data(), shape.size()});
      view_features(gradient, &call.gradient);
    }
    call.gradient.data = gradient.mutable_data_ptr();
    const size_t bytes = gradient.numel() * gradient.element_size();
    // Small pages are cleared one by one just before they are written: that is done in the cache.
    call.stream = advise_huge_pages(call.gradient.data, bytes) && bytes >= kStreamBytes;
  } else {
    wanted = torch::stable::new_empty(features, {int64_t(0)});
  }
  call.pixels = pixels.view;
  std::optional<Thresholds<T>> sorted;
  if (thresholds) {
    sorted.emplace(data<int64_t>(dense(*thresholds)), classes);
    call.sample = sorted->view(data<int64_t>(dense(*rng_state)));
  }
  call.anchors = anchors.view();
  call.temperature = options.temperature;
  call.log_z = scales.log_z.data();
  call.contrast = scales.contrast.data();
  call.positive_scale = scales.positive.data();
  call.negative_scale = scales.negative.data();
  call.pixel_scale = scales.pixel;
  call.pixel_anchor = options.pixel_anchor_weight != 0;
  std::vector<double> anchor_gradient(options.prototypes_need_grad ? plan.count * channels * padded : 0);
  call.anchor_gradient = options.prototypes_need_grad ? anchor_gradient.data() : nullptr;

  if (options.features_need_grad || options.prototypes_need_grad) {
    const Workspaces work =
        make_workspaces(plan, kernels, anchors, thresholds.has_value(), options.prototypes_need_grad);
    const auto kernel = kernels.loss_gradients[feature_type(features)];
    for_each_chunk(plan, [&](int64_t chunk, Range range, int64_t worker) { kernel(call, range, chunk, work[worker]); });
  }
  if (options.features_need_grad && gradient.get() != wanted.get()) torch::stable::copy_(wanted, gradient);
  if (!options.prototypes_need_grad) return {wanted, torch::stable::new_empty(prototypes, {int64_t(0)})};
  return {wanted, prototype_gradient<T>(prototypes, anchors, anchor_gradient, plan.count, options.temperature)};
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

std::tuple<Tensor, Tensor> loss_gradients(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                          Tensor prototypes, OptionalTensor thresholds, OptionalTensor rng_state,
                                          Tensor statistics, Tensor sums, OptionalTensor class_weight, Tensor grad_loss,
                                          double temperature, int64_t ignore_index, bool negative_mean,
                                          double pixel_anchor_weight, int64_t reduction, bool features_need_grad,
                                          bool prototypes_need_grad, bool nearest_exact) {
  check_shape(features);
  STD_TORCH_CHECK(grad_loss.scalar_type() == statistics.scalar_type(),
                  "proac_cuda: the gradient of the loss must have the loss's dtype");
  const PixelTables pixels(features, 2, labels, pixel_weight, prototypes.size(0), ignore_index, nearest_exact);
  const GradientOptions options{temperature, negative_mean,      pixel_anchor_weight,
                                reduction,   features_need_grad, prototypes_need_grad};
  statistics = dense(statistics);
  sums = dense(sums);
  prototypes = dense(prototypes);
  if (class_weight) class_weight = dense(*class_weight);
  const auto run = [&]<class T>(T) {
    const GradientScales<T> scales(statistics, sums, class_weight ? data<T>(*class_weight) : nullptr, grad_loss,
                                   negative_mean, pixel_anchor_weight, reduction);
    return loss_gradients_of<T>(features, pixels, prototypes, thresholds, rng_state, scales, options);
  };
  return compute_type(features) == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace proac
