// Answers calls of the five stages, one after the other, on standard input and output: a call is its number of bytes, the stage's
// number, then its arguments, each behind a letter; the answer is the number of tensors, or -1 and a message, then the tensors. `stages.py` is
// the other end. All numbers are 8 bytes, in the order of bytes that both ends have.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/stages.h"

namespace {

using namespace proac;

std::vector<char> call_bytes;
size_t taken;

void take_bytes(void* to, size_t count) {
  STD_TORCH_CHECK(taken + count <= call_bytes.size(), "the call has fewer arguments than its stage");
  std::memcpy(to, call_bytes.data() + taken, count);
  taken += count;
}
template <class T>
T take() {
  T value;
  take_bytes(&value, sizeof value);
  return value;
}
template <class T>
void give(T value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

void expect(char letter) {
  const auto found = static_cast<char>(take<int64_t>());
  STD_TORCH_CHECK(found == letter, "expected an argument of kind ", letter, ", got ", found);
}

Tensor take_tensor() {
  const auto type = static_cast<ScalarType>(take<int64_t>());
  const int64_t axes = take<int64_t>();
  std::vector<int64_t> sizes, strides;
  for (int64_t a = 0; a < axes; ++a) sizes.push_back(take<int64_t>());
  for (int64_t a = 0; a < axes; ++a) strides.push_back(take<int64_t>());
  const int64_t elements = take<int64_t>();
  Tensor tensor(type, sizes, strides, elements);
  take_bytes(tensor.mutable_data_ptr(), elements * tensor.element_size());
  return tensor;
}

void give_tensor(const Tensor& tensor) {
  int64_t last = tensor.numel() ? 1 : 0;
  for (int64_t a = 0; a < tensor.dim() && last; ++a) last += (tensor.size(a) - 1) * tensor.stride(a);
  give(static_cast<int64_t>(tensor.scalar_type()));
  give(tensor.dim());
  for (const int64_t size : tensor.sizes()) give(size);
  for (const int64_t stride : tensor.strides()) give(stride);
  give(last);
  std::fwrite(tensor.const_data_ptr(), tensor.element_size(), last, stdout);
}

// An argument of the kind that a stage's signature names.
template <class T>
T argument() {
  if constexpr (std::is_same_v<T, OptionalTensor>) {
    const auto letter = static_cast<char>(take<int64_t>());
    return letter == 'N' ? OptionalTensor() : OptionalTensor(take_tensor());
  } else if constexpr (std::is_same_v<T, Tensor>) {
    return expect('T'), take_tensor();
  } else if constexpr (std::is_same_v<T, bool>) {
    return expect('b'), take<int64_t>() != 0;
  } else {
    return expect(std::is_same_v<T, double> ? 'd' : 'i'), take<T>();
  }
}

template <class Result, class... Parameters>
Result call(Result (*stage)(Parameters...)) {
  std::tuple<Parameters...> arguments{argument<Parameters>()...};  // in their order, as braces have it
  return std::apply(stage, std::move(arguments));
}

void answer(const Tensor& tensor) {
  give(int64_t(1));
  give_tensor(tensor);
}
template <class... Tensors>
void answer(const std::tuple<Tensors...>& tensors) {
  give(static_cast<int64_t>(sizeof...(Tensors)));
  std::apply([](const auto&... each) { (give_tensor(each), ...); }, tensors);
}

void serve() {
  const auto stage = take<int64_t>();
  if (stage == 0) return answer(call(select_negatives));
  if (stage == 1) return answer(call(class_statistics));
  if (stage == 2) return answer(call(positive_sums));
  if (stage == 3) return answer(call(reduce_loss));
  if (stage == 4) return answer(call(loss_gradients));
  STD_TORCH_CHECK(false, "there is no stage ", stage);
}

}  // namespace

int main() {
  std::fprintf(stderr, "%s\n", cpu_kernels().name);
  for (int64_t bytes; std::fread(&bytes, sizeof bytes, 1, stdin) == 1;) {
    call_bytes.resize(bytes);
    taken = 0;
    if (std::fread(call_bytes.data(), 1, bytes, stdin) != static_cast<size_t>(bytes)) return 1;
    try {
      serve();
    } catch (const std::exception& error) {
      const std::string text = error.what();
      give(int64_t(-1));
      give(static_cast<int64_t>(text.size()));
      std::fwrite(text.data(), 1, text.size(), stdout);
    }
    std::fflush(stdout);
  }
}
