# A toolchain: zig's C++ compiler, which links for any architecture and any glibc. Of the environment: STARS_ZIG, the
# program, and STARS_ZIG_TARGET, e.g. x86_64-linux-gnu.2.17. See wheels.py.
set(CMAKE_SYSTEM_NAME Linux)
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "$ENV{STARS_ZIG_TARGET}")
set(CMAKE_CXX_COMPILER $ENV{STARS_ZIG} c++ -target $ENV{STARS_ZIG_TARGET})
# It makes debug information unless told otherwise, ten times the library.
set(CMAKE_CXX_FLAGS_INIT -g0)
set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)
