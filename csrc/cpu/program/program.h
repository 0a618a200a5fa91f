// A frozen network on a CPU with AMX, or with bfloat16's dot products in AVX-512, as one call: convolutions and pools from
// buffer to buffer, all laid out beforehand.
//
// Built step by step from Python (resnet_fast/amx/program.py), then run for any number of images, `capacity` at a time.
// Buffers belong to the program, weights are tensors that programs share, so one caller runs at a time and others wait.
// In a section `by_image` every thread takes images through all its steps, in buffers of its own that stay in its second
// cache level; elsewhere the threads share each step. No value depends on which thread computes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace resnet_fast::cpu {

// Where a buffer is: in storage of its own, or one of the tensors of a call, bfloat16 in channels_last.
enum class Place { kStorage, kX, kResidual, kY };

// Activations, zero where there is halo. group: images side by side in a tile, 1 or 16. own: one for each thread, of one
// image. Vectors hold 32 channels, or those of the image that a stem reads.
struct Buffer {
  int64_t channels, height, width, halo, group, vector;
  bool own;
  int64_t pixel, row, plane, block, unit, origin;  // steps in values; `unit` is an image, or a group of them
  at::Tensor storage;
  Place place = Place::kStorage;
};

struct StepTime {
  std::string name;
  double seconds;  // of all threads together, divided by how many they are
};

class Step;
struct Live;

class Program {
 public:
  // planes: 1 for bfloat16, 3 for float32. threads: the most that will run it. tiles: AMX's, else dot products, which one
  // plane can do without them.
  Program(int64_t planes, int64_t capacity, int64_t threads, bool tiles);
  ~Program();

  // Returns its number. group and own as above; a vector of no more than 4 makes it an image's.
  int64_t buffer(
      int64_t channels, int64_t height, int64_t width, int64_t halo, int64_t group, bool own, int64_t vector);
  // One of the call's tensors as a buffer. Only for convolutions, and with one plane.
  int64_t tensor(Place place, int64_t channels, int64_t height, int64_t width);
  const Buffer& at(int64_t buffer) const;
  void section(bool by_image);
  void add(std::unique_ptr<Step> step);
  // Returns whether it became part of the step before.
  bool add_or_join(std::unique_ptr<Step> step);

  // Of the input, an image or a channels_last tensor, into buffer y.
  void read(int64_t y);
  // weight: packed, bias: float, padded to whole vectors; residual: a buffer or -1; taps: (row, column) steps. Returns
  // what add_or_join() does.
  bool conv(
      const std::string& name, int64_t x, int64_t y, int64_t residual, const at::Tensor& weight, const at::Tensor& bias,
      const std::vector<std::vector<int64_t>>& taps, int64_t stride, int64_t blocks, int64_t outputs_per_group,
      bool relu);
  // 3x3, stride 1, padding 1, of one plane, by dot products. weight: as winograd_multiply() takes it.
  void winograd(
      const std::string& name, int64_t x, int64_t y, int64_t residual, const at::Tensor& weight, const at::Tensor& bias,
      bool relu);
  // y is every stride-th pixel of every stride-th row of x.
  void skip(int64_t x, int64_t y, int64_t stride);
  // y = max_pool2d(relu(conv(x)), 3, stride 2, padding 1) of an image x, whose convolution is height x width. taps: a row
  // of `columns` pixels each.
  void conv_max_pool(
      const std::string& name, int64_t x, int64_t y, const at::Tensor& weight, const at::Tensor& bias,
      const std::vector<std::vector<int64_t>>& taps, int64_t columns, int64_t stride, int64_t height, int64_t width);
  // The buffer that a convolution `width` wide and pooled into y is in, a band at a time.
  int64_t band(int64_t y, int64_t width);
  void average_pool(int64_t x, int64_t y);
  // Of buffer x into the output, channels_last.
  void write(int64_t x);

  // y = program(x), images in the first dimension; float32 or bfloat16 each. Returns the images of which y is of no use,
  // because Winograd's transforms have spread a NaN or Inf.
  std::vector<int64_t> run(const at::Tensor& x, const at::Tensor& y);
  // Of a residual block that brings more than its input, and looks itself for what is not finite.
  void run_live(const at::Tensor& x, const at::Tensor& y, Live* live);
  std::vector<StepTime> timed_run(const at::Tensor& x, const at::Tensor& y);

 private:
  int64_t sharing() const;  // threads that share an image's steps, in the present section

  struct Section {
    bool by_image;
    std::vector<std::unique_ptr<Step>> steps;
  };
  // Returns what run() does. seconds: null, or of every thread's steps.
  std::vector<int64_t> run_all(const at::Tensor& x, const at::Tensor& y, Live* live, std::vector<double>* seconds);
  void run_chunk(const at::Tensor& x, const at::Tensor& y, Live* live, int64_t first, int64_t images, int64_t threads,
                 std::atomic<bool>* infinite, std::vector<double>* seconds);

  int planes_;
  int64_t capacity_, threads_;
  bool tiles_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<Section> sections_;
  std::mutex turn_;
};

}  // namespace resnet_fast::cpu
