// The host side of a CUDA operator: PyTorch's current stream, and the tensor's device made current.
// For *_cuda.cpp files, which torch compiles and links without CUDA's C++ API (c10/cuda) in sight.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

// PyTorch built without CUDA does not export it; the library must load there all the same
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace lmengine::cuda {

inline cudaStream_t current_stream(int32_t device_index) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("lmengine: this PyTorch is built without CUDA");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("lmengine: PyTorch gives no CUDA stream for device " +
                             std::to_string(device_index));
  }
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_index) {
    if (cudaGetDevice(&previous_) != cudaSuccess || cudaSetDevice(device_index) != cudaSuccess) {
      throw std::runtime_error("lmengine: cannot use CUDA device " + std::to_string(device_index) +
                               ": " + cudaGetErrorString(cudaGetLastError()));
    }
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace lmengine::cuda
