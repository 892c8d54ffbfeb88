// The rotation on a GPU as a Python class: its arguments are addresses on the device, such as
// tensor.data_ptr() of torch or array.data.ptr of CuPy.
#include <pybind11/pybind11.h>

#include "rotation.h"

namespace py = pybind11;

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

PYBIND11_MODULE(rotation_cuda, module) {
  py::class_<Rotation>(module, "Rotation")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("d"), py::arg("m"), py::arg("b"))
      .def("forward",
           [](Rotation& self, uintptr_t skew, uintptr_t x, uintptr_t y, int64_t rows) {
             self.forward(address<const float>(skew), address<const float>(x), address<float>(y),
                          rows);
           })
      .def("backward", [](Rotation& self, uintptr_t x, uintptr_t grad, uintptr_t x_grad,
                          uintptr_t skew_grad, int64_t rows) {
        self.backward(address<const float>(x), address<const float>(grad), address<float>(x_grad),
                      address<float>(skew_grad), rows);
      });
}
