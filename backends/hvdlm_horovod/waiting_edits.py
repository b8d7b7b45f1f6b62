"""Edits with which Horovod's background thread sleeps while it waits for other ranks or for a slow network."""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

# Collectives that are in flight while the rank computes (buckets during the backward pass, fragments of streaming
# DiLoCo) share the cores with the computation: a thread that polls takes its time. A short wait still polls, since the
# threads of ranks that are in step answer at once, and a thread that slept would be late at each collective.
_AWAIT = "Await: the background thread polls at first, then sleeps, a little longer each time."
EDITS: tuple[Edit, ...] = (
    Edit(
        "horovod/common/mpi/mpi_context.h",
        "struct MPIContext {\n\n",
        """\
// Waits for a request: polls for `polled` microseconds, then sleeps between polls for an eighth of the time that it has
// waited, 50 to `longest` microseconds. The kernel sends and receives meanwhile, and the core is the computation's.
int Await(MPI_Request& request, MPI_Status* status, int64_t polled, int64_t longest);

struct MPIContext {

""",
        _AWAIT,
    ),
    Edit(
        "horovod/common/mpi/mpi_context.cc",
        "#include <cassert>\n#include <iostream>\n#include <memory>\n#include <vector>\n",
        "#include <algorithm>\n#include <cassert>\n#include <chrono>\n#include <iostream>\n#include <memory>\n"
        "#include <thread>\n#include <vector>\n",
        _AWAIT,
    ),
    Edit(
        "horovod/common/mpi/mpi_context.cc",
        "MPI_Datatype MPIContext::GetMPIDataType(const std::shared_ptr<Tensor> tensor) const {\n",
        """\
int Await(MPI_Request& request, MPI_Status* status, int64_t polled, int64_t longest) {
  auto began = std::chrono::steady_clock::now();
  for (;;) {
    int done = 0;
    int error = MPI_Test(&request, &done, status);
    if (error != MPI_SUCCESS || done) {
      return error;
    }
    auto elapsed = std::chrono::steady_clock::now() - began;
    int64_t waited = std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count();
    if (waited < polled) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(std::min(longest, std::max<int64_t>(50, waited / 8))));
    }
  }
}

MPI_Datatype MPIContext::GetMPIDataType(const std::shared_ptr<Tensor> tensor) const {
""",
        _AWAIT,
    ),
)

# A rank that hands over a tensor before the others waits for them here: another thread without work answers when it
# wakes up, after HOROVOD_IDLE_CYCLE_TIME, or when its rank hands over the tensor, too.
_AGREEMENT = "Ranks that wait for others to agree on what to send poll for 1 ms, and sleep from then on."
EDITS += tuple(
    Edit(
        "horovod/common/mpi/mpi_controller.cc",
        "int ret_code = MPI_Allreduce(MPI_IN_PLACE, bitvector.data(), count,\n"
        f"                               MPI_LONG_LONG_INT, {operation}, mpi_ctx_.mpi_comm);\n",
        "MPI_Request request;\n"
        "  int ret_code = MPI_Iallreduce(MPI_IN_PLACE, bitvector.data(), count,\n"
        f"                                MPI_LONG_LONG_INT, {operation}, mpi_ctx_.mpi_comm, &request);\n"
        "  if (ret_code == MPI_SUCCESS) {\n"
        "    ret_code = Await(request, MPI_STATUS_IGNORE, 1000, 1000);\n"
        "  }\n",
        _AGREEMENT,
    )
    for operation in ("MPI_BAND", "MPI_BOR")
)

_PAYLOADS = "Between hosts, the thread sleeps while compressed gradients are gathered, or exchanged by all to all."
EDITS += (
    Edit(
        "horovod/common/ops/mpi_operations.cc",
        "  int op = MPI_Allgatherv(sendbuf != nullptr ? sendbuf : MPI_IN_PLACE,\n"
        "                          (int) total_num_elements,\n"
        "                          dtype,\n"
        "                          buffer_data,\n"
        "                          recvcounts,\n"
        "                          displcmnts,\n"
        "                          dtype,\n"
        "                          mpi_context.GetMPICommunicator(Communicator::GLOBAL));\n",
        """\
  const void* source = sendbuf != nullptr ? sendbuf : MPI_IN_PLACE;
  MPI_Comm comm = mpi_context.GetMPICommunicator(Communicator::GLOBAL);
  int op;
  if (SpansHosts(mpi_context)) {
    MPI_Request request;
    op = MPI_Iallgatherv(source, (int)total_num_elements, dtype, buffer_data, recvcounts, displcmnts, dtype, comm,
                         &request);
    if (op == MPI_SUCCESS) {
      op = Await(request, MPI_STATUS_IGNORE, 20, 200);
    }
  } else {
    op = MPI_Allgatherv(source, (int)total_num_elements, dtype, buffer_data, recvcounts, displcmnts, dtype, comm);
  }
""",
        _PAYLOADS,
    ),
    Edit(
        "horovod/common/ops/mpi_operations.cc",
        "  int op = MPI_Alltoallv(sendbuf, sendcounts.data(), sdispls.data(),\n"
        "                         mpi_context.GetMPIDataType(e.tensor->dtype()),\n"
        "                         buffer_data, recvcounts.data(), rdispls.data(),\n"
        "                         mpi_context.GetMPIDataType(e.output->dtype()),\n"
        "                         mpi_context.GetMPICommunicator(Communicator::GLOBAL));\n",
        """\
  MPI_Datatype dtype = mpi_context.GetMPIDataType(e.tensor->dtype());
  MPI_Comm comm = mpi_context.GetMPICommunicator(Communicator::GLOBAL);
  int op;
  if (SpansHosts(mpi_context)) {
    MPI_Request request;
    op = MPI_Ialltoallv(sendbuf, sendcounts.data(), sdispls.data(), dtype, buffer_data, recvcounts.data(),
                        rdispls.data(), dtype, comm, &request);
    if (op == MPI_SUCCESS) {
      op = Await(request, MPI_STATUS_IGNORE, 20, 200);
    }
  } else {
    op = MPI_Alltoallv(sendbuf, sendcounts.data(), sdispls.data(), dtype, buffer_data, recvcounts.data(),
                       rdispls.data(), dtype, comm);
  }
""",
        _PAYLOADS,
    ),
)
