// The architectures that the library was compiled for; the doctor reports them.
#include <torch/library.h>

#include <string>

TORCH_LIBRARY_FRAGMENT(spatial_mamba, m) {
  m.def("cuda_architectures() -> str", [] {
    return std::string(SMD2_CUDA_ARCHITECTURES);
  });
}
