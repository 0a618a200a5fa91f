// Winograd's F(4x4, 3x3): a weight packed, and the three passes over a slab of tiles. See conv_kernels.h for what they read
// and write.
//
// A tile of 6x6 pixels gives 4x4 outputs: y = A' [(G w G') . (B' x B)] A, with the points 0, +-5/8, +-3/2 and infinity.
// In float32 their error is half that of the usual 0, +-1, +-2 (benchmarks/NOTES.md), and all of B and A is exact. The
// rows of G are powers of a point, divided.
#include "winograd_parts.h"

#include "conv_kernels.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

using namespace winograd;

namespace {

// One dimension of G w G'.
C10_ALWAYS_INLINE void transform_weight(const Vec* w, int64_t step, Vec* out, int64_t out_step) {
  const Vec w0 = w[0], w1 = w[step], w2 = w[2 * step];
  const Vec even_p = Vec(kOverP) * fma(kP * kP, w2, w0), even_q = Vec(kOverQ) * fma(kQ * kQ, w2, w0);
  out[0] = Vec(kOver0) * w0;
  out[out_step] = fma(kOverP * kP, w1, even_p);
  out[2 * out_step] = fma(-kOverP * kP, w1, even_p);
  out[3 * out_step] = fma(kOverQ * kQ, w1, even_q);
  out[4 * out_step] = fma(-kOverQ * kQ, w1, even_q);
  out[5 * out_step] = w2;
}

// One dimension of A' m A.
C10_ALWAYS_INLINE void transform_output(const Vec* m, int64_t step, Vec* out, int64_t out_step) {
  constexpr float p = kPointP, q = kPointQ, p2 = p * p, q2 = q * q;
  const Vec even_p = m[step] + m[2 * step], odd_p = m[step] - m[2 * step];
  const Vec even_q = m[3 * step] + m[4 * step], odd_q = m[3 * step] - m[4 * step];
  out[0] = m[0] + (even_p + even_q);
  out[out_step] = fma(q, odd_q, Vec(p) * odd_p);
  out[2 * out_step] = fma(q2, even_q, Vec(p2) * even_p);
  out[3 * out_step] = fma(q2 * q, odd_q, fma(p2 * p, odd_p, m[5 * step]));
}

// By the number of rows, which are tiles, less one.
constexpr auto kByTiles = multiply_table<kWinogradBlock, 1>(std::make_integer_sequence<int, kRows>());

}  // namespace

void winograd_pack(const WinogradWeight& conv, int64_t begin, int64_t end) {
  const int64_t element_step = conv.panels * conv.channels * kWinogradPanel;
  for (int64_t output = 0; output < conv.panels * kWinogradPanel; output += Vec::size()) {
    // Beyond the outputs, in the last panel, the last is repeated: what comes of it is never stored.
    int32_t places[Vec::size()];
    float scales[Vec::size()];
    for (int64_t lane = 0; lane < Vec::size(); ++lane) {
      const int64_t place = smaller(output + lane, conv.outputs - 1);
      places[lane] = static_cast<int32_t>(place * conv.output_step);
      scales[lane] = conv.scale == nullptr ? 1 : conv.scale[place];
    }
    const auto outputs = at::vec::Vectorized<int32_t>::loadu(places);
    const Vec scale = Vec::loadu(scales);
    float* packed = conv.packed + block_offset(output, kStep, conv.channels);
    for (int64_t channel = begin; channel < end; ++channel) {
      const float* taps = conv.weight + channel * conv.channel_step;
      float* to = packed + channel * kStep;
      Vec w[kTaps][kTaps], half[kIn][kTaps];
      for (int i = 0; i < kTaps; ++i) {
        for (int j = 0; j < kTaps; ++j) {
          w[i][j] = scale * at::vec::gather<sizeof(float)>(taps + (i * kTaps + j) * conv.tap_step, outputs);
        }
      }
      for (int j = 0; j < kTaps; ++j) transform_weight(&w[0][j], kTaps, &half[0][j], kTaps);
      for (int i = 0; i < kIn; ++i) {
        Vec row[kIn];
        transform_weight(half[i], 1, row, 1);
        for (int j = 0; j < kIn; ++j) row[j].store(to + (i * kIn + j) * element_step);
      }
    }
  }
}

namespace {

template <bool normed>
void transform_tiles(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  const int64_t step = slab.transformed_step;  // not read again behind every store
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of<kOut, kOut>(conv, slab.first + tile);
    const float* pixels[kIn][kIn];
    find_pixels(conv, place, pixels);
    float* out = slab.transformed + tile * kWinogradBlock;
    for_each_vector<L::size>(conv.channels, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
      float* to = out + block_offset(channel, kWinogradBlock, slab.tiles);
      const int64_t behind = channel + kWinogradBlock;
      float* next = out + (behind < conv.channels ? block_offset(behind, kWinogradBlock, slab.tiles)
                                                  : kWinogradBlock + channel % kWinogradBlock);  // of the next tile
      const Pixel<normed> pixel(conv, channel);
      Vec x[kIn][kIn], half[kIn][kIn];
      for (int j = 0; j < kIn; ++j) {
        for (int i = 0; i < kIn; ++i) x[i][j] = pixel.load(pixels[i][j], channel, span);
        transform_input(&x[0][j], kIn, &half[0][j], kIn);
      }
      for (int i = 0; i < kIn; ++i) {
        Vec row[kIn];
        transform_input(half[i], 1, row, 1);
        for (int j = 0; j < kIn; ++j) {
          row[j].store(to + (i * kIn + j) * step);
          if (channel % kLine == 0) fetch_to_write(next + (i * kIn + j) * step);
        }
      }
    });
  }
}

}  // namespace

void winograd_input(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  with_norm(conv, [&](auto normed) { transform_tiles<decltype(normed)::value>(conv, slab, begin, end); });
}

void winograd_product(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  const int64_t panels = conv.panels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / panels, panel = item % panels;
    const float* weight = conv.weight + item * conv.channels * kWinogradPanel;
    const float* transformed = slab.transformed + element * slab.transformed_step;
    float* products = slab.products + element * slab.products_step + panel * slab.tiles * kWinogradPanel;
    const int64_t finished = kFinished > conv.summed ? kFinished : conv.summed;
    for (int64_t channel = 0; channel < conv.channels; channel += finished) {
      const int64_t channels = smaller(finished, conv.channels - channel);
      const Terms terms = {channels, conv.summed, slab.tiles * kWinogradBlock, channel == 0 && !conv.continues};
      const float* block = transformed + block_offset(channel, kWinogradBlock, slab.tiles);
      for (int64_t output = 0; output < kWinogradPanel; output += kStep) {
        const float* weights = weight + output * conv.channels + channel * kStep;
        for (int64_t tile = 0; tile < slab.tiles; tile += kRows) {
          kByTiles[smaller(kRows, slab.tiles - tile) - 1](
              block + tile * kWinogradBlock, weights, products + output * slab.tiles + tile * kStep, terms,
              fetched_by(tile / kRows, weights, channels));
        }
      }
    }
  }
}

namespace {

// Sums of a chunk's outputs, about a value near them, so that they do not cancel; in memory between its tiles.
class Moments {
 public:
  Moments(const WinogradConv& conv, int64_t tile) : outputs_(conv.outputs), starts_(tile % conv.chunk == 0) {
    at_ = conv.moments + tile / conv.chunk * 3 * outputs_;
  }

  // near: the first row of the tile's outputs
  template <typename Span>
  C10_ALWAYS_INLINE void load(int64_t channel, const Vec* near, Span span) {
    if (starts_) {
      shift_ = L{{Vec(1.0f / kOut) * ((near[0] + near[1]) + (near[2] + near[3]))}};
      shift_.store_acc(at_ + channel, span);
      sum_ = square_ = L::fill(0);
    } else {
      shift_ = L::load(at_ + channel, span);
      sum_ = L::load(at_ + outputs_ + channel, span);
      square_ = L::load(at_ + 2 * outputs_ + channel, span);
    }
  }
  C10_ALWAYS_INLINE void add(const L& out) {
    const L centred = out - shift_;
    sum_ = sum_ + centred;
    square_ = fmadd(centred, centred, square_);
  }
  template <typename Span>
  C10_ALWAYS_INLINE void store(int64_t channel, Span span) const {
    sum_.store_acc(at_ + outputs_ + channel, span);
    square_.store_acc(at_ + 2 * outputs_ + channel, span);
  }

 private:
  int64_t outputs_;
  bool starts_;
  float* at_;
  L shift_, sum_, square_;
};

template <bool with_moments>
bool write_tiles(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  Vec zero_if_finite(0);
  const int64_t step = slab.products_step;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of<kOut, kOut>(conv, slab.first + tile);
    const int64_t pixel = (place.image * conv.height + place.row) * conv.width + place.column;
    const float* products = slab.products + tile * kStep;
    Moments moments(conv, slab.first + tile);
    for_each_vector<L::size>(conv.outputs, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
      const float* from = products + block_offset(channel, kStep, slab.tiles);
      Vec half[kOut][kIn];
      for (int j = 0; j < kIn; ++j) {
        Vec column[kIn];
        for (int i = 0; i < kIn; ++i) column[i] = Vec::loadu(from + (i * kIn + j) * step);
        transform_output(column, 1, &half[0][j], kIn);
      }
      const L bias = L::load(conv.bias + channel, span);
      for (int i = 0; i < kOut; ++i) {
        Vec row[kOut];
        transform_output(half[i], 1, row, 1);
        if (with_moments && i == 0) moments.load(channel, row, span);
        for (int j = 0; j < kOut; ++j) {
          zero_if_finite = fma(0, row[j], zero_if_finite);
          if (i >= place.rows || j >= place.columns) continue;
          const int64_t offset = (pixel + i * conv.width + j) * conv.outputs + channel;
          L out = L{{row[j]}} + bias;
          if (conv.residual != nullptr) out = out + L::load(conv.residual + offset, span);
          if (conv.relu) out = relu(out);
          if (channel % kLine == 0) fetch_to_write(conv.y + offset + kOut * conv.outputs);  // of the tile on the right
          out.store(conv.y + offset, span);
          if constexpr (with_moments) moments.add(out);
        }
      }
      if constexpr (with_moments) moments.store(channel, span);
    });
  }
  return is_zero(zero_if_finite);
}

}  // namespace

bool winograd_output(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  return conv.moments == nullptr ? write_tiles<false>(conv, slab, begin, end) : write_tiles<true>(conv, slab, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
