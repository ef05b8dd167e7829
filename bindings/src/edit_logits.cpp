// Biases, bans and masks of single tokens, as kernels/edit_logits.py has them.
#include <algorithm>
#include <cstring>
#include <limits>

#include "ops.h"
#include "parallel.h"

namespace stars {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();
constexpr int64_t kWordsPerTask = 512;  // of a mask, 32 columns each

// A table, as shifts by a number of each element's own are no vectors in the least instruction set.
constexpr struct bits {
  uint32_t of[32] = {};
  constexpr bits() {
    for (int i = 0; i < 32; ++i) of[i] = uint32_t{1} << i;
  }
} kBit;

// Entries first .. end - 1 of a range that is cut to what the array has.
struct range {
  int64_t first, end;
  range(int64_t start, int64_t count, int64_t size)
      : first(std::clamp<int64_t>(start, 0, size)), end(std::clamp<int64_t>(first + count, first, size)) {}
};

void mask_words(const stars_edit_logits_params& p, int64_t lane, int64_t first, int64_t end) {
  const int32_t* const mask = p.masks + p.mask_row[lane] * ((p.vocab + 31) / 32);
  float* const row = p.logits + lane * p.vocab;
  for (int64_t word = first; word < end; ++word) {
    const uint32_t allowed = static_cast<uint32_t>(mask[word]);
    if (allowed == ~uint32_t{0}) continue;
    const int64_t count = std::min<int64_t>(32, p.vocab - 32 * word);
    float* const column = row + 32 * word;
    if (count == 32)
      for (int i = 0; i < 32; ++i) column[i] = allowed & kBit.of[i] ? column[i] : kForbidden;  // without a branch
    else
      for (int64_t i = 0; i < count; ++i) column[i] = allowed & kBit.of[i] ? column[i] : kForbidden;
  }
}

// Whether the response, the committed one and what the lane drew, ends with all of a word but its last token.
bool follows(const stars_edit_logits_params& p, int64_t lane, const int32_t* word, int64_t steps) {
  const int64_t before = p.word_length - 1;
  for (int64_t back = 1; back <= before; ++back) {
    const int32_t wanted = word[before - back];
    if (wanted < 0) continue;
    const int32_t said = back <= steps ? p.out_tokens[lane * p.max_steps + steps - back]
                                       : p.tail[lane * before + before - (back - steps)];
    if (said != wanted) return false;
  }
  return true;
}

void edit_lane(const stars_edit_logits_params& p, int64_t lane) {
  if (p.done[lane]) return;
  float* const row = p.logits + lane * p.vocab;
  const int64_t steps = std::clamp<int64_t>(p.steps[lane], 0, p.max_steps);
  const range entries(p.start[lane], p.count[lane], p.entry_count);
  for (int64_t entry = entries.first; entry < entries.end; ++entry) {
    const int32_t token = p.entries[3 * entry], until = p.entries[3 * entry + 1];
    if (token < 0 || token >= p.vocab) continue;
    float bias;
    std::memcpy(&bias, p.entries + 3 * entry + 2, sizeof bias);
    row[token] = until > p.base[lane] + steps ? kForbidden : row[token] + bias;
  }
  const range words(p.first_word[lane], p.word_count[lane], p.word_rows);
  for (int64_t at = words.first; at < words.end; ++at) {
    const int32_t* const word = p.words + at * p.word_length;
    const int32_t last = word[p.word_length - 1];
    if (last >= 0 && last < p.vocab && follows(p, lane, word, steps)) row[last] = kForbidden;
  }
}

}  // namespace

void edit_logits(const stars_edit_logits_params& p) {
  const auto masked = [&p](int64_t lane) {
    return !p.done[lane] && p.mask_row[lane] >= 0 && p.mask_row[lane] < p.mask_rows;
  };
  bool any = false;
  for (int64_t lane = 0; lane < p.lanes; ++lane) any |= masked(lane);
  if (any) {
    // A task is a share of a lane's columns: few lanes of a large vocabulary are spread, too.
    const int64_t words = (p.vocab + 31) / 32, tasks = (words + kWordsPerTask - 1) / kWordsPerTask;
    parallel(p.lanes * tasks, [&](int64_t task) {
      const int64_t lane = task / tasks, first = task % tasks * kWordsPerTask;
      if (masked(lane)) mask_words(p, lane, first, std::min(words, first + kWordsPerTask));
    });
  }
  parallel(p.lanes, [&p](int64_t lane) { edit_lane(p, lane); });
}

}  // namespace stars
