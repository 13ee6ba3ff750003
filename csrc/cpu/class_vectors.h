// The arithmetic of one number per class: how chunks merge, log Z, and the factors of the gradient. No kernel, no tensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace proac {

constexpr int64_t kReductionNone = 0, kReductionMean = 1;  // as proac_cuda/stages/__init__.py has them

// numerator / denominator, 0 where the denominator is 0.
inline double over(double numerator, double denominator) { return denominator == 0 ? 0 : numerator / denominator; }

// log(sum of exp) of `count` values that lie `stride` apart.
inline double log_sum_exp(const double* values, int64_t count, int64_t stride) {
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

// The statistics of all pixels from those of the chunks, (chunks, 6, K).
template <class T>
void merge_statistics(const StatisticsCall& call, int64_t chunks, T* out) {
  const int64_t classes = call.pixels.num_classes, size = kNumStatistics * classes;
  std::vector<double> merged(size);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < size; ++i) merged[i] += call.partial[c * size + i];
  }
  const bool sampled = call.sample.rank;
  double before = 0;  // weight of the classes before k
  std::vector<double> after(classes + 1);
  for (int64_t k = classes - 1; k >= 0; --k) after[k] = after[k + 1] + merged[kWeight * classes + k];
  for (int64_t k = 0; k < classes; ++k) {
    merged[kLogZ * classes + k] = log_sum_exp(call.partial + kLogZ * classes + k, chunks, size);
    // Not the total minus W_k, which would lose the small remainder where one class has almost everything.
    if (!sampled) merged[kNegativeWeight * classes + k] = before + after[k + 1];
    before += merged[kWeight * classes + k];
    double hardest = -std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < chunks; ++c) {
      const double value = call.partial[c * size + kHardest * classes + k];
      if (!(value <= hardest) && hardest == hardest) hardest = value;
    }
    merged[kHardest * classes + k] = hardest;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(merged[i]);
}

inline void merge_diagnostics(const std::vector<Diagnostics>& parts, int64_t* out) {
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

// Sum of c_k over the classes that are present.
template <class T>
double total_class_weight(const T* statistics, int64_t classes, const T* class_weight) {
  double total = 0;
  for (int64_t k = 0; k < classes; ++k) {
    if (statistics[kWeight * classes + k] > 0) total += class_weight ? class_weight[k] : 1;
  }
  return total;
}

// The factors of equations (8) to (10), which depend on the class alone.
template <class T>
struct GradientScales {
  std::vector<T> log_z, contrast, positive, negative;
  double pixel;

  // `stride` leads from the upstream gradient of a class to that of the next: 0 where the loss is one number.
  GradientScales(const T* statistics, const T* sums, int64_t classes, const T* class_weight, const T* grad,
                 int64_t stride, bool negative_mean, double pixel_anchor_weight, int64_t reduction)
      : log_z(classes),
        contrast(contrast_log_z(statistics, classes, negative_mean)),
        positive(classes),
        negative(classes) {
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

}  // namespace proac
