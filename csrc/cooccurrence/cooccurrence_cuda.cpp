// The operator cooccurrence for CUDA tensors: checks, memory from PyTorch, the bands one after the
// other.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cooccurrence/cooccurrence_checks.h"
#include "cooccurrence/cooccurrence_cuda.h"
#include "support/stream.h"

namespace lmengine {
namespace {

using Entries = std::tuple<Tensor, Tensor, Tensor>;

Entries new_entries(const Tensor& tokens, int64_t count) {
  return {torch::stable::new_empty(tokens, {count}), torch::stable::new_empty(tokens, {count}),
          torch::stable::new_empty(tokens, {count}, ScalarType::Float)};
}

// The bands' entries behind one another; each band is released once it is copied.
Entries joined(const Tensor& tokens, std::vector<Entries>& parts) {
  if (parts.size() == 1) return parts[0];
  int64_t total = 0;
  for (const Entries& part : parts) total += std::get<0>(part).numel();
  Entries all = new_entries(tokens, total);
  int64_t first = 0;
  const auto append = [&](Tensor& to, const Tensor& from) {
    Tensor place = torch::stable::narrow(to, 0, first, from.numel());
    torch::stable::copy_(place, from);
  };
  for (Entries& part : parts) {
    append(std::get<0>(all), std::get<0>(part));
    append(std::get<1>(all), std::get<1>(part));
    append(std::get<2>(all), std::get<2>(part));
    first += std::get<0>(part).numel();
    part = Entries(new_entries(tokens, 0));
  }
  return all;
}

Entries cooccurrence(const Tensor& tokens, int64_t vocabulary_size, int64_t window_size,
                     bool symmetric, bool distance_weighting) {
  check_cooccurrence(tokens, vocabulary_size, window_size);
  const cuda::DeviceGuard guard(tokens.get_device_index());
  const DistanceUnits distances(window_size, distance_weighting);
  const auto allocate = [&](size_t bytes) {
    auto tensor = std::make_shared<Tensor>(
        torch::stable::new_empty(tokens, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return GpuMemory(tensor, tensor->mutable_data_ptr());
  };
  CooccurrenceCounter counter(
      {static_cast<const int32_t*>(tokens.const_data_ptr()), tokens.numel(), vocabulary_size,
       window_size, symmetric, distances.units.data(), distances.scale},
      allocate, cuda::current_stream(tokens.get_device_index()));
  std::vector<Entries> parts;
  for (int64_t band = 0; band < counter.bands(); ++band) {
    parts.push_back(new_entries(tokens, counter.count(band)));
    auto& [rows, columns, values] = parts.back();
    counter.write(static_cast<int32_t*>(rows.mutable_data_ptr()),
                  static_cast<int32_t*>(columns.mutable_data_ptr()),
                  static_cast<float*>(values.mutable_data_ptr()));
  }
  return joined(tokens, parts);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CUDA, m) { m.impl("cooccurrence", TORCH_BOX(&cooccurrence)); }

}  // namespace lmengine
