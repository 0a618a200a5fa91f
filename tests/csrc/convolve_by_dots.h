// One convolution by a copy of csrc/cpu/amx/winograd_dots.cpp, in tiles of one image, without what Programs lay out:
// included by what tests/test_winograd_dots_mutants.py writes, once for each copy, which is in the namespace MUTANT.

// x: [block][height + 2][width + 2 and more][32], with a halo; weight: as winograd_multiply() takes it; y and residual:
// [block][height][width][32]. Returns whether all was finite.
extern "C" bool CONVOLVE(
    const uint16_t* x, int64_t x_row, int64_t x_block, int64_t blocks, const uint16_t* weight, const float* scale,
    const float* bias, const uint16_t* residual, uint16_t* y, int64_t height, int64_t width, int64_t out_blocks, bool relu) {
  using namespace resnet_fast::cpu::amx;
  WinogradArgs args{};
  args.x = x;
  args.x_pixel = kVector;
  args.x_row = x_row;
  args.x_block = x_block;
  args.blocks = blocks;
  args.weight = weight;
  args.scale = scale;
  args.bias = bias;
  args.residual = residual;
  args.y = y;
  args.y_pixel = kVector;
  args.y_row = width * kVector;
  args.y_block = height * args.y_row;
  args.relu = relu;
  std::vector<WinogradStrip> strips;
  std::vector<WinogradTile> tiles;
  for (int64_t row = 0; row < height; row += 2) {
    strips.push_back({row * x_row, (width + 1) / 2});
    for (int64_t column = 0; column < width; column += 2) {
      tiles.push_back({static_cast<int32_t>(row * args.y_row + column * kVector),
                       static_cast<int32_t>(height - row < 2 ? 1 : 2), static_cast<int32_t>(width - column < 2 ? 1 : 2)});
    }
  }
  const auto count = static_cast<int64_t>(tiles.size());
  args.tiles = count | 1;
  std::vector<uint16_t> values(blocks * kWinogradPoints * args.tiles * kVector);
  std::vector<char> infinite(count);
  alignas(64) float scratch[kScratchFloats];
  MUTANT::resnet_fast::cpu::amx::winograd_transform(args, strips.data(), static_cast<int64_t>(strips.size()), values.data());
  MUTANT::resnet_fast::cpu::amx::winograd_multiply(
      args, values.data(), tiles.data(), count, 0, out_blocks, reinterpret_cast<bool*>(infinite.data()), scratch);
  for (const char tile : infinite) {
    if (tile) return false;
  }
  return true;
}
