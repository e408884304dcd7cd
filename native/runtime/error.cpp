#include "error.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace dso {
namespace {

std::string vtext(const char* format, va_list args) {
  va_list again;
  va_copy(again, args);
  const int n = std::vsnprintf(nullptr, 0, format, args);
  std::string out(n > 0 ? n : 0, '\0');
  if (n > 0) std::vsnprintf(out.data(), out.size() + 1, format, again);
  va_end(again);
  return out;
}

// A plain array: it needs no destructor when a thread ends and no allocation when memory is exhausted.
thread_local char message[1024] = "";

}  // namespace

std::string text(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string out = vtext(format, args);
  va_end(args);
  return out;
}

void fail(int32_t code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const std::string out = vtext(format, args);
  va_end(args);
  throw Error(code, out);
}

void set_last_error(const char* m) noexcept {
  const size_t n = std::min(std::strlen(m), sizeof(message) - 1);
  std::memcpy(message, m, n);
  message[n] = '\0';
}

const char* last_error() noexcept { return message; }

}  // namespace dso
