// In plain C++ what csrc/cuda/ptx.cuh has in PTX. A copy arrives no sooner than it is waited for.
#pragma once

#include "emulation.h"

namespace boft::cuda {

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(is_half<T>);
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto slots = emulation::exchange(mine, sizeof(mine));
  const int lane = int(threadIdx.x) % 32;
  const auto entry = [&](int from, int reg, int half) {
    return widen(emulation::deposit<T>(slots, from, 2 * reg + half));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2;
      c[i] += entry(row % 8 * 4 + t, k / 8 * 2 + row / 8, k % 2) *
              entry(column * 4 + t, 4 + k / 8, k % 2);
    }
  }
}

template <class T>
void unpack(uint32_t pair, float& low, float& high) {
  T two[2];
  std::memcpy(two, &pair, 4);
  low = widen(two[0]), high = widen(two[1]);
}
template <class T>
uint32_t pack(float low, float high) {
  const T two[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t pair;
  std::memcpy(&pair, two, 4);
  return pair;
}

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

inline void load_transposed(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix: unaligned");
  const auto slots = emulation::exchange(&row, sizeof(row));
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m)
    for (int half = 0; half < 2; ++half) {
      const auto* from = emulation::deposit<const uint16_t*>(slots, 8 * m + 2 * t + half);
      uint16_t value;
      std::memcpy(&value, from + g, 2);
      std::memcpy(reinterpret_cast<unsigned char*>(&out[m]) + 2 * half, &value, 2);
    }
}

template <int Bytes>
void copy_async(void* to, const void* from) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % Bytes != 0)
    emulation::fail("cp.async: unaligned");
  emulation::current().copies.push_back({to, from, Bytes, false});
}
inline void copy_async_or_zeros(void* to, const void* from, bool exists) {
  copy_async<16>(to, from);
  if (!exists) emulation::current().copies.back().from = nullptr;
}
inline void close_copies() {
  emulation::current().copies.push_back({nullptr, nullptr, 0, true});
}
template <int Pending>
void await_copies() {
  auto& copies = emulation::current().copies;
  int groups = 0;
  for (const auto& copy : copies) groups += copy.closes;
  while (groups > Pending) {
    const auto copy = copies.front();
    copies.pop_front();
    if (copy.closes) --groups;
    else if (copy.from == nullptr) std::memset(copy.to, 0, size_t(copy.bytes));
    else std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  }
}

inline double reciprocal(double x) { return 1.0 / x; }
inline int unknown(int x) { return x; }

}  // namespace boft::cuda
