// Runs every launcher on small maps, under sanitizers. With the argument
// "orders", it also checks that results are bitwise equal in the three orders
// of threads; without it there is less to run, because ThreadSanitizer is slow.
#include <cstdio>
#include <exception>
#include <string>

#include "operator_case.h"

namespace smd2 {
namespace cuda {
namespace {

template <typename T>
void run(Case c, bool all_orders) {
  using emulator::Order;
  emulator::set_order(Order::forward);
  const auto expected = c.run<T>();
  for (const Order order : {Order::reverse, Order::random}) {
    emulator::set_order(order);
    if (all_orders && c.run<T>() != expected) {
      throw std::runtime_error("results depend on the order of threads");
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace smd2

int main(int count, char** arguments) {
  using smd2::cuda::Case;
  const bool orders = count > 1 && arguments[1] == std::string("orders");
  try {
    // One token; several tiles and bands, an odd number of channels; a
    // sequence of several rows of segments.
    for (const Case& c :
         {Case(1, 1, 1, 1), Case(1, 21, 21, 33), Case(1, 2, 301, 2)}) {
      smd2::cuda::run<float>(c, orders);
      if (orders) {
        smd2::cuda::run<c10::BFloat16>(c, orders);
      }
    }
    smd2::cuda::run<double>(Case(1, 9, 18, 3), orders);
    smd2::cuda::run<c10::Half>(Case(1, 9, 18, 3), orders);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  std::printf("done\n");
  return 0;
}
