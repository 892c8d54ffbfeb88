// Kernels for the emulation's own test, most of them wrong: test_emulation.py says what of each.
#include <cstdio>
#include <string>

#include "cuda/ptx.cuh"

namespace {

using namespace boft::cuda;

// Every thread publishes its index, and reads that of its neighbour.
__global__ void neighbours(int* out, bool barrier, int beyond) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = int(threadIdx.x);
  shared[i + beyond] = i;
  if (barrier) __syncthreads();
  out[i] = shared[(i + 1) % 64];
}

// Half of the threads wait for the others, which wait for their warp.
__global__ void deadlock() {
  if (threadIdx.x % 2 == 0) __syncthreads();
  else __syncwarp();
}

__global__ void copy(const float* from, float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = int(threadIdx.x);
  copy_async<4>(shared + i, from + i);
  close_copies();
  if (wait) await_copies<0>();
  out[i] = shared[i];
}

// Lane g, t of a 16 x 16 matrix times 16 x 8, of small integers.
__global__ void product(float* out) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](int row, int column, int down) {  // entries row - 2 column, neighbours
    bf16 two[2] = {narrow<bf16>(float(row - 2 * column)),
                   narrow<bf16>(float(row + down - 2 * (column + 1 - down)))};
    uint32_t bits;
    std::memcpy(&bits, two, 4);
    return bits;
  };
  const uint32_t a[4] = {pair(g, 2 * t, 0), pair(g + 8, 2 * t, 0), pair(g, 2 * t + 8, 0),
                         pair(g + 8, 2 * t + 8, 0)};
  float c[4] = {};
  mma<bf16>(c, a, pair(2 * t, g, 1), pair(2 * t + 8, g, 1));
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

__global__ void transposed(uint16_t* out) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());  // 32 rows of 8
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = uint16_t(lane * 8 + i);
  __syncwarp();
  uint32_t pieces[4];
  load_transposed(pieces, shared + lane * 8);
  std::memcpy(out + lane * 8, pieces, 16);
}

bool run(const std::string& name) {
  int ints[64] = {};
  float floats[128] = {}, more[64];
  for (int i = 0; i < 64; ++i) more[i] = float(i);
  bool right = true;
  if (name == "neighbours" || name == "no barrier" || name == "beyond shared memory") {
    launch(neighbours, 1, 64, 64 * sizeof(int), {}, ints, name != "no barrier",
           name == "beyond shared memory" ? 16 : 0);
    for (int i = 0; i < 64; ++i) right = right && ints[i] == (i + 1) % 64;
  } else if (name == "beyond an array") {
    int* few = new int[63];
    launch(neighbours, 1, 64, 64 * sizeof(int), {}, few, true, 0);
    delete[] few;
  } else if (name == "deadlock") {
    launch(deadlock, 1, 64, 0, {});
  } else if (name == "copy" || name == "copy not awaited") {
    launch(copy, 1, 64, 64 * sizeof(float), {}, static_cast<const float*>(more), floats,
           name == "copy");
    for (int i = 0; i < 64; ++i) right = right && floats[i] == float(i);
  } else if (name == "copy unaligned") {
    const auto* odd = reinterpret_cast<const float*>(reinterpret_cast<const char*>(more) + 2);
    launch(copy, 1, 32, 64 * sizeof(float), {}, odd, floats, true);
  } else if (name == "product") {
    launch(product, 1, 32, 0, {}, floats);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        int sum = 0;
        for (int k = 0; k < 16; ++k) sum += (i - 2 * k) * (k - 2 * j);
        right = right && floats[i * 8 + j] == float(sum);
      }
  } else if (name == "transposed") {
    uint16_t out[256];
    launch(transposed, 1, 32, 512, {}, out);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i)  // matrix i / 2: column lane / 4 of rows 2 (lane % 4) + i % 2
        right = right && out[lane * 8 + i] ==
                             (i / 2 * 8 + lane % 4 * 2 + i % 2) * 8 + lane / 4;
  } else if (name == "too much shared memory") {
    launch(deadlock, 1, 64, 228 * 1024, {});
  } else {
    return false;
  }
  return right;
}

}  // namespace

int main(int, char** argv) {
  const bool right = run(argv[1]);
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}
