# Compiles and links for macOS on ARM64 with zig, which has clang, libc++ and the headers and symbols of macOS (PyPI: ziglang):
#   cmake -DCMAKE_TOOLCHAIN_FILE=build_tools/cmake/arm64-apple-macos.cmake -DDSO_ZIG=.../ziglang/zig
# Compiles by `zig clang`, since `zig c++` takes no -march of clang's; links by `zig c++`, which alone has zig's linker.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES DSO_ZIG)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
get_filename_component(DSO_ZIG_LIB ${DSO_ZIG} DIRECTORY)
string(APPEND DSO_ZIG_LIB /lib)
set(CMAKE_CXX_COMPILER
    ${DSO_ZIG} clang --driver-mode=g++ --no-default-config --target=arm64-apple-macos14.4 -nostdinc -nostdinc++ -isystem
    ${DSO_ZIG_LIB}/libcxx/include -isystem ${DSO_ZIG_LIB}/libcxxabi/include -isystem ${DSO_ZIG_LIB}/include -isystem
    ${DSO_ZIG_LIB}/libc/include/any-darwin-any -D_LIBCPP_ABI_VERSION=1 -D_LIBCPP_ABI_NAMESPACE=__1 -D_LIBCPP_HAS_THREADS=1
    -D_LIBCPP_HAS_MONOTONIC_CLOCK=1 -D_LIBCPP_HAS_TERMINAL=1 -D_LIBCPP_HAS_MUSL_LIBC=0 -D_LIBCPP_HAS_FILESYSTEM=1
    -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=0 -D_LIBCPP_HAS_RANDOM_DEVICE=1 -D_LIBCPP_HAS_LOCALIZATION=1
    -D_LIBCPP_HAS_UNICODE=1 -D_LIBCPP_HAS_WIDE_CHARACTERS=1 -D_LIBCPP_PSTL_BACKEND_SERIAL
    -D_LIBCPP_HARDENING_MODE=_LIBCPP_HARDENING_MODE_NONE -D_LIBCPP_ASSERTION_SEMANTIC_DEFAULT=_LIBCPP_ASSERTION_SEMANTIC_IGNORE)
set(CMAKE_USER_MAKE_RULES_OVERRIDE_CXX ${CMAKE_CURRENT_LIST_DIR}/arm64-apple-macos-link.cmake)
set(CMAKE_INSTALL_NAME_TOOL true)  # nothing is installed
# Said here, since CMake would link a program to find out.
set(CMAKE_CXX_COMPILER_ID_RUN TRUE)
set(CMAKE_CXX_COMPILER_ID Clang)
set(CMAKE_CXX_COMPILER_VERSION 20)
set(CMAKE_CXX_COMPILER_FORCED TRUE)
