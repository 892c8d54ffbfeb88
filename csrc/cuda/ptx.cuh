// Instructions that CUDA C++ has no function for. Compute capability 8.0 has all of them.
#pragma once

#include "gpu.cuh"

#ifdef BOFT_EMULATED
#include "emulation_ptx.h"
#else

namespace boft::cuda {

// Computes c += a b on the tensor cores, for a warp: a is 16 x 16, b 16 x 8, c 16 x 8. Each
// register of a lane holds a pair of neighboring entries. With g = lane / 4 and t = lane % 4, lane
// (g, t) holds:
//   a:      columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of both rows
//   b0, b1: rows 2t, 2t + 1 and rows 2t + 8, 2t + 9 of column g
//   c:      columns 2t, 2t + 1 of row g, then of row g + 8
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

// Converts two neighboring halves, which are 32 bits in memory, to float32; pack() converts them
// back.
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

// Makes a pair of the low halves of two pairs, or of the high halves.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// Loads four 8 x 8 matrices of halves from shared memory, transposed, for a warp. Lane 8m + r
// passes the address of row r of matrix m, a multiple of 16 bytes. With g = lane / 4 and
// t = lane % 4, out[m] becomes the entries of column g of matrix m in rows 2t and 2t + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory; both addresses are multiples of
// Bytes. close_copies() and await_copies() wait for it.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)  // bypasses the first-level cache, as rows are read only once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(Bytes)
                 : "memory");
}
// Starts a copy of 16 bytes as copy_async() does, or one of 16 bytes of zeros if `from` does not
// exist. There is no branch, and nothing is read where it does not.
__device__ __forceinline__ void copy_async_or_zeros(void* to, const void* from, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
// Makes a group of the copies that this thread has started since the last call.
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread but the last `Pending`. Other threads see the copied bytes
// after a barrier only.
template <int Pending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Computes 1 / x to about one unit in the last place, for normal numbers. A division would take
// twice as long, and a branch. One cubic Newton step improves the approximation of the hardware.
__device__ __forceinline__ double reciprocal(double x) {
  double y;  // relative error below 2^-19
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double error = fma(-x, y, 1.0);
  return fma(y, fma(error, error, error), y);
}

// Returns x, but hides its value from the compiler, so that expressions of it are computed where
// they stand. Without that the compiler moves them out of a loop and keeps them in registers that
// are needed.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace boft::cuda
#endif
