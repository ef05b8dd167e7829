/* A toy language model and a reward, for the examples beside it: what comes next depends on the last word alone. */
#ifndef BIGRAM_H
#define BIGRAM_H

#define VOCAB 14
#define EOS 0

static const char* const WORDS[VOCAB] = {".",    "the",  "film",   "plot",  "was",   "and",  "but",
                                         "very", "long", "moving", "funny", "dull,", "then", "ended"};

/* Row i, digit j: the logit of word j after word i. 0 is as good as never, 9 nearly always. */
static const char* const LOGITS[VOCAB] = {
    "06000010000040", /* . */
    "00770000000000", /* the */
    "00007000000007", /* film */
    "00007000000006", /* plot */
    "00000006555500", /* was */
    "06000006444430", /* and */
    "06000006444430", /* but */
    "00000002666600", /* very */
    "50000660000000", /* long */
    "50000650000000", /* moving */
    "50000650000000", /* funny */
    "30000660000050", /* dull, */
    "08000000000000", /* then */
    "90000330000000", /* ended */
};

/* What the reward makes of a word. */
static const double LIKED[VOCAB] = {0, 0, 0, 0, 0, 0.25, -0.25, 0.125, -0.75, 1.5, 1.0, -1.5, -0.25, 0};

#endif /* BIGRAM_H */
