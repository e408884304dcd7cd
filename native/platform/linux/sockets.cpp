#include "../sockets.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>

namespace dso {
namespace {

msghdr message_of(iovec (&pieces)[2], Bytes first, Bytes second) {
  pieces[0] = {first.data, size_t(first.bytes)};
  pieces[1] = {second.data, size_t(second.bytes)};
  msghdr message{};
  message.msg_iov = pieces;
  message.msg_iovlen = 2;
  return message;
}

bool try_again() { return errno == EAGAIN || errno == EWOULDBLOCK; }

}  // namespace

bool is_stream(int fd) {
  int type = 0;
  socklen_t size = sizeof type;
  return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

int64_t send_now(int fd, Bytes first, Bytes second) {
  iovec pieces[2];
  const msghdr message = message_of(pieces, first, second);
  for (;;) {
    const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0) return sent;
    if (errno != EINTR) return try_again() ? 0 : -1;
  }
}

static int64_t receive(int fd, Bytes first, Bytes second, int flags) {
  iovec pieces[2];
  msghdr message = message_of(pieces, first, second);
  for (;;) {
    const ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT | flags);
    if (got > 0) return got;
    if (got == 0) return -1;
    if (errno != EINTR) return try_again() ? 0 : -1;
  }
}

int64_t receive_now(int fd, Bytes first, Bytes second) { return receive(fd, first, second, 0); }

int64_t peek_now(int fd, Bytes piece) { return receive(fd, piece, {piece.data, 0}, MSG_PEEK); }

void wait_for_sockets(std::vector<Watch>& watches, int milliseconds) {
  std::vector<pollfd> polled;
  for (const Watch& w : watches)
    polled.push_back({w.fd, short((w.readable ? POLLIN : 0) | (w.writable ? POLLOUT : 0) | (w.ends ? POLLRDHUP : 0)), 0});
  if (poll(polled.data(), polled.size(), milliseconds) < 0)
    for (pollfd& p : polled) p.revents = 0;  // interrupted: the caller tries again
  for (size_t i = 0; i < watches.size(); ++i) watches[i].ended = polled[i].revents & (POLLERR | POLLHUP | POLLRDHUP | POLLNVAL);
}

void shut_socket(int fd) { shutdown(fd, SHUT_RDWR); }

}  // namespace dso
