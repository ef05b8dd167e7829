// Packing of matrices in 4 to 8 bits, once at load, from what files hold: no copy between.
#include <algorithm>
#include <cstring>

#include "error.h"
#include "formats.h"
#include "parallel.h"
#include "stars.h"

namespace stars {
namespace {

// One column's part of a chunk. Scales and offsets are the bits or the integers that are stored.
struct Cell {
  uint8_t codes[kChunk];
  uint32_t scales[2];  // the second of 16 inputs each
  uint32_t offset;
  uint16_t heads[2];  // float16 scales of the integers
};

struct Source {
  const uint8_t* values;
  const void* scales;
  const uint8_t* zeros;
  int64_t group, in_features;
  int32_t dtype;
};

uint16_t half_at(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return half;
}

void nibbles(const uint8_t* from, uint8_t* codes) {
  for (int k = 0; k < 16; ++k) {
    codes[k] = from[k] & 15;
    codes[k + 16] = from[k] >> 4;
  }
}

// Of a block of 32 columns.
void read_small(const Source& s, int64_t row, int64_t index, const Format& f, Cell& cell) {
  const bool minimum = f.offsets == Offsets::kMinimum;
  const int64_t bytes = 2 + 2 * minimum + (f.bits == 8 ? 32 : 16 + (f.bits == 5 ? 4 : 0));
  const uint8_t* block = s.values + (row * (s.in_features / kChunk) + index) * bytes;
  cell.scales[0] = half_at(block);
  block += 2;
  if (minimum) {
    cell.offset = half_at(block);
    block += 2;
  }
  if (f.bits == 8) {
    for (int k = 0; k < kChunk; ++k) cell.codes[k] = block[k] ^ 128;
    return;
  }
  const uint8_t* fifth = block;
  nibbles(f.bits == 5 ? block + 4 : block, cell.codes);
  if (f.bits == 5)
    for (int k = 0; k < kChunk; ++k) cell.codes[k] |= (fifth[k / 8] >> (k % 8) & 1) << 4;
}

// Of a block of 256.
void read_large(const Source& s, int64_t row, int64_t index, const Format& f, Cell& cell) {
  const int sub = static_cast<int>(index % kSuperChunks);
  const int64_t blocks = s.in_features / (kSuperChunks * kChunk), block_index = row * blocks + index / kSuperChunks;
  if (f.bits == 6) {
    const uint8_t* block = s.values + block_index * 210;
    const uint8_t* low = block + sub / 4 * 64 + sub % 2 * 32;
    const uint8_t* upper = block + 128 + sub / 4 * 32;
    const int quarter = sub % 4;
    for (int k = 0; k < kChunk; ++k)
      cell.codes[k] = (quarter < 2 ? low[k] & 15 : low[k] >> 4) | (upper[k] >> (2 * quarter) & 3) << 4;
    cell.scales[0] = block[192 + 2 * sub];
    cell.scales[1] = block[192 + 2 * sub + 1];
    cell.heads[0] = half_at(block + 208);
    return;
  }
  const uint8_t* block = s.values + block_index * (f.bits == 5 ? 176 : 144);
  const uint8_t* packed = block + 4;
  cell.heads[0] = half_at(block);
  cell.heads[1] = half_at(block + 2);
  if (sub < 4) {
    cell.scales[0] = packed[sub] & 63;
    cell.offset = packed[sub + 4] & 63;
  } else {
    cell.scales[0] = (packed[sub + 4] & 15) | packed[sub - 4] >> 6 << 4;
    cell.offset = packed[sub + 4] >> 4 | packed[sub] >> 6 << 4;
  }
  const uint8_t* low = block + (f.bits == 5 ? 48 : 16) + sub / 2 * 32;
  for (int k = 0; k < kChunk; ++k) cell.codes[k] = sub % 2 ? low[k] >> 4 : low[k] & 15;
  if (f.bits == 5)
    for (int k = 0; k < kChunk; ++k) cell.codes[k] |= (block[16 + k] >> sub & 1) << 4;
}

// Scales and zeros of groups lie beside the values.
void read_groups(const Source& s, int64_t row, int64_t index, Cell& cell, bool wide) {
  const uint8_t* values = s.values + (row * s.in_features + index * kChunk) / 2;
  for (int k = 0; k < kChunk; ++k) cell.codes[k] = k % 2 ? values[k / 2] >> 4 : values[k / 2] & 15;
  const int64_t place = row * (s.in_features / s.group) + index * kChunk / s.group;
  const int64_t size = wide ? 4 : 2;
  cell.scales[0] = 0;
  std::memcpy(&cell.scales[0], static_cast<const uint8_t*>(s.scales) + place * size, size);
  static constexpr uint16_t kHalves[16] = {0x0000, 0x3C00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700,
                                           0x4800, 0x4880, 0x4900, 0x4980, 0x4A00, 0x4A80, 0x4B00, 0x4B80};
  cell.offset = kHalves[s.zeros ? s.zeros[place] & 15 : 8];
}

void read_cell(const Source& s, int64_t row, int64_t index, const Format& f, Cell& cell) {
  if (s.dtype == STARS_INT8) {
    const uint8_t* values = s.values + row * s.in_features + index * kChunk;
    const int64_t count = std::min(kChunk, s.in_features - index * kChunk);
    for (int64_t k = 0; k < kChunk; ++k) cell.codes[k] = k < count ? values[k] ^ 128 : 128;
  } else if (s.scales) {
    read_groups(s, row, index, cell, f.scales == Scales::kFloat);
  } else if (f.scales == Scales::kHalf) {
    read_small(s, row, index, f, cell);
  } else {
    read_large(s, row, index, f, cell);
  }
}

// The byte in which input k of column c has its (low) bits, from the chunk's begin, and the first of them.
struct Place {
  int64_t byte;
  int bit;
};
Place code_place(int bits, int64_t c, int k) {
  const int pair = k / 2, half = k % 2 * 2;  // bytes
  if (bits == 8) return {pair / 2 * 4 * kPanel + 4 * c + half + pair % 2, 0};
  return {pair / 4 * 4 * kPanel + 4 * c + half + pair % 4 / 2, pair % 2 * 4};
}
Place upper_place(int bits, int64_t c, int k) {
  const int upper = bits - 4, pair = k / 2, in_word = 16 / upper;
  const int bit = pair % in_word * upper;
  return {512 + pair / in_word * 4 * kPanel + 4 * c + k % 2 * 2 + bit / 8, bit % 8};
}

void write_cell(const Cell& cell, const Format& f, const Layout& layout, uint8_t* chunk, uint8_t* head, int64_t c) {
  for (int k = 0; k < kChunk; ++k) {
    const Place at = code_place(f.bits, c, k);
    chunk[at.byte] |= (f.bits == 8 ? cell.codes[k] : cell.codes[k] & 15) << at.bit;
    if (f.bits == 8 || f.bits == 4) continue;
    const Place upper = upper_place(f.bits, c, k);
    chunk[upper.byte] |= cell.codes[k] >> 4 << upper.bit;
  }
  uint8_t* scales = chunk + layout.scales;
  uint8_t* offsets = chunk + layout.offsets;
  if (f.scales == Scales::kHalf) std::memcpy(scales + 2 * c, &cell.scales[0], 2);
  if (f.scales == Scales::kFloat) std::memcpy(scales + 4 * c, &cell.scales[0], 4);
  if (f.scales == Scales::kSmall || f.scales == Scales::kSmallOf16) scales[c] = cell.scales[0];
  if (f.scales == Scales::kSmallOf16) scales[kPanel + c] = cell.scales[1];
  if (f.offsets == Offsets::kMinimum || f.offsets == Offsets::kZero) std::memcpy(offsets + 2 * c, &cell.offset, 2);
  if (f.offsets == Offsets::kSmallMinimum) offsets[c] = cell.offset;
  if (layout.head) std::memcpy(head + 2 * c, &cell.heads[0], 2);
  if (layout.head == 128) std::memcpy(head + 64 + 2 * c, &cell.heads[1], 2);
}

int read_code(const uint8_t* chunk, int bits, int64_t c, int k) {
  const Place at = code_place(bits, c, k);
  if (bits == 8) return chunk[at.byte];
  int code = chunk[at.byte] >> at.bit & 15;
  if (bits > 4) {
    const Place upper = upper_place(bits, c, k);
    code |= (chunk[upper.byte] >> upper.bit & ((1 << (bits - 4)) - 1)) << 4;
  }
  return code;
}

const char* wrong_shape(int64_t out_features, int64_t in_features, int32_t dtype) {
  if (out_features <= 0 || in_features <= 0) return "out_features and in_features must be positive";
  if (!is_quantised(dtype)) return "dtype must be of 4 to 8 bits, STARS_INT8 to STARS_INT4_F32";
  if (!quantised_fits(out_features, in_features)) return "out_features * in_features is too large";
  if (in_features % inputs_of(dtype))
    return inputs_of(dtype) == kChunk ? "in_features must be a multiple of the 32 of a group"
                                      : "in_features must be a multiple of the 256 of a block";
  return nullptr;
}

}  // namespace

void unpack_row(const void* packed, int64_t in_features, int32_t dtype, int64_t row, float* to) {
  const Format f = format_of(dtype);
  const Layout layout(f, in_features);
  const uint8_t* panel = static_cast<const uint8_t*>(packed) + row / kPanel * layout.panel;
  const int64_t c = row % kPanel;
  float of_output = 0;
  if (f.scales == Scales::kOutput) std::memcpy(&of_output, panel + layout.panel - 4 * kPanel + 4 * c, 4);
  for (int64_t index = 0; index < layout.chunks; ++index) {
    const uint8_t* chunk = panel + layout.chunk_at(index);
    const uint8_t* head = panel + layout.head_at(index);
    const uint8_t* scales = chunk + layout.scales;
    const uint8_t* offsets = chunk + layout.offsets;
    float scale[2] = {of_output, of_output}, offset = 0, zero = static_cast<float>(f.zero);
    if (f.scales == Scales::kHalf) scale[0] = scale[1] = half_to_float(half_at(scales + 2 * c));
    if (f.scales == Scales::kFloat) std::memcpy(&scale[0], scales + 4 * c, 4), scale[1] = scale[0];
    if (f.scales == Scales::kSmall) scale[0] = scale[1] = half_to_float(half_at(head + 2 * c)) * scales[c];
    if (f.scales == Scales::kSmallOf16)
      for (int half = 0; half < 2; ++half)
        scale[half] = half_to_float(half_at(head + 2 * c)) * static_cast<int8_t>(scales[half * kPanel + c]);
    if (f.offsets == Offsets::kMinimum) offset = half_to_float(half_at(offsets + 2 * c));
    if (f.offsets == Offsets::kZero) zero = half_to_float(half_at(offsets + 2 * c));
    if (f.offsets == Offsets::kSmallMinimum) offset = -half_to_float(half_at(head + 64 + 2 * c)) * offsets[c];
    const int count = static_cast<int>(std::min(kChunk, in_features - index * kChunk));
    const bool add = f.offsets == Offsets::kMinimum || f.offsets == Offsets::kSmallMinimum;
    for (int k = 0; k < count; ++k) {
      const float weight = (static_cast<float>(read_code(chunk, f.bits, c, k)) - zero) * scale[k / 16];
      to[index * kChunk + k] = add ? weight + offset : weight;
    }
  }
}

}  // namespace stars

using namespace stars;

int64_t stars_quant_bytes(int64_t out_features, int64_t in_features, int32_t dtype) {
  if (const char* wrong = wrong_shape(out_features, in_features, dtype)) {
    fail("stars_quant_bytes", wrong);
    return 0;
  }
  return panel_count(out_features) * Layout(format_of(dtype), in_features).panel;
}

int32_t stars_pack_quant(const void* values, const void* scales, const void* zeros, int64_t group,
                         int64_t out_features, int64_t in_features, int32_t dtype, void* packed) {
  if (const char* wrong = wrong_shape(out_features, in_features, dtype)) return fail("pack_quant", wrong);
  if (!values || !packed) return fail("pack_quant", "values and packed must not be null");
  const bool own_scales = dtype == STARS_INT8 || dtype == STARS_INT4 || dtype == STARS_INT4_F32;
  if (own_scales && !scales) return fail("pack_quant", "scales must not be null");
  if (scales && !own_scales && dtype != STARS_Q4_0) return fail("pack_quant", "scales are in the blocks of this dtype");
  if (zeros && dtype != STARS_INT4 && dtype != STARS_INT4_F32) return fail("pack_quant", "this dtype has no zeros");
  if (scales && dtype != STARS_INT8 && (group <= 0 || group % kChunk || in_features % group))
    return fail("pack_quant", "group must be a multiple of 32 that divides in_features");
  const Source source = {static_cast<const uint8_t*>(values), scales, static_cast<const uint8_t*>(zeros), group,
                         in_features, dtype};
  return guarded("pack_quant", [&] {
    const Format f = format_of(dtype);
    const Layout layout(f, in_features);
    parallel(panel_count(out_features), [&](int64_t index) {
      uint8_t* panel = static_cast<uint8_t*>(packed) + index * layout.panel;
      std::memset(panel, 0, layout.panel);
      const int64_t columns = std::min(kPanel, out_features - index * kPanel);
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t row = index * kPanel + c;
        if (f.scales == Scales::kOutput)
          std::memcpy(panel + layout.panel - 4 * kPanel + 4 * c, static_cast<const float*>(scales) + row, 4);
        for (int64_t k = 0; k < layout.chunks; ++k) {
          Cell cell = {};
          read_cell(source, row, k, f, cell);
          write_cell(cell, f, layout, panel + layout.chunk_at(k), panel + layout.head_at(k), c);
        }
      }
    });
  });
}

int32_t stars_unpack_quant(const void* packed, int64_t out_features, int64_t in_features, int32_t dtype,
                           float* matrix) {
  if (const char* wrong = wrong_shape(out_features, in_features, dtype)) return fail("unpack_quant", wrong);
  if (!packed || !matrix) return fail("unpack_quant", "packed and matrix must not be null");
  return guarded("unpack_quant", [&] {
    parallel(out_features,
             [=](int64_t row) { unpack_row(packed, in_features, dtype, row, matrix + row * in_features); });
  });
}
