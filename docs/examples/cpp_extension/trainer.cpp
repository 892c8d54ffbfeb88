// A training loop in C++ and its Python module: gradient descent on the skew of one layer,
// y = x R W^T, whose weight W stays frozen. Its matrix products stand for those of a real program.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "rotation.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<float, py::array::c_style>;

class Layer {
 public:
  // skew (m, d/b, b(b-1)/2), x (rows, d), weight (n, d), target (rows, n)
  Layer(const Array& skew, const Array& x, const Array& weight, const Array& target)
      : rows_(x.shape(0)), d_(x.shape(1)), n_(weight.shape(0)), x_(x.data()),
        weight_(weight.data()), target_(target.data()), rotation_(d_, skew.shape(0), block(skew)),
        rotated(size_t(rows_ * d_)), grad(size_t(rows_ * d_)), x_grad(size_t(rows_ * d_)),
        skew_grad(size_t(skew.size())) {
    if (weight.shape(1) != d_ || target.shape(0) != rows_ || target.shape(1) != n_)
      throw std::invalid_argument("weight, target: expected (n, d) and (rows, n)");
  }

  // Computes the loss, half the mean of (y - target)^2, and its gradients x_grad and skew_grad.
  double step(const float* skew) {
    rotation_.forward(skew, x_, rotated.data(), rows_);
    double loss = 0;
    std::fill(grad.begin(), grad.end(), 0.f);
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t i = 0; i < n_; ++i) {
        const float* w = weight_ + i * d_;
        double y = 0;
        for (int64_t j = 0; j < d_; ++j) y += double(rotated[size_t(row * d_ + j)]) * w[j];
        const double error = y - target_[row * n_ + i];
        loss += error * error / double(2 * rows_ * n_);
        const float slope = float(error / double(rows_ * n_));
        for (int64_t j = 0; j < d_; ++j) grad[size_t(row * d_ + j)] += slope * w[j];
      }
    rotation_.backward(x_, grad.data(), x_grad.data(), skew_grad.data(), rows_);
    return loss;
  }

 private:
  int64_t block(const Array& skew) const {
    const int64_t b = skew.ndim() == 3 && skew.shape(1) > 0 ? d_ / skew.shape(1) : 0;
    if (b < 2 || skew.shape(2) != b * (b - 1) / 2)
      throw std::invalid_argument("skew: expected (m, d/b, b(b-1)/2)");
    return b;
  }

  int64_t rows_, d_, n_;
  const float *x_, *weight_, *target_;
  Rotation rotation_;

 public:
  std::vector<float> rotated, grad, x_grad, skew_grad;
};

py::tuple loss_and_gradients(const Array& skew, const Array& x, const Array& weight,
                             const Array& target) {
  Layer layer(skew, x, weight, target);
  const double loss = layer.step(skew.data());
  Array x_grad({x.shape(0), x.shape(1)});
  Array skew_grad({skew.shape(0), skew.shape(1), skew.shape(2)});
  std::copy(layer.x_grad.begin(), layer.x_grad.end(), x_grad.mutable_data());
  std::copy(layer.skew_grad.begin(), layer.skew_grad.end(), skew_grad.mutable_data());
  return py::make_tuple(loss, x_grad, skew_grad);
}

std::vector<double> train(Array skew, const Array& x, const Array& weight, const Array& target,
                          int64_t steps, float rate) {
  Layer layer(skew, x, weight, target);
  std::vector<double> losses;
  float* numbers = skew.mutable_data();
  for (int64_t step = 0; step < steps; ++step) {
    losses.push_back(layer.step(numbers));
    for (size_t i = 0; i < layer.skew_grad.size(); ++i) numbers[i] -= rate * layer.skew_grad[i];
  }
  return losses;
}

}  // namespace

PYBIND11_MODULE(trainer, module) {
  module.def("loss_and_gradients", &loss_and_gradients, py::arg("skew").noconvert(),
             py::arg("x").noconvert(), py::arg("weight").noconvert(),
             py::arg("target").noconvert(), "(loss, gradient of x, gradient of skew)");
  module.def("train", &train, py::arg("skew").noconvert(), py::arg("x").noconvert(),
             py::arg("weight").noconvert(), py::arg("target").noconvert(), py::arg("steps"),
             py::arg("rate"), "Change skew in place; return the loss before each step");
}
