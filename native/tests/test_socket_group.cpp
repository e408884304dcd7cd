// Groups of processes that are connected: sums and joins over socket pairs with small buffers and over TCP, processes that end
// or run something else, and interrupted calls.
#include <fcntl.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <thread>

#include "child_processes.hpp"
#include "exchange_plan.hpp"
#include "socket_pairs.hpp"

namespace {

using Clock = std::chrono::steady_clock;

// Two connections between each two of some processes; each process keeps its own ends.
struct Mesh {
  const int ranks;
  std::vector<std::vector<int>> data, alive;
  Mesh(int ranks, const std::function<Pair()>& connect) : ranks(ranks) {
    data.assign(size_t(ranks), std::vector<int>(size_t(ranks), -1));
    alive = data;
    for (size_t i = 0; i < size_t(ranks); ++i)
      for (size_t j = i + 1; j < size_t(ranks); ++j)
        for (auto* connections : {&data, &alive}) {
          const Pair pair = connect();
          (*connections)[i][j] = pair.ends[0];
          (*connections)[j][i] = pair.ends[1];
        }
  }
  void close_of(int rank) const {
    for (const auto* connections : {&data, &alive})
      for (const int end : (*connections)[size_t(rank)])
        if (end >= 0) close(end);
  }
};

struct Member {
  dso_group* g = nullptr;
  Member(const Mesh& mesh, int rank) {
    for (int r = 0; r < mesh.ranks; ++r)
      if (r != rank) mesh.close_of(r);
    if (dso_group_connect(mesh.data[size_t(rank)].data(), mesh.alive[size_t(rank)].data(), rank, mesh.ranks, &g)) {
      fprintf(stderr, "group: %s\n", dso_last_error());
      abort();
    }
    mesh.close_of(rank);
  }
  ~Member() { dso_group_destroy(g); }
  Member(const Member&) = delete;
};

// Runs `body` in `ranks` processes, rank 0 in this one, where `leader` is run instead if it is given; returns the status of the
// others, each 0 if it returned.
std::vector<int> in_processes(int ranks, const std::function<Pair()>& connect, const std::function<void(dso_group*, int)>& body,
                              const std::function<void(dso_group*, const std::vector<pid_t>&)>& leader = nullptr) {
  std::vector<pid_t> pids;
  const Mesh mesh(ranks, connect);
  for (int r = 1; r < ranks; ++r) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(100);
      {
        Member child(mesh, r);
        body(child.g, r);
      }
      _exit(failures ? 1 : 0);
    }
    pids.push_back(pid);
  }
  {
    Member member(mesh, 0);
    if (leader)
      leader(member.g, pids);
    else
      body(member.g, 0);
  }
  return ended(pids);
}

void check_sums(const Exchange& exchange, int rank, int ranks, int32_t rows) {
  std::vector<float> result;
  if (!check(exchange.run(rank, rows, result) == 0, "run: %s", dso_last_error())) return;
  long wrong = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < exchange.width; ++i) {
      float sum = element(0, r, i);
      for (int k = 1; k < ranks; ++k) sum += element(k, r, i);
      wrong += result[size_t(r * exchange.width + i)] != sum;
    }
  check(wrong == 0, "rank %d of %d, %d rows of %d: %ld sums differ", rank, ranks, rows, exchange.width, wrong);
}

// Sums in ascending order of ranks, as with shared memory; the longest parts are larger than any socket's buffers.
void sums() {
  for (const auto& connect : {local_pair, tcp_pair})
    for (int ranks : {2, 3, 4})
      for (int32_t width : {1, 7, 300, 1031}) {
        const auto body = [&](dso_group* g, int rank) {
          const Exchange exchange(g, rank, ranks, false, width, 0, 1 + width % 3);
          for (int32_t rows : {1, 3, 200, 2, 2500, 1}) check_sums(exchange, rank, ranks, rows);
        };
        all_fine(in_processes(ranks, connect, body), "sums");
      }
}

// Plans of other widths in turn, as the layers of a model and its head.
void many() {
  for (int ranks : {2, 3}) {
    const auto body = [&](dso_group* g, int rank) {
      const Exchange narrow(g, rank, ranks, false, 64, 0, 1), wide(g, rank, ranks, false, 1537, 0, 2);
      for (int i = 0; i < rounds(1000) && !failures; ++i) {
        check_sums(narrow, rank, ranks, 1 + i % 3);
        check_sums(wide, rank, ranks, 1 + i % 2);
      }
    };
    all_fine(in_processes(ranks, tcp_pair, body), "many exchanges");
  }
}

void joins() {
  for (const auto& connect : {local_pair, tcp_pair}) {
    const auto body = [&](dso_group* g, int rank) {
      const Exchange exchange(g, rank, 3, true, 251, 96, 2);
      std::vector<float> result;
      for (int32_t rows : {1, 130, 4000}) {
        check(exchange.run(rank, rows, result) == 0, "run: %s", dso_last_error());
        long wrong = 0;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < 251; ++i) wrong += result[size_t(r * 251 + i)] != element(int(i / 96), r, i);
        check(wrong == 0, "rank %d, %d rows: %ld elements differ", rank, rows, wrong);
      }
    };
    all_fine(in_processes(3, connect, body), "joins");
  }
}

// Signals whose handlers return, while processes wait for each other.
void interrupts() {
  const auto body = [](dso_group* g, int rank) {
    struct sigaction action{};
    action.sa_handler = [](int) {};
    sigaction(SIGALRM, &action, nullptr);
    const itimerval often{{0, 500}, {0, 500}}, never{};
    setitimer(ITIMER_REAL, &often, nullptr);
    const Exchange exchange(g, rank, 2, false, 513, 0, 1);
    for (int i = 0; i < rounds(200) && !failures; ++i) {
      if (i % 20 == rank) usleep(3000);
      check_sums(exchange, rank, 2, 1 + 40 * (i % 3));
    }
    setitimer(ITIMER_REAL, &never, nullptr);
  };
  all_fine(in_processes(2, local_pair, body), "interrupts");
}

// A process is killed while the others wait for it: their steps end, and later ones too.
void lost() {
  const auto body = [](dso_group* g, int rank) {
    if (rank == 1) {
      for (;;) pause();
    }
    const Exchange exchange(g, rank, 3, false, 64, 0, 1);
    std::vector<float> result;
    refuses(exchange.run(rank, 1, result), DSO_ELOST, "of 3", "a step of another rank");
  };
  const auto leader = [](dso_group* g, const std::vector<pid_t>& pids) {
    const Exchange exchange(g, 0, 3, false, 64, 0, 1);
    check(dso_group_lost(g) == -1, "lost: %d", dso_group_lost(g));
    std::thread killer([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      kill(pids[0], SIGKILL);
    });
    std::vector<float> result;
    const auto start = Clock::now();
    check(exchange.run(0, 1, result) == DSO_ELOST, "a step: %s", dso_last_error());
    killer.join();
    check(exchange.run(0, 1, result) == DSO_ELOST, "a later step: %s", dso_last_error());
    check(Clock::now() - start < std::chrono::seconds(20), "the steps wait");
    check(dso_group_lost(g) == 1 || dso_group_lost(g) == 2, "lost: %d", dso_group_lost(g));
  };
  const std::vector<int> statuses = in_processes(3, tcp_pair, body, leader);
  check(WIFSIGNALED(statuses[0]) && statuses[1] == 0, "statuses %d, %d", statuses[0], statuses[1]);
}

// One that ends between steps is noticed without a step.
void lost_when_idle() {
  const auto leader = [](dso_group* g, const std::vector<pid_t>& pids) {
    kill(pids[0], SIGKILL);
    const auto until = Clock::now() + std::chrono::seconds(20);
    while (dso_group_lost(g) < 0 && Clock::now() < until) usleep(1000);
    check(dso_group_lost(g) == 1, "lost: %d", dso_group_lost(g));
  };
  const auto body = [](dso_group*, int) {
    for (;;) pause();
  };
  in_processes(2, tcp_pair, body, leader);
}

// What a process has sent before it ended is received; another thread ends a step that waits.
void ends() {
  const auto last = [](dso_group* g, int rank) {
    const Exchange exchange(g, rank, 2, false, 1000, 0, 1);
    if (rank == 0) usleep(100000);
    for (int i = 0; i < 3; ++i) check_sums(exchange, rank, 2, 50);
  };
  for (const auto& connect : {local_pair, tcp_pair}) all_fine(in_processes(2, connect, last), "the last step");
  const auto body = [](dso_group*, int) { usleep(500000); };
  const auto leader = [](dso_group* g, const std::vector<pid_t>&) {
    const Exchange exchange(g, 0, 2, false, 64, 0, 1);
    std::thread other([&] {
      usleep(100000);
      dso_group_lose(g, 0);
    });
    std::vector<float> result;
    refuses(exchange.run(0, 1, result), DSO_ELOST, "rank 0 of 2", "a step that another thread ends");
    other.join();
  };
  all_fine(in_processes(2, tcp_pair, body, leader), "a step that another thread ends");
}

// The data connection stays silent, as that of a machine without power does; the other connection fails.
void vanished() {
  const Mesh mesh(2, tcp_pair);
  dso_group* g = nullptr;
  check(dso_group_connect(mesh.data[0].data(), mesh.alive[0].data(), 0, 2, &g) == 0, "group: %s", dso_last_error());
  {
    const Exchange exchange(g, 0, 2, false, 64, 0, 1);
    std::thread other([&] {
      usleep(100000);
      const linger at_once{1, 0};
      setsockopt(mesh.alive[1][0], SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
      close(mesh.alive[1][0]);  // resets the connection
    });
    std::vector<float> result;
    refuses(exchange.run(0, 1, result), DSO_ELOST, "rank 1 of 2", "a machine that is gone");
    other.join();
  }
  dso_group_destroy(g);
  mesh.close_of(0);
  close(mesh.data[1][0]);
}

// Processes that do not run the same plans over the same batches do not use each other's numbers.
void other_steps() {
  const auto body = [](dso_group* g, int rank) {
    const Exchange exchange(g, rank, 2, false, 64, 0, 1);
    std::vector<float> result;
    check(exchange.run(rank, 2 + rank, result) == DSO_ELOST, "a step of another size: %s", dso_last_error());
  };
  all_fine(in_processes(2, local_pair, body), "other steps");
}

void refusals() {
  const Mesh mesh(2, local_pair);
  dso_group* g = nullptr;
  const int32_t none[2]{-1, -1}, file[2]{-1, open("/dev/null", O_RDONLY)};
  refuses(dso_group_connect(none, none, 2, 2, &g), DSO_EINVAL, "rank is 2 of 2", "a rank that does not exist");
  refuses(dso_group_connect(none, none, 0, 2, &g), DSO_EINVAL, "rank 1: -1 and -1 are not two sockets", "no socket");
  refuses(dso_group_connect(file, none, 0, 2, &g), DSO_EINVAL, "are not two sockets", "a file");
  refuses(dso_group_connect(mesh.data[0].data(), file, 0, 2, &g), DSO_EINVAL, "are not two sockets", "a file");
  check(dso_group_connect(mesh.data[0].data(), none, 0, 2, &g) == 0, "group: %s", dso_last_error());
  uint8_t byte = 0;
  refuses(dso_group_send(g, &byte, 1), DSO_EINVAL, "for rows only", "a message");
  refuses(dso_group_receive(g, &byte, 1), DSO_EINVAL, "for rows only", "a message");
  refuses(dso_group_lose(g, 2), DSO_EINVAL, "must be below 2", "a rank that does not exist");
  dso_group_destroy(g);
  close(file[1]);
  for (int rank : {0, 1}) mesh.close_of(rank);
}

}  // namespace

int main() {
  refusals();
  sums();
  many();
  joins();
  interrupts();
  lost();
  lost_when_idle();
  ends();
  vanished();
  other_steps();
  return report("test_socket_group");
}
