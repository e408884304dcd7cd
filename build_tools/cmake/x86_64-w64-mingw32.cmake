# Cross-builds for Windows on x86-64 with clang and the headers and libraries of Debian's g++-mingw-w64-x86-64-posix, and runs the
# tests under Wine: cmake -DCMAKE_TOOLCHAIN_FILE=build_tools/cmake/x86_64-w64-mingw32.cmake
# Not with GCC itself: on Windows it does not align the stack for vectors of 32 bytes (its bug 54412).
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
find_program(DSO_CLANG NAMES clang++-21 clang++-20 clang++-19 clang++ REQUIRED)  # before an older default
find_program(DSO_WINE NAMES wine64 wine PATHS /usr/lib/wine)
set(CMAKE_CXX_COMPILER ${DSO_CLANG})
set(CMAKE_CXX_COMPILER_TARGET x86_64-w64-mingw32)
set(CMAKE_RC_COMPILER x86_64-w64-mingw32-windres)
set(CMAKE_EXE_LINKER_FLAGS_INIT "-static -pthread")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-static -pthread")
set(CMAKE_CROSSCOMPILING_EMULATOR ${DSO_WINE})
set(CMAKE_FIND_ROOT_PATH /usr/x86_64-w64-mingw32)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
