// What a batch norm kernel does to V neighbouring elements: Ops for the map and reduce of bn_threads.h. No tensors, no
// launches. kPerColumn: every element has its own channel, else they share channel[0].
#pragma once

#include <type_traits>

#include "bn_math.h"

namespace resnet_fast::cuda {

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T values[V];
};

template <int V, typename T>
RF_HOST_DEVICE Vec<T, V> load(const T* from) {
  return *reinterpret_cast<const Vec<T, V>*>(from);
}

template <int V, typename T>
RF_HOST_DEVICE void store(T* to, const Vec<T, V>& values) {
  *reinterpret_cast<Vec<T, V>*>(to) = values;
}

// ---- statistics ----

template <typename T_, typename Acc_>
struct Statistics {
  using T = T_;
  using Acc = Acc_;
  struct Channel {};
  using Running = ShiftedSums<Acc, std::is_same_v<T, Acc>>;

  const T* x;

  RF_HOST_DEVICE Channel channel(int64_t) const { return {}; }

  template <int V, bool kPerColumn>
  RF_HOST_DEVICE void reduce(int64_t offset, const Channel*, Running* running) const {
    const auto xs = load<V>(x + offset);
    RF_UNROLL
    for (int v = 0; v < V; ++v) running[kPerColumn ? v : 0].add(static_cast<Acc>(xs.values[v]));
  }
};

template <typename Acc>
struct FinishStatistics {
  Acc* mean;
  Acc* var;

  RF_HOST_DEVICE void operator()(int64_t channel, const Moments<double>& state) const {
    mean[channel] = static_cast<Acc>(state.mean());
    var[channel] = static_cast<Acc>(state.var());
  }
};

// ---- forward ----

// kJoin: the residual has a norm of its own.
template <typename T_, typename Acc_, bool kJoin>
struct Apply {
  using T = T_;
  using Acc = Acc_;
  struct Single {
    Affine<Acc> main;
  };
  struct Pair {
    Affine<Acc> main;
    Affine<Acc> residual;
  };
  using Channel = std::conditional_t<kJoin, Pair, Single>;

  const T* x;
  const T* residual;  // may be null
  T* y;               // may be x
  Norm<Acc> norm;
  Norm<Acc> residual_norm;
  bool relu;

  RF_HOST_DEVICE Channel channel(int64_t c) const {
    if constexpr (kJoin) {
      return {norm.at(c), residual_norm.at(c)};
    } else {
      return {norm.at(c)};
    }
  }

  template <int V, bool kPerColumn>
  RF_HOST_DEVICE void map(int64_t offset, const Channel* channel) const {
    const auto xs = load<V>(x + offset);
    Vec<T, V> residuals = {};
    if (residual != nullptr) residuals = load<V>(residual + offset);
    Vec<T, V> ys;
    RF_UNROLL
    for (int v = 0; v < V; ++v) {
      const Channel& c = channel[kPerColumn ? v : 0];
      Acc value = c.main(static_cast<Acc>(xs.values[v]));
      if (residual != nullptr) {
        const Acc added = static_cast<Acc>(residuals.values[v]);
        if constexpr (kJoin) {
          value += c.residual(added);
        } else {
          value += added;
        }
      }
      ys.values[v] = static_cast<T>(relu ? relu_of(value) : value);
    }
    store<V>(y + offset, ys);
  }
};

// ---- backward ----

enum class Mask { none, from_x, from_y };

template <typename T_, typename Acc_>
struct Gradient {
  using T = T_;
  using Acc = Acc_;

  const T* dy;
  const T* x;  // may be null where nothing needs it
  const T* y;  // for Mask::from_y
  Norm<Acc> norm;
  Mask mask;

  template <int V>
  struct Values {
    Acc x[V];
    Acc dz[V];
  };

  // dz = dy where the forward's output was kept. Without y that output is computed again and rounded as it was stored.
  template <int V, bool kPerColumn, typename Channel>
  RF_HOST_DEVICE Values<V> values(int64_t offset, const Channel* channel) const {
    const auto dys = load<V>(dy + offset);
    Vec<T, V> xs = {};
    Vec<T, V> ys = {};
    if (x != nullptr) xs = load<V>(x + offset);
    if (mask == Mask::from_y) ys = load<V>(y + offset);
    Values<V> out;
    RF_UNROLL
    for (int v = 0; v < V; ++v) {
      out.x[v] = static_cast<Acc>(xs.values[v]);
      out.dz[v] = static_cast<Acc>(dys.values[v]);
      const T again = static_cast<T>(channel[kPerColumn ? v : 0].affine(out.x[v]));
      const T kept = mask == Mask::from_y ? ys.values[v] : again;
      if (mask != Mask::none) out.dz[v] = masked(out.dz[v], static_cast<Acc>(kept));
    }
    return out;
  }
};

template <typename T_, typename Acc_>
struct BackwardReduce : Gradient<T_, Acc_> {
  using Acc = Acc_;
  struct Channel {
    Affine<Acc> affine;
  };
  using Running = Sums<Acc>;

  RF_HOST_DEVICE Channel channel(int64_t c) const { return {this->norm.at(c)}; }

  template <int V, bool kPerColumn>
  RF_HOST_DEVICE void reduce(int64_t offset, const Channel* channel, Running* running) const {
    const auto in = this->template values<V, kPerColumn>(offset, channel);
    RF_UNROLL
    for (int v = 0; v < V; ++v) {
      const int c = kPerColumn ? v : 0;
      running[c].add(in.dz[v], in.x[v] - channel[c].affine.mean);
    }
  }
};

template <typename Acc>
struct FinishBackward {
  Norm<Acc> norm;
  Acc* sum_dz;
  Acc* sum_dzx;
  Acc* dweight;  // may be null: sum_dzx * rstd

  RF_HOST_DEVICE void operator()(int64_t channel, const Sums<double>& state) const {
    sum_dz[channel] = static_cast<Acc>(state.dz);
    sum_dzx[channel] = static_cast<Acc>(state.dzx);
    if (dweight != nullptr) dweight[channel] = static_cast<Acc>(state.dzx * norm.rstd(channel));
  }
};

template <typename T_, typename Acc_>
struct BackwardApply : Gradient<T_, Acc_> {
  using T = T_;
  using Acc = Acc_;
  using Channel = InputGradient<Acc>;

  const Acc* sum_dz;  // times inv_count, what batch statistics give back; null where the statistics were fixed
  const Acc* sum_dzx;
  Acc inv_count;
  T* dx;  // may be null
  T* dz;  // may be null

  RF_HOST_DEVICE Channel channel(int64_t c) const {
    const Affine<Acc> affine = this->norm.at(c);
    if (sum_dz == nullptr) return {affine, Acc(0), Acc(0)};
    const Acc rstd = this->norm.rstd(c);
    return {affine, sum_dz[c] * inv_count, sum_dzx[c] * inv_count * rstd * rstd};
  }

  template <int V, bool kPerColumn>
  RF_HOST_DEVICE void map(int64_t offset, const Channel* channel) const {
    const auto in = this->template values<V, kPerColumn>(offset, channel);
    Vec<T, V> dxs;
    Vec<T, V> dzs;
    RF_UNROLL
    for (int v = 0; v < V; ++v) {
      const Channel& c = channel[kPerColumn ? v : 0];
      // fixed statistics: x plays no part, not even an infinite one
      dxs.values[v] = static_cast<T>(sum_dz != nullptr ? c(in.dz[v], in.x[v]) : c.affine.scale * in.dz[v]);
      dzs.values[v] = static_cast<T>(in.dz[v]);
    }
    if (dx != nullptr) store<V>(dx + offset, dxs);
    if (dz != nullptr) store<V>(dz + offset, dzs);
  }
};

}  // namespace resnet_fast::cuda
