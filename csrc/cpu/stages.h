// The five stages on CPU tensors; schemas and shapes stand in proac_cuda/stages/ops.py.
#pragma once

#include <tuple>

#include "views.h"

namespace proac {

Tensor select_negatives(Tensor features, Tensor labels, OptionalTensor pixel_weight, Tensor rng_state,
                        int64_t num_negatives, int64_t num_classes, int64_t ignore_index, bool nearest_exact);

std::tuple<Tensor, Tensor, Tensor> class_statistics(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                                    Tensor prototypes, OptionalTensor thresholds,
                                                    OptionalTensor rng_state, double temperature, int64_t ignore_index,
                                                    bool pixel_anchor, bool hardest_negative, bool nearest_exact);

Tensor positive_sums(Tensor positive, Tensor labels, OptionalTensor pixel_weight, Tensor statistics,
                     int64_t ignore_index, bool negative_mean, bool nearest_exact);

Tensor reduce_loss(Tensor statistics, Tensor sums, OptionalTensor class_weight, double pixel_anchor_weight,
                   int64_t reduction);

std::tuple<Tensor, Tensor> loss_gradients(Tensor features, Tensor labels, OptionalTensor pixel_weight,
                                          Tensor prototypes, OptionalTensor thresholds, OptionalTensor rng_state,
                                          Tensor statistics, Tensor sums, OptionalTensor class_weight, Tensor grad_loss,
                                          double temperature, int64_t ignore_index, bool negative_mean,
                                          double pixel_anchor_weight, int64_t reduction, bool features_need_grad,
                                          bool prototypes_need_grad, bool nearest_exact);

}  // namespace proac
