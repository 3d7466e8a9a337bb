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
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using Dict = c10::impl::GenericDict;
using Tensors = std::unordered_map<std::string, at::Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

Dict read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read ", path);
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
  if (!dict.contains(name)) fail(path, " has no ", name);
  return dict.at(name);
}

// As in the metadata: float32[64,16], float32[*,16] where the first size may be any, with strides if not contiguous.
std::string describe(const at::Tensor& x, bool any_size) {
  std::ostringstream text;
  text << c10::getDtypeNames(x.scalar_type()).first << '[';
  for (int64_t k = 0; k < x.dim(); ++k) text << (k ? "," : "") << (any_size && !k ? "*" : std::to_string(x.size(k)));
  text << ']';
  if (x.is_contiguous()) return text.str();
  for (int64_t k = 0; k < x.dim(); ++k) text << (k ? "," : ":[") << x.stride(k);
  return text.str() + "]";
}

void check(const std::string& name, const at::Tensor& x, const std::string& expected) {
  const auto found = describe(x, expected.find('*') != std::string::npos);
  if (found != expected) fail(name, " is ", found, ", must be ", expected);
}

// Lines of a shape and a name, as names and shapes in their order.
std::vector<std::pair<std::string, std::string>> read_lines(const std::string& lines) {
  std::vector<std::pair<std::string, std::string>> found;
  std::istringstream text(lines);
  for (std::string spec, name; text >> spec && std::getline(text >> std::ws, name);) found.emplace_back(name, spec);
  return found;
}

void train(const std::vector<std::string>& args) {
  if (args.size() < 4 || args.size() > 6) fail("usage: train PACKAGE DATA STATE OUT [FIRST [LAST]]");
  const auto &package = args[0], &data_path = args[1], &state_path = args[2];
  const auto data = read(data_path), state = read(state_path);
  if (!std::ifstream(package)) fail("cannot read ", package);
  torch::inductor::AOTIModelPackageLoader step(package);
  const auto metadata = step.get_metadata();
  if (!metadata.count("bnb_compile")) fail(package, " is not a package of bnb_compile");
  const auto kind = metadata.at("bnb_compile.kind"), version = metadata.at("bnb_compile.version");
  const auto of_data = entry(data, "version", data_path).toStringRef();
  if (version != of_data) fail(package, " is of bnb_compile ", version, ", ", data_path, " of ", of_data);
  if (kind != "TrainStep") fail(package, " is an ", kind, ", must be a TrainStep");

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
  int64_t steps = -1, batch = -1;  // none yet
  for (const auto& [name, spec] : read_lines(metadata.at("bnb_compile.inputs"))) {
    const auto x = entry(data, name, data_path).toTensor(), of_step = x.narrow(0, 0, 1).squeeze(0);
    check(data_path + ": " + name, of_step, spec);
    const bool of_any_size = spec.find('*') != std::string::npos;
    if (steps >= 0 && steps != x.size(0)) fail(data_path, ": ", name, " has ", x.size(0), " steps, must have ", steps);
    steps = x.size(0);
    if (!of_any_size) continue;
    inputs.push_back(name == "hyper" ? x : x.to(device));  // hyperparameters are read on the host
  }

  const int64_t first = args.size() > 4 ? std::stoll(args[4]) : 0;
  const int64_t last = args.size() > 5 ? std::stoll(args[5]) : steps;
  if (first < 0 || last < first || last > steps) fail("steps ", first, " to ", last, ", must be from 0 to ", steps);
  for (int64_t k = first; k < last; ++k) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<at::Tensor> row;
    for (const auto& x : inputs) row.push_back(x[k]);
    const double loss = step.run(row).at(0).item().toDouble();
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    std::printf("%ld %.9g %.4f\n", static_cast<long>(k), loss, time.count());
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
