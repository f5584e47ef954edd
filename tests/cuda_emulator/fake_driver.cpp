// Stands for NVIDIA's driver, libcuda.so.1, on a machine without it: it knows
// the order in which calls must come, and keeps the last launch for the test.
#include <cstdint>
#include <cstring>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201;
constexpr intptr_t kContext = 0x1000, kModule = 0x2000, kFunction = 0x3000;

intptr_t contexts[8];  // a stack
int depth = 0;
int next_status = kSuccess;
int attributes_set = 0;
struct {
  int64_t function, blocks, lanes, warps, shared_bytes, stream, members[64];
} last;

bool in_context() {
  return depth > 0 && contexts[depth - 1] == kContext;
}

int result() {
  const int status = in_context() ? next_status : kInvalidContext;
  next_status = kSuccess;
  return status;
}

}  // namespace

extern "C" {

int cuGetErrorName(int status, const char** name) {
  *name = status == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_OTHER";
  return kSuccess;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 209 ? "no kernel image" : "something is wrong";
  return kSuccess;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(intptr_t* context, int) {
  *context = kContext;
  return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = 227 * 1024;
  return attribute == 97 ? kSuccess : kInvalidValue;
}
int cuCtxGetCurrent(intptr_t* context) {
  *context = depth ? contexts[depth - 1] : 0;
  return kSuccess;
}
int cuCtxPushCurrent_v2(intptr_t context) {
  contexts[depth++] = context;
  return kSuccess;
}
int cuCtxPopCurrent_v2(intptr_t* context) {
  *context = contexts[--depth];
  return kSuccess;
}
int cuModuleLoadData(intptr_t* module, const char* image) {
  *module = kModule;
  return std::memcmp(image, "\177ELF", 4) ? kInvalidValue : result();
}
int cuModuleGetFunction(intptr_t* function, intptr_t module, const char* name) {
  *function = kFunction;
  return module == kModule && std::strstr(name, "fuse_tiles") ? result()
                                                              : kInvalidValue;
}
int cuFuncSetAttribute(intptr_t function, int attribute, int value) {
  attributes_set++;
  const bool valid = attribute == 8 && value == 227 * 1024;
  return function == kFunction && valid ? result() : kInvalidValue;
}
int cuLaunchKernel(
    intptr_t function,
    unsigned x,
    unsigned y,
    unsigned z,
    unsigned lanes,
    unsigned warps,
    unsigned threads_z,
    unsigned shared_bytes,
    intptr_t stream,
    void** arguments,
    void** extra) {
  if (y != 1 || z != 1 || threads_z != 1 || extra) {
    return kInvalidValue;
  }
  last = {function, x, lanes, warps, shared_bytes, stream, {}};
  std::memcpy(last.members, arguments[0], 11 * sizeof(int64_t));
  return result();
}

// For the test:
void fail_next(int status) {
  next_status = status;
}
int context_depth() {
  return depth;
}
int num_attributes_set() {
  return attributes_set;
}
int64_t last_launch(int number) {
  return reinterpret_cast<const int64_t*>(&last)[number];
}
}
