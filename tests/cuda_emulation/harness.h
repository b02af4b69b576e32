// Runs a kernel on cases that Python wrote, once for every seed, and compares the outcomes.
//
//   program FOLDER...    FOLDER holds case.txt, lines of `name value`, and one file per tensor;
//                        every output is written beside them as NAME.out.
//
// `seeds` in case.txt says how many thread orders run; they must agree in every bit. A folder's
// name is printed before it runs. -DHARNESS_FLOAT_ONLY compiles one element type, for mutants.
#pragma once

#include <fstream>
#include <iterator>
#include <string>

#include "cuda/target.cuh"

namespace harness {

using Bytes = std::vector<char>;

class Case {
 public:
  explicit Case(std::string folder) : folder_(std::move(folder)) {
    std::ifstream file(folder_ + "/case.txt");
    for (std::string name, value; file >> name >> value;) values_[name] = value;
  }

  std::string text(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) emulation::fail("%s has no %s", folder_.c_str(), name.c_str());
    return found->second;
  }
  int64_t integer(const std::string& name) const { return std::stoll(text(name)); }
  double number(const std::string& name) const { return std::stod(text(name)); }

  // The tensor's data, null where Python wrote none. It ends where its memory ends, and begins
  // `offset` elements after an address aligned for every access.
  template <typename T>
  const T* input(const std::string& name, int64_t offset = 0) {
    std::ifstream file(folder_ + "/" + name + ".bin", std::ios::binary);
    if (!file) return nullptr;
    const Bytes bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    T* data = allocate<T>(bytes.size(), offset);
    if (!bytes.empty()) std::memcpy(data, bytes.data(), bytes.size());
    return data;
  }
  // Memory a kernel writes: NaN until then, and compared between seeds.
  template <typename T>
  T* output(const std::string& name, int64_t count, int64_t offset = 0) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    T* data = allocate<T>(bytes, offset);
    outputs_.push_back({name, reinterpret_cast<const char*>(data), bytes});
    return data;
  }
  // Memory for a kernel's own use: NaN until written.
  template <typename T>
  T* workspace(int64_t count) {
    return allocate<T>(static_cast<size_t>(count) * sizeof(T), 0);
  }

  template <typename Run>
  void run(const Run& run_case) {
    std::vector<Bytes> first;
    for (int64_t seed = 0; seed < integer("seeds"); ++seed) {
      emulation::seed = static_cast<uint64_t>(seed);
      outputs_.clear();
      buffers_.clear();
      run_case(*this);
      for (size_t i = 0; i < outputs_.size(); ++i) {
        const Output& output = outputs_[i];
        const Bytes bytes(output.data, output.data + output.bytes);
        if (seed == 0) {
          first.push_back(bytes);
          std::ofstream(folder_ + "/" + output.name + ".out", std::ios::binary)
              .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        } else if (bytes != first[i]) {
          emulation::fail("%s depends on the order of the threads (seed %lld)", output.name.c_str(),
                          static_cast<long long>(seed));
        }
      }
    }
  }

 private:
  struct Output {
    std::string name;
    const char* data;
    size_t bytes;
  };

  template <typename T>
  T* allocate(size_t bytes, int64_t offset) {
    const size_t skipped = static_cast<size_t>(offset) * sizeof(T);
    buffers_.push_back(std::make_unique<emulation::Buffer>(skipped + bytes));
    return reinterpret_cast<T*>(static_cast<char*>(buffers_.back()->get()) + skipped);
  }

  std::string folder_;
  std::map<std::string, std::string> values_;
  std::vector<std::unique_ptr<emulation::Buffer>> buffers_;
  std::vector<Output> outputs_;
};

// Calls run.template operator()<T>(case) with the element type that `dtype` names.
template <typename Run>
int main_with_type(int count, char** folders, const Run& run) {
  for (int i = 1; i < count; ++i) {
    std::printf("%s\n", folders[i]);
    std::fflush(stdout);
    Case(folders[i]).run([&](Case& c) {
      const std::string dtype = c.text("dtype");
      if (dtype == "float32") return run.template operator()<float>(c);
#ifndef HARNESS_FLOAT_ONLY
      if (dtype == "float64") return run.template operator()<double>(c);
      if (dtype == "float16") return run.template operator()<__half>(c);
      if (dtype == "bfloat16") return run.template operator()<__nv_bfloat16>(c);
#endif
      emulation::fail("unknown dtype %s", dtype.c_str());
    });
  }
  return 0;
}

}  // namespace harness
