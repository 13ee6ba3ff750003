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

// How the tile unit is used. 16-bit features gain by it always; the digits of float32 ones cost more than they save
// where a product is small, and their sums could overflow where it is enormous.
inline TileUse tile_use(const Kernels& kernels, const Tensor& features, int64_t classes, bool sampled,
                        bool anchor_gradient) {
  const FeatureType type = feature_type(features);
  const int64_t channels = features.size(1);
  const bool digits_pay = std::min(classes, channels) >= 64 && std::max(classes, channels) <= 40000;
  const int parts = type == kBFloat16 ? 1 : type == kHalf ? 2 : type == kFloat && digits_pay ? 3 : 0;
  // Gathering members of sampled sets and the prototypes' gradient take floats.
  return {kernels.has_tile_unit ? parts : 0, kernels.has_tile_unit && parts == 1 && !sampled && !anchor_gradient};
}

template <class T>
Workspaces make_workspaces(const ChunkPlan& plan, const Kernels& kernels, const Anchors<T>& anchors, bool sampled,
                           bool anchor_gradient) {
  return Workspaces(num_workers(plan), {anchors.classes, anchors.channels, sizeof(T), kernels.vector_bytes, sampled,
                                        anchor_gradient, anchors.tile_use});
}

}  // namespace proac
