/* A request of the segment controller in C11: a toy model drafts, a toy reward scores, libstars decides.
 *
 *   bigram [seed] [width] [samples]     e.g. bigram 7 4 2
 *
 * `width` attempts are drawn at once. It changes the speed of a host that batches them, and never the text. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "bigram.h"
#include "stars.h"

enum { MAX_TOKENS = 40, SEGMENT_SIZE = 5, MAX_ATTEMPTS = 12, MAX_WIDTH = 16 };

typedef struct {
  int32_t tokens[SEGMENT_SIZE];
  int32_t count;
} segment;

/* Says what the library said, and ends the program: a host would end the request. */
static void give_up(void) {
  fprintf(stderr, "%s\n", stars_last_error());
  exit(1);
}

/* The draft of one attempt: at each place the argmax of logits and the attempt's own noise, which is a draw. */
static segment draft(const stars_attempt* attempt, int32_t last) {
  segment made = {{0}, 0};
  while (made.count < attempt->max_tokens) {
    float noise[VOCAB];
    if (stars_gumbel(attempt->seed, (uint32_t)made.count, (uint32_t)attempt->attempt, (uint32_t)attempt->stream, VOCAB,
                     noise) != STARS_OK)
      give_up();
    int32_t best = 0;
    for (int32_t token = 0; token < VOCAB; ++token) {
      noise[token] += (float)(LOGITS[last][token] - '0');
      if (noise[token] > noise[best]) best = token;
    }
    made.tokens[made.count++] = last = best;
    if (last == EOS) break;
  }
  return made;
}

/* Of a whole response, or of its beginning: it is scored with each attempt at its end. */
static double reward_of(const int32_t* tokens, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += LIKED[tokens[i]];
  return sum;
}

static void respond(uint64_t seed, int64_t width, int64_t sample) {
  stars_controller_params params = {0};
  params.size = sizeof params;
  params.seed = seed;
  params.sample = sample;
  params.reward_threshold = 4.0;
  params.beta = 0.25;
  params.alpha = 0.25;
  params.prompt_reward = 0.0; /* of the empty response */
  params.max_tokens = MAX_TOKENS;
  params.segment_size = SEGMENT_SIZE;
  params.max_attempts = MAX_ATTEMPTS;
  stars_controller* controller = stars_controller_open(&params);
  if (!controller) give_up();

  int32_t response[MAX_TOKENS];
  int64_t length = 0;
  segment drafts[MAX_ATTEMPTS]; /* of this segment, all rounds: the best seen may win in the end */
  int64_t drawn = 0, count;
  stars_attempt attempts[MAX_WIDTH];
  while ((count = stars_controller_next(controller, attempts, width)) > 0) {
    stars_scored scored[MAX_WIDTH] = {{0}};
    for (int64_t i = 0; i < count; ++i) { /* a host drafts them in one batch, and scores them in another */
      const segment one = drafts[drawn++] = draft(&attempts[i], length ? response[length - 1] : EOS);
      for (int32_t k = 0; k < one.count; ++k) response[length + k] = one.tokens[k];
      scored[i].attempt = attempts[i].attempt;
      scored[i].tokens = one.count;
      scored[i].ended = one.tokens[one.count - 1] == EOS;
      scored[i].reward = reward_of(response, length + one.count);
    }
    stars_note notes[MAX_WIDTH];
    stars_decision decision = {0};
    decision.size = sizeof decision;
    if (stars_controller_feed(controller, scored, count, notes, &decision) != STARS_OK) give_up();
    if (decision.verdict != STARS_ACCEPT && decision.verdict != STARS_FALLBACK) continue;
    const segment* winner = &drafts[decision.winner - 1];
    for (int32_t k = 0; k < winner->count; ++k) {
      response[length + k] = winner->tokens[k];
      printf("%s ", WORDS[winner->tokens[k]]);
    }
    length += winner->count;
    printf("[attempt %d%s, reward %.3f]\n", (int)decision.winner,
           decision.verdict == STARS_ACCEPT ? "" : ", the best of all that were rejected", reward_of(response, length));
    drawn = 0;
    if (stars_controller_commit(controller) != STARS_OK) give_up();
  }
  if (count < 0) give_up();

  stars_progress progress = {0};
  progress.size = sizeof progress;
  if (stars_controller_progress(controller, &progress) != STARS_OK) give_up();
  printf("= %s: %" PRId64 " segments, %" PRId64 " of %" PRId64 " attempts accepted\n",
         progress.finish_reason == STARS_STOP ? "stop" : "length", progress.segments, progress.accepted,
         progress.attempts_counted);
  if (stars_controller_close(controller) != STARS_OK) give_up();
}

/* Argument `place` as a number of least .. most; `otherwise` where there is none. */
static uint64_t argument(int argc, char** argv, int place, uint64_t otherwise, uint64_t least, uint64_t most) {
  if (argc <= place) return otherwise;
  char* end = NULL;
  errno = 0;
  const unsigned long long value = strtoull(argv[place], &end, 10);
  if (argv[place][0] >= '0' && argv[place][0] <= '9' && *end == '\0' && !errno && value >= least && value <= most)
    return value;
  fprintf(stderr, "usage: bigram [seed] [width, 1 to %d] [samples, 1 to 4096]\n", MAX_WIDTH);
  exit(2);
}

int main(int argc, char** argv) {
  if (stars_check_version(STARS_ABI_VERSION) != STARS_OK) give_up();
  const uint64_t seed = argument(argc, argv, 1, 7, 0, UINT64_MAX);
  const int64_t width = (int64_t)argument(argc, argv, 2, 4, 1, MAX_WIDTH);
  const int64_t samples = (int64_t)argument(argc, argv, 3, 1, 1, 4096);
  for (int64_t sample = 0; sample < samples; ++sample) respond(seed, width, sample);
  return 0;
}
