"""Edits that reduce Horovod's use of cores and time, and measure the time of its collectives."""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

# Horovod's background thread polls for work every cycle (1 ms), and at each poll all ranks agree by an all-reduce of
# some bits, even if there is nothing to send: the thread takes core time from the computation, and a gradient waits for
# the next cycle. With HOROVOD_IDLE_CYCLE_TIME (milliseconds; unset: as released) a thread without work sleeps that
# long, and a submitted tensor wakes it at once.
_IDLE = "HOROVOD_IDLE_CYCLE_TIME: a background thread without work sleeps until a tensor is handed over."
EDITS: tuple[Edit, ...] = (
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

# The overlap of communication with the backward pass follows from two times: how long the caller waited, and how long
# the background thread was busy with collectives, which this counter measures.
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

# synchronize() in PyTorch spins until the collective is done, and where ranks use all cores it takes the core that the
# background thread needs. With this edit it sleeps, and Python receives a Control-C.
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


# TensorFlow allocates an operation's result anew at each call, a large one from the kernel: touching its 4 KB pages one
# after the other takes a tenth of the time of summing it. There are far fewer pages of 2 MB.
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
