"""Imports every module of the package as it is on Windows: without the modules and names of POSIX.

    python -m support.without_posix        # the modules that cannot be imported, one per line, with the reason

Only this package's modules miss them: torch and others, which have their own builds for Windows, are imported as they are.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import pkgutil
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

PACKAGES = ("deepseek_optimizer", "deepseek_optimizer_cli")
MODULES = frozenset({"crypt", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"})
# Names that Windows lacks, as Python's documentation says.
NAMES = {
    "os": "EX_OK F_LOCK O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK P_PID RTLD_NOW SCHED_OTHER WNOHANG chown chroot confstr "
    "copy_file_range ctermid eventfd fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp "
    "getpriority getsid getuid getxattr initgroups killpg lchown lockf major makedev memfd_create minor mkfifo mknod nice "
    "openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv "
    "register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setpgid setpriority setsid setuid setxattr "
    "statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 waitid waitpid writev",
    "signal": "ITIMER_PROF ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP "
    "SIGTSTP SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer pause pthread_kill "
    "pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo",
    "select": "EPOLLIN POLLIN epoll kqueue poll",
    "socket": "AF_UNIX CMSG_LEN SCM_RIGHTS SO_REUSEPORT TCP_USER_TIMEOUT recv_fds send_fds",
    "mmap": "MADV_HUGEPAGE MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
    "time": "CLOCK_MONOTONIC clock_gettime pthread_getcpuclockid tzset",
}


class _Hidden(types.ModuleType):
    """A module of the standard library without some of its names."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__)
        hidden = NAMES[module.__name__].split()
        self.__dict__.update({name: value for name, value in vars(module).items() if name not in hidden})


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """`__import__` of this package's modules."""
    if level == 0 and name.partition(".")[0] in MODULES:
        raise ImportError(f"No module named {name!r}", name=name)
    found = _REAL_IMPORT(name, globals, locals, fromlist, level)
    return _hidden[found.__name__] if level == 0 and found.__name__ in _hidden else found


_REAL_IMPORT = builtins.__import__
_BUILTINS = {**vars(builtins), "__import__": _import}
_hidden = {name: _Hidden(importlib.import_module(name)) for name in NAMES}


class _Loader(SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = _BUILTINS
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.partition(".")[0] in PACKAGES else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            loader: Loader = _Loader(spec.loader.name, spec.loader.path)
            spec.loader = loader
        return spec


def _needs_a_package(error: Exception) -> bool:
    """Whether an import failed since an optional package is not installed."""
    if isinstance(error, ImportError):
        return (error.name or "").partition(".")[0] not in (*PACKAGES, *MODULES, *NAMES)
    return type(error).__name__ == "MissingPackageError"


def failures() -> list[str]:
    """Imports everything. Returns the modules that cannot be imported, with the reason; those that need another package which
    is not installed are left out."""
    sys.meta_path.insert(0, _Finder())
    failed = []
    for package in PACKAGES:
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.", lambda _: None):
            if found.name.endswith(".__main__"):
                continue  # runs a command
            try:
                importlib.import_module(found.name)
            except Exception as error:
                if not _needs_a_package(error):
                    failed.append(f"{found.name}: {type(error).__name__}: {error}")
    return failed


if __name__ == "__main__":
    print("\n".join(failures()))
