// What the CPU kernels share. Every kernel is one source, compiled for several instruction sets and
// chosen when the library is loaded; helpers are forced inline, since only what ends up inside the
// cloned function is compiled for its instruction set.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BOFT_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define BOFT_CLONES
#endif
#define BOFT_INLINE inline __attribute__((always_inline))
