// Defines the operators as soon as the library is loaded, so that programs
// without Python find them. Their kernels are in */cpu.cpp.
#include <dlfcn.h>

#include <sstream>
#include <string>

#include "stable.h"

namespace {

constexpr char kSchemas[] =
#include "schemas.h"
    ;

// Those of the stable ABI of PyTorch 2.12, which an older one does not have.
using Tag = int32_t();
using DefineWithTags = AOTITorchError(
    TorchLibraryHandle library,
    const char* schema,
    const int32_t* tags,
    int32_t num_tags);

template <typename Function>
Function* find(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

class Definitions {
 public:
  Definitions() {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment(
        "spatial_mamba", __FILE__, __LINE__, &library_));
    const auto tag = find<Tag>("torch_tag_pt2_compliant_tag");
    const auto define = find<DefineWithTags>("torch_library_def_with_tags");
    std::istringstream lines(kSchemas);
    for (std::string schema; std::getline(lines, schema);) {
      if (schema.empty()) {
        continue;
      }
      if (tag && define) {
        const int32_t tags[] = {tag()};
        STABLE_TORCH_ERROR_CODE_CHECK(
            define(library_, schema.c_str(), tags, 1));
      } else {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_library_def(library_, schema.c_str()));
      }
    }
  }
  ~Definitions() {
    aoti_torch_delete_library_object(library_);
  }

 private:
  TorchLibraryHandle library_;
};

const Definitions definitions;

}  // namespace
