// A stand-in for PyTorch's stable tensor, as far as csrc/cpu asks for it: dense memory with sizes and strides.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace torch::headeronly {
enum class ScalarType { Byte, Short, Int, Long, Half, Float, Double, BFloat16 };
}

namespace torch::stable {

using torch::headeronly::ScalarType;

inline int64_t bytes_of(ScalarType type) {
  constexpr int64_t bytes[] = {1, 2, 4, 8, 2, 4, 8, 2};
  return bytes[static_cast<int>(type)];
}

class Tensor {
 public:
  Tensor() = default;
  // Its memory holds `elements` numbers from the first one on; PyTorch's is aligned to 64 bytes too.
  Tensor(ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t elements)
      : type_(type), sizes_(std::move(sizes)), strides_(std::move(strides)) {
    const int64_t bytes = (elements * bytes_of(type) + 64) / 64 * 64;
    memory_ = std::shared_ptr<void>(std::aligned_alloc(64, bytes), std::free);
  }

  ScalarType scalar_type() const { return type_; }
  int64_t element_size() const { return bytes_of(type_); }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis]; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t axis = dim() - 1; axis >= 0; --axis) {
      if (sizes_[axis] != 1 && strides_[axis] != expected) return numel() == 0;
      expected *= sizes_[axis];
    }
    return true;
  }
  const void* const_data_ptr() const { return memory_.get(); }
  void* mutable_data_ptr() const { return memory_.get(); }
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(memory_.get());
  }
  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(memory_.get());
  }
  const void* get() const { return memory_.get(); }  // tells tensors apart

 private:
  ScalarType type_ = ScalarType::Float;
  std::vector<int64_t> sizes_, strides_;
  std::shared_ptr<void> memory_;
};

template <class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace torch::stable

#define STD_TORCH_CHECK(condition, ...)                  \
  do {                                                   \
    if (!(condition)) torch::stable::raise(__VA_ARGS__); \
  } while (false)
