// Checks of glove_epoch's arguments that the CPU and the CUDA operator share.
#pragma once

#include "embedding/embedding.h"
#include "support/checks.h"

namespace lmengine {

inline std::string bad_index(const char* name, int64_t index, int64_t entry, int64_t size) {
  return std::string(name) + ": expected 0 to " + std::to_string(size - 1) + ", got " +
         std::to_string(index) + " at entry " + std::to_string(entry);
}

inline std::string bad_value(float value, int64_t entry) {
  char number[32];
  std::snprintf(number, sizeof number, "%g", value);
  return std::string("values: expected finite numbers above 0, got ") + number + " at entry " +
         std::to_string(entry);
}

inline std::string bad_stages(int64_t entries) {
  return "stages: expected rows that do not fall, of numbers from 0 to " + std::to_string(entries);
}

// Shapes, dtypes and layout; `costs` is left to the caller.
inline GloveParameters glove_parameters(Tensor& parameters, Tensor& squared_gradients,
                                        const Tensor& rows, const Tensor& columns,
                                        const Tensor& values, const Tensor& stages, double eta,
                                        double x_max, double alpha, double grad_clip) {
  check_dim(parameters, 3, "parameters");
  check_dim(squared_gradients, 3, "squared_gradients");
  check_size(parameters, 0, 2, "parameters");
  LMENGINE_CHECK(parameters.size(2) >= 2, "parameters: expected size dim + 1 >= 2 in dimension 2");
  for (int64_t d = 0; d < 3; ++d)
    check_size(squared_gradients, d, parameters.size(d), "squared_gradients");
  check_dim(stages, 2, "stages");
  LMENGINE_CHECK(stages.size(1) >= 2, "stages: expected size partitions + 1 >= 2 in dimension 1");
  for (const Tensor* tensor : {&rows, &columns, &values}) {
    check_dim(*tensor, 1, "rows, columns, values");
    check_size(*tensor, 0, rows.size(0), "rows, columns, values");
  }
  check_dtype(parameters, ScalarType::Float, "parameters");
  check_dtype(squared_gradients, ScalarType::Float, "squared_gradients");
  check_dtype(rows, ScalarType::Int, "rows");
  check_dtype(columns, ScalarType::Int, "columns");
  check_dtype(values, ScalarType::Float, "values");
  check_dtype(stages, ScalarType::Long, "stages");
  for (const Tensor* tensor : std::initializer_list<const Tensor*>{
           &parameters, &squared_gradients, &rows, &columns, &values, &stages})
    LMENGINE_CHECK(tensor->is_contiguous(), "glove_epoch: expected contiguous tensors");
  return {static_cast<float*>(parameters.mutable_data_ptr()),
          static_cast<float*>(squared_gradients.mutable_data_ptr()),
          static_cast<const int32_t*>(rows.const_data_ptr()),
          static_cast<const int32_t*>(columns.const_data_ptr()),
          static_cast<const float*>(values.const_data_ptr()),
          static_cast<const int64_t*>(stages.const_data_ptr()),
          parameters.size(1),
          parameters.size(2) - 1,
          stages.size(0),
          stages.size(1) - 1,
          static_cast<float>(eta),
          static_cast<float>(x_max),
          static_cast<float>(alpha),
          static_cast<float>(grad_clip),
          nullptr};
}

}  // namespace lmengine
