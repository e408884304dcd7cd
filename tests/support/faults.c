/* A library for LD_PRELOAD that makes the n-th call to the system fail, or kills the process there.
 *
 * faults_arm() starts counting. Counted are calls that change something below a directory or map one of its files
 * (FAULTS_FILES), and allocations of at least a given size, and threads (FAULTS_MEMORY). Call number `at` (from 0) then
 *   FAIL_ONCE  fails with `error`, and later calls succeed;
 *   FAIL_ON    fails with `error`, and so do all later ones. With ENOSPC, as on a full disk, a write first writes its first
 *              half, and names can still be removed;
 *   KILL       is not made: the process ends by SIGKILL.
 *
 * Only calls through the C library's exported symbols are seen, not those it makes itself; that is why fopen is wrapped.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAULTS_FILES = 1, FAULTS_MEMORY = 2 };
enum { FAIL_ONCE = 0, FAIL_ON = 1, KILL = 2 };
enum { LETS_GO = 1, TAKES = 2 };

static char root[PATH_MAX];
static size_t root_length;
static int kinds, mode, error_number;
static __thread int watching = 1;
static long at, count;
static size_t smallest;
static int log_fd = -1;
static char hit[PATH_MAX + 64];
static __thread int inside;

/* ---- control, called through ctypes ---- */

/* log: where each counted call is written, as a line "name path"; -1 for nowhere. */
void faults_arm(const char* directory, int which, long n, int how, int error, size_t bytes, int log) {
  snprintf(root, sizeof root, "%s", directory);
  root_length = strlen(root);
  at = n, mode = how, error_number = error, smallest = bytes, log_fd = log, count = 0, hit[0] = 0;
  __atomic_store_n(&kinds, which, __ATOMIC_SEQ_CST);
}

long faults_disarm(void) {
  __atomic_store_n(&kinds, 0, __ATOMIC_SEQ_CST);
  return count;
}

/* Whether this thread's allocations are counted. A thread inherits it from the one that creates it: those of the native library
 * are counted, and not Python's, whose start waits for ever if an allocation fails before the thread has said that it runs. */
void faults_watch(int on) { watching = on; }

/* The first call that failed, as "name path"; empty if none did. */
const char* faults_hit(void) { return hit; }

/* ---- counting ---- */

/* 0: the call succeeds; 1: it is the first that fails; 2: one before it failed already. */
static int due(int effect) {
  long n = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
  if (at < 0 || n < at || (mode == FAIL_ON && error_number == ENOSPC && effect == LETS_GO)) return 0;
  return n == at ? 1 : mode == FAIL_ON ? 2 : 0;
}

static int strike(const char* name, const char* path, int effect) {
  int now = due(effect);
  if (log_fd >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path);
    syscall(SYS_write, log_fd, line, (size_t)length);
  }
  if (!now) return 0;
  if (now == 1) snprintf(hit, sizeof hit, "%s %s", name, path);
  if (mode == KILL) kill(getpid(), SIGKILL);
  errno = error_number;
  return now;
}

static int below(const char* path) {
  return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

static int path_of(int directory, const char* path, char* out) {
  if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) > 0;
  char link[64], base[PATH_MAX];
  if (directory == AT_FDCWD)
    snprintf(link, sizeof link, "/proc/self/cwd");
  else
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, base, sizeof base - 1);
  if (length < 0) return 0;
  base[length] = 0;
  return snprintf(out, PATH_MAX, "%s/%s", base, path) > 0;
}

/* Whether this call on a name fails now. */
static int name_fails(const char* call, int directory, const char* path, int effect) {
  char whole[PATH_MAX];
  int saved = errno;
  if (!(kinds & FAULTS_FILES) || !path || !path_of(directory, path, whole) || !below(whole)) return errno = saved, 0;
  errno = saved;
  return strike(call, whole, effect);
}

static int fd_fails(const char* call, int fd, int effect) {
  char link[64], path[PATH_MAX];
  if (!(kinds & FAULTS_FILES) || fd < 0) return 0;
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (length < 0) return 0;
  path[length] = 0;
  return below(path) ? strike(call, path, effect) : 0;
}

#define REAL(result, name, ...)       \
  static result (*real)(__VA_ARGS__); \
  if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* ---- files ---- */

static int makes(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC); }

#define OPEN(name)                                                            \
  int name(const char* path, int flags, ...) {                                \
    REAL(int, name, const char*, int, ...);                                   \
    va_list more;                                                             \
    va_start(more, flags);                                                    \
    int rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;       \
    va_end(more);                                                             \
    if (makes(flags) && name_fails("open", AT_FDCWD, path, TAKES)) return -1; \
    return real(path, flags, rights);                                         \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                             \
  int name(int directory, const char* path, int flags, ...) {                    \
    REAL(int, name, int, const char*, int, ...);                                 \
    va_list more;                                                                \
    va_start(more, flags);                                                       \
    int rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;          \
    va_end(more);                                                                \
    if (makes(flags) && name_fails("openat", directory, path, TAKES)) return -1; \
    return real(directory, path, flags, rights);                                 \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                     \
  FILE* name(const char* path, const char* how) {                                       \
    REAL(FILE*, name, const char*, const char*);                                        \
    if (strpbrk(how, "wa+") && name_fails("fopen", AT_FDCWD, path, TAKES)) return NULL; \
    return real(path, how);                                                             \
  }
FOPEN(fopen)
FOPEN(fopen64)

/* How much of a write still fits on the disk. */
static size_t half(int hit_now, size_t size) {
  return hit_now == 1 && mode == FAIL_ON && error_number == ENOSPC ? size / 2 : 0;
}

ssize_t write(int fd, const void* data, size_t size) {
  REAL(ssize_t, write, int, const void*, size_t);
  int fails = fd_fails("write", fd, TAKES);
  if (!fails) return real(fd, data, size);
  return half(fails, size) ? real(fd, data, half(fails, size)) : -1;
}

#define PWRITE(name, offset)                                                  \
  ssize_t name(int fd, const void* data, size_t size, offset place) {         \
    REAL(ssize_t, name, int, const void*, size_t, offset);                    \
    int fails = fd_fails("pwrite", fd, TAKES);                                \
    if (!fails) return real(fd, data, size, place);                           \
    return half(fails, size) ? real(fd, data, half(fails, size), place) : -1; \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec* parts, int number) {
  REAL(ssize_t, writev, int, const struct iovec*, int);
  return fd_fails("writev", fd, TAKES) ? -1 : real(fd, parts, number);
}

#define SENDFILE(name, offset)                                                 \
  ssize_t name(int out, int in, offset* place, size_t size) {                  \
    REAL(ssize_t, name, int, int, offset*, size_t);                            \
    return fd_fails("sendfile", out, TAKES) ? -1 : real(out, in, place, size); \
  }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags) {
  REAL(ssize_t, copy_file_range, int, off64_t*, int, off64_t*, size_t, unsigned);
  return fd_fails("copy_file_range", out, TAKES) ? -1 : real(in, from, out, to, size, flags);
}

#define ON_FD(name)                                    \
  int name(int fd) {                                   \
    REAL(int, name, int);                              \
    return fd_fails(#name, fd, TAKES) ? -1 : real(fd); \
  }
ON_FD(fsync)
ON_FD(fdatasync)

#define TRUNCATE(name, length_type)                                  \
  int name(int fd, length_type length) {                             \
    REAL(int, name, int, length_type);                               \
    return fd_fails("ftruncate", fd, TAKES) ? -1 : real(fd, length); \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int posix_fallocate(int fd, off_t from, off_t length) {
  REAL(int, posix_fallocate, int, off_t, off_t);
  return fd_fails("posix_fallocate", fd, TAKES) ? error_number : real(fd, from, length);
}

/* ---- names ---- */

int rename(const char* old, const char* new) {
  REAL(int, rename, const char*, const char*);
  return name_fails("rename", AT_FDCWD, new, TAKES) ? -1 : real(old, new);
}

int renameat(int from, const char* old, int to, const char* new) {
  REAL(int, renameat, int, const char*, int, const char*);
  return name_fails("renameat", to, new, TAKES) ? -1 : real(from, old, to, new);
}

int renameat2(int from, const char* old, int to, const char* new, unsigned flags) {
  REAL(int, renameat2, int, const char*, int, const char*, unsigned);
  return name_fails("renameat2", to, new, TAKES) ? -1 : real(from, old, to, new, flags);
}

int link(const char* old, const char* new) {
  REAL(int, link, const char*, const char*);
  return name_fails("link", AT_FDCWD, new, TAKES) ? -1 : real(old, new);
}

int linkat(int from, const char* old, int to, const char* new, int flags) {
  REAL(int, linkat, int, const char*, int, const char*, int);
  return name_fails("linkat", to, new, TAKES) ? -1 : real(from, old, to, new, flags);
}

int symlink(const char* old, const char* new) {
  REAL(int, symlink, const char*, const char*);
  return name_fails("symlink", AT_FDCWD, new, TAKES) ? -1 : real(old, new);
}

int mkdir(const char* path, mode_t rights) {
  REAL(int, mkdir, const char*, mode_t);
  return name_fails("mkdir", AT_FDCWD, path, TAKES) ? -1 : real(path, rights);
}

int mkdirat(int directory, const char* path, mode_t rights) {
  REAL(int, mkdirat, int, const char*, mode_t);
  return name_fails("mkdirat", directory, path, TAKES) ? -1 : real(directory, path, rights);
}

int unlink(const char* path) {
  REAL(int, unlink, const char*);
  return name_fails("unlink", AT_FDCWD, path, LETS_GO) ? -1 : real(path);
}

int unlinkat(int directory, const char* path, int flags) {
  REAL(int, unlinkat, int, const char*, int);
  return name_fails("unlinkat", directory, path, LETS_GO) ? -1 : real(directory, path, flags);
}

int rmdir(const char* path) {
  REAL(int, rmdir, const char*);
  return name_fails("rmdir", AT_FDCWD, path, LETS_GO) ? -1 : real(path);
}

/* ---- memory ---- */

static int allocation_fails(const char* call, size_t size) {
  if (!(kinds & FAULTS_MEMORY) || !watching || size < smallest || inside) return 0;
  inside = 1;
  char told[32];
  snprintf(told, sizeof told, "%zu bytes", size);
  int fails = strike(call, told, TAKES);
  inside = 0;
  return fails;
}

#define MMAP(name, offset)                                                                                       \
  void* name(void* where, size_t size, int rights, int flags, int fd, offset place) {                            \
    REAL(void*, name, void*, size_t, int, int, int, offset);                                                     \
    if (flags & MAP_ANONYMOUS ? allocation_fails("mmap", size) : fd_fails("mmap", fd, TAKES)) return MAP_FAILED; \
    return real(where, size, rights, flags, fd, place);                                                          \
  }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) { return allocation_fails("malloc", size) ? NULL : __libc_malloc(size); }

void* calloc(size_t number, size_t size) {
  return size && number < SIZE_MAX / size && allocation_fails("calloc", number * size) ? NULL : __libc_calloc(number, size);
}

void* realloc(void* old, size_t size) { return allocation_fails("realloc", size) ? NULL : __libc_realloc(old, size); }

void* aligned_alloc(size_t alignment, size_t size) {
  return allocation_fails("aligned_alloc", size) ? NULL : __libc_memalign(alignment, size);
}

struct beginning {
  void* (*start)(void*);
  void* argument;
  int watching;
};

static void* inherits(void* given) {
  struct beginning of = *(struct beginning*)given;
  free(given);
  watching = of.watching;
  return of.start(of.argument);
}

int pthread_create(pthread_t* made, const pthread_attr_t* how, void* (*start)(void*), void* argument) {
  REAL(int, pthread_create, pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  struct beginning* of = allocation_fails("pthread_create", SIZE_MAX) ? NULL : __libc_malloc(sizeof *of);
  if (!of) return EAGAIN;
  *of = (struct beginning){start, argument, watching};
  int error = real(made, how, inherits, of);
  if (error) free(of);
  return error;
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  if (allocation_fails("posix_memalign", size)) return ENOMEM;
  void* made = __libc_memalign(alignment, size);
  if (!made) return ENOMEM;
  *out = made;
  return 0;
}
