// What the stages share as they unpack their arguments into a call of the kernels.
#pragma once

#include "anchors.h"
#include "dispatch.h"
#include "parallel.h"
#include "views.h"

namespace proac {

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Into how many bfloat16 numbers the tile unit splits a feature; 0: it is not used.
inline int pixel_parts(const Kernels& kernels, const Tensor& features) {
  const FeatureType type = feature_type(features);
  return !kernels.has_tile_unit ? 0 : type == kBFloat16 ? 1 : type == kHalf ? 2 : 0;
}

template <class T>
Workspaces make_workspaces(const ChunkPlan& plan, const Kernels& kernels, const Anchors<T>& anchors, bool sampled,
                           bool anchor_gradient) {
  return Workspaces(num_workers(plan), {anchors.classes, anchors.channels, sizeof(T), kernels.vector_bytes, sampled,
                                        anchor_gradient, anchors.pixel_parts > 0});
}

}  // namespace proac
