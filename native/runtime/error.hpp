// Errors inside the library are exceptions; the C interface converts them to a code and this thread's message.
#pragma once
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "dso.h"

namespace dso {

class Error : public std::runtime_error {
 public:
  Error(int32_t code, const std::string& message) : std::runtime_error(message), code(code) {}
  const int32_t code;
};

[[noreturn]] void fail(int32_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

void set_last_error(const char* message) noexcept;  // of the calling thread
const char* last_error() noexcept;

// Runs `body` at the C interface: no exception leaves it.
template <class Body>
int32_t guarded(Body&& body) noexcept {
  try {
    body();
    return DSO_OK;
  } catch (const Error& e) {
    set_last_error(e.what());
    return e.code;
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return DSO_ENOMEM;
  } catch (const std::exception& e) {
    set_last_error(e.what());
    return DSO_EINVAL;
  }
}

}  // namespace dso
