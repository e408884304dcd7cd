// Time of an exchange of rows between two processes: microseconds per step of a plan that publishes rows and adds them, median
// and 90th percentile. Both processes wait for each other at every step, as those of a model do.
//   bench_exchange                        over shared memory and over TCP, on this machine
//   bench_exchange listen PORT            over TCP between two machines: first here,
//   bench_exchange connect ADDRESS PORT   then there
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>

#include "exchange_plan.hpp"

namespace {

constexpr int32_t kWidth = 2048;

int connection(bool listens, const char* address, int port) {
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_port = htons(uint16_t(port));
  inet_pton(AF_INET, address, &at.sin_addr);
  auto* const name = reinterpret_cast<sockaddr*>(&at);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  const int on = 1;
  if (listens) {
    const int server = fd;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(server, name, sizeof at) || listen(server, 1)) perror("listen"), exit(1);
    fd = accept(server, nullptr, nullptr);
    close(server);
  } else {
    int tries = 0;
    while (connect(fd, name, sizeof at)) {
      if (++tries == 1000) perror("connect"), exit(1);
      usleep(10000);
    }
  }
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return fd;
}

dso_group* connected(int rank, const char* address, int port) {
  const int data = connection(rank == 0, address, port);
  const int32_t by_rank[2]{rank == 0 ? -1 : data, rank == 0 ? data : -1}, none[2]{-1, -1};
  dso_group* g = nullptr;
  check(dso_group_connect(by_rank, none, rank, 2, &g) == 0, "group: %s", dso_last_error());
  close(data);
  return g;
}

void measure(dso_group* g, int rank, const char* what) {
  const Exchange exchange(g, rank, 2, false, kWidth, 0, 1);
  for (int32_t rows : {1, 8, 64, 512}) {
    std::vector<float> result;
    std::vector<double> times;
    for (int i = 0; i < std::max(200, 4000 / rows); ++i) {
      double seconds = 0;
      if (!check(exchange.run(rank, rows, result, &seconds) == 0, "run: %s", dso_last_error())) return;
      times.push_back(seconds);
    }
    std::sort(times.begin(), times.end());
    if (rank == 0)
      printf("%-14s %4d rows of %d floats: %8.1f us, %8.1f us\n", what, rows, kWidth, 1e6 * times[times.size() / 2],
             1e6 * times[times.size() * 9 / 10]);
  }
}

void on_this_machine(const char* what, const std::function<dso_group*(int)>& group) {
  fflush(stdout);
  const pid_t other = fork();
  dso_group* const g = group(other == 0);
  measure(g, other == 0, what);
  dso_group_destroy(g);
  if (other == 0) _exit(failures);
  waitpid(other, nullptr, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string how = argc > 1 ? argv[1] : "";
  if ((how == "listen" && argc == 3) || (how == "connect" && argc == 4)) {
    const int rank = how == "connect";
    dso_group* const g = connected(rank, rank ? argv[2] : "0.0.0.0", atoi(argv[argc - 1]));
    measure(g, rank, "TCP");
    dso_group_destroy(g);
    return failures;
  }
  const int memory = memfd_create("bench", MFD_CLOEXEC);
  on_this_machine("shared memory", [&](int rank) {
    dso_group* g = nullptr;
    check(dso_group_create(memory, rank, 2, &g) == 0, "group: %s", dso_last_error());
    return g;
  });
  const int port = 20000 + int(getpid() % 20000);
  on_this_machine("TCP", [&](int rank) { return connected(rank, "127.0.0.1", port); });
  return failures;
}
