// Runs one recorded launch, for sanitizers that want a process of their own: program KERNEL.so CASE OUT ORDER SEED
// [SITE]. Every buffer has exactly its size. OUT gets them all as they are afterwards. Printed: the sites met, one a
// line, and after a line of -- what went wrong. Exit status: that of gk_launch, 3 where it could not be tried.
#include "runtime.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <vector>

namespace {

struct Pointer { // bytes of the arguments that hold the address of a place in a buffer
  long at, buffer, offset;
};

template <class T> void read(std::ifstream &in, T *values, size_t n) {
  in.read(reinterpret_cast<char *>(values), n * sizeof(T));
}

[[noreturn]] void stop(const char *why) {
  fprintf(stderr, "%s\n", why);
  exit(3);
}

} // namespace

int main(int argc, char **argv) {
  if (argc < 6) stop("program KERNEL.so CASE OUT ORDER SEED [SITE]");
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) stop(dlerror());
  auto launch = reinterpret_cast<int (*)(const gk::twin::Launch &, const void *)>(dlsym(library, "gk_launch"));
  auto report = reinterpret_cast<const char *(*)()>(dlsym(library, "gk_report"));
  auto sites = reinterpret_cast<const char *(*)()>(dlsym(library, "gk_sites"));

  gk::twin::Launch how{};
  int sizes[8]; // blocks, cluster, threads, shared_bytes, resident; bytes of the arguments; buffers; pointers
  std::ifstream in(argv[2], std::ios::binary);
  read(in, sizes, 8);
  how.blocks = sizes[0], how.cluster = sizes[1], how.threads = sizes[2], how.shared_bytes = sizes[3];
  how.resident = sizes[4];
  how.order = static_cast<gk::twin::Order>(atoi(argv[4])), how.seed = atoi(argv[5]),
  how.left_out = argc > 6 ? argv[6] : "";
  std::vector<char> arguments(sizes[5]);
  std::vector<long> bytes(sizes[6]);
  std::vector<Pointer> pointers(sizes[7]);
  std::vector<char *> buffers;
  read(in, arguments.data(), arguments.size());
  read(in, bytes.data(), bytes.size());
  read(in, pointers.data(), pointers.size());
  for (long n : bytes) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, n)) stop("out of memory"); // aligned as torch aligns on a GPU
    buffers.push_back(static_cast<char *>(memory));
    read(in, buffers.back(), n);
  }
  if (!in) stop("the case is too short");
  for (const Pointer &p : pointers) {
    const char *address = buffers[p.buffer] + p.offset;
    memcpy(arguments.data() + p.at, &address, sizeof address);
  }

  const int outcome = launch(how, arguments.data());
  printf("%s--\n%s\n", sites(), report());
  std::ofstream out(argv[3], std::ios::binary);
  for (size_t i = 0; i < buffers.size(); i++) {
    out.write(buffers[i], bytes[i]);
    free(buffers[i]);
  }
  return outcome;
}
