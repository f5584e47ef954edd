// Runs a classifier or UPerNet that AOTInductor compiled, without Python.
//
// Compile the model, for images of any size:
//   python tools/export_model.py --weights W --format aoti --output model.pt2
// Compile this, where $TORCH is the folder of the installed torch:
//   c++ -std=c++20 run_aoti.cpp -o run_aoti -I$TORCH/include
//     -I$TORCH/include/torch/csrc/api/include -L$TORCH/lib
//     -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -ldl
// Run, where _C.so is in spatial_mamba_d2/ops, and the image is height x width
// x 3 numbers of 8 bits, in the size that the network is to see:
//   ./run_aoti _C.so model.pt2 224 320 < image.u8
#include <algorithm>
#include <cstdlib>
#include <iostream>

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr
        << "usage: run_aoti OPERATORS.so MODEL.pt2 HEIGHT WIDTH < IMAGE\n";
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
  auto image = torch::empty({1, height, width, 3}, torch::kUInt8);
  const auto bytes = static_cast<std::streamsize>(image.nbytes());
  std::cin.read(reinterpret_cast<char*>(image.data_ptr()), bytes);
  if (std::cin.gcount() != bytes) {
    std::cerr << "the image must have " << bytes << " bytes, got "
              << std::cin.gcount() << "\n";
    return 1;
  }
  try {
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const auto output = model.run({image}).at(0);
    if (output.dim() == 2) {  // probabilities of classes
      const auto [values, classes] =
          output[0].topk(std::min<int64_t>(5, output.size(1)));
      for (int64_t i = 0; i < values.numel(); ++i) {
        std::cout << classes[i].item<int64_t>() << " "
                  << values[i].item<float>() << "\n";
      }
    } else {  // labels, as 8 bits for each pixel
      const auto labels = output.to(torch::kUInt8).contiguous();
      std::cout.write(
          static_cast<const char*>(labels.data_ptr()),
          static_cast<std::streamsize>(labels.nbytes()));
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
