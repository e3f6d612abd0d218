// A libcuda.so.1 that runs nothing: it answers as a GPU would, writes down what it was asked, one line a call, and
// fails where it is told to, so that everything on the host runs where there is no driver.
//
// Environment, read at every call so that a test can change it: STUB_LOG the file to write to; STUB_CAPABILITY (90),
// STUB_MULTIPROCESSORS (132), STUB_SHARED (232448) what the GPU is; STUB_CLUSTERS (8), STUB_BLOCKS (1) how many
// clusters, and blocks of a multiprocessor, run at the same time; STUB_FAIL "name=error name=error": calls that fail,
// and how.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int id, pad;
  unsigned value[16];
} Attribute; // CUlaunchAttribute
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
} Config; // CUlaunchConfig

static __thread void *current; // context

static int setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

// Writes the line, and says whether the call is one that fails.
static int asked(const char *name, const char *more) {
  const char *path = getenv("STUB_LOG"), *fail = getenv("STUB_FAIL");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (file) fprintf(file, "%s%s%s\n", name, *more ? " " : "", more), fclose(file);
  for (const char *at = fail; at && (at = strstr(at, name)); at++)
    if (at[strlen(name)] == '=') return atoi(at + strlen(name) + 1);
  return 0;
}
static void show(char *line, size_t size, const Config *c) {
  int n = snprintf(line, size, "grid=%u block=%u shared=%u stream=%p", c->grid[0], c->block[0], c->shared, c->stream);
  for (unsigned i = 0; i < c->count; i++)
    n += snprintf(line + n, size - n, " attribute%d=%u", c->attributes[i].id, c->attributes[i].value[0]);
}

static int version(int *v) { return *v = setting("STUB_VERSION", 13000), 0; }
static int device_get(int *device, int ordinal) { return *device = ordinal, 0; }
static int device_name(char *name, int size, int device) { return snprintf(name, size, "Stub %d", device), 0; }
static int device_attribute(int *v, int attribute, int device) {
  switch (attribute) {
  case 16:
    *v = setting("STUB_MULTIPROCESSORS", 132);
    break;
  case 75:
    *v = setting("STUB_CAPABILITY", 90) / 10;
    break;
  case 76:
    *v = setting("STUB_CAPABILITY", 90) % 10;
    break;
  case 97:
    *v = setting("STUB_SHARED", 232448);
    break;
  case 120:
    *v = setting("STUB_CAPABILITY", 90) >= 90;
    break;
  default:
    return 1;
  }
  return 0;
}
static int retain(void **context, int device) {
  return *context = (void *)(0x100l + device), asked("cuDevicePrimaryCtxRetain", "");
}
static int get_current(void **context) { return *context = current, 0; }
static int push(void *context) {
  if (current) return 1; // one context deep is all that is needed
  current = context;
  return asked("cuCtxPushCurrent", "");
}
static int pop(void **context) {
  *context = current, current = NULL;
  return asked("cuCtxPopCurrent", "");
}
static int exchange_mode(int *mode) {
  static __thread int now;
  int before = now;
  now = *mode, *mode = before;
  return asked("cuThreadExchangeStreamCaptureMode", now == 2 ? "relaxed" : "back");
}
static int load(void **library, const char *code) {
  *library = (void *)0x1000;
  return current ? asked("cuLibraryLoadData", memcmp(code, "\177ELF", 4) ? "not a cubin" : "cubin") : 201;
}
static int get_kernel(void **kernel, void *library, const char *name) {
  return *kernel = (void *)0x2000, asked("cuLibraryGetKernel", name);
}
static int get_function(void **function, void *kernel) {
  return *function = (void *)0x3000, asked("cuKernelGetFunction", "");
}
static int func_load(void *function) { return asked("cuFuncLoad", ""); }
static int set_attribute(void *function, int attribute, int value) {
  char line[64];
  snprintf(line, sizeof line, "attribute%d=%d", attribute, value);
  return asked("cuFuncSetAttribute", line);
}
static int clusters(int *count, void *function, const Config *c) {
  char line[512];
  show(line, sizeof line, c);
  *count = setting("STUB_CLUSTERS", 8);
  return current ? asked("cuOccupancyMaxActiveClusters", line) : 201;
}
static int blocks(int *count, void *function, int threads, size_t shared) {
  char line[64];
  snprintf(line, sizeof line, "block=%d shared=%zu", threads, shared);
  *count = setting("STUB_BLOCKS", 1);
  return current ? asked("cuOccupancyMaxActiveBlocksPerMultiprocessor", line) : 201;
}
static int launch(const Config *c, void *function, void **arguments, void **extra) {
  char line[512];
  show(line, sizeof line, c);
  const int *walk = arguments[0]; // T, B, H, reverse
  snprintf(line + strlen(line), sizeof line - strlen(line), " T=%d B=%d H=%d", walk[0], walk[1], walk[2]);
  return current ? asked("cuLaunchKernelEx", line) : 201;
}
static int error_name(int error, const char **text) {
  *text = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
  return 0;
}
static int error_string(int error, const char **text) {
  *text = error == 2 ? "out of memory" : "the stub was told so";
  return 0;
}
static int unknown(void) { return 801; } // CUDA_ERROR_NOT_SUPPORTED

static const struct {
  const char *name;
  void *f;
} known[] = {
    {"cuDriverGetVersion", version},
    {"cuDeviceGet", device_get},
    {"cuDeviceGetName", device_name},
    {"cuDeviceGetAttribute", device_attribute},
    {"cuDevicePrimaryCtxRetain", retain},
    {"cuCtxGetCurrent", get_current},
    {"cuCtxPushCurrent", push},
    {"cuCtxPopCurrent", pop},
    {"cuThreadExchangeStreamCaptureMode", exchange_mode},
    {"cuLibraryLoadData", load},
    {"cuLibraryGetKernel", get_kernel},
    {"cuKernelGetFunction", get_function},
    {"cuFuncLoad", func_load},
    {"cuFuncSetAttribute", set_attribute},
    {"cuOccupancyMaxActiveClusters", clusters},
    {"cuOccupancyMaxActiveBlocksPerMultiprocessor", blocks},
    {"cuLaunchKernelEx", launch},
    {"cuGetErrorName", error_name},
    {"cuGetErrorString", error_string},
};

int cuInit(unsigned flags) { return asked("cuInit", ""); }
int cuGetExportTable(const void **table, const void *id) {
  return *table = NULL, 500;
} // NVRTC asks, and takes no for an answer
int cuGetProcAddress_v2(const char *name, void **f, int version, unsigned long long flags, int *status) {
  *f = !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2
       : !strcmp(name, "cuInit")         ? (void *)cuInit
                                         : unknown;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(known[i].name, name)) *f = known[i].f;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char *name, void **f, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, f, version, flags, NULL);
}
