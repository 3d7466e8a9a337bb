// Train with a packaged TrainStep, without Python:
//
//   train PACKAGE DATA STATE OUT [FIRST [LAST]]
//
// PACKAGE  What bnb_compile.export.package wrote.
// DATA     A dict: "version" of bnb_compile, and by the names of the step's arguments ("hyper", "batch[0]", ...)
//          tensors with a first dimension for the steps.
// STATE    A dict of the step's tensors: dict(step.state_dict()) in Python, or an earlier OUT.
// OUT      The same after steps FIRST (0) to LAST - 1 (all), for step.load_state_dict.
//
// Dicts are files of torch.save. A line is printed for each step: its number, its loss, its milliseconds.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using Dict = c10::impl::GenericDict;
using Tensors = std::unordered_map<std::string, at::Tensor>;

Dict read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  return torch::jit::pickle_load(bytes).toGenericDict();
}

// torch::pickle_save tags a dict with its type, which torch.load with weights_only=True does not read.
void write(const std::string& path, const Tensors& tensors) {
  c10::Dict<std::string, at::Tensor> dict;
  for (const auto& [name, x] : tensors) dict.insert(name, x.cpu());
  std::string bytes;
  const auto append = [&](const char* data, size_t size) { bytes.append(data, size); };
  torch::jit::Pickler pickler(append, nullptr, nullptr, nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(dict);
  pickler.stop();

  caffe2::serialize::PyTorchStreamWriter file(path);
  file.writeRecord("data.pkl", bytes.data(), bytes.size());
  for (size_t k = 0; k < pickler.tensorData().size(); ++k) {
    const auto data = torch::jit::getWriteableTensorData(pickler.tensorData()[k]);
    file.writeRecord("data/" + std::to_string(k), data.data(), data.sizeInBytes());
  }
  file.writeEndOfFile();
}

c10::IValue entry(const Dict& dict, const std::string& name, const std::string& path) {
  TORCH_CHECK(dict.contains(name), path, " has no ", name);
  return dict.at(name);
}

// Lines of the metadata: a tensor's specification and its name, here the other way round.
std::vector<std::pair<std::string, std::string>> read_lines(const std::string& lines) {
  std::vector<std::pair<std::string, std::string>> found;
  std::istringstream text(lines);
  for (std::string spec, name; text >> spec && std::getline(text >> std::ws, name);) found.emplace_back(name, spec);
  return found;
}

// A specification is float32[64,16], or float32[*,16] if the first size may be any; strides follow if it has some.
bool any_size(const std::string& spec) { return spec.find('*') != std::string::npos; }

void check(const std::string& name, const at::Tensor& x, const std::string& spec) {
  std::vector<std::string> sizes;
  for (const auto n : x.sizes()) sizes.push_back(sizes.empty() && any_size(spec) ? "*" : std::to_string(n));
  auto found = c10::str(c10::getDtypeNames(x.scalar_type()).first, '[', c10::Join(",", sizes), ']');
  if (!x.is_contiguous()) found += c10::str(":[", c10::Join(",", x.strides()), ']');
  TORCH_CHECK(found == spec, name, " is ", found, ", must be ", spec);
}

void agree(const std::string& name, const char* what, int64_t& known, int64_t found) {
  TORCH_CHECK(known < 0 || found == known, name, " has ", found, ' ', what, ", must have ", known);
  known = found;
}

int64_t number(const std::string& text) {
  char* end;
  const auto value = std::strtoll(text.c_str(), &end, 10);
  TORCH_CHECK(!text.empty() && !*end, "'", text, "' is not a number of steps");
  return value;
}

void train(const std::vector<std::string>& args) {
  TORCH_CHECK(args.size() >= 4 && args.size() <= 6, "usage: train PACKAGE DATA STATE OUT [FIRST [LAST]]");
  const auto &package = args[0], &data_path = args[1], &state_path = args[2];
  const auto data = read(data_path), state = read(state_path);
  TORCH_CHECK(std::ifstream(package), "cannot read ", package);
  torch::inductor::AOTIModelPackageLoader step(package);
  const auto metadata = step.get_metadata();
  TORCH_CHECK(metadata.count("bnb_compile"), package, " is not a package of bnb_compile");
  const auto kind = metadata.at("bnb_compile.kind"), version = metadata.at("bnb_compile.version");
  const auto of_data = entry(data, "version", data_path).toStringRef();
  TORCH_CHECK(version == of_data, package, " is of bnb_compile ", version, ", ", data_path, " of ", of_data);
  TORCH_CHECK(kind == "TrainStep", package, " is an ", kind, ", must be a TrainStep");

  // The program's own tensors become those of the step, which updates them in place.
  const c10::Device device(metadata.at("AOTI_DEVICE_KEY"));
  Tensors tensors, constants;
  for (const auto& [name, spec] : read_lines(metadata.at("bnb_compile.tensors"))) {
    tensors[name] = entry(state, name, state_path).toTensor().to(device);
    check(state_path + ": " + name, tensors[name], spec);
  }
  for (const auto& name : step.get_constant_fqns()) constants[name] = tensors.at(name);
  step.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);

  std::vector<at::Tensor> inputs;
  int64_t steps = -1, samples = -1;  // not known yet
  for (const auto& [name, spec] : read_lines(metadata.at("bnb_compile.inputs"))) {
    const auto x = entry(data, name, data_path).toTensor(), of_step = x.narrow(0, 0, 1).squeeze(0);
    check(data_path + ": " + name, of_step, spec);
    agree(data_path + ": " + name, "steps", steps, x.size(0));
    if (any_size(spec)) agree(data_path + ": " + name, "samples", samples, of_step.size(0));
    inputs.push_back(name == "hyper" ? x : x.to(device));  // hyperparameters are read on the host
  }

  const int64_t first = args.size() > 4 ? number(args[4]) : 0, last = args.size() > 5 ? number(args[5]) : steps;
  TORCH_CHECK(0 <= first && first <= last && last <= steps, "steps ", first, " to ", last, ", must be in 0 to ", steps);
  for (int64_t k = first; k < last; ++k) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<at::Tensor> row;
    for (const auto& x : inputs) row.push_back(x[k]);
    const double loss = step.run(row).at(0).item().toDouble();
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    std::printf("%lld %.9g %.4f\n", static_cast<long long>(k), loss, time.count());
  }
  write(args[3], tensors);
}

int main(int argc, char** argv) {
  try {
    train({argv + 1, argv + argc});
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "train: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train: %s\n", error.what());
    return 1;
  }
}
