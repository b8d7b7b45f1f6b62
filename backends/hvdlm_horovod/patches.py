"""The edits that Horovod 0.28.1's source distribution needs before it builds against today's frameworks.

Horovod 0.28.1 is of June 2023. Each edit is one literal replacement in one file, with the reason it
is there. An edit whose text is not found stops the build: a silent miss would surface as a compiler
error an hour later. Delete an edit when a Horovod release makes it unnecessary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

VERSION = "0.28.1"


class Edit(NamedTuple):
    """Replace ``old`` by ``new`` in ``file`` (relative to the source folder), because of ``why``."""

    file: str
    old: str
    new: str
    why: str


EDITS: tuple[Edit, ...] = (
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 17)",
        "TensorFlow's and torch's headers, which the common code includes through them, are C++17 since 2023.",
    ),
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD_REQUIRED ON)",
        "set(CMAKE_CXX_STANDARD_REQUIRED ON)\nset(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
        'set(CMAKE_INSTALL_RPATH "$ENV{HVDLM_RPATH}")',
        "The wheel is installed into other environments and on other machines: it looks for MPI, PyTorch and NCCL "
        "where the build says (hvdlm_horovod.build.rpath), not in the folders of the environment that built it.",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        "torch 2.13's headers use C++20; a C++20 compiler also accepts the C++17 headers of older releases.",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")',
        "# xla_mpi_ops.cc: left out, see hvdlm_horovod.patches",
        "The TensorFlow wheel lacks a header that this file includes. It holds Horovod's operations inside "
        "XLA programs on GPUs, which hvdlm does not use: it compiles only the parts between collectives.",
    ),
    Edit(
        "cmake/Modules/FindPytorch.cmake",
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n',
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n'
        "if(NOT HAVE_CUDA)\n    set(Pytorch_CUDA FALSE)  # no HOROVOD_GPU_OPERATIONS\nendif()\n",
        "PyPI's torch knows CUDA, wanted or not. Where a CUDA compiler is on PATH, without all of its libraries or in "
        "another version, Horovod's build failed, though nobody had asked for GPUs.",
    ),
)

# In GCC 13 to 16 fewer of the standard headers include each other, and more of a template is checked before it is used.
# Where Clang is installed without GCC, nothing may call gcc.
EDITS += (
    Edit(
        "horovod/common/group_table.h",
        "#include <mutex>\n#include <queue>\n",
        "#include <cstdint>\n#include <mutex>\n#include <queue>\n#include <string>\n",
        "GCC 13 and later: std::string and int32_t need their own headers.",
    ),
    Edit(
        "horovod/common/common.h",
        "#include <memory>\n#include <string>\n",
        "#include <memory>\n#include <stdexcept>\n#include <string>\n",
        "GCC 16: std::logic_error needs its own header, which torch's headers include first and TensorFlow's may not.",
    ),
    Edit(
        "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
        "  const size_type count_;\n",
        "  size_type count_;\n",
        "GCC 14 and later refuse operator= of span, which assigns to this const member.",
    ),
    Edit(
        "third_party/gloo/gloo/types.h",
        "#include <iostream>\n",
        "#include <cstdint>\n#include <iostream>\n",
        "GCC 15 and later: uint8_t needs its own header.",
    ),
    Edit(
        "horovod/common/ops/cuda/CMakeLists.txt",
        "set(CMAKE_CUDA_STANDARD 11)",
        "set(CMAKE_CUDA_STANDARD 17)",
        "The standard library of GCC 14 and later is not valid C++11 for nvcc (Horovod's pull request 4313), and the "
        "headers of CUDA 13 want C++17.",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        "import sysconfig; print(sysconfig.get_path('include'))",
        "Python 3.12 has no distutils; only setuptools brings one.",
    ),
    Edit(
        "cmake/Utilities.cmake",
        '"gcc -march=native',
        "\"'${CMAKE_CXX_COMPILER}' -march=native",
        "Without a gcc on PATH the processor's vector instructions were not used, whatever compiler was there.",
    ),
    Edit(
        "CMakeLists.txt",
        'set(CMAKE_CXX_FLAGS "${CMAKE_CXX_FLAGS} -pthread -fPIC -Wall -ftree-vectorize")\n',
        'set(CMAKE_CXX_FLAGS "${CMAKE_CXX_FLAGS} -pthread -fPIC -Wall -ftree-vectorize")\n'
        'if(CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND CMAKE_SYSTEM_NAME STREQUAL "Linux")\n'
        '    set(CMAKE_CXX_FLAGS "${CMAKE_CXX_FLAGS} -stdlib=libstdc++")\n'
        "endif()\n",
        "The frameworks' wheels for Linux take and return classes of libstdc++. With libc++, some Clangs' default, "
        "the operations would compile and then not load.",
    ),
)

# horovodrun starts ranks with mpirun, and tells from `mpirun --version` whose it is.
EDITS += (
    Edit(
        "horovod/runner/mpi_run.py",
        "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
        "Open MPI 5 takes `none` for the program to start unless these options have two dashes. Open MPI 4.1 and MPICH "
        "know both forms.",
    ),
    Edit(
        "horovod/runner/mpi_run.py",
        "        elif 'MPICH' in output:\n",
        "        elif 'MPICH' in output or 'HYDRA' in output:\n",
        "MPICH's mpirun calls itself HYDRA. MPICH is in its output only where variables of that name configured it.",
    ),
    Edit(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable\n",
        "from shutil import which as find_executable\n",
        "Python 3.12 has no distutils: horovodrun ended with an import error where setuptools is not installed.",
    ),
)

# Horovod's background thread looks for work every cycle (1 ms), and at each look all ranks agree by an all-reduce of
# some bits, also while there is nothing to send: the thread takes core time from the computation, and a gradient waits
# for the next look. With HOROVOD_IDLE_CYCLE_TIME (milliseconds; unset: as released) a thread without work sleeps that
# long, and a tensor that is handed over wakes it at once.
_IDLE = "HOROVOD_IDLE_CYCLE_TIME: a background thread without work sleeps until a tensor is handed over."
EDITS += (
    Edit("horovod/common/tensor_queue.h", "#include <iostream>\n", "#include <chrono>\n#include <iostream>\n", _IDLE),
    Edit(
        "horovod/common/tensor_queue.h",
        "  void RemoveJoinTensor();\n",
        "  void RemoveJoinTensor();\n\n"
        "  bool IsIdle() const;  // whether no tensor is under way\n"
        "  static void WaitForWork(std::chrono::steady_clock::duration limit);  // 0: only forget what came so far\n",
        _IDLE,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "// Add a TensorTableEntry as well as its message to the queue.\n",
        "namespace {\n"
        "std::mutex work_mutex;\n"
        "std::condition_variable work_came;\n"
        "bool work = false;\n\n"
        "Status AnnounceWork() {\n"
        "  std::lock_guard<std::mutex> guard(work_mutex);\n"
        "  work = true;\n"
        "  work_came.notify_one();\n"
        "  return Status::OK();\n"
        "}\n"
        "} // namespace\n\n"
        "bool TensorQueue::IsIdle() const {\n"
        "  std::lock_guard<std::mutex> guard(mutex_);\n"
        "  return tensor_table_.empty() && message_queue_.empty();\n"
        "}\n\n"
        "void TensorQueue::WaitForWork(std::chrono::steady_clock::duration limit) {\n"
        "  std::unique_lock<std::mutex> guard(work_mutex);\n"
        "  work_came.wait_for(guard, limit, [] { return work; });\n"
        "  work = false;\n"
        "}\n\n"
        "// Add a TensorTableEntry as well as its message to the queue.\n",
        _IDLE,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "#include <assert.h>\n",
        "#include <assert.h>\n#include <condition_variable>\n",
        _IDLE,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "  message_queue_.push(std::move(message));\n  return Status::OK();\n",
        "  message_queue_.push(std::move(message));\n  return AnnounceWork();\n",
        _IDLE,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "    message_queue_.push(std::move(messages[i]));\n  }\n  return Status::OK();\n",
        "    message_queue_.push(std::move(messages[i]));\n  }\n  return AnnounceWork();\n",
        _IDLE,
    ),
    Edit(
        "horovod/common/operations.cc",
        "  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {\n"
        "    std::this_thread::sleep_for(sleep_duration);\n"
        "  }\n",
        '  static const char* idle_text = std::getenv("HOROVOD_IDLE_CYCLE_TIME");\n'
        "  static const long idle_us = idle_text ? long(std::strtod(idle_text, nullptr) * 1000.) : 0;\n"
        "  bool idle = idle_us > 0;\n"
        "  for (auto id : state.process_set_table.Ids()) {\n"
        "    idle = idle && state.process_set_table.Get(id).tensor_queue.IsIdle();\n"
        "  }\n"
        "  if (!idle && sleep_duration > std::chrono::steady_clock::duration::zero()) {\n"
        "    std::this_thread::sleep_for(sleep_duration);\n"
        "  }\n"
        "  TensorQueue::WaitForWork(std::chrono::microseconds(idle ? idle_us : 0));\n",
        _IDLE,
    ),
)

# How much of the communication hides behind the backward pass can be told only by whoever sees both: the caller sees
# how long it waited, this counter how long the background thread was busy with collectives.
_BUSY = "horovod_transfer_seconds(): seconds spent in collectives; negative where a GPU stream does them unseen."
EDITS += (
    Edit(
        "horovod/common/operations.cc",
        "// Process a Response by doing a reduction, a gather, a broadcast, or\n",
        "std::atomic<long long> transfer_ns{0};\n"
        "std::atomic<bool> transfer_unseen{false};\n\n"
        "// Process a Response by doing a reduction, a gather, a broadcast, or\n",
        _BUSY,
    ),
    Edit(
        "horovod/common/operations.cc",
        "  Status status;\n  try {\n    // process_set is passed here only",
        "  auto began = std::chrono::steady_clock::now();\n"
        "  Status status;\n  try {\n    // process_set is passed here only",
        _BUSY,
    ),
    Edit(
        "horovod/common/operations.cc",
        "  if (!status.in_progress()) {\n    for (auto& e : entries) {\n",
        "  if (status.in_progress()) {\n"
        "    transfer_unseen = true;\n"
        "  } else {\n"
        "    if (!entries.empty() && response.response_type() != Response::BARRIER) {\n"
        "      transfer_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(\n"
        "                         std::chrono::steady_clock::now() - began)\n"
        "                         .count();\n"
        "    }\n"
        "    for (auto& e : entries) {\n",
        _BUSY,
    ),
    Edit(
        "horovod/common/operations.cc",
        "void horovod_shutdown() {\n",
        "double horovod_transfer_seconds() {\n"
        "  return transfer_unseen ? -1. : 1e-9 * double(transfer_ns.load());\n"
        "}\n\n"
        "void horovod_shutdown() {\n",
        _BUSY,
    ),
    Edit(
        "horovod/common/operations.h",
        "void horovod_shutdown();\n",
        "void horovod_shutdown();\n\n// Seconds in collectives so far; negative where a GPU stream does them unseen.\n"
        "double horovod_transfer_seconds();\n",
        _BUSY,
    ),
)

# synchronize() in PyTorch spins until the collective is done: the core that it takes is the one that the background
# thread needs where ranks fill all cores. It sleeps instead, and lets Python see a Control-C.
_WAIT = "horovod_torch_wait_and_clear sleeps until the background thread is done; horovod_torch_wait_sleeps tells so."
EDITS += (
    Edit(
        "horovod/torch/handle_manager.h",
        "#include <atomic>\n",
        "#include <atomic>\n#include <chrono>\n#include <condition_variable>\n",
        _WAIT,
    ),
    Edit(
        "horovod/torch/handle_manager.h",
        "  bool PollHandle(int handle);\n",
        "  bool PollHandle(int handle);\n"
        "  bool WaitHandle(int handle, std::chrono::milliseconds limit); // whether it is done\n",
        _WAIT,
    ),
    Edit(
        "horovod/torch/handle_manager.h",
        "  std::mutex mutex_;\n",
        "  std::mutex mutex_;\n  std::condition_variable done_;\n",
        _WAIT,
    ),
    Edit(
        "horovod/torch/handle_manager.cc",
        "  results_[handle] = std::make_shared<Status>(status);\n}\n",
        "  results_[handle] = std::make_shared<Status>(status);\n"
        "  done_.notify_all();\n}\n\n"
        "bool HandleManager::WaitHandle(int handle, std::chrono::milliseconds limit) {\n"
        "  std::unique_lock<std::mutex> guard(mutex_);\n"
        "  auto ended = [&] {\n"
        "    auto found = results_.find(handle);\n"
        "    return found == results_.end() || found->second != nullptr;\n"
        "  };\n"
        "  return done_.wait_for(guard, limit, ended);\n}\n",
        _WAIT,
    ),
    Edit(
        "horovod/torch/mpi_ops_v2.cc",
        "      py::gil_scoped_release release_python_gil;\n      std::this_thread::yield();\n    }\n",
        "      py::gil_scoped_release release_python_gil;\n"
        "      handle_manager.WaitHandle(handle, std::chrono::milliseconds(100));\n    }\n"
        "    if (PyErr_CheckSignals() != 0) throw py::error_already_set();\n",
        _WAIT,
    ),
    Edit(
        "horovod/torch/mpi_ops_v2.cc",
        '  m.def("horovod_torch_reset", &Reset);\n',
        '  m.def("horovod_torch_reset", &Reset);\n  m.attr("horovod_torch_wait_sleeps") = true;\n',
        _WAIT,
    ),
)


# TensorFlow allocates an operation's result anew on each call, and a large result anew from the kernel: touching its
# 4 KB pages one after the other takes a tenth of the time of summing it. Of 2 MB pages there are few.
_PAGES = "The result of a large all-reduce on a CPU lies in huge pages where the kernel grants them (madvise)."
EDITS += (
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "#include <unordered_map>\n",
        "#include <unordered_map>\n#include <sys/mman.h>\n",
        _PAGES,
    ),
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "namespace {\n\n::tensorflow::DataType GetTFDataType(",
        "namespace {\n\n"
        "void AdviseHugePages(const ::tensorflow::Tensor& tensor, int device) {\n"
        "#ifdef MADV_HUGEPAGE\n"
        "  const uintptr_t page = 1 << 21;\n"
        "  auto data = tensor.tensor_data();\n"
        "  auto first = (reinterpret_cast<uintptr_t>(data.data()) + page - 1) & ~(page - 1);\n"
        "  auto last = (reinterpret_cast<uintptr_t>(data.data()) + data.size()) & ~(page - 1);\n"
        "  if (device == CPU_DEVICE_ID && last > first + 3 * page) {\n"
        "    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // a refusal costs speed alone\n"
        "  }\n"
        "#endif\n"
        "}\n\n"
        "::tensorflow::DataType GetTFDataType(",
        _PAGES,
    ),
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "    OP_REQUIRES_OK_ASYNC(\n        context, context->allocate_output(0, tensor.shape(), &output), done);\n",
        "    OP_REQUIRES_OK_ASYNC(\n"
        "        context, context->allocate_output(0, tensor.shape(), &output), done);\n"
        "    AdviseHugePages(*output, device);\n",
        _PAGES,
    ),
)


def digest() -> str:
    """Return a short hash of all edits: part of the key of the wheel cache."""
    return hashlib.sha256(repr((VERSION, EDITS)).encode()).hexdigest()[:12]


def apply(source: Path) -> None:
    """Apply every edit to the unpacked source distribution in ``source``.

    Raises:
        SystemExit: an edit's text occurs not exactly once in its file.
    """
    for edit in EDITS:
        path = source / edit.file
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise SystemExit(
                f"setup: cannot patch Horovod {VERSION}: {edit.file} holds {edit.old!r} {text.count(edit.old)} times, "
                "expected once. Is the source distribution the released one?"
            )
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
