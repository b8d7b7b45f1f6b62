"""Edits with which Horovod moves and sums bfloat16, half of float32's bytes (its issue 4047; no release has it)."""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

# Messages between ranks carry a type as a number, which flatbuffers' enum of one byte passes on unchecked.
_TYPE = "HOROVOD_BFLOAT16, a type of its own: its bits are not those of float16."
EDITS: tuple[Edit, ...] = (
    Edit("horovod/common/message.h", "  HOROVOD_BOOL = 9,\n", "  HOROVOD_BOOL = 9,\n  HOROVOD_BFLOAT16 = 10,\n", _TYPE),
    Edit(
        "horovod/common/message.cc",
        "    case HOROVOD_FLOAT32:\n      static const std::string float32",
        "    case HOROVOD_BFLOAT16:\n"
        '      static const std::string bfloat16("bfloat16");\n'
        "      return bfloat16;\n"
        "    case HOROVOD_FLOAT32:\n      static const std::string float32",
        _TYPE,
    ),
    Edit(
        "horovod/common/message.cc",
        "    case HOROVOD_FLOAT16:\n      return 2;\n",
        "    case HOROVOD_FLOAT16:\n    case HOROVOD_BFLOAT16:\n      return 2;\n",
        _TYPE,
    ),
)

_ARITHMETIC = "Sums of bfloat16 add in float32 and round once per addition; horovod_bfloat16 tells that there are any."
EDITS += (
    Edit(
        "horovod/common/half.h",
        "#include <stdint.h>\n",
        "#include <stdint.h>\n#include <string.h>\n",
        _ARITHMETIC,
    ),
    Edit(
        "horovod/common/half.h",
        "inline void HalfBits2Float(",
        "// The upper half of a float32. Arithmetic takes place in float32; its results are rounded to the\n"
        "// nearest, ties to even.\n"
        "struct BFloat16 {\n"
        "  uint16_t bits;\n\n"
        "  BFloat16() = default;\n\n"
        "  BFloat16(float value) {\n"
        "    uint32_t wide;\n"
        "    memcpy(&wide, &value, sizeof(wide));\n"
        "    bool nan = (wide & 0x7fffffff) > 0x7f800000; // rounded, it could become a number\n"
        "    bits = uint16_t((nan ? wide | 0x400000 : wide + 0x7fff + ((wide >> 16) & 1)) >> 16);\n"
        "  }\n\n"
        "  operator float() const {\n"
        "    uint32_t wide = uint32_t(bits) << 16;\n"
        "    float value;\n"
        "    memcpy(&value, &wide, sizeof(value));\n"
        "    return value;\n"
        "  }\n"
        "};\n\n"
        "inline void HalfBits2Float(",
        _ARITHMETIC,
    ),
    Edit(
        "horovod/common/half.cc",
        "#if HAVE_MPI\n",
        'extern "C" bool horovod_bfloat16() { return true; }\n\n#if HAVE_MPI\n',
        _ARITHMETIC,
    ),
    Edit(
        "horovod/common/ops/collective_operations.cc",
        "  case HOROVOD_FLOAT32:\n    ScaleBufferCPUImpl(",
        "  case HOROVOD_BFLOAT16:\n"
        "    ScaleBufferCPUImpl((const BFloat16*)fused_input_data,\n"
        "                       (BFloat16*)buffer_data, num_elements,\n"
        "                       (float)scale_factor);\n"
        "    break;\n"
        "  case HOROVOD_FLOAT32:\n    ScaleBufferCPUImpl(",
        _ARITHMETIC,
    ),
)

_TRANSPORTS = "MPI sums bfloat16 by an operation of its own, Gloo by its templates, NCCL as ncclBfloat16."
EDITS += (
    Edit(
        "horovod/common/mpi/mpi_context.cc",
        "  case HOROVOD_FLOAT16:\n    return mpi_float16_t;\n",
        "  case HOROVOD_FLOAT16:\n  case HOROVOD_BFLOAT16: // two bytes, whose sum is the operation's\n"
        "    return mpi_float16_t;\n",
        _TRANSPORTS,
    ),
    Edit(
        "horovod/common/mpi/mpi_context.cc",
        "MPI_Op MPIContext::GetMPISumOp(DataType dtype) const {\n",
        "namespace {\n\n"
        "void BFloat16Sum(void* in, void* inout, int* len, MPI_Datatype*) {\n"
        "  auto* addends = static_cast<const BFloat16*>(in);\n"
        "  auto* sums = static_cast<BFloat16*>(inout);\n"
        "  for (int i = 0; i < *len; ++i) {\n"
        "    sums[i] = sums[i] + addends[i];\n"
        "  }\n"
        "}\n\n"
        "MPI_Op CreateBFloat16Sum() {\n"
        "  MPI_Op op;\n"
        "  MPI_Op_create(&BFloat16Sum, 1, &op);\n"
        "  return op;\n"
        "}\n\n"
        "} // namespace\n\n"
        "MPI_Op MPIContext::GetMPISumOp(DataType dtype) const {\n"
        "  if (dtype == HOROVOD_BFLOAT16) {\n"
        "    static const MPI_Op sum = CreateBFloat16Sum(); // lives as long as MPI does\n"
        "    return sum;\n"
        "  }\n",
        _TRANSPORTS,
    ),
    Edit(
        "horovod/common/ops/gloo_operations.cc",
        "  case HOROVOD_FLOAT32:\n",
        "  case HOROVOD_BFLOAT16:\n    return new GlooAlgorithms<BFloat16>(gloo_context);\n  case HOROVOD_FLOAT32:\n",
        _TRANSPORTS,
    ),
    Edit(
        "horovod/common/ops/nccl_operations.cc",
        "  case HOROVOD_FLOAT32:\n",
        "  case HOROVOD_BFLOAT16:\n    return ncclBfloat16;\n  case HOROVOD_FLOAT32:\n",
        _TRANSPORTS,
    ),
)

_KERNELS = "Scaling of bfloat16 on GPUs, in float32."
EDITS += (
    Edit(
        "horovod/common/ops/cuda/cuda_kernels.cu",
        "#include <cuda_fp16.h>\n",
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n",
        _KERNELS,
    ),
    Edit(
        "horovod/common/ops/cuda/cuda_kernels.cu",
        "template<typename T, typename TS>\n__global__ void scale_buffer_k(",
        "// An element of bfloat16, multiplied in float32.\n"
        "struct BFloat16Element {\n"
        "  __nv_bfloat16 value;\n"
        "  __device__ operator float() const { return __bfloat162float(value); }\n"
        "  __device__ BFloat16Element& operator=(float product) {\n"
        "    value = __float2bfloat16(product);\n"
        "    return *this;\n"
        "  }\n"
        "  __device__ BFloat16Element& operator*=(float factor) { return *this = factor * float(*this); }\n"
        "};\n\n"
        "template<typename T, typename TS>\n__global__ void scale_buffer_k(",
        _KERNELS,
    ),
    Edit(
        "horovod/common/ops/cuda/cuda_kernels.cu",
        "    case HOROVOD_FLOAT32:\n      scale_buffer_k<<<",
        "    case HOROVOD_BFLOAT16:\n"
        "      scale_buffer_k<<<blocks, threads, 0, stream>>>((const BFloat16Element*) fused_input_data,\n"
        "                                                     (BFloat16Element*) buffer_data,\n"
        "                                                     num_elements, (float) scale_factor);\n"
        "      break;\n"
        "    case HOROVOD_FLOAT32:\n      scale_buffer_k<<<",
        _KERNELS,
    ),
    Edit(
        "horovod/common/ops/cuda/cuda_kernels.cu",
        "   case HOROVOD_FLOAT32:\n     batched_scaled_memcpy_k<",
        "   case HOROVOD_BFLOAT16:\n"
        "     batched_scaled_memcpy_k<BFloat16Element, BLOCKS_PER_COPY_D2D_KERNEL>\n"
        "         <<<blocks, threads, 0, stream>>>(params, (float) scale_factor);\n"
        "     break;\n"
        "   case HOROVOD_FLOAT32:\n     batched_scaled_memcpy_k<",
        _KERNELS,
    ),
)

_TORCH = "PyTorch's bfloat16 tensors are handled where its float16 tensors are, on CPUs and GPUs."
EDITS += (
    Edit(
        "horovod/torch/adapter_v2.cc",
        "  case common::HOROVOD_FLOAT32:\n",
        "  case common::HOROVOD_BFLOAT16:\n    return ::torch::kBFloat16;\n  case common::HOROVOD_FLOAT32:\n",
        _TORCH,
    ),
    Edit(
        "horovod/torch/adapter_v2.cc",
        "  case ::torch::kFloat:\n",
        "  case ::torch::kBFloat16:\n    return common::HOROVOD_BFLOAT16;\n  case ::torch::kFloat:\n",
        _TORCH,
    ),
    Edit(
        "horovod/torch/mpi_ops_v2.cc",
        "  // basics\n",
        "  for (std::string operation :\n"
        '       {"allreduce", "allgather", "broadcast", "alltoall", "reducescatter",\n'
        '        "grouped_allreduce", "grouped_allgather", "grouped_reducescatter"}) {\n'
        '    for (std::string device : {"torch_", "torch_cuda_"}) {\n'
        '      auto prefix = "horovod_torch_" + operation + "_async_" + device;\n'
        '      m.attr((prefix + "BFloat16Tensor").c_str()) =\n'
        '          m.attr((prefix + "HalfTensor").c_str());\n'
        "    }\n"
        "  }\n\n"
        "  // basics\n",
        _TORCH,
    ),
)

_TENSORFLOW = "TensorFlow's operations take bfloat16."


def _takes_bfloat16(operation: str, types: str, start: str = "") -> Edit:
    old = f'REGISTER_OP("Horovod{operation}")\n    .Attr({start}"T: {{{types}'
    return Edit("horovod/tensorflow/mpi_ops.cc", old, f"{old}bfloat16, ", _TENSORFLOW)


EDITS += (
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "  case common::HOROVOD_FLOAT32:\n",
        "  case common::HOROVOD_BFLOAT16:\n    return DT_BFLOAT16;\n  case common::HOROVOD_FLOAT32:\n",
        _TENSORFLOW,
    ),
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "  case DT_FLOAT:\n",
        "  case DT_BFLOAT16:\n    return common::HOROVOD_BFLOAT16;\n  case DT_FLOAT:\n",
        _TENSORFLOW,
    ),
    *(_takes_bfloat16(operation, "uint8, int8, ") for operation in ("Allreduce", "GroupedAllreduce")),
    *(_takes_bfloat16(operation, "int32, int64, ") for operation in ("Reducescatter", "GroupedReducescatter")),
    *(
        _takes_bfloat16(operation, "uint8, int8, uint16, ", "\n        ")
        for operation in ("Allgather", "GroupedAllgather", "Broadcast", "Alltoall")
    ),
)
