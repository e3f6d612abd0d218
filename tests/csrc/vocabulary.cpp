// vocabulary FUNCTION NUMBER: doubles from standard input, what the function makes of them to standard output, computed
// in GK_STORAGE. NUMBER is the second argument of those that take two.
#include "../../csrc/vocabulary.h"
#include <cstdio>
#include <cstdlib>
#include <string>

using T = GK_STORAGE;
using V = gk::Vec<T>;

V evaluate(const std::string &name, V x, V n) {
#define GK_CASE(f)                                                                                                     \
  if (name == #f) return gk::f(x);
  GK_CASE(exp)
  GK_CASE(exp2)
  GK_CASE(expm1)
  GK_CASE(log)
  GK_CASE(log1p)
  GK_CASE(sigmoid)
  GK_CASE(tanh)
  GK_CASE(softplus)
  GK_CASE(sqrt)
  GK_CASE(sin)
  GK_CASE(cos)
  GK_CASE(erf)
  GK_CASE(abs)
  GK_CASE(sign)
  GK_CASE(relu)
  if (name == "pow") return gk::pow(x, n);
  if (name == "min") return gk::min(x, n);
  if (name == "max") return gk::max(x, n);
  std::fprintf(stderr, "no function %s\n", name.c_str());
  std::exit(2);
}

int main(int count, char **args) {
  if (count != 3) return 2;
  const V n(T(std::strtod(args[2], nullptr)));
  double numbers[V::size];
  for (size_t got; (got = std::fread(numbers, sizeof(double), V::size, stdin)) > 0;) {
    V x(1);
    for (size_t i = 0; i < got; i++) x.v[i] = T(numbers[i]);
    const V y = evaluate(args[1], x, n);
    for (size_t i = 0; i < got; i++) numbers[i] = double(y.v[i]);
    std::fwrite(numbers, sizeof(double), got, stdout);
  }
}
