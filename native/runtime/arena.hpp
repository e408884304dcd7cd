// Memory straight from the system: page-aligned, zero, huge pages where they help, resident when first touched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace dso {

class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes);  // address space only: nothing is resident yet. DSO_ENOMEM
  ~Arena();
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }

  // At least `bytes`; what was inside is lost when it grows. Grows by a quarter or more: a context that gets longer token
  // by token does not remap at every step.
  void reserve(int64_t bytes);
  void release(int64_t from);  // pages wholly past `from` go back to the system, and read as zero

  // For tests of what is kept in it. Under AddressSanitizer close() fills the arena with NaN and forbids all of it, allow()
  // gives one region back, and regions want a gap between them; otherwise these do nothing.
  void close();
  void allow(int64_t from, int64_t bytes);
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kGap = 64;
#else
  static constexpr int64_t kGap = 0;
#endif

  uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void swap(Arena& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace dso
