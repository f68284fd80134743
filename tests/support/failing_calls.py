"""Makes system calls fail in a process that preloads a library, whichever language makes them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* Counts calls on files below `folder`; number `at` fails with `code`, and if `stays` is set all later ones do too. */
static char folder[PATH_MAX];
static long at, calls;
static int code, stays;

void faults_begin(const char *below, long number, int error, int forever) {
    snprintf(folder, sizeof folder, "%s", below);
    at = number; code = error; stays = forever; calls = 0;
}
long faults_end(void) { folder[0] = 0; return calls; }

static int fails(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    long number = calls++;
    if (number != at && !(stays && number > at)) return 0;
    errno = code;
    return 1;
}
static int fails_at(int descriptor, const char *path) {
    char link[64], name[PATH_MAX];
    if (!folder[0]) return 0;
    if (path && (path[0] == '/' || descriptor == AT_FDCWD)) return fails(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    return fails(name);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, parameters, condition, arguments) \
    type name parameters { return (condition) ? -1 : REAL(name) arguments; }
#define MODE va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest)
/* On a full disk existing files can still be opened. */
#define OPENING(failing) (!(stays && !(flags & O_CREAT)) && failing)

int open(const char *path, int flags, ...) { MODE; return OPENING(fails(path)) ? -1 : REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) {
    MODE; return OPENING(fails(path)) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int d, const char *path, int flags, ...) {
    MODE; return OPENING(fails_at(d, path)) ? -1 : REAL(openat)(d, path, flags, mode);
}
int openat64(int d, const char *path, int flags, ...) {
    MODE; return OPENING(fails_at(d, path)) ? -1 : REAL(openat64)(d, path, flags, mode);
}
ssize_t write(int d, const void *data, size_t size) {
    if (fails_at(d, NULL)) {
        if (stays && calls - 1 == at && size > 1) return REAL(write)(d, data, size / 2); /* the last blocks */
        return -1;
    }
    return REAL(write)(d, data, size);
}
WRAP(ssize_t, read, (int d, void *data, size_t size), !stays && fails_at(d, NULL), (d, data, size))
WRAP(int, fsync, (int d), fails_at(d, NULL), (d))
WRAP(int, ftruncate, (int d, off_t size), fails_at(d, NULL), (d, size))
WRAP(int, ftruncate64, (int d, off64_t size), fails_at(d, NULL), (d, size))
WRAP(int, mkdir, (const char *path, mode_t mode), fails(path), (path, mode))
WRAP(int, chmod, (const char *path, mode_t mode), fails(path), (path, mode))
WRAP(int, rename, (const char *from, const char *to), fails(from), (from, to))
WRAP(int, renameat, (int d, const char *from, int e, const char *to), fails_at(d, from), (d, from, e, to))
WRAP(int, unlink, (const char *path), !stays && fails(path), (path))
WRAP(int, unlinkat, (int d, const char *path, int flags), !stays && fails_at(d, path), (d, path, flags))
WRAP(int, rmdir, (const char *path), !stays && fails(path), (path))
"""


class Faults:
    """The preloaded library, in the process that has loaded it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def begin(self, folder: Path, number: int, code: int, stays: bool) -> None:
        self._library.faults_begin(os.fsencode(folder), ctypes.c_long(number), code, stays)

    def end(self) -> int:
        """Stop failing; returns the number of calls."""
        return self._library.faults_end()


def build_library(folder: Path) -> Path:
    """Compile the library in `folder`; returns its path, for LD_PRELOAD."""
    (folder / "faults.c").write_text(_SOURCE)
    command = ["cc", "-shared", "-fPIC", "-O0", "-U_FORTIFY_SOURCE", "faults.c", "-o", "faults.so", "-ldl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder / "faults.so"
