// Runs recorded launches, under sanitizers.
//
//     replay <once|orders> <recording> ...
//
// With "orders", it also checks that all buffers are bitwise equal in the three
// orders of threads; "once" leaves that out, because ThreadSanitizer is slow.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "recording.h"

namespace {

using smd2::emulator::Order;
using smd2::emulator::Recording;

Recording::Memory run(const Recording& recording, Order order) {
  smd2::emulator::set_order(order);
  Recording::Memory memory = recording.allocate();
  recording.run(memory);
  return memory;
}

void replay(const Recording& recording, bool all_orders) {
  const auto expected = run(recording, Order::forward);
  if (!all_orders) {
    return;
  }
  for (const Order order : {Order::reverse, Order::random}) {
    const auto other = run(recording, order);
    for (size_t i = 0; i < expected.buffers.size(); i++) {
      if (std::memcmp(
              expected.buffers[i].get(),
              other.buffers[i].get(),
              expected.sizes[i])) {
        throw std::runtime_error("results depend on the order of threads");
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    return 2;
  }
  try {
    for (int i = 2; i < count; i++) {
      replay(Recording(arguments[i]), arguments[1] == std::string("orders"));
    }
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  std::printf("done\n");
  return 0;
}
