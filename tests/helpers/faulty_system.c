/* A shared library for LD_PRELOAD that makes the system misbehave towards one process, as environment variables say:
 *
 * FAULTY_DIR       only files below this directory are concerned
 * FULL_AFTER       bytes that can still be written there; then the disk is full
 * SYNC_FAILS       the number of the fsync that reports an error of input or output
 * FLIP_WRITE       the number of the write in which one bit changes on its way; writes to TensorBoard's files, which
 *                  nothing reads back, are not counted
 * SLOW_US          microseconds that every write, fsync and rename takes longer
 * SHORT_WRITES     bytes that one call writes at most
 * SYNC_LOG         a file that gets a line for each write, fsync and rename there, so that a power cut can be played:
 *                  what was not synced is lost. What a rename replaces is kept beside it as SYNC_LOG.NUMBER
 * CLOCK_JUMP       seconds by which the clock of the day is wrong ...
 * CLOCK_AFTER      ... from so many seconds after the first look at it
 *
 * The variables are read in every call, since processes that are forked from a prepared one get them only then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long written, syncs, writes;
static double first_look;

static double option(const char *name) {
    const char *value = getenv(name);
    return value ? atof(value) : 0;
}

static int concerns(const char *path) {
    const char *directory = getenv("FAULTY_DIR");
    return directory && !strncmp(path, directory, strlen(directory));
}

/* Writes the path of an open file, which is empty if it has none. */
static void path_of(int file, char path[4096]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
}

static int concerns_file(int file) {
    char path[4096];
    if (!getenv("FAULTY_DIR")) return 0;
    path_of(file, path);
    return concerns(path);
}

static int flips(int file) {
    char path[4096];
    path_of(file, path);
    if (strstr(path, "/tensorboard/")) return 0;
    return __sync_add_and_fetch(&writes, 1) == (long)option("FLIP_WRITE");
}

static void be_slow(void) {
    if (option("SLOW_US")) usleep((useconds_t)option("SLOW_US"));
}

static void note(const char *what, const char *path, const char *to, const char *replaced) {
    const char *log = getenv("SYNC_LOG");
    char line[3 * 4096];
    if (!log) return;
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%s\n", what, path, to, replaced);
    int file = open(log, O_WRONLY | O_APPEND | O_CREAT, 0666);
    if (file < 0 || REAL(write)(file, line, (size_t)length) != length) abort();
    close(file);
}

static void note_file(const char *what, int file) {
    char path[4096];
    path_of(file, path);
    note(what, path, "", "");
}

/* Returns how many of the bytes may be written, or -1 with errno. */
static ssize_t allowed(size_t count) {
    be_slow();
    size_t most = (size_t)option("SHORT_WRITES");
    if (most && count > most) count = most;
    if (getenv("FULL_AFTER")) {
        long left = (long)option("FULL_AFTER") - __sync_fetch_and_add(&written, 0);
        if (left <= 0 && count) {
            errno = ENOSPC;
            return -1;
        }
        if ((long)count > left) count = (size_t)left;
    }
    __sync_fetch_and_add(&written, (long)count);
    return (ssize_t)count;
}

ssize_t write(int file, const void *bytes, size_t count) {
    if (!concerns_file(file)) return REAL(write)(file, bytes, count);
    ssize_t possible = allowed(count);
    if (possible <= 0) return possible;
    note_file("write", file);
    if (!flips(file)) return REAL(write)(file, bytes, (size_t)possible);
    char *changed = malloc((size_t)possible);
    memcpy(changed, bytes, (size_t)possible);
    changed[possible / 2] ^= 4;
    ssize_t result = REAL(write)(file, changed, (size_t)possible);
    free(changed);
    return result;
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (!concerns_file(file)) return REAL(writev)(file, parts, count);
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len) return write(file, parts[i].iov_base, parts[i].iov_len); /* a short write is allowed */
    return 0;
}

int fsync(int file) {
    if (concerns_file(file)) {
        be_slow();
        if (__sync_add_and_fetch(&syncs, 1) == (long)option("SYNC_FAILS")) {
            errno = EIO;
            return -1;
        }
        int result = REAL(fsync)(file);
        if (!result) note_file("sync", file);
        return result;
    }
    return REAL(fsync)(file);
}

int rename(const char *from, const char *to) {
    static long renames;
    char replaced[4096] = "";
    if (!concerns(from)) return REAL(rename)(from, to);
    be_slow();
    if (getenv("SYNC_LOG")) {
        snprintf(replaced, sizeof replaced, "%s.%d.%ld", getenv("SYNC_LOG"), getpid(), __sync_add_and_fetch(&renames, 1));
        if (link(to, replaced)) *replaced = 0;
    }
    int result = REAL(rename)(from, to);
    if (!result) note("rename", from, to, replaced);
    return result;
}

static double jump(void) {
    if (!getenv("CLOCK_JUMP")) return 0;
    struct timespec now;
    REAL(clock_gettime)(CLOCK_MONOTONIC, &now);
    double seconds = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    if (!first_look) first_look = seconds;
    return seconds - first_look < option("CLOCK_AFTER") ? 0 : option("CLOCK_JUMP");
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = REAL(clock_gettime)(clock, time);
    if (clock == CLOCK_REALTIME) time->tv_sec += (time_t)jump();
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    int result = REAL(gettimeofday)(time, zone);
    time->tv_sec += (time_t)jump();
    return result;
}

time_t time(time_t *seconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds) *seconds = now.tv_sec;
    return now.tv_sec;
}
