// Sizes of the pieces of work: their defaults, names and allowed values.
#include <cstring>

#include "boft_kernels.h"

namespace boft::cpu {

Tunables& tunables() {
  static Tunables values{{65536}, {192}, {1024}};
  return values;
}

std::atomic<int64_t>* tunable(const char* name) {
  Tunables& all = tunables();
  if (std::strcmp(name, "grain") == 0) return &all.grain;
  if (std::strcmp(name, "linear_outputs") == 0) return &all.linear_outputs;
  if (std::strcmp(name, "linear_rows") == 0) return &all.linear_rows;
  return nullptr;
}

bool is_allowed(const char* name, int64_t value) {
  if (std::strcmp(name, "grain") == 0) return 1024 <= value && value <= (int64_t(1) << 30);
  if (std::strcmp(name, "linear_outputs") == 0)
    return value % kLinearOutputs == 0 && kLinearOutputs <= value && value <= 6 * kLinearOutputs;
  return value % kLinearRows == 0 && kLinearRows <= value && value <= 64 * kLinearRows;
}

int64_t grain_of(int64_t work, int64_t share) {
  const int64_t items = tunables().grain / (share * (work < 1 ? 1 : work));
  return items < 1 ? 1 : items;
}

}  // namespace boft::cpu
