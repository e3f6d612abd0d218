// Rows of heads on their way to the tiles and back: asked for ahead, copied, packed, written.
#pragma once
#include "pack.h"

namespace gk {

// Rows of `width` values, `stride` apart.
template <class T> struct Rows {
  T *first;
  int64_t stride, count, width;
  T *operator()(int64_t t) const { return first + t * stride; }
  // At most `most` of them.
  Rows part(int64_t from, int64_t most) const {
    return {first + from * stride, stride, std::min(most, count - from), width};
  }
};

template <class T> constexpr int64_t whole_vectors(int64_t n) { return vectors<T>(n) * lanes<T>; }

template <class P> Rows<P> take_rows(Arena &arena, int64_t count, int64_t width) {
  const int64_t stride = row_stride<P>(width);
  return {arena.take<P>(count * stride), stride, count, width};
}

// Rows that are wanted soon, asked for one at each call, while there is arithmetic to do: a core drops requests that
// come all at once, and does not foresee rows that lie apart because heads are side by side.
class Ahead {
  struct Stream {
    const char *next;
    int64_t stride, bytes, left;
  } streams[5]{};
  int count = 0;

public:
  void restart() { count = 0; }
  template <class T> void add(const Rows<T> &rows) {
    constexpr int64_t size = sizeof(T);
    streams[count++] = {reinterpret_cast<const char *>(rows.first), rows.stride * size, rows.width * size, rows.count};
  }
  void ask() {
    for (int k = 0; k < count; k++) {
      Stream &s = streams[k];
      if (s.left-- <= 0) continue;
      for (int64_t c = 0; c < s.bytes; c += 64) prefetch(s.next + c);
      s.next += s.stride;
    }
  }
};

// ---- to the tile

template <class T, class P> void copy(const Rows<T> &from, const Rows<P> &to) {
  constexpr int L = lanes<T>;
  for (int64_t t = 0; t < from.count; t++)
    for (int64_t c = 0; c < from.width; c += L) store(to(t) + c, load(from(t) + c, from.width - c));
}
// Where they are if the tile can read them there, else copied.
template <class T, class P> Rows<P> readable(const Rows<T> &rows, const Rows<P> &room) {
  if constexpr (std::is_same_v<T, P>)
    if (rows.width % Dot<P>::depth == 0) return rows;
  copy(rows, room);
  return room.part(0, rows.count);
}

// For sums along the width: panels of [width][L rows].
template <class T, class P> void pack_along(const Rows<T> &rows, const Packed<P> &to) {
  pack_units<P>([&](int, int64_t t) { return rows(t); }, to.panels, to.matrix.panel, 1, rows.count, rows.width, 0,
                vectors<T>(rows.count));
}
// For sums over rows: panels of [rows][L of the width]; these are the rows from `first` on.
template <class T, class P> void pack_over(const Rows<T> &rows, const Packed<P> &to, int64_t first = 0) {
  pack_rows<P>(rows, to.panels + first * lanes<P>, to.matrix.panel, rows.count, rows.width, 0, vectors<T>(rows.width));
}

// What is packed along from row `first` on, a multiple of L.
template <class P> Matrix<P> along_from(Matrix<P> m, int64_t first) {
  m.panels += first / lanes<P> * m.panel;
  return m;
}
// The part with rows [first, first + n) of what is packed over rows.
template <class P> Matrix<P> over_part(const Matrix<P> &m, int64_t first, int64_t n) {
  return {m.panels + first * lanes<P>, m.panel, sum_steps<P>(n), nullptr};
}

// ---- back

// Sums [rows][whole vectors], times `scale`, to where they belong.
template <class T> void write(const Real<T> *sums, Real<T> scale, const Rows<T> &to) {
  using V = Vec<Real<T>>;
  constexpr int L = lanes<T>;
  for (int64_t t = 0; t < to.count; t++, sums += whole_vectors<T>(to.width))
    for (int64_t c = 0; c < to.width; c += L) store(to(t) + c, V::load(sums + c) * V(scale), to.width - c);
}

} // namespace gk
