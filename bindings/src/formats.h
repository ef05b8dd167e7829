// How a matrix of 4 to 8 bits is stored for the product: in panels of 32 output columns as others are (packing.h), each
// a sequence of chunks of 32 inputs, so that a product reads it as one stream. A chunk holds, 32 columns beside each
// other in each of its parts,
//
//   codes     of eight bits: 8 words of 32 bits a column; of fewer: 4 words of eight low nibbles
//   upper     bits above the nibble: one word of a bit, or two words of two bits, of each of the 32 inputs
//   scales    float16, float32 or small integers (of 32 or of 16 inputs)
//   offsets   float16 minima or zeros, or small integers
//
// and before each eight chunks of K types the float16 that their integers are multiplied with. A matrix with one scale
// for each output has them in float32 behind the panel's chunks. All parts are multiples of 64 bytes, or pairs that are.
//
// The inputs 2 t and 2 t + 1 of a chunk lie as pairs in the low and the high half of a word, so that a shift and a mask
// make 16-bit integers of them, as they are multiplied:
//   eight bits   word q: pair 2 q in the low bytes of its halves, pair 2 q + 1 in the high ones
//   nibbles      word o: pair 4 o + p in nibble p of its halves
//   upper        pair t in the bits from (t mod 16 / bits) * bits on, of word t / (16 / bits)
#pragma once

#include <cstdint>
#include <cstring>

#include "packing.h"
#include "stars.h"

namespace stars {

constexpr int64_t kChunk = 32;       // inputs
constexpr int64_t kSuperChunks = 8;  // chunks that share the float16 scales of a K type

enum class Scales { kOutput, kHalf, kFloat, kSmall, kSmallOf16 };
enum class Offsets { kNone, kMinimum, kZero, kSmallMinimum };

struct Format {
  int bits;
  int zero;  // w = (code - zero) * scale + offset
  Scales scales;
  Offsets offsets;
};

constexpr int32_t kFirstFormat = STARS_INT8, kLastFormat = STARS_INT4_F32;

constexpr bool is_quantised(int32_t dtype) { return dtype >= kFirstFormat && dtype <= kLastFormat; }

constexpr Format format_of(int32_t dtype) {
  switch (dtype) {
    case STARS_INT8: return {8, 128, Scales::kOutput, Offsets::kNone};
    case STARS_Q8_0: return {8, 128, Scales::kHalf, Offsets::kNone};
    case STARS_Q4_0: return {4, 8, Scales::kHalf, Offsets::kNone};
    case STARS_Q4_1: return {4, 0, Scales::kHalf, Offsets::kMinimum};
    case STARS_Q5_0: return {5, 16, Scales::kHalf, Offsets::kNone};
    case STARS_Q5_1: return {5, 0, Scales::kHalf, Offsets::kMinimum};
    case STARS_Q4_K: return {4, 0, Scales::kSmall, Offsets::kSmallMinimum};
    case STARS_Q5_K: return {5, 0, Scales::kSmall, Offsets::kSmallMinimum};
    case STARS_Q6_K: return {6, 32, Scales::kSmallOf16, Offsets::kNone};
    case STARS_INT4: return {4, 0, Scales::kHalf, Offsets::kZero};
    default: return {4, 0, Scales::kFloat, Offsets::kZero};
  }
}

// What in_features must be a multiple of.
constexpr int64_t inputs_of(int32_t dtype) {
  if (!is_quantised(dtype) || dtype == STARS_INT8) return 1;
  const Scales scales = format_of(dtype).scales;
  return scales == Scales::kSmall || scales == Scales::kSmallOf16 ? kSuperChunks * kChunk : kChunk;
}

constexpr int64_t code_bytes(int bits) { return bits == 8 ? 1024 : 512 + 128 * (bits - 4); }

// Where things lie, in bytes.
struct Layout {
  int64_t scales, offsets, chunk;  // from the chunk's begin; its size
  int64_t head;                    // before each eight chunks
  int64_t chunks, panel;

  constexpr Layout(const Format& f, int64_t in_features)
      : scales(code_bytes(f.bits)),
        offsets(scales + (f.scales == Scales::kHalf || f.scales == Scales::kSmallOf16 ? 64
                          : f.scales == Scales::kFloat                                ? 128
                          : f.scales == Scales::kSmall                                ? 32
                                                                                      : 0)),
        chunk(offsets + (f.offsets == Offsets::kNone ? 0 : f.offsets == Offsets::kSmallMinimum ? 32 : 64)),
        head(f.scales == Scales::kSmall ? 128 : f.scales == Scales::kSmallOf16 ? 64 : 0),
        chunks((in_features + kChunk - 1) / kChunk),
        panel(chunks * chunk + (chunks + kSuperChunks - 1) / kSuperChunks * head +
              (f.scales == Scales::kOutput ? 4 * kPanel : 0)) {}

  constexpr int64_t chunk_at(int64_t index) const { return index * chunk + (index / kSuperChunks + 1) * head; }
  constexpr int64_t head_at(int64_t index) const { return index / kSuperChunks * (kSuperChunks * chunk + head); }
};

// Whether the packed form can be an array.
inline bool quantised_fits(int64_t out_features, int64_t in_features) {
  return packed_fits(out_features, in_features) && fits(panel_count(out_features), kPanel, in_features + kChunk, 2);
}

// One row of the matrix in float32. Compiled once, so that its bits are those of Python's reference everywhere.
void unpack_row(const void* packed, int64_t in_features, int32_t dtype, int64_t row, float* to);

// float16 in float32. (F16C does the same.)
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7FFFu;
  uint32_t bits;
  if (magnitude >= 0x7C00) {
    bits = magnitude << 13 | 0x7F800000u;
  } else {  // as a number 2^112 times too small, which is exact, subnormals too
    const uint32_t shifted = magnitude << 13;
    float wide;
    std::memcpy(&wide, &shifted, sizeof wide);
    wide *= 0x1p112f;
    std::memcpy(&bits, &wide, sizeof bits);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace stars
