// A slow disk: each call that changes one waits up to as many milliseconds as the file named by SLOW_DISK says. For LD_PRELOAD.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int regular(int descriptor) {
  struct stat s;
  return fstat(descriptor, &s) == 0 && S_ISREG(s.st_mode);
}

static void wait_a_while(void) {
  static __thread unsigned seed = 0;
  const char *path = getenv("SLOW_DISK");
  FILE *file = path ? fopen(path, "r") : NULL;
  int milliseconds = 0;
  if (!file) return;
  if (fscanf(file, "%d", &milliseconds) != 1) milliseconds = 0;
  fclose(file);
  if (!seed) seed = (unsigned)getpid() ^ (unsigned)(size_t)&seed;
  if (milliseconds > 0) usleep(rand_r(&seed) % (1000 * milliseconds));
}

#define NEXT(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *data, size_t size) {
  if (regular(descriptor)) wait_a_while();
  return NEXT(write)(descriptor, data, size);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
  wait_a_while();
  return NEXT(pwrite64)(descriptor, data, size, at);
}
int fsync(int descriptor) {
  wait_a_while();
  return NEXT(fsync)(descriptor);
}
int fdatasync(int descriptor) {
  wait_a_while();
  return NEXT(fdatasync)(descriptor);
}
int rename(const char *from, const char *to) {
  wait_a_while();
  return NEXT(rename)(from, to);
}
int mkdir(const char *path, mode_t mode) {
  wait_a_while();
  return NEXT(mkdir)(path, mode);
}
