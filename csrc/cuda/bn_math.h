// The arithmetic of a batch norm with residual and ReLU: numbers in, numbers out. Runs on the device and on the host.
//
// y = act((x - mean) * rstd * weight + bias [+ residual]), computed in Acc (double for double, else float) and rounded
// once. act keeps NaN, and its gradient passes wherever the stored y is not <= 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace resnet_fast::cuda {

// ---- normalisation ----

template <typename Acc>
struct Affine {
  Acc mean;
  Acc scale;
  Acc bias;

  // fma spelled out: the backward's mask must see the value that the forward saw.
  RF_HOST_DEVICE Acc operator()(Acc x) const { return std::fma(x - mean, scale, bias); }
};

// A norm's vectors. Null means the value that changes nothing: mean 0, rstd 1, weight 1, bias 0.
template <typename Acc>
struct Norm {
  const Acc* mean;
  const Acc* var;
  const Acc* weight;
  const Acc* bias;
  Acc eps;

  RF_HOST_DEVICE Acc rstd(int64_t c) const { return var == nullptr ? Acc(1) : Acc(1) / std::sqrt(var[c] + eps); }

  RF_HOST_DEVICE Affine<Acc> at(int64_t c) const {
    const Acc r = rstd(c);
    return {mean == nullptr ? Acc(0) : mean[c], weight == nullptr ? r : r * weight[c],
            bias == nullptr ? Acc(0) : bias[c]};
  }
};

template <typename Acc>
RF_HOST_DEVICE Acc relu_of(Acc value) {
  return value <= 0 ? Acc(0) : value;  // NaN stays NaN
}

// dy where the forward's output was kept.
template <typename Acc>
RF_HOST_DEVICE Acc masked(Acc dy, Acc kept) {
  return kept <= 0 ? Acc(0) : dy;
}

// ---- statistics ----

// a + b = sum + lost, exactly (Knuth's two-sum).
template <typename Acc>
struct TwoSum {
  Acc sum;
  Acc lost;

  RF_HOST_DEVICE TwoSum(Acc a, Acc b) : sum(a + b) {
    const Acc added = sum - a;
    lost = (a - (sum - added)) + (b - added);
  }
};

// The mean is shift + offset, of which the offset is what the shift rounds off: where the mean is large beside the
// standard deviation, means differ by no more than that.
template <typename Acc>
struct Moments {
  using Wide = Moments<double>;  // what blocks' results are merged in

  Acc count;
  Acc shift;
  Acc offset;
  Acc m2;  // sum((x - mean)^2)

  // Chan's formula; an empty side changes nothing.
  RF_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const Acc total = count + other.count;
    const Acc delta = (other.shift - shift) + (other.offset - offset);
    const Acc part = other.count / total;
    // delta of infinite means is no number, where the mean of all values is still infinite
    offset += std::isfinite(delta) ? delta * part : other.mean();
    settle();
    m2 += other.m2 + delta * delta * count * part;
    count = total;
  }
  RF_HOST_DEVICE void settle() {
    const TwoSum<Acc> whole(shift, offset);
    if (!std::isfinite(whole.sum)) return;
    shift = whole.sum;
    offset = whole.lost;
  }
  RF_HOST_DEVICE Wide wide() const { return {count, shift, offset, m2}; }
  RF_HOST_DEVICE Acc mean() const { return shift + offset; }
  RF_HOST_DEVICE Acc var() const { return m2 / count; }
};

// A thread's own values, as sums shifted by its first one: exact where mean >> std, and no division per value.
// kCompensated keeps what `sum` rounds off; for values that have half of Acc's bits that is not worth it.
template <typename Acc, bool kCompensated>
struct ShiftedSums {
  using State = Moments<Acc>;

  Acc count;
  Acc shift;
  Acc sum;
  Acc lost;
  Acc sum_squares;

  RF_HOST_DEVICE void add(Acc x) {
    if (count == 0) shift = std::isfinite(x) ? x : Acc(0);
    const Acc d = x - shift;
    if constexpr (kCompensated) {
      const TwoSum<Acc> total(sum, d);
      sum = total.sum;
      lost += total.lost;
    } else {
      sum += d;
    }
    sum_squares = std::fma(d, d, sum_squares);
    count += 1;
  }

  RF_HOST_DEVICE Moments<Acc> state() const {
    if (count == 0) return {};
    const Acc whole = std::isfinite(sum) ? sum + lost : sum;  // what an infinite sum lost is no number
    const Acc m2 = sum_squares - whole * (whole / count);
    Moments<Acc> out{count, shift, whole / count, m2 < 0 ? Acc(0) : m2};  // not max(): NaN stays NaN
    out.settle();
    return out;
  }
};

// ---- backward ----

// A thread's few values are added up in Acc, threads in double: terms may cancel.
template <typename Acc>
struct Sums {
  using State = Sums<double>;
  using Wide = Sums<double>;

  Acc dz;
  Acc dzx;  // sum(dz * (x - mean))

  RF_HOST_DEVICE void add(Acc value, Acc centred) {
    dz += value;
    dzx = std::fma(value, centred, dzx);
  }
  RF_HOST_DEVICE void merge(const Sums& other) {
    dz += other.dz;
    dzx += other.dzx;
  }
  RF_HOST_DEVICE State state() const { return {dz, dzx}; }
  RF_HOST_DEVICE Wide wide() const { return {dz, dzx}; }
};

// The gradient of the norm's input: scale * (dz - mean_dz - (x - mean) * rstd^2 * mean_dzx).
template <typename Acc>
struct InputGradient {
  Affine<Acc> affine;
  Acc mean_dz;
  Acc mean_dzx;  // times rstd^2

  RF_HOST_DEVICE Acc operator()(Acc dz, Acc x) const {
    return affine.scale * (dz - mean_dz - (x - affine.mean) * mean_dzx);
  }
};

}  // namespace resnet_fast::cuda
