// The emulated operators as a library for tests. Their schemas are those of
// spatial_mamba, which Python defines; see tests/ops/emulator.py.
#include <torch/library.h>

#include <map>
#include <string>

#include "simt_emulator.h"

namespace {

void set_thread_order(std::string name) {
  using smd2::emulator::Order;
  static const std::map<std::string, Order> orders = {
      {"forward", Order::forward},
      {"reverse", Order::reverse},
      {"random", Order::random}};
  smd2::emulator::set_order(orders.at(name));
}

TORCH_LIBRARY_FRAGMENT(spatial_mamba_emulated, m) {
  m.def("set_thread_order(str order) -> ()", &set_thread_order);
}

}  // namespace
