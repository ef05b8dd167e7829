/* A program of a stranger's, in plain C: is the library that it runs with the one of the header it was compiled with,
 * and does it compute? Prints "stars.h VERSION, instructions ISA"; not 0 where something is wrong, with a sentence. */
#include <stars.h>
#include <stdio.h>
#include <string.h>

static int wrong(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

int main(void) {
  if (stars_check_version(STARS_ABI_VERSION) != STARS_OK) return wrong(stars_last_error());

  /* Random123's known answer of Philox4x32-10: the counter and key are digits of pi. */
  uint32_t words[4];
  const uint32_t answer[4] = {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
  if (stars_philox(0x299f31d0a4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, words) != STARS_OK)
    return wrong(stars_last_error());
  if (memcmp(words, answer, sizeof words) != 0) return wrong("stars_philox does not give its known answer");

  /* A product through the pool of threads: 64 rows of ones with a matrix whose row i is all i. */
  enum { rows = 64, in_features = 64, out_features = 96 };
  static float matrix[out_features * in_features], x[rows * in_features], out[rows * out_features];
  static _Alignas(64) char packed[1 << 16];
  for (int i = 0; i < out_features * in_features; ++i) matrix[i] = (float)(i / in_features);
  for (int i = 0; i < rows * in_features; ++i) x[i] = 1;
  if (stars_packed_bytes(out_features, in_features, STARS_F32) > (int64_t)sizeof packed) return wrong("packed is small");
  if (stars_pack(matrix, out_features, in_features, STARS_F32, packed) != STARS_OK) return wrong(stars_last_error());
  stars_linear_params params = {.size = sizeof params,
                                .x = x,
                                .weight = packed,
                                .out = out,
                                .rows = rows,
                                .in_features = in_features,
                                .out_features = out_features,
                                .out_stride = out_features,
                                .dtype = STARS_F32};
  if (stars_call(STARS_OP_LINEAR, &params) != STARS_OK) return wrong(stars_last_error());
  for (int i = 0; i < rows * out_features; ++i)
    if (out[i] != (float)(in_features * (i % out_features))) return wrong("a product is wrong");

  /* A struct of another version of the header is refused. */
  params.size -= 8;
  if (stars_call(STARS_OP_LINEAR, &params) != STARS_INVALID || !strstr(stars_last_error(), "sizeof"))
    return wrong("a struct of another size was not refused");

  printf("stars.h %d, instructions %s\n", STARS_ABI_VERSION, stars_isa());
  return 0;
}
