# What `cmake --install` puts in place: stars.h, the library for both kinds of linking, and what CMake and pkg-config
# find it by. Read by ../../CMakeLists.txt, unless the library is for the Python package.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Programs need the library of the ABI that they were compiled for: its number is in the library's name.
string(REGEX MATCH "#define STARS_ABI_VERSION ([0-9]+)" found "${STARS_HEADER}")
set(abi_version ${CMAKE_MATCH_1})
file(STRINGS engine/version.py found REGEX "^__version__ = ")
string(REGEX MATCH "[0-9.]+" STARS_VERSION "${found}")
if(NOT abi_version OR NOT STARS_VERSION)
  message(FATAL_ERROR "bindings/stars.h must define STARS_ABI_VERSION, engine/version.py __version__")
endif()
set_target_properties(stars PROPERTIES SOVERSION ${abi_version} VERSION ${abi_version}.${STARS_VERSION})

# Of the very objects that the shared library is made of.
get_target_property(objects stars SOURCES)
list(FILTER objects INCLUDE REGEX "TARGET_OBJECTS")
add_library(stars_static STATIC $<TARGET_OBJECTS:stars> ${objects})
set_target_properties(stars_static PROPERTIES OUTPUT_NAME stars LINKER_LANGUAGE CXX)
# Also programs in C are to be linked with it, by a linker that brings no C++ library along.
set(cxx_library ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER cxx_library INCLUDE REGEX "^(std)?c\\+\\+$")
list(REMOVE_DUPLICATES cxx_library)
target_link_libraries(stars_static PUBLIC Threads::Threads INTERFACE ${cxx_library} m)

foreach(target stars stars_static)
  target_include_directories(${target} INTERFACE $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/bindings>
                             $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  add_library(stars::${target} ALIAS ${target})
endforeach()

install(FILES bindings/stars.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS stars stars_static EXPORT starsTargets)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/stars)
install(EXPORT starsTargets NAMESPACE stars:: DESTINATION ${package_dir})
configure_package_config_file(bindings/packaging/starsConfig.cmake.in starsConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(starsConfigVersion.cmake VERSION ${STARS_VERSION} COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/starsConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/starsConfigVersion.cmake
        DESTINATION ${package_dir})

# Relative to the file itself, so that the whole can be moved.
file(RELATIVE_PATH STARS_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" STARS_PREFIX "${STARS_PREFIX}")
file(RELATIVE_PATH STARS_LIBDIR ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH STARS_INCLUDEDIR ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
list(TRANSFORM cxx_library PREPEND "-l" OUTPUT_VARIABLE STARS_CXX_LIBRARY)
configure_file(bindings/packaging/stars.pc.in stars.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/stars.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
