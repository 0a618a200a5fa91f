// A frozen network on a CPU without AMX as one call: oneDNN's convolutions, Winograd's and direct ones, and a stem's max-pool.
//
// Built layer by layer from Python (resnet_fast/cpu_network.py) for inputs of one shape, whose weights are packed. Running
// it changes nothing in it, so threads may run it side by side. Activations are in the pool's memory from the layer that
// writes them to the last that reads them; a residual that nobody else reads becomes the sum.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace resnet_fast::cpu {

class FrozenNetwork {
 public:
  // onednn: the weight as oneDNN takes it, packed or not; winograd: as its kernels do, which then go first; direct: as the
  // direct kernel does, which then is the only one.
  struct Conv {
    at::Tensor onednn;
    std::optional<at::Tensor> winograd, direct, bias;
    int64_t out_channels;
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups;
    bool relu;
  };

  // Each returns the number of the value it writes; the network's input is number 0. residual: added before the ReLU.
  int64_t conv(int64_t x, std::optional<int64_t> residual, Conv conv);
  int64_t max_pool(int64_t x);

  // The last layer's value.
  at::Tensor run(const at::Tensor& x) const { return run_all(x, nullptr); }

  // What took how long: so many layers in one step, one step after the other.
  struct Time {
    int64_t layers;
    double seconds;
  };
  std::vector<Time> timed_run(const at::Tensor& x) const {
    std::vector<Time> times;
    run_all(x, &times);
    return times;
  }

 private:
  struct Layer {
    int64_t x;
    std::optional<int64_t> residual;
    std::optional<Conv> conv;  // a max-pool where there is none
  };

  at::Tensor run_all(const at::Tensor& x, std::vector<Time>* times) const;
  int64_t add(Layer layer);
  bool last_read(int64_t value, int64_t layer) const { return value > 0 && last_reader_[value] == layer; }
  // Whether a direct convolution computes the max-pool behind it as well.
  bool pools(int64_t number) const;
  at::Tensor compute(int64_t number, const std::vector<at::Tensor>& values) const;

  std::vector<Layer> layers_;  // layer i writes value i + 1
  std::vector<int64_t> last_reader_ = {-1};  // of each value
};

}  // namespace resnet_fast::cpu
