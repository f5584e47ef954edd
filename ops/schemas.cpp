// Defines the operators as soon as the library is loaded, so that programs
// without Python find them. Their kernels are in */cpu.cpp.
#include <sstream>
#include <string>

#include <torch/library.h>

namespace {

constexpr char kSchemas[] =
#include "schemas.h"
    ;

TORCH_LIBRARY_FRAGMENT(spatial_mamba, m) {
  std::istringstream lines(kSchemas);
  for (std::string schema; std::getline(lines, schema);) {
    if (!schema.empty())
      m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  }
}

}  // namespace
