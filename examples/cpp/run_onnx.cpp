// Runs an ONNX file of tools/export_model.py, or its .xml, with OpenVINO and
// without Python. Any of the three tasks; it prints the outputs.
//
// Compile, where $OPENVINO is the folder of the installed Python package
// openvino, which has the headers:
//   c++ -std=c++17 run_onnx.cpp -o run_onnx -I$OPENVINO/include
//     -L$OPENVINO/libs -Wl,-rpath,$OPENVINO/libs -l:libopenvino.so.2641
// Run, where the image is height x width x 3 numbers of 8 bits, in the size
// that the network is to see:
//   ./run_onnx model.onnx 224 320 < image.u8
#include <cstdlib>
#include <iostream>

#include <openvino/openvino.hpp>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_onnx MODEL.onnx HEIGHT WIDTH < IMAGE\n";
    return 2;
  }
  const int height = std::atoi(argv[2]), width = std::atoi(argv[3]);
  if (height < 1 || width < 1) {
    std::cerr << "HEIGHT and WIDTH must be at least 1, got " << argv[2] << " "
              << argv[3] << "\n";
    return 2;
  }
  try {
    ov::Core core;
    auto model = core.compile_model(
        argv[1], "CPU", ov::hint::inference_precision(ov::element::f32));
    ov::Shape shape = {size_t(height), size_t(width), 3};
    if (model.input().get_partial_shape().size() == 4) {  // in batches
      shape.insert(shape.begin(), 1);
    }
    ov::Tensor image(ov::element::u8, shape);
    const auto bytes = static_cast<std::streamsize>(image.get_byte_size());
    std::cin.read(reinterpret_cast<char*>(image.data()), bytes);
    if (std::cin.gcount() != bytes) {
      std::cerr << "the image must have " << bytes << " bytes, got "
                << std::cin.gcount() << "\n";
      return 1;
    }
    auto request = model.create_infer_request();
    request.set_input_tensor(image);
    request.infer();
    for (const auto& output : model.outputs()) {
      const ov::Tensor found = request.get_tensor(output);
      const auto type = found.get_element_type();
      std::cout << output.get_any_name() << " " << found.get_shape();
      for (size_t i = 0; i < found.get_size(); ++i) {
        if (type == ov::element::f32)
          std::cout << " " << found.data<float>()[i];
        if (type == ov::element::i64)
          std::cout << " " << found.data<int64_t>()[i];
        if (type == ov::element::u8)
          std::cout << " " << +found.data<uint8_t>()[i];
      }
      std::cout << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
