// Helpers of all CPU kernels: instruction sets, number types, vectors.
//
// One source serves several instruction sets: a kernel is a template over the bytes of a vector,
// and BOFT_ISAS instantiates it once for each set, in a function with the TARGET attribute.
// BOFT_RUN picks the instance at run time. Helpers are forced inline, because the compiler uses an
// instruction set for code inside of such a function only.
#pragma once

#include <cstdint>
#include <cstring>

#define BOFT_INLINE inline __attribute__((always_inline))

// BOFT_ISAS(DEFINE) expands to DEFINE(suffix, bytes of a vector, TARGET) for each instruction set.
// BOFT_RUN(name, ...) calls name_<suffix> for the instruction set of isa_level().
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

// Best instruction set of this machine, or the lesser one that BOFT_OPS_CPU_ISA (docs/env.md)
// names.
Isa isa_level();
const char* isa_name(Isa level);

// A bfloat16 number: the upper 16 bits of a float32.
struct bf16 {
  uint16_t bits;
};

// Converts an element to the type that it is computed in, exactly.
BOFT_INLINE float widen(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
BOFT_INLINE float widen(float value) { return value; }
BOFT_INLINE double widen(double value) { return value; }

// Rounds to nearest, ties to even. NaN stays NaN: the quiet bit 0x40 is set, since its other bits
// may be cut off.
BOFT_INLINE bf16 round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded)};
}

// Type that elements of T are computed in: float32 for bfloat16, else T.
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

// Rounds a computed number to the element type.
template <class T>
BOFT_INLINE T narrow(Compute<T> value) {
  return value;
}
template <>
BOFT_INLINE bf16 narrow<bf16>(float value) {
  return round_to_bf16(value);
}

// Vectors of BYTES bytes, the width of the instruction set's registers. GCC takes a wider vector
// too, but splits it over several registers, of which there are not enough then.
template <class T, int BYTES>
struct Vector {
  static constexpr int64_t lanes = BYTES / int64_t(sizeof(T));
  // `type` is a vector in memory, aligned like a T only; `value` is one in a register.
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  typedef T value __attribute__((vector_size(BYTES)));
};

// Bytes of a vector that `size` numbers of T fill; at most `bytes`.
template <class T>
constexpr int fitting(int bytes, int64_t size) {
  return size * int64_t(sizeof(T)) < bytes ? int(size * int64_t(sizeof(T))) : bytes;
}

}  // namespace boft::cpu
