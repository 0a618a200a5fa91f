// Lanes<scalar_t>: one full vector of scalar_t held as one or two vectors of its accumulation type.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <tuple>
#include <type_traits>

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// How much of a vector a step covers: all of it (known at compile time) or the first `count` lanes.
struct Full {};
struct Part {
  int64_t count;  // more than none, less than all
};

template <typename scalar_t>
struct Lanes {
  using acc_t = acc_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  using Storage = at::vec::Vectorized<scalar_t>;
  static constexpr int parts = sizeof(scalar_t) == 2 ? 2 : 1;
  static constexpr int64_t size = parts * Vec::size();
  static_assert(size == Storage::size());

  Vec v[parts];

  static C10_ALWAYS_INLINE Lanes fill(acc_t value) {
    Lanes out;
    for (auto& part : out.v) part = Vec(value);
    return out;
  }

  // Values of scalar_t, widened. Lanes past a Part's count are zero.
  static C10_ALWAYS_INLINE Lanes load(const scalar_t* p, Full) { return widen(Storage::loadu(p)); }
  static C10_ALWAYS_INLINE Lanes load(const scalar_t* p, Part part) {
    if (part.count <= 0 || part.count >= size) __builtin_unreachable();  // spares the compiler a doubt, and a warning
    return widen(Storage::loadu(p, part.count));
  }

  C10_ALWAYS_INLINE void store(scalar_t* p, Full) const { narrow().store(p); }
  C10_ALWAYS_INLINE void store(scalar_t* p, Part part) const { narrow().store(p, static_cast<int>(part.count)); }

  // Values of acc_t; arrays of them are padded, so that they are always read and written whole.
  static C10_ALWAYS_INLINE Lanes load_acc(const acc_t* p) {
    Lanes out;
    for (int i = 0; i < parts; ++i) out.v[i] = Vec::loadu(p + i * Vec::size());
    return out;
  }
  C10_ALWAYS_INLINE void store_acc(acc_t* p) const {
    for (int i = 0; i < parts; ++i) v[i].store(p + i * Vec::size());
  }

  // The same where what lies past a Part's count is not to be touched.
  C10_ALWAYS_INLINE void store_acc(acc_t* p, Full) const { store_acc(p); }
  C10_ALWAYS_INLINE void store_acc(acc_t* p, Part part) const {
    acc_t lanes[size];
    store_acc(lanes);
    for (int64_t i = 0; i < part.count; ++i) p[i] = lanes[i];
  }

  // As it would be read back after it had been stored.
  C10_ALWAYS_INLINE Lanes rounded() const { return widen(narrow()); }

  // Zero in the lanes that a Part does not cover, whatever is there.
  C10_ALWAYS_INLINE Lanes keep(Full) const { return *this; }
  C10_ALWAYS_INLINE Lanes keep(Part part) const {
    acc_t lanes[size];
    store_acc(lanes);
    for (int64_t i = part.count; i < size; ++i) lanes[i] = 0;
    return load_acc(lanes);
  }

 private:
  static C10_ALWAYS_INLINE Lanes widen(const Storage& stored) {
    Lanes out;
    if constexpr (parts == 2) {
      std::tie(out.v[0], out.v[1]) = at::vec::convert_to_float<scalar_t>(stored);
    } else {
      out.v[0] = stored;
    }
    return out;
  }
  C10_ALWAYS_INLINE Storage narrow() const {
    if constexpr (parts == 2) {
      return at::vec::convert_from_float<scalar_t>(v[0], v[1]);
    } else {
      return v[0];
    }
  }
};

// How many lanes of an L a step covers.
template <typename L>
constexpr int64_t count_of(Full) {
  return L::size;
}
template <typename L>
C10_ALWAYS_INLINE int64_t count_of(Part part) {
  if (part.count <= 0 || part.count >= L::size) __builtin_unreachable();
  return part.count;
}

template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> operator+(const Lanes<scalar_t>& a, const Lanes<scalar_t>& b) {
  Lanes<scalar_t> out;
  for (int i = 0; i < out.parts; ++i) out.v[i] = a.v[i] + b.v[i];
  return out;
}

template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> operator-(const Lanes<scalar_t>& a, const Lanes<scalar_t>& b) {
  Lanes<scalar_t> out;
  for (int i = 0; i < out.parts; ++i) out.v[i] = a.v[i] - b.v[i];
  return out;
}

template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> operator*(const Lanes<scalar_t>& a, const Lanes<scalar_t>& b) {
  Lanes<scalar_t> out;
  for (int i = 0; i < out.parts; ++i) out.v[i] = a.v[i] * b.v[i];
  return out;
}

// a * b + c. Written as a call, so that forward and backward round the same expression the same way.
template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> fmadd(const Lanes<scalar_t>& a, const Lanes<scalar_t>& b, const Lanes<scalar_t>& c) {
  Lanes<scalar_t> out;
  for (int i = 0; i < out.parts; ++i) out.v[i] = at::vec::fmadd(a.v[i], b.v[i], c.v[i]);
  return out;
}

// max(x, 0), keeping NaN.
template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> relu(const Lanes<scalar_t>& x) {
  using Vec = typename Lanes<scalar_t>::Vec;
  Lanes<scalar_t> out;
  for (int i = 0; i < out.parts; ++i) out.v[i] = at::vec::clamp_min(x.v[i], Vec(0));
  return out;
}

// grad where !(y <= limit), else 0: a NaN in y lets the gradient pass.
template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> masked(
    const Lanes<scalar_t>& grad, const Lanes<scalar_t>& y, acc_type<scalar_t> limit) {
  using Vec = typename Lanes<scalar_t>::Vec;
  Lanes<scalar_t> out;
  for (int i = 0; i < out.parts; ++i) out.v[i] = Vec::blendv(grad.v[i], Vec(0), y.v[i] <= Vec(limit));
  return out;
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
