// Registration of the CUDA kernels: from tensors to the descriptions of arguments.h. The schemas stand in proac_cuda/stages/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

// The one thing asked of PyTorch's CUDA library. Weak, so that this library also loads, for its CPU kernels, where PyTorch has none.
#pragma weak aoti_torch_get_current_cuda_stream

namespace proac::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Double:
      return Type::float64;
    default:
      STD_TORCH_CHECK(false, "proac_cuda: features must be float16, bfloat16, float32 or float64");
  }
}

LabelType label_type_of(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return LabelType::uint8;
    case ScalarType::Short:
      return LabelType::int16;
    case ScalarType::Int:
      return LabelType::int32;
    case ScalarType::Long:
      return LabelType::int64;
    default:
      STD_TORCH_CHECK(false, "proac_cuda: labels must be uint8, int16, int32 or int64");
  }
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
OptionalTensor dense(const OptionalTensor& tensor) { return tensor ? OptionalTensor(dense(*tensor)) : tensor; }
const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
std::vector<int64_t> sizes(const Tensor& tensor, int64_t first = 0) {
  auto all = tensor.sizes();
  return {all.begin() + first, all.end()};
}
std::vector<int64_t> strides(const Tensor& tensor) {
  auto all = tensor.strides();
  return {all.begin(), all.end()};
}

// Whether the spatial axes collapse into one stride, so that a kernel can walk them; where there is nothing to walk, they do.
bool collapses(const Tensor& features) {
  if (features.numel() == 0) return true;
  int64_t expected = -1;
  for (int64_t axis = features.dim() - 1; axis >= 2; --axis) {
    if (features.size(axis) == 1) continue;
    if (expected >= 0 && features.stride(axis) != expected) return false;
    expected = features.stride(axis) * features.size(axis);
  }
  return true;
}

Features describe(const Tensor& features, void* data) {
  STD_TORCH_CHECK(features.dim() >= 3 && features.dim() <= 5,
                  "proac_cuda: features must be (B, D, *spatial) with 1 to 3 spatial axes");
  STD_TORCH_CHECK(collapses(features), "proac_cuda: the features' spatial axes do not collapse into one stride");
  return describe_features(data, type_of(features), static_cast<int>(features.dim() - 2), sizes(features).data(),
                           strides(features).data());
}

// `at` is a tensor at the features' resolution whose spatial axes begin at first_axis.
Pixels describe(const Tensor& at, int64_t first_axis, const Tensor& labels, const OptionalTensor& weight,
                int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
  auto spatial = sizes(at, first_axis);
  auto weight_strides = weight ? strides(*weight) : strides(labels);
  return describe_pixels(labels.const_data_ptr(), label_type_of(labels), data(weight), static_cast<int>(spatial.size()),
                         spatial.data(), sizes(labels).data(), strides(labels).data(), weight_strides.data(),
                         num_classes, ignore_index, nearest_exact);
}

Sampling describe(const OptionalTensor& thresholds, const OptionalTensor& rng_state) {
  if (!thresholds || !rng_state) return {nullptr, nullptr};
  return {static_cast<const int64_t*>(thresholds->const_data_ptr()),
          static_cast<const int64_t*>(rng_state->const_data_ptr())};
}

Tensor make(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "proac_cuda: a CUDA kernel could not be launched: ", cudaGetErrorName(error),
                  ", ", cudaGetErrorString(error));
}

// Makes the tensor's device current and finds PyTorch's stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  // The workspace comes from PyTorch's allocator, which gives it to nobody else before this stream's work is done.
  template <class Stage>
  void run(Stage& stage, const Tensor& like) const {
    Tensor workspace = make(like, {static_cast<int64_t>(workspace_bytes(stage)) + 1}, ScalarType::Byte);
    stage.workspace = workspace.mutable_data_ptr();
    check(proac::cuda::run(stage, stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

Tensor select_negatives(Tensor features, Tensor labels, OptionalTensor pixel_weight, Tensor rng_state,
                        int64_t num_negatives, int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
  Device device(features);
  Tensor rng = dense(rng_state), thresholds = make(rng_state, {num_classes, 2});
  SelectNegatives stage = {};
  stage.pixels = describe(features, 2, labels, pixel_weight, num_classes, ignore_index, nearest_exact);
  STD_TORCH_CHECK(stage.pixels.count <= int64_t(1) << 32,
                  "proac_cuda: sampled negatives are drawn from at most 2^32 pixels");
  stage.compute = type_of(features);
  stage.rng = static_cast<const int64_t*>(rng.const_data_ptr());
  stage.num_negatives = num_negatives;
  stage.thresholds = static_cast<int64_t*>(thresholds.mutable_data_ptr());
  device.run(stage, features);
  return thresholds;
}

// Stage (i): its arguments, and what it leaves.
struct Statistics {
  Statistics(Tensor features, Tensor labels, OptionalTensor pixel_weight, Tensor prototypes, OptionalTensor thresholds,
             OptionalTensor rng_state, double temperature, int64_t ignore_index, bool pixel_anchor,
             bool hardest_negative, bool nearest_exact)
      : anchors(dense(prototypes)),
        last(dense(thresholds)),
        rng(dense(rng_state)),
        statistics(make(prototypes, {kNumStatistics, prototypes.size(0)})),
        positive(make(prototypes, without_channels(features))),
        diagnostics(make(features, {4}, ScalarType::Long)) {
    stage.features = describe(features, const_cast<void*>(features.const_data_ptr()));
    stage.pixels = describe(features, 2, labels, pixel_weight, prototypes.size(0), ignore_index, nearest_exact);
    stage.sampling = describe(last, rng);
    stage.prototypes = anchors.const_data_ptr();
    stage.temperature = temperature;
    stage.pixel_anchor = pixel_anchor;
    stage.hardest_negative = hardest_negative;
    stage.statistics = statistics.mutable_data_ptr();
    stage.positive = positive.mutable_data_ptr();
    stage.diagnostics = static_cast<int64_t*>(diagnostics.mutable_data_ptr());
  }
  static std::vector<int64_t> without_channels(const Tensor& features) {
    std::vector<int64_t> shape = sizes(features, 1);
    shape[0] = features.size(0);
    return shape;
  }
  Tensor anchors;
  OptionalTensor last, rng;
  Tensor statistics, positive, diagnostics;
  ClassStatistics stage = {};
};

// Stage (ii), likewise.
struct Sums {
  Sums(Tensor positive, Tensor labels, OptionalTensor pixel_weight, Tensor statistics, int64_t ignore_index,
       bool negative_mean, bool nearest_exact)
      : own(dense(positive)), rows(dense(statistics)), sums(make(statistics, {2, statistics.size(1)})) {
    stage.pixels = describe(positive, 1, labels, pixel_weight, statistics.size(1), ignore_index, nearest_exact);
    stage.compute = type_of(statistics);
    stage.positive = own.const_data_ptr();
    stage.statistics = rows.const_data_ptr();
    stage.negative_mean = negative_mean;
    stage.sums = sums.mutable_data_ptr();
  }
  Tensor own, rows, sums;
  PositiveSums stage = {};
};

// The loss of both, likewise.
struct Loss {
  Loss(Tensor statistics, Tensor sums, OptionalTensor class_weight, double pixel_anchor_weight, int64_t reduction)
      : rows(dense(statistics)),
        both(dense(sums)),
        classes(dense(class_weight)),
        loss(make(statistics, reduction == kNone ? std::vector<int64_t>{statistics.size(1)} : std::vector<int64_t>{})),
        stage{type_of(statistics), statistics.size(1),  rows.const_data_ptr(),       both.const_data_ptr(),
              data(classes),       pixel_anchor_weight, static_cast<int>(reduction), loss.mutable_data_ptr()} {}
  Tensor rows, both;
  OptionalTensor classes;
  Tensor loss;
  ReduceLoss stage;
};

std::tuple<Tensor, Tensor, Tensor> class_statistics(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                                    Tensor prototypes, OptionalTensor thresholds,
                                                    OptionalTensor rng_state, double temperature, int64_t ignore_index,
                                                    bool pixel_anchor, bool hardest_negative, bool nearest_exact) {
  Device device(features);
  Statistics first(features, labels, pixel_weight, prototypes, thresholds, rng_state, temperature, ignore_index,
                   pixel_anchor, hardest_negative, nearest_exact);
  device.run(first.stage, features);
  return {first.statistics, first.positive, first.diagnostics};
}

Tensor positive_sums(Tensor positive, Tensor labels, OptionalTensor pixel_weight, Tensor statistics,
                     int64_t ignore_index, bool negative_mean, bool nearest_exact) {
  Device device(positive);
  Sums second(positive, labels, pixel_weight, statistics, ignore_index, negative_mean, nearest_exact);
  device.run(second.stage, positive);
  return second.sums;
}

Tensor reduce_loss(Tensor statistics, Tensor sums, OptionalTensor class_weight, double pixel_anchor_weight,
                   int64_t reduction) {
  Device device(statistics);
  Loss last(statistics, sums, class_weight, pixel_anchor_weight, reduction);
  check(run(last.stage, device.stream()));
  return last.loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                                        Tensor prototypes, OptionalTensor class_weight,
                                                        OptionalTensor thresholds, OptionalTensor rng_state,
                                                        double temperature, int64_t ignore_index, bool negative_mean,
                                                        double pixel_anchor_weight, int64_t reduction,
                                                        bool hardest_negative, bool nearest_exact) {
  Device device(features);
  Statistics first(features, labels, pixel_weight, prototypes, thresholds, rng_state, temperature, ignore_index,
                   pixel_anchor_weight > 0, hardest_negative, nearest_exact);
  Sums second(first.positive, labels, pixel_weight, first.statistics, ignore_index, negative_mean, nearest_exact);
  Loss last(first.statistics, second.sums, class_weight, pixel_anchor_weight, reduction);
  LossForward stages = {first.stage, second.stage, last.stage, nullptr};
  device.run(stages, features);
  return {last.loss, first.statistics, second.sums, first.diagnostics};
}

std::tuple<Tensor, Tensor> loss_gradients(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                          Tensor prototypes, OptionalTensor thresholds, OptionalTensor rng_state,
                                          Tensor statistics, Tensor sums, OptionalTensor class_weight, Tensor grad_loss,
                                          double temperature, int64_t ignore_index, bool negative_mean,
                                          double pixel_anchor_weight, int64_t reduction, bool features_need_grad,
                                          bool prototypes_need_grad, bool nearest_exact) {
  STD_TORCH_CHECK(grad_loss.scalar_type() == statistics.scalar_type(),
                  "proac_cuda: the gradient of the loss must have the loss's dtype");
  Device device(features);
  Tensor anchors = dense(prototypes), rows = dense(statistics), both = dense(sums);
  OptionalTensor last = dense(thresholds), rng = dense(rng_state), classes = dense(class_weight);
  Tensor wanted = features_need_grad ? torch::stable::empty_like(features) : make(features, {0}), gradient = wanted;
  if (features_need_grad && !collapses(wanted))
    gradient = make(features, sizes(features));  // features whose elements overlap, for one
  Tensor grad_prototypes = prototypes_need_grad ? make(prototypes, sizes(prototypes)) : make(prototypes, {0});
  LossGradients stage = {};
  stage.features = describe(features, const_cast<void*>(features.const_data_ptr()));
  stage.pixels = describe(features, 2, labels, pixel_weight, prototypes.size(0), ignore_index, nearest_exact);
  stage.sampling = describe(last, rng);
  stage.prototypes = anchors.const_data_ptr();
  stage.statistics = rows.const_data_ptr();
  stage.sums = both.const_data_ptr();
  stage.class_weight = data(classes);
  stage.grad_loss = grad_loss.const_data_ptr();
  stage.grad_loss_stride = grad_loss.dim() ? grad_loss.stride(0) : 0;
  stage.temperature = temperature;
  stage.negative_mean = negative_mean;
  stage.pixel_anchor_weight = pixel_anchor_weight;
  stage.reduction = static_cast<int>(reduction);
  if (features_need_grad) stage.grad_features = describe(gradient, gradient.mutable_data_ptr());
  if (prototypes_need_grad) stage.grad_prototypes = grad_prototypes.mutable_data_ptr();
  device.run(stage, features);
  if (features_need_grad && gradient.get() != wanted.get()) torch::stable::copy_(wanted, gradient);
  return {wanted, grad_prototypes};
}

}  // namespace
}  // namespace proac::cuda

STABLE_TORCH_LIBRARY_IMPL(proac_cuda, CUDA, m) {
  m.impl("select_negatives", TORCH_BOX(&proac::cuda::select_negatives));
  m.impl("class_statistics", TORCH_BOX(&proac::cuda::class_statistics));
  m.impl("positive_sums", TORCH_BOX(&proac::cuda::positive_sums));
  m.impl("reduce_loss", TORCH_BOX(&proac::cuda::reduce_loss));
  m.impl("loss_forward", TORCH_BOX(&proac::cuda::loss_forward));
  m.impl("loss_gradients", TORCH_BOX(&proac::cuda::loss_gradients));
}
