// The only file that sees torch, and of torch only the stable C ABI (libtorch >= 2.10): one binary
// serves every later torch and every Python. Nothing is registered when the library is loaded:
// boft_ops_register(namespace) puts the kernels under the namespace that a copy of the Python
// package derives from its own name. Schemas, fakes and fallbacks are defined there too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "boft_kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

boft::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return boft::DType::F32;
    case ScalarType::Double: return boft::DType::F64;
    case ScalarType::BFloat16: return boft::DType::BF16;
    default: STD_TORCH_CHECK(false, "expected float32, float64 or bfloat16");
  }
}

std::vector<int64_t> leading_sizes(const Tensor& t, int64_t trailing) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim() - trailing; ++i) sizes.push_back(t.size(i));
  return sizes;
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (int64_t s : sizes) n *= s;
  return n;
}

// Run body(begin, end) over the tiles of n blocks, enough of them at a time to outweigh a thread.
template <class F>
void over_tiles(int64_t n_blocks, int64_t b, F body) {
  const int64_t n_tiles = (n_blocks + boft::cpu::kTile - 1) / boft::cpu::kTile;
  const int64_t grain = std::max<int64_t>(1, 32768 / (b * b * b));
  torch::stable::parallel_for(0, n_tiles, grain, body);
}

Tensor cayley_cpu(const Tensor& skew_) {
  STD_TORCH_CHECK(skew_.dim() >= 1, "cayley: skew: expected at least 1 dimension");
  const int64_t packed = skew_.size(skew_.dim() - 1);
  int64_t b = 1;
  while (b * (b - 1) / 2 < packed) ++b;
  STD_TORCH_CHECK(b * (b - 1) / 2 == packed, "cayley: skew: expected b(b-1)/2 numbers, got ", packed);
  const auto dtype = dtype_of(skew_);
  const Tensor skew = torch::stable::contiguous(skew_);
  auto sizes = leading_sizes(skew, 1);
  const int64_t n = product(sizes);
  sizes.insert(sizes.end(), {b, b});
  Tensor blocks = torch::stable::new_empty(skew, sizes);
  const void* in = skew.const_data_ptr();
  void* out = blocks.mutable_data_ptr();
  over_tiles(n, b, [&](int64_t begin, int64_t end) {
    boft::cpu::cayley(in, out, n, b, begin, end, dtype);
  });
  return blocks;
}

Tensor cayley_backward_cpu(const Tensor& blocks_, const Tensor& grad_) {
  const int64_t dim = blocks_.dim();
  STD_TORCH_CHECK(dim >= 2 && blocks_.size(dim - 1) == blocks_.size(dim - 2),
                  "cayley_backward: blocks: expected square blocks");
  STD_TORCH_CHECK(grad_.dim() == dim && grad_.scalar_type() == blocks_.scalar_type(),
                  "cayley_backward: grad: expected the shape and dtype of blocks");
  for (int64_t i = 0; i < dim; ++i)
    STD_TORCH_CHECK(grad_.size(i) == blocks_.size(i), "cayley_backward: grad: expected the shape of blocks");
  const auto dtype = dtype_of(blocks_);
  const Tensor blocks = torch::stable::contiguous(blocks_), grad = torch::stable::contiguous(grad_);
  const int64_t b = blocks.size(dim - 1);
  auto sizes = leading_sizes(blocks, 2);
  const int64_t n = product(sizes);
  sizes.push_back(b * (b - 1) / 2);
  Tensor skew_grad = torch::stable::new_empty(blocks, sizes);
  const void *in = blocks.const_data_ptr(), *upstream = grad.const_data_ptr();
  void* out = skew_grad.mutable_data_ptr();
  over_tiles(n, b, [&](int64_t begin, int64_t end) {
    boft::cpu::cayley_backward(in, upstream, out, n, b, begin, end, dtype);
  });
  return skew_grad;
}

}  // namespace

#define BOFT_API extern "C" __attribute__((visibility("default")))

BOFT_API const char* boft_ops_isa() { return boft::cpu::isa(); }

// Names, separated by commas, of the ops that have a kernel on `device`.
BOFT_API const char* boft_ops_kernels(const char* device) {
  return std::strcmp(device, "cpu") == 0 ? "cayley,cayley_backward" : "";
}

// Register the kernels under `ns`. Returns 0, or -1 with the reason in err.
BOFT_API int boft_ops_register(const char* ns, char* err, int err_len) {
  using torch::stable::detail::StableLibrary;
  try {
    // never freed: taking it back at exit would race torch's own static destructors
    auto* cpu = new StableLibrary(StableLibrary::Kind::IMPL, ns, "CPU", __FILE__, __LINE__);
    cpu->impl("cayley", TORCH_BOX(&cayley_cpu));
    cpu->impl("cayley_backward", TORCH_BOX(&cayley_backward_cpu));
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(err, size_t(err_len), "%s", e.what());
    return -1;
  }
}
