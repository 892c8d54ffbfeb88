// Choice of the instruction set, once for the process.
#include <cstdlib>
#include <initializer_list>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

// Best instruction set that this machine has.
Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return Isa::Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::Avx2;
#endif
  return Isa::Baseline;
}

// The one that BOFT_OPS_CPU_ISA names, if this machine has a better one, else the best.
Isa chosen() {
  const Isa found = best();
  const char* wanted = std::getenv("BOFT_OPS_CPU_ISA");
  if (!wanted) return found;
  for (const Isa lesser : {Isa::Baseline, Isa::Avx2})
    if (lesser < found && std::strcmp(wanted, isa_name(lesser)) == 0) return lesser;
  return found;
}

}  // namespace

Isa isa_level() {
  static const Isa level = chosen();
  return level;
}

const char* isa_name(Isa level) {
  return level == Isa::Avx512 ? "avx512" : level == Isa::Avx2 ? "avx2" : "baseline";
}

const char* isa() { return isa_name(isa_level()); }

}  // namespace boft::cpu
