#include "parallel.h"
extern "C" __attribute__((visibility("default"))) int stars_abi_version() { return 1; }
