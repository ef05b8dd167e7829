#include "stars.h"

void stars_philox(uint64_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t[4]) {}
double stars_accept_uniform(uint64_t, uint32_t, uint32_t, uint32_t) { return 0.5; }
void stars_gumbel(uint64_t, uint32_t, uint32_t, uint32_t, int64_t, float*) {}
