// The steps that deal with what a call brings besides its activations.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../activation_pool.h"
#include "steps.h"

namespace resnet_fast::cpu {

namespace {

// Once a call, not once a chunk of images. An item is a block of 32 output channels.
class PackStep : public Step {
 public:
  PackStep(int planes, int64_t capacity, std::vector<Packed> layers)
      : Step("pack", capacity, 0), planes_(planes), layers_(std::move(layers)) {
    for (const Packed& packed : layers_) items += packed.weight.size(0);
  }

  void run(const Run& run, int64_t item) const override {
    if (run.first > 0) return;
    size_t number = 0;
    for (; item >= layers_[number].weight.size(0); ++number) item -= layers_[number].weight.size(0);
    const at::Tensor& weight = layers_[number].weight;
    auto* values = static_cast<uint16_t*>(weight.mutable_data_ptr());
    pack_block(planes_, layers_[number], *run.live, item, values + item * weight.stride(0));
  }

 private:
  int planes_;
  std::vector<Packed> layers_;
};

class CheckStep : public Step {
 public:
  CheckStep() : Step("check", 1, 1) {}

  void run(const Run& run, int64_t) const override {
    const int64_t values = run.y.stride(0);
    const auto* y = static_cast<const uint16_t*>(run.y.const_data_ptr()) + (run.first + run.unit) * values;
    if (!amx::all_finite(y, values)) run.live->finite = false;
  }
};

}  // namespace

LiveLayer live_layer(const BlockLayer& layer, const at::Tensor& conv_weight) {
  const auto vector = [](const at::Tensor& t) {
    if (!t.defined()) return t;
    if (t.scalar_type() != at::kBFloat16 || !t.is_contiguous()) return t.to(at::kFloat).contiguous();
    // to() takes some 15 us, and a ResNet-50 has 212 of them
    const at::Tensor wide = at::empty(t.sizes(), t.options().dtype(at::kFloat));
    std::copy_n(t.const_data_ptr<at::BFloat16>(), t.numel(), wide.mutable_data_ptr<float>());
    return wide;
  };
  return {conv_weight, vector(layer.weight), vector(layer.bias), vector(layer.mean), vector(layer.var), layer.eps};
}

Packed empty_packed(int64_t layer, int planes, int64_t out_channels, int64_t steps, int64_t by_item_threads) {
  const PoolGuard pool;
  const int64_t blocks = by_item_threads > 0 ? by_item_threads : out_channels / amx::kVector;
  return {layer, by_item_threads > 0, at::empty({blocks, steps, planes, amx::kBlockValues}, at::kBFloat16),
          at::empty({out_channels}, at::kFloat), at::empty({out_channels}, at::kFloat)};
}

Packed empty_winograd(int64_t layer, int64_t channels, int64_t out_channels) {
  Packed packed = empty_packed(layer, 1, out_channels, amx::kWinogradPoints * channels / amx::kVector);
  packed.winograd = true;
  return packed;
}

void pack_block(int planes, const Packed& packed, const Live& live, int64_t block, uint16_t* to) {
  const LiveLayer& layer = live.layers[packed.layer];
  const at::Tensor& weight = layer.conv_weight;
  const int64_t first = block * amx::kVector, outputs = layer.turned ? 1 : 0, sign = layer.turned ? -1 : 1;
  int64_t begin = first * weight.stride(outputs);
  if (layer.turned) begin += (weight.size(2) - 1) * weight.stride(2) + (weight.size(3) - 1) * weight.stride(3);
  const amx::WeightArgs args{planes,
                             static_cast<const char*>(weight.const_data_ptr()) + begin * weight.element_size(),
                             weight.scalar_type() == at::kFloat,
                             weight.stride(outputs),
                             weight.stride(1 - outputs),
                             sign * weight.stride(2),
                             sign * weight.stride(3),
                             weight.size(1 - outputs),
                             weight.size(2),
                             weight.size(3),
                             to};
  packed.winograd ? amx::pack_winograd_weights(args) : amx::pack_weights(args);
  if (!layer.mean.defined()) return;
  const auto vector = [first](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() + first : nullptr; };
  amx::fold_norm({vector(layer.weight), vector(layer.bias), vector(layer.mean), vector(layer.var),
                  static_cast<float>(layer.eps), amx::kVector, packed.scale.mutable_data_ptr<float>() + first,
                  packed.bias.mutable_data_ptr<float>() + first});
}

std::unique_ptr<Step> make_pack(int planes, int64_t capacity, std::vector<Packed> layers) {
  return std::make_unique<PackStep>(planes, capacity, std::move(layers));
}

std::unique_ptr<Step> make_check() { return std::make_unique<CheckStep>(); }

}  // namespace resnet_fast::cpu
