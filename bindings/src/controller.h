// The segment controller: one request as a state machine, with the law and its random numbers inside.
#pragma once

#include <cstdint>

#include "stars.h"

namespace stars {

class controller {
 public:
  // What is wrong with parameters; null where nothing is.
  static const char* check(const stars_controller_params& p);

  explicit controller(const stars_controller_params& params);

  // Each returns null, or why nothing was done.
  const char* next(stars_attempt* attempts, int64_t capacity, int64_t& count);
  const char* feed(const stars_scored* scored, int64_t count, stars_note* notes, stars_decision& decision);
  const char* commit();
  void abort();

  void progress(stars_progress& out) const;

 private:
  // Of the segment that is being decided.
  struct segment {
    int32_t drawn = 0;  // attempts that were given
    int32_t fed = 0;    // of which the results were given, the first ones
    int32_t tokens = 0;  // most of each attempt
    int32_t verdict = STARS_UNDECIDED;
    int32_t winner = 0, best = 0;  // attempts, from 1; 0: none
    stars_scored winning = {}, leading = {};  // what was said of these
    int64_t fed_tokens = 0;  // drawn for attempts whose results were given, and not counted in done_ yet
    int64_t rewards = 0;     // computed for them
  };

  double tau(int64_t tokens) const;
  int64_t segment_tokens() const;
  static bool decided(const segment& s) { return s.verdict == STARS_ACCEPT || s.verdict == STARS_FALLBACK; }
  const char* unusable(const stars_scored* scored, int64_t count) const;
  void settle(segment& s, const stars_scored& one, stars_note* note) const;
  void pay();

  stars_controller_params params_;
  double start_;
  segment segment_;
  stars_progress done_ = {};
};

}  // namespace stars
