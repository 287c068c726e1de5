#include "support/instruction_set.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace lmengine {

namespace {

InstructionSet detect() {
  __builtin_cpu_init();
  InstructionSet best = InstructionSet::none;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    best = InstructionSet::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd")) {
      best = InstructionSet::avx512;
      if (__builtin_cpu_supports("avx512bf16")) best = InstructionSet::avx512bf16;
    }
  }
  if (const char* wanted = std::getenv("LMENGINE_ISA")) {
    for (InstructionSet set : {InstructionSet::avx2, InstructionSet::avx512}) {
      if (std::strcmp(wanted, name_of(set)) == 0 && set < best) return set;
    }
  }
  return best;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet detected = detect();
  return detected;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512bf16:
      return "avx512bf16";
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    case InstructionSet::none:
      break;
  }
  return "none";
}

void unsupported_processor() {
  throw std::runtime_error("lmengine's CPU kernels need a processor with AVX2, FMA and BMI2");
}

}  // namespace lmengine
