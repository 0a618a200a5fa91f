#include "conv_geometry.h"

#include <numeric>

#include "integers.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kTile = 16, kMaxImages = 16;

int64_t div_down(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

Axis forward_axis(const AxisGeometry& g) {
  Axis axis{g.size, g.stride, -g.padding, {}, g.out_size, 0, g.out_size, 1, {{}}};
  for (int64_t k = 0; k < g.kernel; ++k) {
    const int64_t residue = k * g.dilation % g.stride, shift = k * g.dilation / g.stride;
    auto& known = axis.residues;
    const auto found = std::find(known.begin(), known.end(), residue);
    axis.classes[0].push_back({k, found - known.begin(), shift});
    if (found == known.end()) known.push_back(residue);
    axis.max_shift = std::max(axis.max_shift, shift);
  }
  return axis;
}

Axis gradient_axis(const AxisGeometry& g) {
  Axis axis{g.out_size, 1, 0, {0}, div_up(g.size, g.stride), 0, g.size, g.stride, {}};
  axis.classes.resize(g.stride);
  int64_t least = INT64_MAX, most = INT64_MIN;
  for (int64_t a = 0; a < g.stride; ++a) {
    for (int64_t k = 0; k < g.kernel; ++k) {
      const int64_t from = a + g.padding - k * g.dilation, offset = div_down(from, g.stride);
      if (offset * g.stride != from) continue;
      axis.classes[a].push_back({k, 0, offset});
      least = std::min(least, offset), most = std::max(most, offset);
    }
  }
  axis.base = least;
  axis.max_shift = most - least;
  for (auto& taps : axis.classes) {
    for (AxisTap& tap : taps) tap.shift -= least;
  }
  return axis;
}

int64_t Grid::pitch() const {
  const Axis& a = right;
  if (a.step != 1) return a.positions + a.max_shift;
  const int64_t left = std::max<int64_t>(0, -a.base);
  const int64_t first_beyond = a.source_size - a.base - a.positions;
  return a.positions + std::clamp<int64_t>(std::max(a.max_shift - left, first_beyond), 0, a.max_shift);
}

std::vector<Chunk> Grid::chunks(int64_t position_bytes, int64_t budget, bool fill_tiles) const {
  std::vector<Chunk> out;
  const int64_t rows = down.positions, row_bytes =
      pitch() * position_bytes * static_cast<int64_t>(down.residues.size() * right.residues.size());
  const int64_t image_bytes = (rows + down.max_shift) * row_bytes;
  if (image_bytes > budget && rows > 1) {
    // Strips, as even as may be; where a row is a pixel, of whole tiles.
    const int64_t most = std::max<int64_t>(1, budget / row_bytes - down.max_shift);
    int64_t strips = div_up(rows, most);
    if (images * strips <= 16) {
      int64_t even = 1;
      while (even < strips) even *= 2;
      strips = even;
    }
    int64_t step = div_up(rows, strips);
    if (pitch() == 1) step = div_up(step, 2 * kTile) * 2 * kTile;
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t row = 0; row < rows; row += step) out.push_back({image, 1, row, std::min(step, rows - row)});
    }
    return out;
  }
  const int64_t most = std::clamp<int64_t>(budget / std::max<int64_t>(1, image_bytes), 1, std::min(images, kMaxImages));
  int64_t together = most;
  if (fill_tiles) {
    const auto waste = [&](int64_t n) {
      const int64_t used = right.positions * n;
      return static_cast<double>(div_up(used, kTile) * kTile) / static_cast<double>(used);
    };
    together = 1;
    for (int64_t n = 2; n <= most; ++n) {
      if (waste(n) <= waste(together)) together = n;  // more pixels for every weight
    }
  }
  for (int64_t image = 0; image < images; image += together) {
    out.push_back({image, std::min(together, images - image), 0, rows});
  }
  return out;
}

bool Grid::is_column() const {
  return images == 1 && right.source_size == 1 && down.source_size == down.positions && down.out_step == 1 &&
      down.step == 1 && down.max_shift == 0 && right.max_shift == 0;
}

int64_t Grid::positions(const Chunk& chunk) const { return chunk.rows * pitch() * chunk.images; }

int64_t Grid::source_positions(const Chunk& chunk) const {
  const auto planes = static_cast<int64_t>(down.residues.size() * right.residues.size());
  // A tap of the last tile may reach beyond the last plane.
  return (planes * (chunk.rows + down.max_shift) * pitch() + right.max_shift + 1) * chunk.images + 2 * kTile +
      pitch() * chunk.images;
}

std::vector<int32_t> Grid::source(const Chunk& chunk) const {
  std::vector<int32_t> out(source_positions(chunk), -1);
  if (is_column()) {
    std::iota(out.begin(), out.begin() + chunk.rows, static_cast<int32_t>(chunk.row));
    return out;
  }
  int32_t* at = out.data();
  const int64_t columns = pitch();
  for (const int64_t row_residue : down.residues) {
    for (const int64_t column_residue : right.residues) {
      for (int64_t i = 0; i < chunk.rows + down.max_shift; ++i) {
        const int64_t y = down.step * (chunk.row + i) + row_residue + down.base;
        if (y < 0 || y >= down.source_size) {
          at += columns * chunk.images;
          continue;
        }
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t x = right.step * j + column_residue + right.base;
          if (x < 0 || x >= right.source_size) {
            at += chunk.images;
            continue;
          }
          for (int64_t n = 0; n < chunk.images; ++n) {
            *at++ = static_cast<int32_t>(((chunk.image + n) * down.source_size + y) * right.source_size + x);
          }
        }
      }
    }
  }
  return out;
}

std::vector<int32_t> Grid::output(const Chunk& chunk, int64_t number) const {
  const int64_t a = number / right.out_step, b = number % right.out_step, columns = pitch();
  std::vector<int32_t> out(positions(chunk), -1);
  if (is_column()) {
    std::iota(out.begin(), out.end(), static_cast<int32_t>(chunk.row));
    return out;
  }
  for (int64_t i = 0; i < chunk.rows; ++i) {
    const int64_t y = down.out_step * (chunk.row + i) + a;
    if (y >= down.out_size) continue;
    int32_t* at = out.data() + i * columns * chunk.images;
    for (int64_t j = 0; j < right.positions; ++j) {
      const int64_t x = right.out_step * j + b;
      if (x >= right.out_size) break;
      for (int64_t n = 0; n < chunk.images; ++n) {
        *at++ = static_cast<int32_t>(((chunk.image + n) * down.out_size + y) * right.out_size + x);
      }
    }
  }
  return out;
}

std::vector<int32_t> Grid::taps(const Chunk& chunk, int64_t number) const {
  std::vector<int32_t> out;
  const auto column_residues = static_cast<int64_t>(right.residues.size());
  for (const AxisTap& r : down.classes[number / right.out_step]) {
    for (const AxisTap& s : right.classes[number % right.out_step]) {
      const int64_t plane = r.residue * column_residues + s.residue;
      const int64_t row = plane * (chunk.rows + down.max_shift) + r.shift;
      out.push_back(static_cast<int32_t>((row * pitch() + s.shift) * chunk.images));
    }
  }
  return out;
}

std::vector<int32_t> Grid::kernel_taps(int64_t number) const {
  std::vector<int32_t> out;
  for (const AxisTap& r : down.classes[number / right.out_step]) {
    for (const AxisTap& s : right.classes[number % right.out_step]) {
      out.push_back(static_cast<int32_t>(r.kernel * kernel_columns + s.kernel));
    }
  }
  return out;
}

Grid::Tiles Grid::tiles(const Chunk& chunk, int64_t number) const {
  const std::vector<int32_t> pixel = output(chunk, number);
  const auto all = static_cast<int64_t>(pixel.size());
  const int64_t used = right.positions * chunk.images, row = pitch() * chunk.images;
  Tiles out;
  const auto add = [&](int64_t first, int64_t end) {
    out.pixel.insert(out.pixel.end(), pixel.begin() + first, pixel.begin() + end);
    for (; first < end; first += kTile) out.first.push_back(static_cast<int32_t>(first));
    out.pixel.resize(out.first.size() * kTile, -1);
  };
  if (div_up(all, kTile) <= chunk.rows * div_up(used, kTile)) {
    add(0, all);
  } else {
    for (int64_t i = 0; i < chunk.rows; ++i) add(i * row, i * row + used);
  }
  return out;
}

}  // namespace resnet_fast::cpu
