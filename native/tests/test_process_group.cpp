// Groups: a leader and other processes, which are forked: bytes from the leader, exchange of rows between plans, and processes
// that end.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <thread>

#include "child_processes.hpp"
#include "exchange_plan.hpp"

namespace {

struct Member {
  dso_group* g = nullptr;
  Member(int fd, int rank, int ranks) {
    if (dso_group_create(fd, rank, ranks, &g)) {
      fprintf(stderr, "group: %s\n", dso_last_error());
      abort();
    }
  }
  ~Member() { dso_group_destroy(g); }
  Member(const Member&) = delete;
};

// Runs `body` in `ranks` processes, rank 0 in this one; returns the status of the others, each 0 if it returned.
std::vector<int> in_processes(int ranks, const std::function<void(dso_group*, int)>& body,
                              const std::function<void(dso_group*, const std::vector<pid_t>&)>& leader = nullptr) {
  const int fd = memfd_create("test", MFD_CLOEXEC);
  Member member(fd, 0, ranks);
  std::vector<pid_t> pids;
  for (int r = 1; r < ranks; ++r) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(100);
      Member child(fd, r, ranks);
      body(child.g, r);
      _exit(failures ? 1 : 0);
    }
    pids.push_back(pid);
  }
  if (leader)
    leader(member.g, pids);
  else
    body(member.g, 0);
  const std::vector<int> statuses = ended(pids);
  close(fd);
  return statuses;
}

// Messages of many sizes, also longer than the ring, arrive in order at all others.
void messages() {
  std::vector<uint8_t> sent(5 << 20);
  Random random(1);
  for (uint8_t& b : sent) b = uint8_t(random.bits());
  const std::vector<size_t> sizes{1, 7, 4096, 1 << 20, 3 << 20, 0, 64, 700000};
  const auto body = [&](dso_group* g, int rank) {
    size_t at = 0;
    for (size_t n : sizes) {
      if (rank == 0) {
        check(dso_group_send(g, sent.data() + at, (int64_t)n) == 0, "send: %s", dso_last_error());
      } else {
        std::vector<uint8_t> got(n + 1);
        check(dso_group_receive(g, got.data(), (int64_t)n) == 0, "receive: %s", dso_last_error());
        check(memcmp(got.data(), sent.data() + at, n) == 0, "rank %d: %zu bytes differ", rank, n);
      }
      at += n;
    }
  };
  for (int ranks : {2, 3}) all_fine(in_processes(ranks, body), "messages");
}

// Sums in ascending order of ranks, for few rows (one thread) and many; the memory that is shared grows between steps.
void sums() {
  for (int ranks : {2, 3}) {
    for (int threads : {1, 3}) {
      const auto body = [&](dso_group* g, int rank) {
        const Exchange exchange(g, rank, ranks, false, 300, 0, threads);
        std::vector<float> result;
        for (int32_t rows : {1, 3, 200, 2, 1000, 1}) {
          check(exchange.run(rank, rows, result) == 0, "run: %s", dso_last_error());
          long wrong = 0;
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < 300; ++i) {
              float sum = element(0, r, i);
              for (int k = 1; k < ranks; ++k) sum += element(k, r, i);
              wrong += result[size_t(r * 300 + i)] != sum;
            }
          check(wrong == 0, "rank %d of %d, %d rows: %ld sums differ", rank, ranks, rows, wrong);
        }
        for (int i = 0; i < 2000; ++i)
          if (!check(exchange.run(rank, 1 + i % 3, result) == 0, "run: %s", dso_last_error())) return;
      };
      all_fine(in_processes(ranks, body), "sums");
    }
  }
}

void joins() {
  const auto body = [&](dso_group* g, int rank) {
    const Exchange exchange(g, rank, 3, true, 250, 96, 2);
    std::vector<float> result;
    for (int32_t rows : {1, 130}) {
      check(exchange.run(rank, rows, result) == 0, "run: %s", dso_last_error());
      long wrong = 0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < 250; ++i) wrong += result[size_t(r * 250 + i)] != element(int(i / 96), r, i);
      check(wrong == 0, "rank %d, %d rows: %ld elements differ", rank, rows, wrong);
    }
  };
  all_fine(in_processes(3, body), "joins");
}

// The leader says that a process was killed; its step ends, and so do those of the others.
void lost() {
  using Clock = std::chrono::steady_clock;
  const auto body = [](dso_group* g, int rank) {
    if (rank == 1) {
      for (;;) pause();
    }
    const Exchange exchange(g, rank, 3, false, 64, 0, 1);
    std::vector<float> result;
    refuses(exchange.run(rank, 1, result), DSO_ELOST, "rank 1 of 3", "a step of another rank");
  };
  const auto leader = [](dso_group* g, const std::vector<pid_t>& pids) {
    const Exchange exchange(g, 0, 3, false, 64, 0, 1);
    std::thread killer([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      kill(pids[0], SIGKILL);
      dso_group_lose(g, 1);
    });
    std::vector<float> result;
    refuses(exchange.run(0, 1, result), DSO_ELOST, "rank 1 of 3", "a step");
    killer.join();
    const auto start = Clock::now();
    refuses(exchange.run(0, 1, result), DSO_ELOST, "rank 1 of 3", "a later step");
    std::vector<uint8_t> many(3 << 20);
    refuses(dso_group_send(g, many.data(), (int64_t)many.size()), DSO_ELOST, "rank 1", "a message that does not fit");
    check(Clock::now() - start < std::chrono::seconds(20), "later calls wait");
    check(dso_group_lost(g) == 1, "lost: %d", dso_group_lost(g));
  };
  const std::vector<int> statuses = in_processes(3, body, leader);
  check(WIFSIGNALED(statuses[0]) && statuses[1] == 0, "statuses %d, %d", statuses[0], statuses[1]);
}

// A process whose leader is gone finds out by itself.
void orphans() {
  int ends[2];
  check(pipe(ends) == 0, "pipe");
  const pid_t leader = fork();
  if (leader == 0) {
    const int fd = memfd_create("test", MFD_CLOEXEC);
    Member member(fd, 0, 2);
    if (fork() == 0) {
      alarm(100);
      Member child(fd, 1, 2);
      uint8_t byte = 0;
      const int32_t code = dso_group_receive(child.g, &byte, 1);
      check(write(ends[1], &code, sizeof code) == sizeof code, "write");
      _exit(0);
    }
    usleep(200000);
    kill(getpid(), SIGKILL);
  }
  int32_t code = 0;
  check(read(ends[0], &code, sizeof code) == sizeof code && code == DSO_ELOST, "an orphan's code is %d", code);
  waitpid(leader, nullptr, 0);
  close(ends[0]);
  close(ends[1]);
}

void refusals() {
  const int fd = memfd_create("test", MFD_CLOEXEC);
  dso_group* g = nullptr;
  refuses(dso_group_create(fd, 2, 2, &g), DSO_EINVAL, "rank is 2 of 2", "a rank that does not exist");
  refuses(dso_group_create(-1, 0, 2, &g), DSO_EINVAL, "fd is -1", "no file");
  Member member(fd, 0, 2);
  uint8_t byte = 0;
  refuses(dso_group_receive(member.g, &byte, 1), DSO_EINVAL, "rank 0 cannot receive", "the leader receives");
  Member other(fd, 1, 2);
  refuses(dso_group_send(other.g, &byte, 1), DSO_EINVAL, "only rank 0", "another rank sends");
  OwnContext alone(Exchange::kernels_here(), 1), both(Exchange::kernels_here(), 1);
  check(dso_context_join(both.c, member.g) == 0, "join: %s", dso_last_error());
  const dso_slot slots[] = {{DSO_SLOT_F32, 8, 0, 0}, {DSO_SLOT_F32, 9, 0, 0}};
  const auto make = [&](dso_context* c, std::vector<dso_step> steps) {
    steps.insert(steps.begin(), step_of(DSO_OP_STATE_IN, {}, {0}));
    dso_plan* plan = nullptr;
    const int32_t code = dso_plan_create(c, steps.data(), (int32_t)steps.size(), slots, 2, nullptr, 0, 1, &plan);
    dso_plan_destroy(plan);
    return code;
  };
  const dso_step publish = step_of(DSO_OP_PUBLISH, {0}, {}), sum = step_of(DSO_OP_SUM_PARTS, {}, {1});
  refuses(make(alone.c, {publish}), DSO_EINVAL, "no group", "a context alone");
  refuses(make(both.c, {publish}), DSO_EINVAL, "no step receives it", "nothing receives");
  refuses(make(both.c, {sum}), DSO_EINVAL, "no step has published", "nothing is published");
  refuses(make(both.c, {publish, publish}), DSO_EINVAL, "no step has received", "two at once");
  refuses(make(both.c, {publish, sum}), DSO_EINVAL, "width 9, must be that of the published rows, 8", "another width");
  dso_step join = step_of(DSO_OP_JOIN_PARTS, {}, {1});
  join.offset = 5;
  refuses(make(both.c, {publish, join}), DSO_EINVAL, "cannot be divided so", "other parts");
  close(fd);
}

}  // namespace

int main() {
  refusals();
  messages();
  sums();
  joins();
  lost();
  orphans();
  return report("test_group");
}
