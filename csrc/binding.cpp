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
#include <tuple>
#include <vector>

#include "boft_kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

boft::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return boft::DType::F32;
    case ScalarType::Double: return boft::DType::F64;
    case ScalarType::BFloat16: return boft::DType::BF16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, float64 or bfloat16, got another dtype");
}

boft::DType wide_dtype_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  name, ": expected float32 or float64, got another dtype");
  return dtype_of(t, name);
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
  STD_TORCH_CHECK(b * (b - 1) / 2 == packed, "cayley: skew: expected b(b-1)/2 numbers, got ",
                  packed);
  const auto dtype = dtype_of(skew_, "cayley: skew");
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
  STD_TORCH_CHECK(dim >= 2 && blocks_.size(dim - 1) == blocks_.size(dim - 2) &&
                      blocks_.size(dim - 1) > 0,
                  "cayley_backward: blocks: expected square blocks");
  STD_TORCH_CHECK(grad_.dim() == dim && grad_.scalar_type() == blocks_.scalar_type(),
                  "cayley_backward: grad: expected the shape and dtype of blocks");
  for (int64_t i = 0; i < dim; ++i)
    STD_TORCH_CHECK(grad_.size(i) == blocks_.size(i),
                    "cayley_backward: grad: expected the shape of blocks");
  const auto dtype = dtype_of(blocks_, "cayley_backward: blocks");
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

void check_square(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() == dim && t.size(dim - 1) == t.size(dim - 2) && t.size(dim - 1) > 0, name,
                  ": expected ", dim, " dimensions and square blocks");
}

struct Butterfly {  // of n factors of n_blocks blocks, the first of which has the given stride
  int64_t n, n_blocks, b, stride, size, groups;

  Butterfly(const Tensor& factors, int64_t first) {
    check_square(factors, 4, "compose: factors");
    n = factors.size(0), n_blocks = factors.size(1), b = factors.size(2);
    STD_TORCH_CHECK(b % 2 == 0 && 0 < n && n < 32 && 0 <= first && first < 31 && n_blocks > 0 &&
                        n_blocks % (int64_t(1) << (first + n - 1)) == 0,
                    "compose: factors: not a butterfly");
    stride = int64_t(1) << first, size = b << (n - 1), groups = n_blocks * b / size;
  }
};

Tensor compose_cpu(const Tensor& factors_, int64_t first) {
  const auto dtype = wide_dtype_of(factors_, "compose: factors");
  const Butterfly shape(factors_, first);
  const Tensor factors = torch::stable::contiguous(factors_);
  Tensor stages = torch::stable::new_empty(factors, {shape.groups, shape.size, shape.size});
  const void* in = factors.const_data_ptr();
  void* out = stages.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, 32768 / (shape.size * shape.size * shape.b));
  torch::stable::parallel_for(0, shape.groups, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::compose(in, out, shape.n, shape.n_blocks, shape.b, shape.stride, begin, end, dtype);
  });
  return stages;
}

Tensor compose_backward_cpu(const Tensor& factors_, const Tensor& grad_, int64_t first) {
  const auto dtype = wide_dtype_of(factors_, "compose: factors");
  const Butterfly shape(factors_, first);
  check_square(grad_, 3, "compose_backward: grad");
  STD_TORCH_CHECK(grad_.size(0) == shape.groups && grad_.size(1) == shape.size &&
                      grad_.scalar_type() == factors_.scalar_type(),
                  "compose_backward: grad: expected the shape and dtype of the stage matrices");
  const Tensor factors = torch::stable::contiguous(factors_);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor factors_grad = torch::stable::empty_like(factors);
  const void *in = factors.const_data_ptr(), *upstream = grad.const_data_ptr();
  void* out = factors_grad.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, 16384 / (shape.size * shape.size * shape.b));
  torch::stable::parallel_for(0, shape.groups, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::compose_backward(in, upstream, out, shape.n, shape.n_blocks, shape.b, shape.stride,
                                begin, end, dtype);
  });
  return factors_grad;
}

// Rows and groups are whole units of work: any split over threads gives the same bits.
boft::cpu::Stage stage_of(const Tensor& x, int64_t size, int64_t chunk, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions");
  const int64_t d = x.size(1);  // sizes bounded by it first: no product of them can wrap
  STD_TORCH_CHECK(0 < size && size <= d && 0 < chunk && chunk <= size && size % chunk == 0 &&
                      0 < stride && stride <= d / size && d % (size * stride) == 0,
                  "stage: does not fit ", d, " features");
  return {size, chunk, stride};
}

Tensor rotate_cpu(const Tensor& x_, const Tensor& stage_, int64_t chunk, int64_t stride,
                  bool transpose) {
  check_square(stage_, 3, "rotate: stage");
  const auto dtype = wide_dtype_of(x_, "rotate: x");
  const boft::cpu::Stage shape = stage_of(x_, stage_.size(2), chunk, stride);
  STD_TORCH_CHECK(stage_.size(0) * shape.size == x_.size(1) &&
                      stage_.scalar_type() == x_.scalar_type(),
                  "rotate: stage: expected d / size matrices in the dtype of x");
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor stage =
      torch::stable::contiguous(transpose ? torch::stable::transpose(stage_, 1, 2) : stage_);
  Tensor y = torch::stable::empty_like(x);
  const void *in = x.const_data_ptr(), *matrices = stage.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const int64_t rows = x.size(0), d = x.size(1);
  const int64_t grain = std::max<int64_t>(4, 65536 / (d * shape.size));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::rotate(in, matrices, out, d, shape, begin, end, dtype);
  });
  return y;
}

Tensor gram_cpu(const Tensor& x_, const Tensor& grad_, int64_t size, int64_t chunk,
                int64_t stride) {
  const auto dtype = wide_dtype_of(x_, "gram: x");
  const boft::cpu::Stage shape = stage_of(x_, size, chunk, stride);
  STD_TORCH_CHECK(grad_.dim() == 2 && grad_.size(0) == x_.size(0) && grad_.size(1) == x_.size(1) &&
                      grad_.scalar_type() == x_.scalar_type(),
                  "gram: grad: expected the shape and dtype of x");
  const Tensor x = torch::stable::contiguous(x_), grad = torch::stable::contiguous(grad_);
  const int64_t rows = x.size(0), d = x.size(1), groups = d / size;
  Tensor out = torch::stable::new_empty(x, {groups, size, size});
  const void *left = x.const_data_ptr(), *right = grad.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, 65536 / (std::max<int64_t>(rows, 1) * size * size));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::gram(left, right, to, rows, d, shape, begin, end, dtype);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scale_backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                      const Tensor& scale_,
                                                      const Tensor& center_) {
  const auto dtype = wide_dtype_of(x_, "scale_backward: x");
  STD_TORCH_CHECK(x_.dim() == 2 && grad_.dim() == 2 && grad_.size(0) == x_.size(0) &&
                      grad_.size(1) == x_.size(1) && grad_.scalar_type() == x_.scalar_type(),
                  "scale_backward: grad: expected the shape and dtype of x, (rows, n)");
  for (const Tensor* vector : {&scale_, &center_})
    STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == x_.size(1) &&
                        vector->scalar_type() == x_.scalar_type(),
                    "scale_backward: scale, center: expected (n,) in the dtype of x");
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Tensor scale = torch::stable::contiguous(scale_);
  const Tensor center = torch::stable::contiguous(center_);
  Tensor x_grad = torch::stable::empty_like(x);
  Tensor scale_grad = torch::stable::empty_like(scale);
  Tensor bias_grad = torch::stable::empty_like(scale);
  const void *pg = grad.const_data_ptr(), *px = x.const_data_ptr();
  const void *ps = scale.const_data_ptr(), *pc = center.const_data_ptr();
  void *dx = x_grad.mutable_data_ptr(), *ds = scale_grad.mutable_data_ptr();
  void* db = bias_grad.mutable_data_ptr();
  const int64_t rows = x.size(0), n = x.size(1);
  const int64_t grain = std::max<int64_t>(16, 65536 / std::max<int64_t>(rows, 1));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::scale_backward(pg, px, ps, pc, dx, ds, db, rows, n, begin, end, dtype);
  });
  return {x_grad, scale_grad, bias_grad};
}

}  // namespace

#define BOFT_API extern "C" __attribute__((visibility("default")))

BOFT_API const char* boft_ops_isa() { return boft::cpu::isa(); }

// Names, separated by commas, of the ops that have a kernel on `device`.
BOFT_API const char* boft_ops_kernels(const char* device) {
  if (std::strcmp(device, "cpu") != 0) return "";
  return "cayley,cayley_backward,compose,compose_backward,rotate,gram,scale_backward";
}

// Register the kernels under `ns`. Returns 0, or -1 with the reason in err.
BOFT_API int boft_ops_register(const char* ns, char* err, int err_len) {
  using torch::stable::detail::StableLibrary;
  try {
    // never freed: taking it back at exit would race torch's own static destructors
    auto* cpu = new StableLibrary(StableLibrary::Kind::IMPL, ns, "CPU", __FILE__, __LINE__);
    cpu->impl("cayley", TORCH_BOX(&cayley_cpu));
    cpu->impl("cayley_backward", TORCH_BOX(&cayley_backward_cpu));
    cpu->impl("compose", TORCH_BOX(&compose_cpu));
    cpu->impl("compose_backward", TORCH_BOX(&compose_backward_cpu));
    cpu->impl("rotate", TORCH_BOX(&rotate_cpu));
    cpu->impl("gram", TORCH_BOX(&gram_cpu));
    cpu->impl("scale_backward", TORCH_BOX(&scale_backward_cpu));
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(err, size_t(err_len), "%s", e.what());
    return -1;
  }
}
