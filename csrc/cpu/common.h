// What the CPU kernels share: one source per kernel, compiled for several instruction sets and
// chosen at run time. Helpers are forced inline, since only what ends up inside a function with the
// TARGET attribute is compiled for its instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#define BOFT_INLINE inline __attribute__((always_inline))

// BOFT_ISAS(DEFINE) writes DEFINE(suffix, bytes per vector, TARGET) once per instruction set, and
// BOFT_RUN(name, ...) calls the name_<suffix> that this machine runs fastest.
#if defined(__x86_64__) && defined(__GNUC__)
#define BOFT_ISAS(DEFINE)                                      \
  DEFINE(baseline, 16, )                                       \
  DEFINE(avx2, 32, __attribute__((target("avx2,fma"))))        \
  DEFINE(avx512, 64, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"))))
#define BOFT_RUN(NAME, ...)                                     \
  (boft::cpu::isa_level() == boft::cpu::Isa::Avx512             \
       ? NAME##_avx512(__VA_ARGS__)                             \
       : boft::cpu::isa_level() == boft::cpu::Isa::Avx2         \
             ? NAME##_avx2(__VA_ARGS__)                         \
             : NAME##_baseline(__VA_ARGS__))
#else
#define BOFT_ISAS(DEFINE) DEFINE(baseline, 16, )
#define BOFT_RUN(NAME, ...) NAME##_baseline(__VA_ARGS__)
#endif

namespace boft::cpu {

enum class Isa : int { Baseline, Avx2, Avx512 };

// The best instruction set of this machine; BOFT_OPS_CPU_ISA (docs/env.md) may ask for a lesser.
Isa isa_level();
const char* isa_name(Isa level);

struct bf16 {
  uint16_t bits;
};

BOFT_INLINE float widen(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
BOFT_INLINE float widen(float value) { return value; }
BOFT_INLINE double widen(double value) { return value; }

// Round to nearest, ties to even; NaN stays NaN.
BOFT_INLINE bf16 round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded)};
}

// What a kernel computes in: float32 for bfloat16.
template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<bf16> {
  using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
BOFT_INLINE T narrow(Compute<T> value) {
  return value;
}
template <>
BOFT_INLINE bf16 narrow<bf16>(float value) {
  return round_to_bf16(value);
}

// Vectors of BYTES bytes: as wide as the instruction set has them. A wider type would compile too,
// but splits into more registers than there are.
template <class T, int BYTES>
struct Vector {
  static constexpr int64_t lanes = BYTES / int64_t(sizeof(T));
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));  // in memory
  typedef T value __attribute__((vector_size(BYTES)));                                 // on its own
};

// The widest vector, of at most `bytes` bytes, that `size` numbers of T fill.
template <class T>
constexpr int fitting(int bytes, int64_t size) {
  return size * int64_t(sizeof(T)) < bytes ? int(size * int64_t(sizeof(T))) : bytes;
}

}  // namespace boft::cpu
