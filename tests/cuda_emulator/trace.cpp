// Counts the bytes of tensors that each launch reads and writes, every byte
// once. The kernels are compiled with ThreadSanitizer's instrumentation, which
// calls a function at every access; the functions defined here count.
//
//     trace <recording>
//
// prints one line "<bytes read> <bytes written> <kernel>" per launch.
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "recording.h"

namespace {

enum Access : unsigned char { kRead = 1, kWritten = 2 };

struct Buffer {
  std::vector<unsigned char> touched;  // per byte
};

// Tensors by address. Other accesses, to the stack or to shared memory, do not
// count.
std::map<uintptr_t, Buffer> buffers;

void touch(const void* address, size_t size, Access access) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  auto next = buffers.upper_bound(first);
  if (next == buffers.begin()) {
    return;
  }
  auto& [begin, buffer] = *--next;
  for (size_t i = first - begin; i < first - begin + size; i++) {
    if (i < buffer.touched.size()) {
      buffer.touched[i] |= access;
    }
  }
}

void report(const char* launch) {
  int64_t read = 0, written = 0;
  for (auto& [begin, buffer] : buffers) {
    for (unsigned char& touched : buffer.touched) {
      read += touched & kRead ? 1 : 0;
      written += touched & kWritten ? 1 : 0;
      touched = 0;
    }
  }
  std::printf("%ld %ld %s\n", long(read), long(written), launch);
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t size) {
  touch(p, size, kRead);
}
void __tsan_write_range(void* p, size_t size) {
  touch(p, size, kWritten);
}
#define SMD2_HOOK(SIZE)                        \
  void __tsan_read##SIZE(void* p) {            \
    touch(p, SIZE, kRead);                     \
  }                                            \
  void __tsan_write##SIZE(void* p) {           \
    touch(p, SIZE, kWritten);                  \
  }                                            \
  void __tsan_unaligned_read##SIZE(void* p) {  \
    touch(p, SIZE, kRead);                     \
  }                                            \
  void __tsan_unaligned_write##SIZE(void* p) { \
    touch(p, SIZE, kWritten);                  \
  }
SMD2_HOOK(1)
SMD2_HOOK(2)
SMD2_HOOK(4)
SMD2_HOOK(8)
SMD2_HOOK(16)
}

int main(int count, char** arguments) {
  if (count != 2) {
    return 2;
  }
  smd2::emulator::set_observer(report);
  try {
    const smd2::emulator::Recording recording(arguments[1]);
    const auto memory = recording.allocate();
    for (size_t i = 0; i < memory.sizes.size(); i++) {
      const void* address = memory.buffers[i].get();
      buffers[reinterpret_cast<uintptr_t>(address)].touched.resize(
          memory.sizes[i]);
    }
    recording.run(memory);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  return 0;
}
