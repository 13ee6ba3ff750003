// What the launchers ask of the device at hand.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace proac::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess)
    return value;
  cudaGetLastError();  // else the next launch would report it once more
  return 0;
}
// The most dynamic shared memory that a block asks for; half of it fits twice on a multiprocessor, whose shared memory is the
// device's limit for a block and what the system takes for one.
constexpr int kSystemShared = 1024;
inline int shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kSystemShared; }

// How many blocks to launch for `wanted` pieces of work: each takes several where there are more than `most`, or than
// `each` for each multiprocessor. At least one, which writes the sums over nothing.
inline int64_t few_blocks(int64_t wanted, int64_t most, int64_t each = 8) {
  int64_t resident = each * static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount));
  if (resident > 0 && resident < most) most = resident;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace proac::cuda
