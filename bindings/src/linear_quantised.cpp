// The product with a matrix of 4 to 8 bits (formats.h).
//
// A group of 32 inputs of a row of x is rounded to 16-bit integers and a scale. Codes are unpacked to 16-bit integers in
// registers, and a group's products summed up in 32 bits: exactly, so that neither their order nor the instructions
// matter (32 * 32767 * 255 < 2^31). What the groups make is one chain of multiply-adds in float32 over the groups in
// order, from zero, the bias last: the bits of a row depend on nothing but the row and the weight.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "formats.h"
#include "ops.h"
#include "product_tasks.h"
#include "rounding.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

typedef uint16_t shorts __attribute__((vector_size(4 * vector_width)));

// Of a tile. Sanitizers make the larger ones, which are the same code once more, take minutes to compile.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kMaxRows = 3;
#else
constexpr int kMaxRows = vector_width == 16 ? 8 : 4;
#endif
constexpr int64_t kRowsPerPass = 64;                  // whose rounded x stays in the second-level cache
constexpr int64_t kAhead = 8192;                      // bytes of a weight that are asked for before they are needed

// Both products of 16-bit integers added.
STARS_INLINE ints dot(ints sum, words a, words b) {
#if defined(__AVX512VNNI__) && defined(__clang__)
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // of the intrinsic clang makes two instructions again
  return sum;
#elif defined(__AVX512VNNI__)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(STARS_SIMD_X86)
  return sum + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const ints low = ((ints)a << 16 >> 16) * ((ints)b << 16 >> 16), high = ((ints)a >> 16) * ((ints)b >> 16);
  return sum + low + high;
#endif
}

STARS_INLINE floats to_floats(ints v) { return __builtin_convertvector(v, floats); }

STARS_INLINE words load_words(const uint8_t* from) {
  words v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

STARS_INLINE floats load_halves(const uint8_t* from) {
#if defined(__AVX512F__)
  return (floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  floats v;
  for (int i = 0; i < vector_width; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    const uint32_t magnitude = half & 0x7FFFu, bits = magnitude << 13;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    wide *= 0x1p112f;
    if (magnitude >= 0x7C00) {
      const uint32_t special = bits | 0x7F800000u;
      std::memcpy(&wide, &special, sizeof wide);
    }
    v[i] = half & 0x8000 ? -wide : wide;
  }
  return v;
#endif
}

template <class T>
STARS_INLINE floats load_small(const uint8_t* from) {
  typedef T bytes __attribute__((vector_size(vector_width)));
  bytes v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, ints), floats);
}

// Pair T of a chunk of one vector of columns, as 16-bit integers; `codes` at the chunk, at the first column.
template <int BITS, int T>
STARS_INLINE words unpack(const uint8_t* codes) {
  if constexpr (BITS == 8) {
    const words both = load_words(codes + T / 2 * 128);
    return T % 2 ? (words)((shorts)both >> 8) : both & 0x00FF00FFu;
  } else {
    const shorts eight = (shorts)load_words(codes + T / 4 * 128);
    const shorts shifted = T % 4 ? eight >> (T % 4 * 4) : eight;
    const words low = T % 4 == 3 ? (words)shifted : (words)shifted & 0x000F000Fu;
    if constexpr (BITS == 4) {
      return low;
    } else {
      constexpr int kUpper = BITS - 4, kInWord = 16 / kUpper, kShift = T % kInWord * kUpper - 4;
      constexpr uint32_t kMask = ((1u << kUpper) - 1) * 0x00100010u;
      const shorts upper = (shorts)load_words(codes + 512 + T / kInWord * 128);
      return low | ((words)(kShift > 0 ? upper >> (kShift > 0 ? kShift : 0) : upper << (kShift < 0 ? -kShift : 0)) &
                    kMask);
    }
  }
}

// What is known of a kind of matrix when its loop is compiled.
template <int BITS_, Scales SCALES_, bool OFFSETS_>
struct Kind {
  static constexpr int kBits = BITS_;
  static constexpr bool kOfOutput = SCALES_ == Scales::kOutput;
  static constexpr bool kOffsets = OFFSETS_;
  static constexpr int kHalves = SCALES_ == Scales::kSmallOf16 ? 2 : 1;
};

// Scales (and offsets) of one vector of columns from `c` on.
template <class K>
STARS_INLINE void load_scales(const Format& f, const Layout& layout, const uint8_t* chunk, const uint8_t* head,
                              int64_t c, floats (&scale)[K::kHalves], floats& offset) {
  const uint8_t* scales = chunk + layout.scales;
  const uint8_t* offsets = chunk + layout.offsets;
  if constexpr (K::kHalves == 2) {
    const floats heads = load_halves(head + 2 * c);
    scale[0] = heads * load_small<int8_t>(scales + c);
    scale[1] = heads * load_small<int8_t>(scales + kPanel + c);
  } else if (f.scales == Scales::kHalf) {
    scale[0] = load_halves(scales + 2 * c);
  } else if (f.scales == Scales::kFloat) {
    scale[0] = load(reinterpret_cast<const float*>(scales) + c);
  } else {
    scale[0] = load_halves(head + 2 * c) * load_small<uint8_t>(scales + c);
  }
  if constexpr (K::kOffsets) {
    if (f.offsets == Offsets::kMinimum)
      offset = load_halves(offsets + 2 * c);
    else if (f.offsets == Offsets::kZero)
      offset = -(load_halves(offsets + 2 * c) * scale[0]);
    else
      offset = -(load_halves(head + 2 * kPanel + 2 * c) * load_small<uint8_t>(offsets + c));
  }
}

// Sums of a group are kept apart where there are few rows: chains of them hide the latency of their additions.
template <int ROWS>
constexpr int kChains = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;

template <int BITS, int T, int ROWS>
STARS_INLINE void add_pair(ints (&sum)[ROWS][2][kChains<ROWS>], const uint8_t* codes, const Group* x,
                           int64_t x_stride) {
  words pair[2];
  for (int v = 0; v < 2; ++v) pair[v] = unpack<BITS, T>(codes + 4 * vector_width * v);
#pragma GCC unroll 8  // clang would leave a loop, over sums in memory
  for (int r = 0; r < ROWS; ++r) {
    const words value = splat(x[r * x_stride].pairs[T]);
    for (int v = 0; v < 2; ++v)
      sum[r][v][T % kChains<ROWS>] = dot(sum[r][v][T % kChains<ROWS>], pair[v], value);
  }
}

template <int BITS, int FIRST, int ROWS, int... T>
STARS_INLINE void add_pairs(ints (&sum)[ROWS][2][kChains<ROWS>], const uint8_t* codes, const Group* x,
                            int64_t x_stride, std::integer_sequence<int, T...>) {
  (add_pair<BITS, FIRST + T, ROWS>(sum, codes, x, x_stride), ...);
}

template <class K, int HALF, int ROWS>
STARS_INLINE void add_group(floats (&total)[ROWS][2], const uint8_t* codes, const Group* x, int64_t x_stride,
                            const floats (&scale)[2][K::kHalves]) {
  constexpr int kPairs = kChunk / 2 / K::kHalves;
  ints sum[ROWS][2][kChains<ROWS>];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v)
      for (int i = 0; i < kChains<ROWS>; ++i) sum[r][v][i] = i == 0 ? splat(x[r * x_stride].start[HALF]) : ints{};
  add_pairs<K::kBits, HALF * kPairs, ROWS>(sum, codes, x, x_stride, std::make_integer_sequence<int, kPairs>());
  for (int r = 0; r < ROWS; ++r) {
    const floats of_x = splat(x[r * x_stride].scale);
    for (int v = 0; v < 2; ++v) {
      ints all = sum[r][v][0];
      for (int i = 1; i < kChains<ROWS>; ++i) all += sum[r][v][i];
      if constexpr (K::kOfOutput)
        total[r][v] = fma(to_floats(all), of_x, total[r][v]);
      else
        total[r][v] = fma(to_floats(all) * of_x, scale[v][HALF], total[r][v]);
    }
  }
}

// ROWS rows by two vectors of columns of a panel, from column `c` of it on.
template <class K, int ROWS>
void tile(const stars_linear_params& p, const Format& f, const Layout& layout, const uint8_t* panel, int64_t column,
          int64_t c, const Group* x, int64_t row, bool ask) {
  floats total[ROWS][2] = {};
  for (int64_t index = 0; index < layout.chunks; ++index, ++x) {
    const uint8_t* chunk = panel + layout.chunk_at(index);
    if (ask)
      for (int64_t line = 0; line < layout.chunk; line += 64) __builtin_prefetch(chunk + kAhead + line);
    floats scale[2][K::kHalves], offset[2];
    if constexpr (!K::kOfOutput)
      for (int v = 0; v < 2; ++v)
        load_scales<K>(f, layout, chunk, panel + layout.head_at(index), c + v * vector_width, scale[v], offset[v]);
    add_group<K, 0, ROWS>(total, chunk + 4 * c, x, layout.chunks, scale);
    if constexpr (K::kHalves == 2) add_group<K, 1, ROWS>(total, chunk + 4 * c, x, layout.chunks, scale);
    if constexpr (K::kOffsets)
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 2; ++v)
          total[r][v] = fma(offset[v], splat(x[r * layout.chunks].sum), total[r][v]);
  }
  for (int v = 0; v < 2; ++v) {
    const int64_t place = column + c + v * vector_width;
    const int64_t count = std::clamp<int64_t>(p.out_features - place, 0, vector_width);
    if (count == 0) continue;
    const floats bias = p.bias ? load_first(p.bias + place, count) : floats{};
    floats scale = splat(1.0f);
    if constexpr (K::kOfOutput)
      scale = load(reinterpret_cast<const float*>(panel + layout.panel) - kPanel + c + v * vector_width);
    for (int r = 0; r < ROWS; ++r) {
      const floats value = p.bias ? fma(total[r][v], scale, bias) : total[r][v] * scale;
      store_first(p.out + (row + r) * p.out_stride + p.out_column + place, value, count);
    }
  }
}

template <class K, int ROWS = kMaxRows>
void row_block(int64_t rows, const stars_linear_params& p, const Format& f, const Layout& layout, const uint8_t* panel,
               int64_t column, const Group* x, int64_t row, bool ask) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      for (int64_t c = 0; c < kPanel; c += 2 * vector_width)
        tile<K, ROWS>(p, f, layout, panel, column, c, x, row, ask && c == 0);
    } else {
      row_block<K, ROWS - 1>(rows, p, f, layout, panel, column, x, row, ask);
    }
  }
}

template <class K>
void product(const stars_linear_params& p, uint64_t call, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const Format f = format_of(p.dtype);
  const Layout layout(f, p.in_features);
  const int64_t rows = end - begin, passes = (rows + kRowsPerPass - 1) / kRowsPerPass;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t from = begin + rows * i / passes, count = begin + rows * (i + 1) / passes - from;
    const Group* groups = rounded_rows(call, p.x, p.in_features, from, count, f.zero, K::kHalves == 2);
    const int64_t blocks = (count + kMaxRows - 1) / kMaxRows;
    for (int64_t index = first; index < last; ++index) {
      const uint8_t* panel = static_cast<const uint8_t*>(p.weight) + index * layout.panel;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = count * block / blocks, next = count * (block + 1) / blocks;
        // The first rows bring the panel into the caches.
        row_block<K>(next - row, p, f, layout, panel, index * kPanel, groups + row * layout.chunks, from + row,
                     block == 0);
      }
    }
  }
}

}  // namespace

void linear_quantised(const stars_linear_params& p) {
  const Format f = format_of(p.dtype);
  const bool offsets = f.offsets != Offsets::kNone;
  const auto run = f.scales == Scales::kOutput ? product<Kind<8, Scales::kOutput, false>>
                   : f.bits == 8               ? product<Kind<8, Scales::kHalf, false>>
                   : f.bits == 6               ? product<Kind<6, Scales::kSmallOf16, false>>
                   : f.bits == 5 && offsets    ? product<Kind<5, Scales::kHalf, true>>
                   : f.bits == 5               ? product<Kind<5, Scales::kHalf, false>>
                   : offsets                   ? product<Kind<4, Scales::kHalf, true>>
                                               : product<Kind<4, Scales::kHalf, false>>;
  static std::atomic<uint64_t> calls{0};
  const uint64_t call = calls.fetch_add(1, std::memory_order_relaxed) + 1;
  // By rows first: a thread then rounds few of them, and a panel serves all that it has.
  for_product_tasks(p, kRowsPerPass, kMaxRows,
                    [run, call](const auto& params, auto... part) { run(params, call, part...); });
}

}  // namespace stars::STARS_ISA
