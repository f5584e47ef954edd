// The emulated kernels by name. A generated source for each set of kernels
// registers them (tests/ops/emulator.py), and the launch code in Python, or a
// program that replays what it has launched, starts them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "simt_emulator.h"

namespace smd2 {
namespace emulator {

// Starts a kernel: (blocks, warps, bytes of shared memory, argument, its size).
using Start = std::function<void(int64_t, int, size_t, const void*, size_t)>;

std::map<std::string, Start>& kernels();

// Throws an exception if there is no kernel of this name, or if its argument
// has another size.
void launch(
    const std::string& name,
    int64_t blocks,
    int warps,
    size_t shared_bytes,
    const void* argument,
    size_t size);

// Registers a kernel by its construction.
struct Registration {
  template <typename Args>
  Registration(const char* name, void (*kernel)(Args)) {
    kernels()[name] = [=](int64_t blocks,
                          int warps,
                          size_t shared_bytes,
                          const void* argument,
                          size_t size) {
      if (sizeof(Args) != size) {
        throw std::runtime_error(
            std::string("emulator: ") + name + ": its argument has " +
            std::to_string(sizeof(Args)) + " bytes, got " +
            std::to_string(size));
      }
      const Args& args = *static_cast<const Args*>(argument);
      run(name, blocks, 32, static_cast<unsigned>(warps), shared_bytes, [&] {
        kernel(args);
      });
    };
  }
};

}  // namespace emulator
}  // namespace smd2
