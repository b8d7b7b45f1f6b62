"""Edits for building Horovod with current frameworks, compilers and Pythons, and starting ranks with current MPIs."""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

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

# In GCC 13 to 16 fewer standard headers include each other, and more of a template is checked before it is
# instantiated. Where Clang is installed without GCC, nothing may call gcc.
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

# horovodrun starts ranks with mpirun, and recognises the MPI by `mpirun --version`.
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
