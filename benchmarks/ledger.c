/* The ledger of pages from C: nanoseconds of each kind of operation, as JSON. benchmarks/ledger.py builds and runs it. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "stars.h"

enum { num_pages = 2000, page_size = 16, texts = 400, repeats = 60 };

static int32_t tokens[texts][16 * page_size + 1];

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

static void must(int64_t status) {
  if (status < 0) {
    fprintf(stderr, "%s\n", stars_last_error());
    exit(1);
  }
}

/* The least time of `repeats` runs over all texts, of one of them. */
#define TIMED(name, pages, body)                                    \
  do {                                                              \
    double best = 1e18;                                             \
    for (int run = 0; run < repeats; ++run) {                       \
      const double begin = now();                                   \
      for (int text = 0; text < texts; ++text) body;                \
      const double each = (now() - begin) / texts;                  \
      if (each < best) best = each;                                 \
    }                                                               \
    printf("%s\"%s, %d pages\": %.1f", first, name, (int)(pages), best); \
    first = ", ";                                                   \
  } while (0)

int main(void) {
  const char* first = "{";
  const stars_ledger_params params = {sizeof params, num_pages, page_size};
  stars_page_copy copy = {sizeof copy, 0, 0, 0, 0};
  srand(1);
  for (int text = 0; text < texts; ++text)
    for (int i = 0; i < 16 * page_size + 1; ++i) tokens[text][i] = rand() % 50000;
  for (int64_t count = 1; count <= 16; count *= 4) {
    stars_ledger* ledger = stars_ledger_open(&params);
    int32_t pages[16];
    TIMED("alloc and release", count, {
      must(-stars_ledger_alloc(ledger, count, pages));
      must(-stars_ledger_release(ledger, pages, count));
    });
    TIMED("a request", count, {
      const int64_t found = stars_ledger_match(ledger, 0, tokens[text], count, pages);
      must(found);
      must(-stars_ledger_share(ledger, pages, found));
      must(-stars_ledger_alloc(ledger, count - found, pages + found));
      must(-stars_ledger_publish(ledger, 0, pages, tokens[text], count, NULL));
      must(-stars_ledger_release(ledger, pages, count));
    });
    TIMED("match", count, { must(stars_ledger_match(ledger, 0, tokens[text % 50 + texts - 50], count, pages)); });
    must(-stars_ledger_close(ledger));
    ledger = stars_ledger_open(&params);
    TIMED("a sequence", count, {
      stars_sequence* one = stars_sequence_open(ledger, 0, tokens[text], count * page_size + 1);
      must(stars_sequence_extend(one, count * page_size + 1 - stars_sequence_length(one), &copy));
      must(-stars_sequence_close(one, tokens[text], count * page_size + 1));
    });
    stars_sequence* one = stars_sequence_open(ledger, 0, NULL, 0);
    must(stars_sequence_extend(one, count * page_size + 1, &copy));
    TIMED("extend by 32 and rewind", count, {
      must(stars_sequence_extend(one, 32, &copy));
      must(-stars_sequence_rewind(one, count * page_size + 1));
    });
    TIMED("fork, extend by 1 and close", count, {
      stars_sequence* fork = stars_sequence_fork(one);
      must(stars_sequence_extend(fork, 1, &copy));
      must(-stars_sequence_close(fork, NULL, 0));
    });
    if (count == 16) TIMED("check", num_pages, { must(-stars_ledger_check(ledger, NULL)); });
    must(-stars_sequence_close(one, NULL, 0));
    must(-stars_ledger_close(ledger));
  }
  printf("}\n");
  return 0;
}
