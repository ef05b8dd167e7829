// Maxima, sums and thresholds over a row of logits: what the sampler needs instead of a sort.
#pragma once

#include <cfloat>
#include <cstdint>

#include "scratch.h"
#include "simd.h"

namespace stars::STARS_ISA {

constexpr float infinity = __builtin_inff();
constexpr int64_t block_vectors = 16;
constexpr int64_t block_size = block_vectors * vector_width;
constexpr float top_p_reach = 40.0f;  // exp(-40) times any vocabulary is below every 1 - top_p that float32 can hold

struct logit_row {
  const float* logits;
  int64_t vocab;
  float* maxima;  // one vector per block of block_size logits: each lane's maximum
  float highest;

  // The vector from `i` on; what lies after the vocabulary is -inf.
  STARS_INLINE floats at(int64_t i) const {
    if (i + vector_width <= vocab) return load(logits + i);
    const int64_t left = vocab - i;
    return lane_numbers() < splat((int32_t)left) ? load_first(logits + i, left) : splat(-infinity);
  }
};

// Some of a row's logits, in the order of their tokens.
struct candidate_list {
  float* values;
  int32_t* tokens;
  int64_t count;
};

STARS_INLINE int64_t maxima_count(int64_t vocab) { return (vocab + block_size - 1) / block_size * vector_width; }

// visit(maxima of the block, first, end) for every block.
template <class F>
STARS_INLINE void for_blocks(const logit_row& row, F&& visit) {
  const float* maxima = row.maxima;
  for (int64_t first = 0; first < row.vocab; first += block_size, maxima += vector_width) {
    const int64_t end = first + block_size;
    visit(load(maxima), first, end < row.vocab ? end : row.vocab);
  }
}

// float32 in the order of integers, and back.
STARS_INLINE int32_t to_key(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

STARS_INLINE float from_key(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int64_t count_at_least(const float* values, int64_t count, float bound) {
  ints found = {};
  int64_t i = 0;
  for (; i + vector_width <= count; i += vector_width) found -= load(values + i) >= splat(bound);
  int64_t total = 0;
  for (int lane = 0; lane < vector_width; ++lane) total += found[lane];
  for (; i < count; ++i) total += values[i] >= bound;
  return total;
}

// A bound that at least k of the values reach, and at most k + slack where ties allow; the k-th largest if slack is 0.
inline float bound_of_k_largest(const float* values, int64_t count, int64_t k, int64_t slack, float highest) {
  int64_t low = to_key(-infinity), high = (int64_t)to_key(highest) + 1;  // k or more reach low, fewer reach high
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t reach = count_at_least(values, count, from_key((int32_t)middle));
    if (reach >= k) {
      low = middle;
      if (slack && reach <= k + slack) break;
    } else {
      high = middle;
    }
  }
  return from_key((int32_t)low);
}

// Appends the lanes of the mask; up to vector_width floats are written at `to`.
STARS_INLINE int64_t append(float* to, floats values, ints mask) {
#if defined(__AVX512F__)
  const __mmask16 bits = (__mmask16)mask_bits(mask);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(bits, (__m512)values));
  return __builtin_popcount(bits);
#else
  int64_t count = 0;
  for (int i = 0; i < vector_width; ++i) {
    to[count] = values[i];
    count += mask[i] ? 1 : 0;
  }
  return count;
#endif
}

// float64 sums of float32 vectors.
struct wide_sum {
  typedef double doubles __attribute__((vector_size(4 * vector_width)));
  typedef float halves __attribute__((vector_size(2 * vector_width)));
  doubles low = {}, high = {};

  STARS_INLINE void add(floats v) {
    halves parts[2];
    std::memcpy(parts, &v, sizeof v);
    low += __builtin_convertvector(parts[0], doubles);
    high += __builtin_convertvector(parts[1], doubles);
  }
  STARS_INLINE double total() const {
    const doubles both = low + high;
    double sum = 0.0;
    for (int i = 0; i < vector_width / 2; ++i) sum += both[i];
    return sum;
  }
};

// The values of the smallest interval known to hold the answer, with their masses, padded with nothing (-inf, 0).
struct weighted_values {
  float* z;
  float* mass;
  int64_t count;

  STARS_INLINE void pad() {
    store(z + count, splat(-infinity));
    store(mass + count, splat(0.0f));
  }
};

inline double mass_above(const weighted_values& s, float pivot) {
  wide_sum sum;
  for (int64_t i = 0; i < s.count; i += vector_width)
    sum.add(load(s.z + i) > splat(pivot) ? load(s.mass + i) : splat(0.0f));
  return sum.total();
}

// Keeps those above the pivot, or the others.
inline void narrow(weighted_values& s, float pivot, bool above) {
  int64_t kept = 0;
  for (int64_t i = 0; i < s.count; i += vector_width) {
    const floats z = load(s.z + i), mass = load(s.mass + i);
    const ints mask = (above ? z > splat(pivot) : z <= splat(pivot)) & (z > splat(-infinity));
    append(s.mass + kept, mass, mask);
    kept += append(s.z + kept, z, mask);
  }
  s.count = kept;
  s.pad();
}

inline void sort_descending(weighted_values& s) {
  for (int64_t i = 1; i < s.count; ++i) {
    const float z = s.z[i], mass = s.mass[i];
    int64_t at = i;
    for (; at > 0 && s.z[at - 1] < z; --at) {
      s.z[at] = s.z[at - 1];
      s.mass[at] = s.mass[at - 1];
    }
    s.z[at] = z;
    s.mass[at] = mass;
  }
}

// Fills maxima and highest; false if a logit is NaN or +inf.
inline bool find_maxima(logit_row& row) {
  float* maxima = row.maxima;
  floats highest = splat(-infinity);
  ints wrong = {};
  int64_t first = 0;
  for (; first + block_size <= row.vocab; first += block_size, maxima += vector_width) {
    floats even = splat(-infinity), odd = splat(-infinity);
    for (int64_t i = 0; i < block_vectors; i += 2) {
      const float* from = row.logits + first + i * vector_width;
      const floats a = load(from), b = load(from + vector_width);
      wrong |= ~((a <= splat(FLT_MAX)) & (b <= splat(FLT_MAX)));
      even = max(even, a);
      odd = max(odd, b);
    }
    even = max(even, odd);
    store(maxima, even);
    highest = max(highest, even);
  }
  if (first < row.vocab) {
    floats own = splat(-infinity);
    for (int64_t i = first; i < row.vocab; i += vector_width) {
      const floats a = row.at(i);
      wrong |= ~(a <= splat(FLT_MAX));
      own = max(own, a);
    }
    store(maxima, own);
    highest = max(highest, own);
  }
  row.highest = max_of(highest);
  return !any(wrong);
}

// Sum over exp(logit - highest), leaving out blocks that are `nothing_below` below the highest.
inline double sum_of_exponentials(const logit_row& row, float nothing_below) {
  double total = 0.0;
  const floats highest = splat(row.highest), bound = splat(row.highest - nothing_below);
  for_blocks(row, [&](const floats& block_highest, int64_t first, int64_t end) {
    if (!any(block_highest >= bound)) return;  // equal where the logits are huge
    floats sum = {};
    if (end - first == block_size) {
      for (int64_t i = 0; i < block_vectors; ++i) sum += exp(load(row.logits + first + i * vector_width) - highest);
    } else {
      for (int64_t i = first; i < end; i += vector_width) sum += exp(row.at(i) - highest);
    }
    total += (double)sum_of(sum);
  });
  return total;
}

struct exponential_sums {
  double mass, weighted;  // sums over e and over e * d, where d = logit - highest <= 0 and e = exp(d)

  // Of the softmax, in nats: log of the mass less the mean of d. Neither can make it negative.
  STARS_INLINE double entropy() const { return __builtin_log(mass) - weighted / mass; }
};

// Both sums in one read, leaving out blocks that are `nothing_below` below the highest; the first has the bits of
// sum_of_exponentials.
inline exponential_sums sums_for_entropy(const logit_row& row, float nothing_below) {
  exponential_sums total = {0.0, 0.0};
  const floats highest = splat(row.highest), bound = splat(row.highest - nothing_below);
  const floats farthest = splat(-1000.0f);  // where e is 0; -inf times 0 would be NaN
  for_blocks(row, [&](const floats& block_highest, int64_t first, int64_t end) {
    if (!any(block_highest >= bound)) return;  // equal where the logits are huge
    floats mass = {}, weighted = {};
    const auto add = [&](const floats& logits) {
      const floats d = logits - highest, e = exp(d);
      mass += e;
      weighted += e * max(d, farthest);
    };
    if (end - first == block_size) {
      for (int64_t i = 0; i < block_vectors; ++i) add(load(row.logits + first + i * vector_width));
    } else {
      for (int64_t i = first; i < end; i += vector_width) add(row.at(i));
    }
    total.mass += (double)sum_of(mass);
    total.weighted += (double)sum_of(weighted);
  });
  return total;
}

// The lowest token id with the highest logit.
inline int32_t first_highest(const logit_row& row) {
  const floats highest = splat(row.highest);
  int32_t token = -1;
  const float* maxima = row.maxima;
  for (int64_t first = 0; token < 0 && first < row.vocab; first += block_size, maxima += vector_width) {
    if (!any(load(maxima) == highest)) continue;
    for (int64_t i = first; token < 0; i += vector_width) {
      const uint32_t bits = mask_bits(row.at(i) == highest);
      if (bits) token = (int32_t)i + __builtin_ctz(bits);
    }
  }
  return token;
}

// The logits >= lowest, in memory that lasts until this thread's next call.
inline candidate_list collect(const logit_row& row, float lowest) {
  thread_local scratch memory;
  float* values = memory.take<float>(2 * row.vocab + 2 * vector_width);
  candidate_list found = {values, reinterpret_cast<int32_t*>(values + row.vocab + vector_width), 0};
  const floats bound = splat(lowest);
  for_blocks(row, [&](const floats& block_highest, int64_t first, int64_t end) {
    if (!any(block_highest >= bound)) return;
    for (int64_t i = first; i < end; i += vector_width) {
      const floats v = row.at(i);
      for (uint32_t bits = mask_bits(v >= bound); bits; bits &= bits - 1) {
        const int64_t token = i + __builtin_ctz(bits);
        found.values[found.count] = row.logits[token];
        found.tokens[found.count++] = (int32_t)token;
      }
    }
  });
  return found;
}

// The k-th largest logit, and a list of candidates that holds at least the k largest and what is within rounding of
// the k-th.
inline float kth_largest(const logit_row& row, int64_t k, candidate_list& found) {
  // The k-th largest of any k or more of the logits is at most the k-th largest of all: the blocks' maxima, where they
  // are enough, bound it closely.
  const int64_t count = maxima_count(row.vocab), slack = k / 4 + 8;
  const bool enough = k <= count / 2;
  const float bound = enough ? bound_of_k_largest(row.maxima, count, k, slack, row.highest)
                             : bound_of_k_largest(row.logits, row.vocab, k, slack, row.highest);
  const double below = (double)bound - __builtin_fabs((double)bound) * 0x1p-21 - 1e-37;
  found = collect(row, below > -FLT_MAX ? (float)below : -FLT_MAX);
  if (found.count < k) return -infinity;  // fewer than k are not forbidden
  return bound_of_k_largest(found.values, found.count, k, 0, row.highest);
}

// The smallest z = value / temperature >= threshold such that the probability of the strictly larger ones is below
// top_p of all >= threshold.
inline float top_p_threshold(const candidate_list& found, float temperature, float highest, float threshold,
                             float top_p) {
  if (!(top_p > 0.0f)) return highest;
  thread_local scratch memory;
  const int64_t room = found.count + 2 * vector_width;
  weighted_values s = {memory.take<float>(2 * room), nullptr, 0};
  s.mass = s.z + room;
  floats lowest = splat(highest);
  wide_sum sum;
  for (int64_t i = 0; i < found.count; i += vector_width) {
    const int64_t left = found.count - i;
    const floats z = (left >= vector_width ? load(found.values + i) : load_first(found.values + i, left)) /
                     splat(temperature);
    const ints kept = (z >= splat(threshold)) & (z > splat(-infinity)) &
                      (lane_numbers() < splat((int32_t)(left < vector_width ? left : vector_width)));
    const floats mass = exp(z - splat(highest));
    sum.add(kept ? mass : splat(0.0f));
    lowest = kept & (z < lowest) ? z : lowest;
    append(s.mass + s.count, mass, kept);
    s.count += append(s.z + s.count, z, kept);
  }
  s.pad();
  const double target = (double)top_p * sum.total();
  double above = 0.0;  // the mass of all that is larger than what is left
  float high = highest, low = -max_of(-lowest);
  while (s.count > 24) {
    float pivot = low + (high - low) * 0.5f;
    if (!(pivot < high)) pivot = low;
    const bool adjacent = pivot == low;
    const int64_t before = s.count;
    const double more = mass_above(s, pivot);
    if (above + more >= target) {
      low = pivot;
      narrow(s, pivot, true);
    } else {
      above += more;
      high = pivot;
      narrow(s, pivot, false);
    }
    if (adjacent && s.count == before) return high;  // all that is left are equal
  }
  sort_descending(s);
  float answer = s.z[0];
  for (int64_t i = 0; i < s.count && above < target;) {
    answer = s.z[i];
    for (; i < s.count && s.z[i] == answer; ++i) above += s.mass[i];
  }
  return answer;
}

}  // namespace stars::STARS_ISA
