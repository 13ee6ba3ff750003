// From tensors to the views that kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "kernels.h"

namespace proac {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline FeatureType feature_type(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, "proac_cuda: features must be float16, bfloat16, float32 or float64");
  }
}

inline ScalarType compute_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline LabelType label_type(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return kUInt8;
    case ScalarType::Short:
      return kInt16;
    case ScalarType::Int:
      return kInt32;
    case ScalarType::Long:
      return kInt64;
    default:
      STD_TORCH_CHECK(false, "proac_cuda: labels must be uint8, int16, int32 or int64");
  }
}

inline void check_shape(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() >= 3 && features.dim() <= 2 + kMaxAxes,
                  "proac_cuda: features must be (B, D, *spatial) with 1 to 3 spatial axes");
}

// Pixels of one image.
inline int64_t pixels_per_image(const Tensor& features, int64_t first_axis) {
  int64_t pixels = 1;
  for (int64_t axis = first_axis; axis < features.dim(); ++axis) pixels *= features.size(axis);
  return pixels;
}

// The view of (B, D, *spatial) features, if their spatial axes collapse into one stride. Strides of axes of size 1, and of
// tensors without elements, mean nothing.
inline bool view_features(const Tensor& features, FeatureView* view) {
  view->channels = features.size(1);
  view->channel_stride = features.size(1) == 1 ? 1 : features.stride(1);
  view->batch_stride = features.stride(0);
  view->pixels = pixels_per_image(features, 2);
  view->pixel_stride = 1;
  if (view->pixels == 0 || features.size(0) == 0) return true;
  int64_t expected = -1;
  for (int64_t axis = features.dim() - 1; axis >= 2; --axis) {
    if (features.size(axis) == 1) continue;
    if (expected < 0) {
      view->pixel_stride = features.stride(axis);
    } else if (features.stride(axis) != expected) {
      return false;
    }
    expected = features.stride(axis) * features.size(axis);
  }
  const int64_t batch = features.size(0);
  if (view->pixels == 1) {  // (N, D) in disguise
    view->pixels = batch;
    view->pixel_stride = batch == 1 ? 1 : view->batch_stride;
  } else if (batch == 1 || view->batch_stride == view->pixels * view->pixel_stride) {
    view->pixels *= batch;  // one long image
  }
  return true;
}

// Where each index of a feature axis of size `size` reads a label axis, in elements: the rule of interpolate's mode
// "nearest", or "nearest-exact".
inline std::vector<int64_t> nearest_offsets(int64_t label_size, int64_t size, int64_t stride, bool nearest_exact) {
  std::vector<int64_t> offsets(size);
  const float scale = static_cast<float>(label_size) / static_cast<float>(size), shift = nearest_exact ? 0.5f : 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    int64_t index = i;
    if (label_size != size) index = static_cast<int64_t>(std::floor((static_cast<float>(i) + shift) * scale));
    offsets[i] = std::min(index, label_size - 1) * stride;
  }
  return offsets;
}

// A PixelView and the tables that it points to.
struct PixelTables {
  PixelView view;
  std::vector<int64_t> offsets[2][kMaxAxes];  // of labels, of weights

  // `first_axis` is the first spatial axis of `grid`: 2 for features, 1 for a tensor of pixels.
  PixelTables(const Tensor& grid, int64_t first_axis, const Tensor& labels, const OptionalTensor& weights,
              int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
    const int64_t axes = grid.dim() - first_axis;
    STD_TORCH_CHECK(axes >= 1 && axes <= kMaxAxes, "proac_cuda: expected 1 to 3 spatial axes");
    STD_TORCH_CHECK(labels.dim() == axes + 1 && labels.size(0) == grid.size(0),
                    "proac_cuda: labels must be (B, *spatial) with the features' B and number of spatial axes");
    for (int64_t a = 0; a < kMaxAxes; ++a) {
      const int64_t axis = a - (kMaxAxes - axes);
      view.size[a] = axis < 0 ? 1 : grid.size(first_axis + axis);
    }
    view.pixels = pixels_per_image(grid, first_axis);
    view.total = grid.size(0) * view.pixels;
    view.label_type = label_type(labels);
    view.num_classes = num_classes;
    view.ignore_index = ignore_index;
    view.labels = make(labels, axes, nearest_exact, offsets[0]);
    view.weights = {nullptr, 0, {nullptr, nullptr, nullptr}};
    if (weights) {
      STD_TORCH_CHECK(weights->dim() == axes + 1 && weights->size(0) == grid.size(0),
                      "proac_cuda: pixel_weight must have the shape of labels");
      view.weights = make(*weights, axes, nearest_exact, offsets[1]);
    }
  }
  PixelTables(const PixelTables&) = delete;
  PixelTables& operator=(const PixelTables&) = delete;

 private:
  NearestView make(const Tensor& values, int64_t axes, bool nearest_exact,
                   std::vector<int64_t> (&tables)[kMaxAxes]) const {
    NearestView result{values.const_data_ptr(), values.stride(0), {nullptr, nullptr, nullptr}};
    bool dense = true;
    int64_t expected = 1;
    for (int64_t a = kMaxAxes - 1; a >= kMaxAxes - axes; --a) {
      const int64_t axis = a - (kMaxAxes - axes) + 1, size = values.size(axis);
      STD_TORCH_CHECK(size > 0 || view.total == 0, "proac_cuda: an axis of labels or pixel_weight is empty");
      dense = dense && size == view.size[a] && (size == 1 || values.stride(axis) == expected);
      expected *= size;
    }
    if (dense || view.total == 0) return result;
    for (int64_t a = 0; a < kMaxAxes; ++a) {
      const int64_t axis = a - (kMaxAxes - axes) + 1;
      tables[a] = axis < 1 ? std::vector<int64_t>{0}
                           : nearest_offsets(values.size(axis), view.size[a], values.stride(axis), nearest_exact);
      result.offset[a] = tables[a].data();
    }
    return result;
  }
};

}  // namespace proac
