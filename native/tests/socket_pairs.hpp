// Connected stream sockets for tests of what processes send each other.
#pragma once
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.hpp"

struct Pair {
  int ends[2];
};

inline Pair local_pair() {
  Pair pair{};
  check(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.ends) == 0, "socketpair");
  const int bytes = 4608;  // so that most parts are sent in pieces
  for (int end : pair.ends) setsockopt(end, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  return pair;
}

inline Pair tcp_pair() {
  Pair pair{};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const int server = socket(AF_INET, SOCK_STREAM, 0);
  auto* const at = reinterpret_cast<sockaddr*>(&address);
  check(bind(server, at, size) == 0 && listen(server, 1) == 0 && getsockname(server, at, &size) == 0, "a server");
  pair.ends[0] = socket(AF_INET, SOCK_STREAM, 0);
  check(connect(pair.ends[0], at, size) == 0, "connect");
  pair.ends[1] = accept(server, nullptr, nullptr);
  close(server);
  const int on = 1;
  for (int end : pair.ends) setsockopt(end, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return pair;
}
