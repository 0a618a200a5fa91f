// Python module resnet_fast._C: build information and the activation pool. Importing it registers the ops of ops.cpp.
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>
#ifdef WITH_CUDA
#include <ATen/detail/CUDAHooksInterface.h>
#include <cuda_runtime_api.h>
#endif

#include <string>
#include <utility>
#include <vector>

#include "cpu/activation_pool.h"
#include "cpu/conv_kernels.h"
#include "cpu/frozen_network.h"
#include "cpu/kernels.h"
#ifdef WITH_AMX
#include "cpu/amx/amx.h"
#include "cpu/program/program.h"
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::list capabilities() {
  py::list out;
  out.append("DEFAULT");
#ifdef WITH_AVX2
  out.append("AVX2");
#endif
#ifdef WITH_AVX512
  out.append("AVX512");
#endif
#ifdef WITH_AMX
  out.append(resnet_fast::cpu::amx::name());
#endif
  return out;
}

py::dict build_info() {
  py::dict info;
  info["torch_version"] = TORCH_VERSION;
#ifdef WITH_CUDA
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  info["cuda_version"] = py::none();
#endif
#ifdef WITH_CUDA
  info["cuda_archs"] = RESNET_FAST_CUDA_ARCHS;
  const auto& hooks = at::detail::getCUDAHooks();
  info["cudnn_version"] = hooks.hasCuDNN() ? py::cast(hooks.versionRuntimeCuDNN()) : py::none();
  info["nvcc_flags"] = RESNET_FAST_NVCC_FLAGS;
#endif
  info["cxx_flags"] = RESNET_FAST_CXX_FLAGS;
  info["compiler"] = compiler();
  info["cplusplus"] = static_cast<int64_t>(__cplusplus);
#ifdef _GLIBCXX_USE_CXX11_ABI
  info["cxx11_abi"] = _GLIBCXX_USE_CXX11_ABI != 0;
#else
  info["cxx11_abi"] = py::none();
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["capabilities"] = capabilities();
  info["cpu_capability"] = resnet_fast::cpu::kernels().name;
  return info;
}

py::dict pool_stats() {
  const auto stats = resnet_fast::cpu::pool_stats();
  py::dict out;
  out["enabled"] = stats.enabled;
  out["limit_bytes"] = stats.limit_bytes;
  out["cached_bytes"] = stats.cached_bytes;
  out["allocated_bytes"] = stats.allocated_bytes;
  out["peak_bytes"] = stats.peak_bytes;
  out["hits"] = stats.hits;
  out["misses"] = stats.misses;
  return out;
}

struct Pooled {};

void bind_frozen_network(py::module_& m) {
  using resnet_fast::cpu::FrozenNetwork;
  using Numbers = std::vector<int64_t>;
  using OptionalTensor = std::optional<at::Tensor>;
  const auto conv = [](FrozenNetwork& network, int64_t x, std::optional<int64_t> residual, const at::Tensor& onednn,
                       const OptionalTensor& winograd, const OptionalTensor& direct, const OptionalTensor& bias,
                       int64_t out_channels, Numbers stride, Numbers padding, Numbers dilation, int64_t groups, bool relu) {
    return network.conv(
        x, residual, {onednn, winograd, direct, bias, out_channels, stride, padding, dilation, groups, relu});
  };
  const auto times = [](const FrozenNetwork& network, const at::Tensor& x) {
    std::vector<std::pair<int64_t, double>> out;
    for (const auto& time : network.timed_run(x)) out.emplace_back(time.layers, time.seconds);
    return out;
  };
  py::class_<FrozenNetwork>(m, "FrozenNetwork", "A frozen network on any CPU: see csrc/cpu/frozen_network.h.")
      .def(py::init<>())
      .def("conv", conv, py::arg("x"), py::arg("residual"), py::arg("onednn"), py::arg("winograd"), py::arg("direct"),
           py::arg("bias"), py::arg("out_channels"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
           py::arg("groups"), py::arg("relu"))
      .def("max_pool", &FrozenNetwork::max_pool, py::arg("x"))
      .def("run", &FrozenNetwork::run, py::arg("x"), py::call_guard<py::gil_scoped_release>())
      .def("timed_run", times, py::arg("x"), py::call_guard<py::gil_scoped_release>());
}

#ifdef WITH_AMX
void bind_program(py::module_& m) {
  using resnet_fast::cpu::Program;
  const auto times = [](Program& program, const at::Tensor& x, const at::Tensor& y) {
    std::vector<std::pair<std::string, double>> out;
    for (const auto& time : program.timed_run(x, y)) out.emplace_back(time.name, time.seconds);
    return out;
  };
  namespace amx = resnet_fast::cpu::amx;
  m.def("amx_usable", &amx::usable, "Whether this CPU and system, and this build, have tiles.");
  m.def("dots_usable", &amx::dots_usable, "Whether they have bfloat16's dot products, which a Program can do with.");
  py::class_<Program>(m, "Program", "A frozen network by bfloat16 products: see csrc/cpu/program/program.h.")
      .def(py::init<int64_t, int64_t, int64_t, bool>(), py::arg("planes"), py::arg("capacity"), py::arg("threads"),
           py::arg("tiles"))
      .def("buffer", &Program::buffer, py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("halo"),
           py::arg("group"), py::arg("own"), py::arg("vector"))
      .def("section", &Program::section, py::arg("by_image"))
      .def("read", &Program::read, py::arg("y"))
      .def("conv", &Program::conv, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("residual"), py::arg("weight"),
           py::arg("bias"), py::arg("taps"), py::arg("stride"), py::arg("blocks"), py::arg("outputs_per_group"),
           py::arg("relu"))
      .def("winograd", &Program::winograd, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("residual"),
           py::arg("weight"), py::arg("bias"), py::arg("relu"))
      .def("skip", &Program::skip, py::arg("x"), py::arg("y"), py::arg("stride"))
      .def("conv_max_pool", &Program::conv_max_pool, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("weight"),
           py::arg("bias"), py::arg("taps"), py::arg("columns"), py::arg("stride"), py::arg("height"), py::arg("width"))
      .def("average_pool", &Program::average_pool, py::arg("x"), py::arg("y"))
      .def("write", &Program::write, py::arg("x"))
      .def("run", &Program::run, py::arg("x"), py::arg("y"), py::call_guard<py::gil_scoped_release>())
      .def("timed_run", times, py::arg("x"), py::arg("y"), py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native backend of resnet_fast";
  m.def("build_info", &build_info, "Versions, compiler and CPU capabilities of this build, and the capability in use.");
  m.def("has_vectors", &resnet_fast::cpu::has_vectors, "Whether the kernels in use are of AVX2 or AVX-512.");
  bind_frozen_network(m);
#ifdef WITH_AMX
  bind_program(m);
#else
  for (const char* name : {"amx_usable", "dots_usable"}) m.def(name, [] { return false; });
#endif
  py::class_<Pooled>(m, "Pooled", "Context manager around pool_enter() and pool_exit(). Stateless: instances nest.")
      .def(py::init<>())
      .def("__enter__", [](const Pooled&) { resnet_fast::cpu::pool_enter(); })
      .def("__exit__", [](const Pooled&, const py::args&) { resnet_fast::cpu::pool_exit(); });
  m.def("pool_enter", &resnet_fast::cpu::pool_enter, "Serve this thread's large CPU tensors from the activation pool.");
  m.def("pool_exit", &resnet_fast::cpu::pool_exit, "Undo one pool_enter().");
  m.def(
      "pool_empty_cache", &resnet_fast::cpu::pool_empty_cache, py::call_guard<py::gil_scoped_release>(),
      "Return the pool's free blocks to the system.");
  m.def("pool_stats", &pool_stats, "Counters of the activation pool.");
}
