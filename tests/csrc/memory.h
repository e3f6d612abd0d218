// What a test of the kernels needs of memory: numbers drawn by seed, the storage types by arithmetic alone, and buffers
// of exactly the size that was asked for.
#pragma once
#include "../../csrc/vec.h"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace walk {

struct Random { // splitmix64
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  template <class T, size_t N> T of(const T (&a)[N]) { return a[below(N)]; }
};

// ---- storage types: a value of E bits of exponent and M of mantissa in 16, by arithmetic and not by the kernels'
// tricks

template <int E, int M> double decode16(uint16_t b) {
  constexpr int bias = (1 << (E - 1)) - 1, all = (1 << E) - 1;
  const int e = (b >> M) & all, m = b & ((1 << M) - 1);
  const double sign = b >> 15 ? -1 : 1;
  if (e == all) return m ? NAN : sign * INFINITY;
  return sign * (e ? std::ldexp((1 << M) + m, e - bias - M) : std::ldexp(m, 1 - bias - M));
}
template <int E, int M> uint16_t encode16(double x) { // of numbers in range
  constexpr int bias = (1 << (E - 1)) - 1;
  const int e = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
  const int q = int(std::nearbyint(std::ldexp(std::fabs(x), M - e)));
  return uint16_t((std::signbit(x) ? 0x8000 : 0) | (q + ((e + bias - 1) << M)));
}
inline double value(float x) { return x; }
inline double value(double x) { return x; }
inline double value(gk::bfloat16 x) { return decode16<8, 7>(x.bits); }
inline double value(gk::half x) { return decode16<5, 10>(x.bits); }
inline void assign(float &to, double x) { to = float(x); }
inline void assign(double &to, double x) { to = x; }
inline void assign(gk::bfloat16 &to, double x) { to.bits = encode16<8, 7>(x); }
inline void assign(gk::half &to, double x) { to.bits = encode16<5, 10>(x); }
template <class T> double rounded(double x) {
  T t;
  assign(t, x);
  return value(t);
}

// ---- buffers

// Memory of exactly `bytes`, every bit set: a NaN in every storage type, and what nobody wrote stays recognisable.
// Either on the heap, between the red zones of a sanitizer, or flush with a page that may not be touched: masked loads
// and stores are the machine's own and no sanitizer looks at them, but the machine does.
class Buffer {
  char *start = nullptr, *mapped = nullptr;
  size_t bytes = 0, length = 0;

public:
  Buffer(size_t size, Random &random) : bytes(size) {
#if defined(__unix__) || defined(__APPLE__)
    if (random.chance(0.5)) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
      length = inside + 2 * page;
      void *const p = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) std::perror("mmap"), std::abort();
      mapped = static_cast<char *>(p);
      if (inside && mprotect(mapped + page, inside, PROT_READ | PROT_WRITE)) std::perror("mprotect"), std::abort();
      start = mapped + page + (random.chance(0.7) ? inside - bytes : 0);
    }
#endif
    if (!mapped) start = static_cast<char *>(std::malloc(bytes));
    if (bytes) std::memset(start, 0xff, bytes);
  }
  Buffer(Buffer &&b) noexcept : start(b.start), mapped(b.mapped), bytes(b.bytes), length(b.length) {
    b.start = b.mapped = nullptr;
  }
  Buffer &operator=(Buffer &&) = delete;
  ~Buffer() {
#if defined(__unix__) || defined(__APPLE__)
    if (mapped) {
      munmap(mapped, length);
      return;
    }
#endif
    std::free(start);
  }
  void seal() { // from here on only read
#if defined(__unix__) || defined(__APPLE__)
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    if (mapped && length > 2 * page) mprotect(mapped + page, length - 2 * page, PROT_READ);
#endif
  }
  char *data() const { return start; }
  size_t size() const { return bytes; }
};

template <class T> Buffer stored(const std::vector<double> &values, Random &random) {
  Buffer b(values.size() * sizeof(T), random);
  for (size_t i = 0; i < values.size(); i++)
    if (!std::isnan(values[i])) assign(reinterpret_cast<T *>(b.data())[i], values[i]);
  b.seal();
  return b;
}

} // namespace walk
