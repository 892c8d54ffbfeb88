// Remembers how much shared memory each kernel was granted on each device. Free of CUDA.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace boft::cuda {

class Grants {
 public:
  // Calls ask() unless this kernel has that many bytes on this device already. Returns what ask()
  // returns, else 0; only a grant that succeeded (0) is remembered.
  template <class F>
  int once(const void* kernel, int device, size_t bytes, F ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t& granted = granted_[{kernel, device}];
    if (bytes <= granted) return 0;
    const int error = ask();
    if (error == 0) granted = bytes;
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> granted_;
};

}  // namespace boft::cuda
