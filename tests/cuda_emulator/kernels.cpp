// The emulated kernels by name; with C functions for ctypes.
#include "kernels.h"

#include <stdexcept>

namespace smd2 {
namespace emulator {

std::map<std::string, Start>& kernels() {
  static std::map<std::string, Start> all;
  return all;
}

void launch(
    const std::string& name,
    int64_t blocks,
    int warps,
    size_t shared_bytes,
    const void* argument,
    size_t size) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    throw std::runtime_error("emulator: no kernel " + name);
  }
  found->second(blocks, warps, shared_bytes, argument, size);
}

}  // namespace emulator
}  // namespace smd2

extern "C" {

// Returns what is wrong, or null.
const char* emulator_launch(
    const char* name,
    int64_t blocks,
    int warps,
    int64_t shared_bytes,
    const void* argument,
    int64_t size) {
  static std::string error;
  try {
    smd2::emulator::launch(
        name,
        blocks,
        warps,
        static_cast<size_t>(shared_bytes),
        argument,
        static_cast<size_t>(size));
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}

void emulator_set_order(int order) {
  smd2::emulator::set_order(static_cast<smd2::emulator::Order>(order));
}
}
