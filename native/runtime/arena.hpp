// Memory directly from the system: page-aligned, zeroed, with huge pages if they help, resident when first touched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace dso {

// The bytes of `count` parts of a cache or the like, for an Arena. DSO_EINVAL or DSO_ENOMEM, naming `what` and its `parts`.
int64_t bytes_of_parts(const char* what, const char* parts, int64_t count, int64_t part_bytes);

class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes);  // reserves address space only: nothing is resident yet. DSO_ENOMEM
  ~Arena();
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }

  // Makes room for at least `bytes`; the content is lost when it grows. It grows by at least a quarter, so that a context that
  // gets longer token by token does not remap at every step.
  void reserve(int64_t bytes);
  void release(int64_t from);  // pages entirely past `from` are returned to the system and read as zero

  // For testing the memory's users. Under AddressSanitizer close() fills the arena with NaN and forbids all access, allow()
  // permits one region again, and regions must have a gap between them; otherwise these do nothing.
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
