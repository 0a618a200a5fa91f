// Python module resnet_fast._C: build information and the activation pool. Importing it registers the ops of ops.cpp.
#include <pybind11/pybind11.h>
#include <torch/version.h>
#ifdef WITH_CUDA
#include <ATen/detail/CUDAHooksInterface.h>
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "cpu/activation_pool.h"
#include "cpu/kernels.h"

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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native backend of resnet_fast";
  m.def("build_info", &build_info, "Versions, compiler and CPU capabilities of this build, and the capability in use.");
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
