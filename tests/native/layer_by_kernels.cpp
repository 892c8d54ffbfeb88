// A layer y = scale * (x R W^T) + bias of one stage and its gradients, by the kernels alone, for
// machines without torch. Arguments: rows d n m b. Reads skew, x, weight, scale, bias and the
// gradient of y from stdin as float32; writes y, x R and the gradients of x, skew, scale and bias.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "boft_kernels.h"

using Floats = std::vector<float>;
namespace cpu = boft::cpu;
constexpr boft::DType kFloat = boft::DType::F32;

static Floats read(int64_t count) {
  Floats values(count);
  if (std::fread(values.data(), sizeof(float), count, stdin) != size_t(count)) std::exit(1);
  return values;
}

static void write(const Floats& values) {
  if (std::fwrite(values.data(), sizeof(float), values.size(), stdout) != values.size())
    std::exit(1);
}

// Sums the parts (count, values) of a result.
static Floats sum(const Floats& parts, int64_t count) {
  const int64_t n = int64_t(parts.size()) / count;
  Floats total(n);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < n; ++i) total[i] += parts[p * n + i];
  return total;
}

int main(int count, char** arguments) {
  if (count != 6) return 2;
  int64_t sizes[5];
  for (int i = 0; i < 5; ++i) sizes[i] = std::atoll(arguments[i + 1]);
  const auto [rows, d, n, m, b] = sizes;
  const int64_t n_blocks = d / b, size = b << (m - 1), tiles = (m * n_blocks + 7) / cpu::kTile;
  const int64_t packed_skew = b * (b - 1) / 2, panel = cpu::linear_panel();
  const int64_t panels = (rows + panel - 1) / panel;
  const int64_t row_blocks = (rows + cpu::kLinearRows - 1) / cpu::kLinearRows;
  const Floats skew = read(m * n_blocks * packed_skew), x = read(rows * d), weight = read(n * d);
  const Floats scale = read(n), bias = read(n), grad = read(rows * n);

  Floats blocks(m * n_blocks * b * b), stages(d * size), y(rows * n), z(rows * n), packed;
  cpu::cayley(skew.data(), nullptr, blocks.data(), m * n_blocks, b, 0, tiles, kFloat);
  cpu::compose(blocks.data(), stages.data(), m, n_blocks, b, 1, 0, d / size, kFloat);
  packed.resize(panels * d * panel);
  cpu::linear_pack(x.data(), stages.data(), packed.data(), rows, d, size, 0, panels);
  cpu::linear(packed.data(), weight.data(), scale.data(), bias.data(), nullptr, y.data(), z.data(),
              rows, d, n, 0, cpu::linear_units(rows, n, 1));
  Floats rotated(rows * d);
  cpu::rotate(x.data(), stages.data(), nullptr, rotated.data(), d, {size, size, 1}, 0, rows, kFloat);

  Floats scale_sums(panels * n), bias_sums(panels * n), x_grad(rows * d);
  packed.assign(panels * n * panel, 0);
  cpu::linear_backward_pack(grad.data(), z.data(), scale.data(), nullptr, packed.data(),
                            scale_sums.data(), bias_sums.data(), rows, n, 0, panels);
  Floats transposed(stages), grams(row_blocks * d * size);
  for (int64_t g = 0; g < d / size; ++g)
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j)
        transposed[(g * size + i) * size + j] = stages[(g * size + j) * size + i];
  cpu::linear_backward(packed.data(), weight.data(), x.data(), transposed.data(), x_grad.data(),
                       grams.data(), rows, d, n, size, 0, cpu::linear_units(rows, d, size));
  const Floats stages_grad = sum(grams, row_blocks);
  Floats blocks_grad(blocks.size()), skew_grad(skew.size());
  cpu::compose_backward(blocks.data(), stages_grad.data(), blocks_grad.data(), m, n_blocks, b, 1, 0,
                        d / size, kFloat);
  cpu::cayley_backward(blocks.data(), nullptr, blocks_grad.data(), skew_grad.data(), m * n_blocks,
                       b, 0, tiles, kFloat);
  write(y), write(rotated), write(x_grad), write(skew_grad);
  write(sum(scale_sums, panels)), write(sum(bias_sums, panels));
  return 0;
}
