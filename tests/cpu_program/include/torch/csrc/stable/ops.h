// The operations on tensors that csrc/cpu asks of PyTorch, and its threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <thread>

#include "tensor.h"

namespace torch::stable {

// Sizes as they are given to new_empty: {2, 3}, or {pointer, count}.
struct Sizes {
  std::vector<int64_t> values;
  Sizes(std::initializer_list<int64_t> list) : values(list) {}
  Sizes(const int64_t* data, size_t count) : values(data, data + count) {}
};

inline Tensor make_dense(ScalarType type, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes[axis], 1);
  const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
  return Tensor(type, sizes, strides, count);
}

inline Tensor new_empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> type = std::nullopt) {
  return make_dense(type.value_or(like.scalar_type()), sizes.values);
}

// With the order of the axes in memory that `like` has, and no gaps.
inline Tensor empty_like(const Tensor& like) {
  std::vector<int64_t> order(like.dim()), strides(like.dim());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0; step *= std::max<int64_t>(like.size(order[i]), 1)) strides[order[i]] = step;
  return Tensor(like.scalar_type(), like.sizes(), strides, like.numel());
}

inline void copy_(const Tensor& to, const Tensor& from) {
  const int64_t bytes = to.element_size();
  std::vector<int64_t> index(to.dim());
  for (int64_t n = 0; n < to.numel(); ++n) {
    int64_t rest = n, at = 0, source = 0;
    for (int64_t axis = to.dim() - 1; axis >= 0; --axis) {
      at += rest % to.size(axis) * to.stride(axis);
      source += rest % to.size(axis) * from.stride(axis);
      rest /= to.size(axis);
    }
    std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + at * bytes,
                static_cast<const char*>(from.const_data_ptr()) + source * bytes, bytes);
  }
}

inline Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor result = make_dense(tensor.scalar_type(), tensor.sizes());
  copy_(result, tensor);
  return result;
}

inline int64_t get_num_threads() { return 2; }

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back([&body, i] { body(i, i + 1); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
