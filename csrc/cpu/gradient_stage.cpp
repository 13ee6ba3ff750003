// Stage (iii) on CPU tensors: unpack the arguments, run the kernel over chunks, add up the prototypes' gradient.
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "class_vectors.h"
#include "stage_call.h"
#include "stages.h"

namespace proac {

namespace {

// Gradients of this size do not stay in the caches anyway.
constexpr size_t kStreamBytes = size_t(16) << 20;

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
                           tile_use(kernels, features, classes, thresholds.has_value(), options.prototypes_need_grad));

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
  if (thresholds && rng_state) {
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
    const GradientScales<T> scales(data<T>(statistics), data<T>(sums), statistics.size(1),
                                   class_weight ? data<T>(*class_weight) : nullptr, data<T>(grad_loss),
                                   grad_loss.dim() == 0 ? 0 : grad_loss.stride(0), negative_mean, pixel_anchor_weight,
                                   reduction);
    return loss_gradients_of<T>(features, pixels, prototypes, thresholds, rng_state, scales, options);
  };
  return compute_type(features) == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace proac
