// Which of the compiled instruction sets this processor runs. Sources named *_simd.cpp are compiled
// once for each, in the namespace lmengine::LMENGINE_ISA; LMENGINE_DISPATCH calls the best of them.
#pragma once

namespace lmengine {

enum class InstructionSet { none, avx2, avx512, avx512bf16 };

// The best set that this processor supports, or the one that the variable LMENGINE_ISA names, if
// that is lower.
InstructionSet instruction_set();

const char* name_of(InstructionSet set);

// Throws std::runtime_error: the processor has none of the compiled sets.
[[noreturn]] void unsupported_processor();

}  // namespace lmengine

// Declares a kernel `void name(const Parameters&)` in each instruction set's namespace.
#define LMENGINE_DECLARE_KERNEL(name, Parameters) \
  namespace lmengine::avx2 {                      \
  void name(const Parameters&);                   \
  }                                               \
  namespace lmengine::avx512 {                    \
  void name(const Parameters&);                   \
  }                                               \
  namespace lmengine::avx512bf16 {                \
  void name(const Parameters&);                   \
  }

#define LMENGINE_DISPATCH(name, parameters)    \
  switch (lmengine::instruction_set()) {       \
    case lmengine::InstructionSet::avx512bf16: \
      lmengine::avx512bf16::name(parameters);  \
      break;                                   \
    case lmengine::InstructionSet::avx512:     \
      lmengine::avx512::name(parameters);      \
      break;                                   \
    case lmengine::InstructionSet::avx2:       \
      lmengine::avx2::name(parameters);        \
      break;                                   \
    case lmengine::InstructionSet::none:       \
      lmengine::unsupported_processor();       \
  }
