// Means and variances from sums over chunks of the values, merged in a fixed order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

namespace resnet_fast::cpu {

class ChunkMoments {
 public:
  ChunkMoments(int64_t chunks, int64_t channels)
      : channels_(channels), counts_(chunks), buffer_(at::empty({chunks, 2, channels}, at::kDouble)) {}

  // Of `width` channels from `channel` on: sums of count values each, and of their squares, about `shift`.
  template <typename T, typename S>
  void put(
      int64_t chunk, int64_t channel, int64_t width, int64_t count, const T* shift, const S* sums, const S* squares) {
    double* mean = buffer_.mutable_data_ptr<double>() + chunk * 2 * channels_ + channel;
    double* m2 = mean + channels_;
    counts_[chunk] = count;
    const double part = 1.0 / static_cast<double>(count);
    for (int64_t i = 0; i < width; ++i) {
      const double sum = sums[i];
      mean[i] = shift[i] + sum * part;
      m2[i] = std::max(0.0, squares[i] - sum * sum * part);
    }
  }

  // mean and biased variance, float32
  std::tuple<at::Tensor, at::Tensor> merged() const {
    const double part = 1.0 / static_cast<double>(std::accumulate(counts_.begin(), counts_.end(), int64_t{0}));
    std::vector<double> mean(channels_), var(channels_);
    each([&](double count, const double* means, const double*) {
      for (int64_t c = 0; c < channels_; ++c) mean[c] += count * part * means[c];
    });
    each([&](double count, const double* means, const double* m2) {
      for (int64_t c = 0; c < channels_; ++c) {
        const double off = means[c] - mean[c];
        var[c] += (m2[c] + count * off * off) * part;
      }
    });
    const at::Tensor out_mean = at::empty({channels_}, at::kFloat), out_var = at::empty({channels_}, at::kFloat);
    std::copy(mean.begin(), mean.end(), out_mean.mutable_data_ptr<float>());
    std::copy(var.begin(), var.end(), out_var.mutable_data_ptr<float>());
    return {out_mean, out_var};
  }

 private:
  template <typename F>
  void each(const F& f) const {
    const double* chunk = buffer_.const_data_ptr<double>();
    for (const int64_t count : counts_) {
      f(static_cast<double>(count), chunk, chunk + channels_);
      chunk += 2 * channels_;
    }
  }

  int64_t channels_;
  std::vector<int64_t> counts_;
  at::Tensor buffer_;
};

}  // namespace resnet_fast::cpu
