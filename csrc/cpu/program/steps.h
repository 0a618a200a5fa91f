// The kinds of steps a Program is made of: each knows its buffers, and cuts its work for one unit into items.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../amx/amx.h"
#include "../residual_block.h"
#include "program.h"

namespace resnet_fast::cpu {

// A convolution and its batch norm as a call brings them; vectors are contiguous float32, or undefined, with a mean that is
// where there is no norm. turned: the kernels by 180 degrees, from output to input channels, as a data gradient has them.
struct LiveLayer {
  at::Tensor conv_weight, weight, bias, mean, var;
  double eps;
  bool turned = false;
};

LiveLayer live_layer(const BlockLayer& layer, const at::Tensor& conv_weight);

// What a call brings besides x and y. residual: undefined for none, else as x.
struct Live {
  at::Tensor residual;
  std::vector<LiveLayer> layers;
  std::atomic<bool> finite{true};  // whether every value of y is, where that was looked at
};

// One call: its tensors, the chunk of images, and who runs what. `unit` is an image, or a group of them.
struct Run {
  const at::Tensor &x, &y;
  int64_t first, images, thread, unit;
  float* scratch;
  Live* live;
  bool tiles;  // AMX's, else dot products
  std::atomic<bool>* infinite;  // of each image: what Winograd's transforms have spread NaN or Inf in
};

// What a convolution computes: tiles for AMX, single pixels for dot products.
struct Rows {
  std::vector<amx::Tile> tiles;
  std::vector<amx::Pixel> pixels;

  int64_t size() const { return static_cast<int64_t>(tiles.size() + pixels.size()); }
};

// For `count` tiles or pixels of `rows`, and the output blocks [begin, end).
inline void convolve(
    const Run& run, const amx::ConvArgs& args, const Rows& rows, int64_t first, int64_t count, int64_t begin,
    int64_t end) {
  run.tiles ? amx::conv(args, rows.tiles.data() + first, count, begin, end, run.scratch)
            : amx::conv_dots(args, rows.pixels.data() + first, count, begin, end);
}

// Where the first pixel of an image is; with a step over groups, that of the group's first image.
uint16_t* pixels(const Buffer& buffer, const Run& run, int64_t step_group);

class Step {
 public:
  Step(std::string name, int64_t group, int64_t items) : name(std::move(name)), group(group), items(items) {}
  virtual ~Step() = default;
  // Items may run in any order, at the same time.
  virtual void run(const Run& run, int64_t item) const = 0;
  // Takes the next step in where each of its items can run right behind one of these, while what it reads is near.
  virtual bool join(std::unique_ptr<Step>&) { return false; }

  std::string name;
  const int64_t group;  // images in a unit of this step
  int64_t items;        // for a unit
};

struct ConvShape {
  int64_t stride, blocks, outputs_per_group;
  bool relu;
};

// What a call brings for one layer, as conv() takes it. by_item: the convolution's items pack what they need for
// themselves, one output block at a time, so that it never leaves their thread's second cache level; else a step before it
// packs everything.
struct Packed {
  int64_t layer;
  bool by_item;
  at::Tensor weight, scale, bias;  // weight: of every output block, or of one for each thread
  bool winograd = false;           // weight: as winograd_multiply() takes it
};
Packed empty_packed(int64_t layer, int planes, int64_t out_channels, int64_t steps, int64_t by_item_threads = 0);
Packed empty_winograd(int64_t layer, int64_t channels, int64_t out_channels);
void pack_block(int planes, const Packed& packed, const Live& live, int64_t block, uint16_t* weight);

// From a tensor of the call into y: every stride-th pixel of every stride-th row.
std::unique_ptr<Step> make_read(int planes, const Buffer& y, Place from = Place::kX, int64_t stride = 1);
std::unique_ptr<Step> make_skip(int planes, const Buffer& x, const Buffer& y, int64_t stride);
std::unique_ptr<Step> make_write(int planes, const Buffer& x);
std::unique_ptr<Step> make_average_pool(int planes, const Buffer& x, const Buffer& y);
std::unique_ptr<Step> make_conv(
    int planes, bool tiles, int64_t threads, const std::string& name, const Buffer& x, const Buffer& y,
    const Buffer* residual, const Packed& packed, const std::vector<std::vector<int64_t>>& taps,
    const ConvShape& shape);

// 3x3, stride 1, padding 1, of one plane; packed for it. sharing: of all threads, those that share an image.
std::unique_ptr<Step> make_winograd(
    int64_t threads, int64_t sharing, const std::string& name, const Buffer& x, const Buffer& y, const Buffer* residual,
    const Packed& packed, bool relu);

// y = max_pool2d(relu(conv(x)), 3, stride 2, padding 1), of an image's only input block. band: a buffer for each thread,
// of a few of the convolution's `height` rows: band_height, where `threads` share an image.
std::unique_ptr<Step> make_conv_pool(
    int planes, bool tiles, const std::string& name, const Buffer& x, const Buffer& band, const Buffer& y,
    int64_t height, const Packed& packed, const std::vector<std::vector<int64_t>>& taps, int64_t columns,
    int64_t stride);
int64_t band_height(int64_t planes, int64_t channels, int64_t width, int64_t y_height, int64_t threads);

std::unique_ptr<Step> make_pack(int planes, int64_t capacity, std::vector<Packed> layers);
// Looks for values of y that are not finite.
std::unique_ptr<Step> make_check();

}  // namespace resnet_fast::cpu
