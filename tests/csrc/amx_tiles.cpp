// Tiles, emulated or the CPU's, and a convolution on them, by themselves: for tests/test_emulated_amx.py. CONV is
// csrc/cpu/amx/conv.cpp or a changed copy of it.
#include CONV

namespace amx = resnet_fast::cpu::amx;

// sum (16, 16) float32 += a (16, 32) times b (16, 16, 2), rows of each `stride` bytes apart.
extern "C" void multiply_add(float* sum, const uint16_t* a, const uint16_t* b, int64_t stride) {
  amx::configure_tiles();
  _tile_loadd(0, sum, stride);
  _tile_loadd(4, a, stride);
  _tile_loadd(6, b, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_stored(0, sum, stride);
  amx::release_tiles();
}

extern "C" void without_configuration() { _tile_zero(0); }

// A 1x1 of bfloat16: y (31, 64) = x (32 pixels, 32) without its row 19 times weight as conv() takes it. Pixels of x and y are
// `step` values apart.
extern "C" void conv(const uint16_t* x, const uint16_t* weight, const float* bias, uint16_t* y, int64_t step) {
  alignas(64) float scratch[amx::kScratchFloats];
  const amx::Tile tiles[2] = {{0, 0, 0xffff}, {16 * step, 16 * step, 0xfff7}};
  const int64_t offset = 0;
  amx::ConvArgs args = {};
  args.planes = 1;
  args.x = x;
  args.x_row = step;
  args.blocks = args.steps = args.chunk = 1;
  args.outputs_per_group = 2;
  args.offsets = &offset;
  args.weight = weight;
  args.bias = bias;
  args.y = y;
  args.y_block = amx::kVector;
  args.y_row = step;
  args.y_gap = 0;
  amx::configure_tiles();
  amx::conv(args, tiles, 2, 0, 2, scratch);
  amx::release_tiles();
}
