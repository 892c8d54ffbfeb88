// The few instructions that CUDA C++ has no name for. Compute capability 8.0 has them all.
#pragma once

#include "gpu.cuh"

#ifdef BOFT_EMULATED
#include "emulation_ptx.h"
#else

namespace boft::cuda {

// c += a b, a 16 x 16 by rows, b 16 x 8 by columns, c 16 x 8. With g = lane / 4 and t = lane % 4, a lane
// holds two neighbouring entries in each register: of a, rows g, g + 8 and columns 2t, then both rows
// and columns 2t + 8; of b, column g and rows 2t, 2t + 8; of c, rows g, g + 8 and columns 2t.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  static_assert(is_half<T>);
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two neighbouring halves, as the 32 bits that they are in memory, from and to float32.
template <class T>
__device__ __forceinline__ void unpack(uint32_t pair, float& low, float& high) {
  static_assert(is_half<T>);
  if constexpr (std::is_same_v<T, bf16>) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
  } else {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
  }
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(is_half<T>);
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four 8 x 8 matrices of halves in shared memory, transposed: lane 8m + r names row r of matrix m, and
// gets of each the entries of column g in rows 2t and 2t + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory; the addresses are multiples of it.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)  // past the first-level cache: read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(Bytes)
                 : "memory");
}
// Closes a group of copies, and waits for all groups of this thread but the last `Pending`.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 1 / x within an ulp or so, for normal numbers: a division would take twice as long, and a branch.
__device__ __forceinline__ double reciprocal(double x) {
  double y;  // off by less than 2^-19 times itself
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double error = fma(-x, y, 1.0);
  return fma(y, fma(error, error, error), y);
}

// The same number, of which the compiler knows nothing: what depends on it stays where it is, and is
// not computed before a loop, to be kept in registers.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace boft::cuda
#endif
