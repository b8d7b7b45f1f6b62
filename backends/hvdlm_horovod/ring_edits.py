"""Edits with which Horovod's sums between hosts fill both directions of every link: around a ring, in segments.

The algorithm, its reasons and the order of the additions are those of ``hvdlm_backends.ring_sum``. On networks below
2.4 Gbit/s, the exponents of floats are coded besides (``coding_edits``).
"""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

_RING = (
    "Large sums between hosts travel around a ring in segments. HOROVOD_RING_THRESHOLD: from how many bytes on, also "
    "within a host; 0: never; unset: 128 KB between hosts. Open MPI's own left 37% of a link of 100 Mbit/s idle. "
    "HOROVOD_RING_CODING: 1, 0: exponents are coded, or not; unset: where sums have been slower than 300 MB/s."
)
EDITS: tuple[Edit, ...] = (
    Edit(
        "horovod/common/ops/mpi_operations.cc",
        '#include "mpi_operations.h"\n',
        '#include "mpi_operations.h"\n\n'
        "#include <algorithm>\n"
        "#include <chrono>\n"
        "#include <cstdint>\n"
        "#include <cstdlib>\n"
        "#include <cstring>\n"
        "#include <vector>\n",
        _RING,
    ),
    Edit(
        "horovod/common/ops/mpi_operations.cc",
        "MPIAllreduce::MPIAllreduce(HorovodGlobalState* global_state)\n",
        """\
namespace {

const int64_t kRingThreshold = 131072; // bytes
const int64_t kRingSegment = 32768;    // bytes; Open MPI's TCP announces messages above 64 KB before it sends them
const int64_t kRingWindow = 64;        // segments under way
const int kRingTag = 7;
static_assert(kRingSegment / 2 <= kMostCoded, "a segment is coded at once");
const double kCodedRate = 3e8; // bytes per second: exponents of floats are coded on slower networks

bool SpansHosts(const MPIContext& context) {
  int size, local_size;
  MPI_Comm_size(context.GetMPICommunicator(Communicator::GLOBAL), &size);
  MPI_Comm_size(context.GetMPICommunicator(Communicator::LOCAL), &local_size);
  return local_size < size;
}

bool UsesRing(const MPIContext& context, int64_t bytes) {
  static const char* text = std::getenv("HOROVOD_RING_THRESHOLD");
  static const int64_t given = text ? std::strtoll(text, nullptr, 10) : 0;
  if (text == nullptr) {
    return SpansHosts(context) && bytes >= kRingThreshold;
  }
  int size;
  MPI_Comm_size(context.GetMPICommunicator(Communicator::GLOBAL), &size);
  return size > 1 && given > 0 && bytes >= given;
}

// As MPI_Allreduce. In step s of 2 (n - 1), rank r sends chunk r - s and receives chunk r - s - 1 (modulo n), to which
// it adds its own elements in the first half. A slot is one segment of one step. A message of fewer bytes than its
// elements have is coded: the receiver need not know whether the sender codes.
int RingAllreduce(const void* sendbuf, void* recvbuf, int64_t count, DataType dtype, MPI_Datatype type, MPI_Op op,
                  MPI_Comm comm) {
  static const char* text = std::getenv("HOROVOD_RING_CODING");
  static double rate = 0.; // bytes per second of the last large sum, which is the same with and without coding
  static std::vector<char> incoming, outgoing, decoded;

  int rank, size, width;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  MPI_Type_size(type, &width);
  const bool may_code = dtype == HOROVOD_FLOAT32 || dtype == HOROVOD_FLOAT16 || dtype == HOROVOD_BFLOAT16;
  const bool codes = may_code && (text ? std::atoi(text) > 0 : rate > 0 && rate < kCodedRate);
  auto* total = static_cast<char*>(recvbuf);
  auto* own = sendbuf == MPI_IN_PLACE ? total : static_cast<const char*>(sendbuf);
  const int64_t segment = std::max<int64_t>(1, kRingSegment / width);
  const int64_t longest = (count + size - 1) / size;
  const int64_t segments = std::max<int64_t>(1, (longest + segment - 1) / segment);
  const int64_t reducing = (size - 1) * segments;
  const int64_t slots = 2 * reducing;
  const int64_t window = std::min(kRingWindow, segments);
  incoming.resize(std::max<size_t>(incoming.size(), window * segment * width));
  outgoing.resize(incoming.size());
  decoded.resize(std::max<size_t>(decoded.size(), segment * width));
  std::vector<MPI_Request> receives(window), sends(window);
  auto began = std::chrono::steady_clock::now();

  auto stretch = [&](int64_t slot, int64_t shift, int64_t& first) {
    int64_t step = slot / segments;
    int64_t chunk = (rank + 2 * size - step - shift) % size;
    int64_t end = count * (chunk + 1) / size;
    first = std::min(count * chunk / size + slot % segments * segment, end);
    return int(std::min(first + segment, end) - first);
  };
  auto post = [&](int64_t slot) {
    int64_t first, offset = slot % window * segment * width;
    int bytes = stretch(slot, 1, first) * width;
    int error = MPI_Irecv(&incoming[offset], bytes, MPI_BYTE, (rank + size - 1) % size, kRingTag, comm,
                          &receives[slot % window]);
    if (error != MPI_SUCCESS) {
      return error;
    }
    int elements = stretch(slot, 0, first);
    const char* source = (slot < segments ? own : total) + first * width;
    int64_t coded = codes ? Encode(dtype, source, elements, &outgoing[offset]) : 0;
    return MPI_Isend(coded ? &outgoing[offset] : source, coded ? int(coded) : elements * width, MPI_BYTE,
                     (rank + 1) % size, kRingTag, comm, &sends[slot % window]);
  };
  auto receive = [&](int64_t slot) {
    MPI_Status status;
    int error = Await(receives[slot % window], &status, 20, 50), received = 0;
    if (error == MPI_SUCCESS) {
      error = MPI_Get_count(&status, MPI_BYTE, &received);
    }
    if (error != MPI_SUCCESS) {
      return error;
    }
    int64_t first;
    int elements = stretch(slot, 1, first);
    const char* arrived = &incoming[slot % window * segment * width];
    char* target = total + first * width;
    const bool coded = received < elements * width;
    if (slot >= reducing) {
      coded ? Decode(dtype, arrived, elements, target) : void(std::memcpy(target, arrived, received));
      return int(MPI_SUCCESS);
    }
    if (coded) {
      Decode(dtype, arrived, elements, decoded.data());
      arrived = decoded.data();
    }
    if (own != total) {
      std::memcpy(target, own + first * width, int64_t(elements) * width);
    }
    return MPI_Reduce_local(arrived, target, elements, type, op);
  };

  int error = MPI_SUCCESS;
  for (int64_t slot = 0; error == MPI_SUCCESS && slot < window; ++slot) {
    error = post(slot);
  }
  for (int64_t slot = 0; error == MPI_SUCCESS && slot < slots; ++slot) {
    error = receive(slot);
    // What a slot sends lies where a later one receives, (size - 1) segments slots on: at least a window.
    if (error == MPI_SUCCESS) {
      error = Await(sends[slot % window], MPI_STATUS_IGNORE, 20, 50);
    }
    if (error == MPI_SUCCESS && slot + window < slots) {
      error = post(slot + window);
    }
  }
  if (count * width >= int64_t(1) << 20) {
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    rate = 2. * (size - 1) / size * count * width / seconds.count();
  }
  return error;
}

} // namespace

MPIAllreduce::MPIAllreduce(HorovodGlobalState* global_state)
""",
        _RING,
    ),
    Edit(
        "horovod/common/ops/mpi_operations.cc",
        """\
  int op =
      MPI_Allreduce(sendbuf, buffer_data, (int)num_elements,
                    mpi_context.GetMPIDataType(first_entry.tensor),
                    mpiOp,
                    mpi_context.GetMPICommunicator(Communicator::GLOBAL));
""",
        """\
  MPI_Datatype type = mpi_context.GetMPIDataType(first_entry.tensor);
  MPI_Comm comm = mpi_context.GetMPICommunicator(Communicator::GLOBAL);
  int64_t bytes = num_elements * mpi_context.GetMPITypeSize(first_entry.tensor->dtype());
  DataType dtype = first_entry.tensor->dtype();
  int op = UsesRing(mpi_context, bytes) ? RingAllreduce(sendbuf, buffer_data, num_elements, dtype, type, mpiOp, comm)
                                        : MPI_Allreduce(sendbuf, buffer_data, (int)num_elements, type, mpiOp, comm);
""",
        _RING,
    ),
    Edit(
        "horovod/common/half.cc",
        "#if HAVE_MPI\n// float16 custom data type summation operation.\n",
        "// Whether sums between hosts go around a ring (mpi_operations.cc).\n"
        'extern "C" bool horovod_ring() { return true; }\n\n'
        "#if HAVE_MPI\n// float16 custom data type summation operation.\n",
        _RING,
    ),
)
