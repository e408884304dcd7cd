// Hidden rows through a connection between two processes of a pipeline.
//
// A frame is its length, big-endian, in four bytes, then four bytes that say what it is, then the rows. Messages of Python's
// multiprocessing.connection on the same socket begin with their lengths in the same way, so that one that comes instead of
// rows, such as an error, is recognized and left for its reader.
#pragma once
#include <cstdint>

namespace dso {

enum class Received { kRows, kEnd, kLost };

class StageLink {
 public:
  explicit StageLink(int socket);  // DSO_EINVAL if it is none. It is not closed

  // Both return false if the connection has ended.
  bool send_rows(float* rows, int64_t count) const;
  bool send_end() const;  // there will be no more rows
  // kLost: the connection has ended, or something else has come than so many floats, which is still there to be read.
  Received receive_rows(float* rows, int64_t count) const;

 private:
  bool send(uint32_t kind, float* rows, int64_t bytes) const;

  const int socket_;
};

}  // namespace dso
