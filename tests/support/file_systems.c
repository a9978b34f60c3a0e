/* File systems that cannot do what a run needs, loaded by LD_PRELOAD.

A call on a path with a folder such as `flock=38` in it fails with that number of errno. `fsyncdir` and `renamedir` are
fsync and rename of directories. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Sets errno and returns 1 if the path says that the call fails. */
static int fails(const char *path, const char *call) {
    char wanted[32];
    snprintf(wanted, sizeof wanted, "/%s=", call);
    const char *found = strstr(path, wanted);
    if (found != NULL)
        errno = atoi(found + strlen(wanted));
    return found != NULL;
}

static int is_directory(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

static const char *path_of(int descriptor, char path[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
    return path;
}

int flock(int descriptor, int operation) {
    char path[PATH_MAX];
    if (fails(path_of(descriptor, path), "flock"))
        return -1;
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return real(descriptor, operation);
}

int fsync(int descriptor) {
    char path[PATH_MAX];
    path_of(descriptor, path);
    if (fails(path, is_directory(path) ? "fsyncdir" : "fsync"))
        return -1;
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return real(descriptor);
}

int rename(const char *before, const char *after) {
    if (is_directory(before) && fails(before, "renamedir"))
        return -1;
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return real(before, after);
}
