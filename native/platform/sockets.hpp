// Connected stream sockets, by descriptor. Nothing here waits except wait_for_sockets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace dso {

struct Bytes {
  uint8_t* data;
  int64_t bytes;
};

// What is left of two pieces after their first `done` bytes.
inline std::pair<Bytes, Bytes> rest(Bytes first, Bytes second, int64_t done) {
  const int64_t of_first = std::min(done, first.bytes), of_second = done - of_first;
  return {{first.data + of_first, first.bytes - of_first}, {second.data + of_second, second.bytes - of_second}};
}

bool is_stream(int fd);  // a socket that is connected, or was; false on systems where groups have no sockets

// As much of two pieces, one after the other, as can be sent or is there. 0: nothing now; -1: the connection has ended.
int64_t send_now(int fd, Bytes first, Bytes second);
int64_t receive_now(int fd, Bytes first, Bytes second);
int64_t peek_now(int fd, Bytes piece);  // as receive_now, but what is there stays there

struct Watch {
  int fd;
  bool readable, writable, ends;  // what is waited for; ends: that the other side will send no more. Failures always count
  bool ended;                     // result: the connection has failed, or (`ends`) the other side will send no more
};
// Returns when one of them is ready, at the latest after so many milliseconds.
void wait_for_sockets(std::vector<Watch>& watches, int milliseconds);

void shut_socket(int fd);  // ends the connection in both directions; may be called while another thread waits for it

}  // namespace dso
