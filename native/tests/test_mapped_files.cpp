// Mapped files that change while they are read: no thread dies, every call that read one reports it, and faults elsewhere are
// passed to the previous handler.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

#include "check.hpp"
#include "mapped_files.hpp"
#include "thread_pool.hpp"

namespace {

constexpr int64_t kBytes = 40 * 4096 - 100;  // the last page is not full

// A file of ones, mapped privately and registered.
class File {
 public:
  explicit File(const char* name, int64_t bytes = kBytes, bool looked_at = true) : bytes_(bytes) {
    fd_ = mkstemp(path_);
    const std::vector<uint8_t> ones(bytes, 1);
    check(fd_ >= 0 && write(fd_, ones.data(), bytes) == bytes, "%s could not be written", path_);
    const timespec then[2] = {{1000000000, 0}, {1000000000, 0}};  // otherwise a change might fall into the same clock tick
    futimens(fd_, then);
    data_ = static_cast<uint8_t*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd_, 0));
    const int64_t modified = int64_t(1000000000) * 1000000000;
    check(dso_mapping_add(data_, bytes, looked_at ? fd_ : -1, modified, name, &number_) == DSO_OK, "%s", dso_last_error());
  }
  ~File() {
    dso_mapping_remove(number_);
    munmap(data_, bytes_);
    close(fd_);
    unlink(path_);
  }
  void touch() { check(futimens(fd_, nullptr) == 0, "futimens"); }
  void cut(int64_t bytes) { check(ftruncate(fd_, bytes) == 0, "ftruncate"); }
  void write_at(int64_t place, uint8_t value) { check(pwrite(fd_, &value, 1, place) == 1, "pwrite"); }
  const uint8_t* data() const { return data_; }
  int64_t sum() const {
    int64_t s = 0;
    for (int64_t i = 0; i < bytes_; ++i) s += const_cast<const volatile uint8_t*>(data_)[i];
    return s;
  }

 private:
  char path_[32] = "/tmp/test_mapped_XXXXXX";
  const int64_t bytes_;
  int fd_;
  uint8_t* data_;
  int64_t number_ = 0;
};

bool changed(const void* address, const char* words) {
  const int32_t rc = dso_mapping_check(address);
  return check(rc == DSO_EFILE && strstr(dso_last_error(), words), "code %d, message \"%s\" (expected \"%s\")", rc,
               dso_last_error(), words);
}
void intact(const File& f) {
  check(dso_mapping_check(f.data()) == DSO_OK && f.sum() == kBytes, "an intact file: %s", dso_last_error());
}

void cut_short() {
  File lost("lost"), other("other");
  intact(lost);
  lost.cut(0);
  std::vector<std::thread> readers;  // all at once: each may be the one that faults
  std::vector<int64_t> sums(8, -1);
  for (size_t i = 0; i < sums.size(); ++i) readers.emplace_back([&, i] { sums[i] = lost.sum(); });
  for (std::thread& t : readers) t.join();
  for (int64_t s : sums) check(s == 0, "a lost file reads as %lld", (long long)s);
  changed(lost.data() + kBytes - 1, "was cut short or cannot be read while its weights are in use: lost");
  intact(other);

  File part("part");
  part.cut(3 * 4096);
  part.sum();
  changed(part.data(), ": part");
  File unread("unread");
  unread.cut(kBytes - 1);  // within a page: nothing faults
  changed(unread.data(), ": unread");
  File faults("faults", kBytes, false);
  faults.cut(0);
  check(faults.sum() == 0, "a lost file");
  changed(faults.data(), ": faults");
  intact(other);
}

void written() {
  File written("written"), grown("grown"), touched("touched");
  written.write_at(5, 7);
  changed(written.data(), "was written to while its weights are in use: written");
  written.write_at(5, 1);
  changed(written.data(), ": written");  // a detected change is permanent
  grown.write_at(kBytes, 1);
  changed(grown.data(), "was written to while its weights are in use: grown");
  check(dso_mapping_check(touched.data()) == DSO_OK, "%s", dso_last_error());
  touched.touch();
  changed(touched.data(), ": touched");
}

void registered_and_not() {
  const uint8_t* place;
  {
    File gone("gone");
    place = gone.data();
    gone.cut(0);
    changed(place, ": gone");
  }
  check(dso_mapping_check(place) == DSO_OK, "a mapping that was removed is still looked at");
  for (int i = 0; i < 100; ++i) intact(File("again"));
  int64_t number = 0;
  check(dso_mapping_add(nullptr, 1, -1, 0, "x", &number) == DSO_EINVAL, "no address");
  check(dso_mapping_add(place, 0, -1, 0, "x", &number) == DSO_EINVAL, "no bytes");
  check(dso_mapping_add(place, 1, -1, 0, nullptr, &number) == DSO_EINVAL, "no name");
  check(dso_mapping_add(place, 1, -1, 0, "x", nullptr) == DSO_EINVAL, "no place for the number");
  {  // the mapping before was undone and not yet removed when its place was taken
    File newer("newer");
    int64_t older = 0;
    check(dso_mapping_add(newer.data() - 4096, 8192, -1, 0, "late", &number) == DSO_OK && number > 0, "%s", dso_last_error());
    check(dso_mapping_add(newer.data(), 4096, -1, 0, "newest", &older) == DSO_OK && older > number, "%s", dso_last_error());
    newer.cut(0);
    check(newer.data()[0] == 0, "lost");
    changed(newer.data(), ": newest");
    dso_mapping_remove(older);
    dso_mapping_remove(number);
    changed(newer.data(), ": newer");
  }
  dso_mapping_remove(0);
  dso_mapping_remove(1 << 30);
}

// Functions that read weights report it themselves.
void calls() {
  const int64_t rows = 64, cols = 640, bytes = dso_packed_bytes(DSO_F32, rows, cols);
  dso_context* c = nullptr;
  if (!check(dso_context_create(nullptr, 3, &c) == 0, "%s", dso_last_error())) return;
  std::vector<float> x(cols, 1), y(rows), all(rows * cols);
  for (const char* way : {"cut", "written"}) {
    File file(way, bytes);
    const dso_weight w{DSO_F32, int32_t(rows), int32_t(cols), 1, file.data(), bytes};
    const auto product = [&] { return dso_linear(c, &w, nullptr, DSO_SLOT_F32, x.data(), 1, 1, y.data()); };
    const auto unpacked = [&] { return dso_unpack(c, &w, 0, rows, all.data()); };
    const auto packed = [&] { return dso_pack(c, DSO_BF16, DSO_SRC_F32, file.data(), 8, 32, 32, nullptr, all.data()); };
    check(product() == 0 && unpacked() == 0 && packed() == 0, "%s", dso_last_error());
    if (way[0] == 'c')
      file.cut(4096);
    else
      file.write_at(100, 9);
    check(product() == DSO_EFILE && strstr(dso_last_error(), way), "dso_linear of a file that was %s: %s", way,
          dso_last_error());
    check(unpacked() == DSO_EFILE, "dso_unpack of a file that was %s", way);
    check(packed() == DSO_EFILE, "dso_pack of a file that was %s", way);
  }
  dso_context_destroy(c);
}

// Tasks that each read a file and wait for each other, so that every thread of a pool has one.
struct Readers final : Job {
  Readers(const File& file, int threads) : file(file), left(threads), tasks(threads) {}
  int64_t next() override { return std::exchange(tasks, -1); }
  void task(int64_t, int) override {
    --left;
    while (left.load() > 0) std::this_thread::yield();
    total += file.sum();
  }
  const File& file;
  std::atomic<int> left;
  std::atomic<int64_t> total{0};
  int64_t tasks;
};

void pool() {
  constexpr int kThreads = 4;
  ThreadPool pool(kThreads);
  File f("f");
  for (const bool lost : {false, true}) {
    if (lost) f.cut(0);
    Readers readers(f, kThreads);
    ThreadPool::Lease(pool).team().run(readers);
    check(readers.total == (lost ? 0 : kThreads * kBytes), "the pool's threads read %lld", (long long)readers.total);
  }
  changed(f.data(), ": f");
}

// How a child process that runs this ends: its exit code, or the negative signal.
int child(const std::function<void()>& work) {
  fflush(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    work();
    _exit(failures ? 1 : 0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

void handle(void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction a = {};
  a.sa_sigaction = handler;
  a.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGBUS, &a, nullptr);
}
void fault_elsewhere() {
  File unknown("unknown");
  int64_t page = sysconf(_SC_PAGESIZE);
  void* const data = mmap(nullptr, page, PROT_READ, MAP_SHARED, open("/proc/self/exe", O_RDONLY), 1 << 30);
  check(data != MAP_FAILED && *static_cast<volatile uint8_t*>(data) == 0, "read past the end of a file");
}

struct sigaction found;  // by a handler like that of Python's faulthandler
void writes_and_raises(int signal, siginfo_t*, void*) {
  sigaction(SIGBUS, &found, nullptr);
  raise(signal);
}

void others_faults() {
  check(child([] {
          signal(SIGBUS, SIG_DFL);
          fault_elsewhere();
        }) == -SIGBUS,
        "a fault elsewhere no longer kills");
  check(child([] {
          handle([](int, siginfo_t* i, void*) { _exit(i->si_code == BUS_ADRERR ? 42 : 43); });
          fault_elsewhere();
        }) == 42,
        "who was there before is called");
  check(child([] {
          signal(SIGBUS, [](int) { _exit(44); });
          fault_elsewhere();
        }) == 44,
        "who was there before, without siginfo");
  check(child([] {
          signal(SIGBUS, SIG_IGN);
          fault_elsewhere();
        }) == -SIGBUS,
        "a fault cannot be ignored");
  check(child([] {
          signal(SIGBUS, SIG_IGN);
          File f("f");
          raise(SIGBUS);
          intact(f);
        }) == 0,
        "a signal that was sent can be");
  check(child([] {
          signal(SIGBUS, SIG_DFL);
          File f("f");
          raise(SIGBUS);
        }) == -SIGBUS,
        "a signal that was sent kills");

  const auto before = [] {
    found.sa_handler = SIG_DFL;
    handle(writes_and_raises);
  };
  check(child([&] {
          before();
          fault_elsewhere();
        }) == -SIGBUS,
        "faulthandler, enabled before");
  const auto after = [](File& f) {
    signal(SIGBUS, SIG_DFL);
    sigaction(SIGBUS, nullptr, &found);
    handle(writes_and_raises);
    keep_handler();
    intact(f);
  };
  check(child([&] {
          File f("f");
          after(f);
          f.cut(0);
          f.sum();
          changed(f.data(), ": f");
        }) == 0,
        "faulthandler, enabled after");
  check(child([&] {
          File f("f");
          sigaction(SIGBUS, nullptr, &found);  // ours: it hands on to us, and we to it
          handle(writes_and_raises);
          keep_handler();
          fault_elsewhere();
        }) == -SIGBUS,
        "faulthandler and we hand on to each other without end");
}

void forked() {
  File f("f");
  f.cut(0);
  check(child([&] {
          f.sum();
          changed(f.data(), ": f");
        }) == 0,
        "a child reads a file that was cut short");
  changed(f.data(), ": f");
}

}  // namespace

int main() {
  struct sigaction before, first;
  sigaction(SIGBUS, nullptr, &before);
  keep_handler();
  sigaction(SIGBUS, nullptr, &first);
  check(before.sa_sigaction == first.sa_sigaction, "a handler without a mapping");
  others_faults();  // before this process starts threads
  forked();
  cut_short();
  written();
  registered_and_not();
  calls();
  pool();
  return report("mapped_files");
}
