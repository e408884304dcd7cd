# The commands that link, for arm64-apple-macos.cmake. A file of its own, since CMake's files for macOS set these variables after the
# toolchain file is read.
set(link "${DSO_ZIG} c++ -target aarch64-macos.14.4")
set(CMAKE_CXX_LINK_EXECUTABLE "${link} <LINK_FLAGS> -o <TARGET> <OBJECTS> <LINK_LIBRARIES>")
set(CMAKE_CXX_CREATE_SHARED_LIBRARY
    "${link} -dynamiclib <LINK_FLAGS> -install_name @rpath/<TARGET_SONAME> -o <TARGET> <OBJECTS> <LINK_LIBRARIES>")
set(CMAKE_CXX_ARCHIVE_CREATE "${DSO_ZIG} ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_APPEND "${DSO_ZIG} ar q <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "${DSO_ZIG} ranlib <TARGET>")
