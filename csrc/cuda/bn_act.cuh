// What bn_act's kernels do with an element: Ops for the map and reduce of skeletons.cuh. No tensors, no launches.
//
// y = act((x - mean) * rstd * weight + bias [+ residual]), computed in Acc (double for double, else float) and rounded
// once. act keeps NaN, and its gradient passes wherever the stored y is not <= 0.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "skeletons.cuh"

namespace resnet_fast::cuda {

// ---- per-channel parameters ----

template <typename Acc>
struct Affine {
  Acc mean;
  Acc rstd;
  Acc scale;
  Acc bias;

  // fma spelled out: the backward's mask must see the value that the forward saw.
  __device__ __forceinline__ Acc operator()(Acc x) const { return fma(x - mean, scale, bias); }
};

template <typename Acc>
struct Norm {
  const Acc* weight;  // may be null: 1
  const Acc* bias;    // may be null: 0
  const Acc* mean;
  const Acc* var;
  Acc eps;

  __device__ __forceinline__ Affine<Acc> at(int64_t channel) const {
    const Acc rstd = Acc(1) / sqrt(var[channel] + eps);
    const Acc scale = weight != nullptr ? rstd * weight[channel] : rstd;
    return {mean[channel], rstd, scale, bias != nullptr ? bias[channel] : Acc(0)};
  }
};

// ---- statistics ----

template <typename Acc>
struct Moments {
  Acc count;
  Acc mean;
  Acc m2;  // sum((x - mean)^2)

  // Chan's formula; an empty side changes nothing.
  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const Acc total = count + other.count;
    const Acc delta = other.mean - mean;
    const Acc part = other.count / total;
    mean += delta * part;
    m2 += other.m2 + delta * delta * count * part;
    count = total;
  }
};

// A thread's own values, as sums shifted by its first one: exact where mean >> std, and no division per value.
template <typename Acc>
struct ShiftedSums {
  Acc count;
  Acc shift;
  Acc sum;
  Acc sum_squares;

  __device__ __forceinline__ void add(Acc x) {
    if (count == 0) shift = x;
    const Acc d = x - shift;
    sum += d;
    sum_squares += d * d;
    count += 1;
  }

  __device__ __forceinline__ Moments<Acc> state() const {
    if (count == 0) return {};
    const Acc m2 = sum_squares - sum * (sum / count);
    return {count, shift + sum / count, m2 < 0 ? Acc(0) : m2};  // not max(): NaN stays NaN
  }
};

struct NoChannel {};

template <typename Tr>
struct Statistics : Tr {
  using Acc = typename Tr::Acc;
  using Channel = NoChannel;
  using State = Moments<Acc>;
  using Running = ShiftedSums<Acc>;

  const typename Tr::T* x;

  __device__ __forceinline__ Channel channel(int64_t) const { return {}; }

  template <bool kChannelsLast>
  __device__ __forceinline__ void reduce(int64_t offset, const Channel*, Running* running) const {
    const auto values = Tr::load(x + offset);
#pragma unroll
    for (int v = 0; v < Tr::V; ++v) running[kChannelsLast ? v : 0].add(static_cast<Acc>(values.values[v]));
  }
};

template <typename Acc>
struct FinishStatistics {
  Acc* mean;
  Acc* var;

  __device__ __forceinline__ void operator()(int64_t channel, const Moments<Acc>& state) const {
    mean[channel] = state.mean;
    var[channel] = state.m2 / state.count;
  }
};

// ---- forward ----

template <typename Tr>
struct Apply : Tr {
  using T = typename Tr::T;
  using Acc = typename Tr::Acc;
  using Channel = Affine<Acc>;

  const T* x;
  const T* residual;  // may be null
  T* y;
  Norm<Acc> norm;
  bool relu;

  __device__ __forceinline__ Channel channel(int64_t c) const { return norm.at(c); }

  template <bool kChannelsLast>
  __device__ __forceinline__ void map(int64_t offset, const Channel* channel) const {
    const auto xs = Tr::load(x + offset);
    typename Tr::Vec residuals = {};
    if (residual != nullptr) residuals = Tr::load(residual + offset);
    typename Tr::Vec ys;
#pragma unroll
    for (int v = 0; v < Tr::V; ++v) {
      Acc value = channel[kChannelsLast ? v : 0](static_cast<Acc>(xs.values[v]));
      if (residual != nullptr) value += static_cast<Acc>(residuals.values[v]);
      if (relu && value <= 0) value = 0;  // NaN stays NaN
      ys.values[v] = static_cast<T>(value);
    }
    Tr::store(y + offset, ys);
  }
};

// ---- backward ----

enum class Mask { none, from_x, from_y };

template <typename Tr>
struct Gradient : Tr {
  using T = typename Tr::T;
  using Acc = typename Tr::Acc;

  const T* dy;
  const T* x;
  const T* y;  // for Mask::from_y
  Norm<Acc> norm;
  Mask mask;

  struct Values {
    Acc x[Tr::V];
    Acc dz[Tr::V];
  };

  // dz = dy where the forward's output was kept. Without y that output is computed again and rounded as it was stored.
  template <bool kChannelsLast>
  __device__ __forceinline__ Values values(int64_t offset, const Affine<Acc>* affine) const {
    const auto dys = Tr::load(dy + offset);
    const auto xs = Tr::load(x + offset);
    typename Tr::Vec ys = {};
    if (mask == Mask::from_y) ys = Tr::load(y + offset);
    Values out;
#pragma unroll
    for (int v = 0; v < Tr::V; ++v) {
      out.x[v] = static_cast<Acc>(xs.values[v]);
      const T again = static_cast<T>(affine[kChannelsLast ? v : 0](out.x[v]));
      const Acc kept = static_cast<Acc>(mask == Mask::from_y ? ys.values[v] : again);
      out.dz[v] = mask != Mask::none && kept <= 0 ? Acc(0) : static_cast<Acc>(dys.values[v]);
    }
    return out;
  }
};

template <typename Acc>
struct Sums {
  Acc dz;
  Acc dzx;  // sum(dz * (x - mean))

  __device__ __forceinline__ void merge(const Sums& other) {
    dz += other.dz;
    dzx += other.dzx;
  }
  __device__ __forceinline__ Sums state() const { return *this; }
};

template <typename Tr>
struct BackwardReduce : Gradient<Tr> {
  using Acc = typename Tr::Acc;
  using Channel = Affine<Acc>;
  using State = Sums<Acc>;
  using Running = State;

  __device__ __forceinline__ Channel channel(int64_t c) const { return this->norm.at(c); }

  template <bool kChannelsLast>
  __device__ __forceinline__ void reduce(int64_t offset, const Channel* channel, Running* running) const {
    const auto in = this->template values<kChannelsLast>(offset, channel);
#pragma unroll
    for (int v = 0; v < Tr::V; ++v) {
      const int c = kChannelsLast ? v : 0;
      running[c].dz += in.dz[v];
      running[c].dzx += in.dz[v] * (in.x[v] - channel[c].mean);
    }
  }
};

template <typename Acc>
struct FinishBackward {
  Norm<Acc> norm;
  Acc* dweight;
  Acc* dbias;

  __device__ __forceinline__ void operator()(int64_t channel, const Sums<Acc>& state) const {
    dweight[channel] = state.dzx * norm.at(channel).rstd;
    dbias[channel] = state.dz;
  }
};

template <typename Tr>
struct BackwardApply : Gradient<Tr> {
  using T = typename Tr::T;
  using Acc = typename Tr::Acc;

  const Acc* dweight;  // sums of batch statistics; null where the statistics were fixed
  const Acc* dbias;
  Acc inv_count;
  T* dx;         // may be null
  T* dresidual;  // may be null

  struct Channel : Affine<Acc> {
    Acc mean_dz;
    Acc mean_dzx;  // rstd^2 * mean(dz * (x - mean))
  };

  __device__ __forceinline__ Channel channel(int64_t c) const {
    const Affine<Acc> affine = this->norm.at(c);
    if (dweight == nullptr) return {affine, Acc(0), Acc(0)};
    return {affine, dbias[c] * inv_count, dweight[c] * affine.rstd * inv_count};
  }

  template <bool kChannelsLast>
  __device__ __forceinline__ void map(int64_t offset, const Channel* channel) const {
    Affine<Acc> affine[kChannelsLast ? Tr::V : 1];
#pragma unroll
    for (int v = 0; v < (kChannelsLast ? Tr::V : 1); ++v) affine[v] = channel[v];
    const auto in = this->template values<kChannelsLast>(offset, affine);
    typename Tr::Vec dxs;
    typename Tr::Vec dzs;
#pragma unroll
    for (int v = 0; v < Tr::V; ++v) {
      const Channel& c = channel[kChannelsLast ? v : 0];
      Acc value = in.dz[v];
      if (dweight != nullptr) value -= c.mean_dz + (in.x[v] - c.mean) * c.mean_dzx;
      dxs.values[v] = static_cast<T>(c.scale * value);
      dzs.values[v] = static_cast<T>(in.dz[v]);
    }
    if (dx != nullptr) Tr::store(dx + offset, dxs);
    if (dresidual != nullptr) Tr::store(dresidual + offset, dzs);
  }
};

}  // namespace resnet_fast::cuda
