// The gradient of a weight by a copy of csrc/cpu/amx/winograd_gradient_dots.cpp, in slabs of so many pairs of tiles: as
// convolve_by_dots.h.

// x, dy: [image][height][width][channels or outputs]; dweight: [output][3][3][channel]. Returns whether all was finite.
extern "C" bool GRADIENT(
    const uint16_t* x, const uint16_t* dy, int64_t images, int64_t height, int64_t width, int64_t channels,
    int64_t outputs, int64_t pairs, uint16_t* dweight) {
  using namespace resnet_fast::cpu::amx;
  const std::vector<uint16_t> zeros(channels + outputs);
  std::vector<uint16_t> x_values(2 * kWinogradPoints * channels * pairs), dy_values(2 * kWinogradPoints * outputs * pairs);
  std::vector<float> sums(kWinogradPoints * outputs * channels);
  WinogradGradientArgs args{};
  args.x = x, args.dy = dy, args.zeros = zeros.data();
  args.channels = channels, args.outputs = outputs, args.height = height, args.width = width;
  args.tiles = images * ((height + 1) / 2) * ((width + 1) / 2);
  args.pairs = pairs;
  args.x_values = x_values.data(), args.dy_values = dy_values.data(), args.sums = sums.data();
  args.dweight = dweight;
  args.output_step = 9 * channels, args.channel_step = 1, args.tap_step = channels;
  const int64_t all = (args.tiles + 1) / 2, blocks = static_cast<int64_t>(sums.size()) / kBlockValues;
  for (int64_t first = 0; first < all; first += pairs) {
    const int64_t count = all - first < pairs ? all - first : pairs;
    MUTANT::resnet_fast::cpu::amx::winograd_gradient_transform(args, 2 * first, 0, count);
    MUTANT::resnet_fast::cpu::amx::winograd_gradient_multiply(args, count, first == 0, 0, blocks);
  }
  return MUTANT::resnet_fast::cpu::amx::winograd_gradient_finish(args, 0, outputs);
}
