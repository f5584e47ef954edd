// Runs a Spatial-Mamba classifier without Python.
//
// Save the model, for images of any size:
//   import torch, spatial_mamba_d2.models as models
//   model = models.build_classifier("tiny")
//   models.load_weights(model, "spatialmamba_tiny.pth")
//   torch.jit.script(model.eval()).save("tiny.pt")
// Compile, where $TORCH is the folder of the installed torch:
//   c++ -std=c++20 classify.cpp -o classify -I$TORCH/include
//     -I$TORCH/include/torch/csrc/api/include -L$TORCH/lib
//     -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -ldl
// Run, where _C.so is in spatial_mamba_d2/ops, and the image is 3 x height x
// width float32 numbers, normalised as in training:
//   ./classify _C.so tiny.pt 224 320 < image.f32
#include <algorithm>
#include <cstdlib>
#include <iostream>

#include <dlfcn.h>
#include <torch/script.h>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: classify OPERATORS.so MODEL.pt HEIGHT WIDTH < IMAGE\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW)) {  // defines the operators
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const int64_t height = std::atoi(argv[3]), width = std::atoi(argv[4]);
  if (height < 1 || width < 1) {
    std::cerr << "HEIGHT and WIDTH must be at least 1, got " << argv[3] << " "
              << argv[4] << "\n";
    return 2;
  }
  auto image = torch::empty({1, 3, height, width});
  const auto bytes = static_cast<std::streamsize>(image.nbytes());
  std::cin.read(reinterpret_cast<char*>(image.data_ptr<float>()), bytes);
  if (std::cin.gcount() != bytes) {
    std::cerr << "the image must have " << bytes << " bytes, got "
              << std::cin.gcount() << "\n";
    return 1;
  }
  try {
    const c10::InferenceMode inference;
    auto model = torch::jit::load(argv[2]);
    const auto scores = model.forward({image}).toTensor().softmax(1)[0];
    const auto [values, classes] =
        scores.topk(std::min<int64_t>(5, scores.numel()));
    for (int64_t i = 0; i < values.numel(); ++i) {
      std::cout << classes[i].item<int64_t>() << " " << values[i].item<float>()
                << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
