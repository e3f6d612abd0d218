// One fault of every kind that a sanitizer is here to find: faults KIND, "none" for none.
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

int shared;
int *volatile leaked;

int main(int count, char **args) {
  const std::string kind = count > 1 ? args[1] : "";
  const int one = count - 1; // 1, but the compiler does not know
  if (kind == "overflow") {
    int *volatile p = static_cast<int *>(std::malloc(4 * sizeof(int))); // volatile: of a size that is not known
    p[3 + one] = 1;
    std::free(p);
  } else if (kind == "leak") {
    leaked = static_cast<int *>(std::malloc(sizeof(int)));
    leaked = nullptr;
  } else if (kind == "arithmetic") {
    std::printf("%d\n", INT_MAX + one);
  } else if (kind == "bounds") {
    std::vector<int> v(one);
    std::printf("%d\n", v[one]);
  } else if (kind == "race") {
    std::thread other([] { shared++; });
    shared++;
    other.join();
  } else if (kind != "none")
    return 2;
  std::puts("unnoticed");
  return 0;
}
