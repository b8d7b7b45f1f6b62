"""Explanations of failed builds: cause, compiler, advice and log."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hvdlm_horovod import failures

LOG = Path("/somewhere/horovod.log")

# Recorded output of compilers and pip.
GCC_12 = """\
[ 12%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/__/common/group_table.cc.o
/cache/tmp1/work/horovod-0.28.1/horovod/common/group_table.h:2:29: error: ‘strin’ is not a member of ‘std’
    2 | struct T { std::vector<std::strin> names; };
      |                             ^~~~~
/cache/tmp1/work/horovod-0.28.1/horovod/common/group_table.h:2:34: error: template argument 1 is invalid
make[2]: *** [horovod/torch/CMakeFiles/pytorch.dir/build.make:76: group_table.cc.o] Error 1
ERROR: Failed building wheel for horovod
"""
GCC_14 = """\
span.cc: In member function ‘span<T>& span<T>::operator=(const span<T>&)’:
span.cc:2:106: error: assignment of read-only member ‘span<T>::count_’
    2 | template <class T> class span { public: span& operator=(const span& other) { data_ = other.data_; count_ =
      |                                                                                                   ~~~~~~~^
"""
GCC_16 = """\
gt.h:5:56: error: ‘string’ is not a member of ‘std’
    5 | class GroupTable { void RegisterGroup(std::vector<std::string>&& tensor_names); };
      |                                                        ^~~~~~
gt.h:4:1: note: ‘std::string’ is defined in header ‘<string>’; this is probably fixable by adding ‘#include <string>’
    3 | #include <unordered_map>
  +++ |+#include <string>
"""
CLANG_14 = """\
a.cc:2:29: error: no member named 'strin' in namespace 'std'
struct T { std::vector<std::strin> names; };
                       ~~~~~^
a.cc:3:21: error: use of undeclared identifier 'x'
2 errors generated.
"""
CLANG_NO_HEADERS = """\
b.cc:1:10: fatal error: 'Python.h' file not found
#include <Python.h>
         ^~~~~~~~~~
1 error generated.
"""
CLANG_LINKER = """\
/usr/bin/ld: /tmp/e-687657.o: in function `main':
e.cc:(.text+0x5): undefined reference to `missing()'
clang: error: linker command failed with exit code 1 (use -v to see invocation)
"""
CLANG_OLD = """\
error: invalid value 'c++20' in '-std=c++20'
note: use 'c++98' or 'c++03' for 'ISO C++ 1998 with amendments' standard
"""
CLANG_FULL = """\
fatal error: error in backend: IO failure on output stream: No space left on device
PLEASE submit a bug report to https://github.com/llvm/llvm-project/issues/ and include the crash backtrace
"""
NO_HEADERS = """\
b.cc:1:10: fatal error: Python.h: No such file or directory
    1 | #include <Python.h>
      |          ^~~~~~~~~~
compilation terminated.
"""
NVCC = """\
d.cu(1): error: identifier "undefined_thing" is undefined
  __attribute__((global)) void f(float* p) { p[0] = undefined_thing; }
                                                    ^

1 error detected in the compilation of "d.cu".
"""
LINKER = """\
/usr/bin/ld: /tmp/cc38Y5G8.o: in function `main':
e.cc:(.text+0x5): undefined reference to `missing()'
collect2: error: ld returned 1 exit status
"""
FULL = """\
/tmp/ccsql15T.s: Assembler messages:
/tmp/ccsql15T.s: Fatal error: can't write 11 bytes to section .text of ok.o: 'No space left on device'
/tmp/ccsql15T.s: Fatal error: ok.o: No space left on device
ok.cc:1:12: error: something that follows from it
"""
FULL_GCC = """\
/tmp/tiny/ok.cc:1:12: fatal error: error closing /tmp/tiny/cc7aiRXP.s: No space left on device
    1 | int main(){}
compilation terminated.
"""
CMAKE = """\
-- Could NOT find MPI (missing: MPI_CXX_FOUND)
CMake Error at /tools/share/cmake-4.4/Modules/FindPackageHandleStandardArgs.cmake:290 (message):
  Could NOT find MPI (missing: MPI_CXX_FOUND)
Call Stack (most recent call first):
"""
UNKNOWN_TO_PIP = """\
ERROR: Could not find a version that satisfies the requirement tensorflow-cpu==2.21.0 (from versions: none)
ERROR: No matching distribution found for tensorflow-cpu==2.21.0
"""
NO_NETWORK = """\
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor.urllib3.\
connection.HTTPSConnection object at 0x7f664a3fda90>: Failed to establish a new connection: [Errno 111] Connection \
refused')': /simple/horovod/
ERROR: Could not find a version that satisfies the requirement horovod==0.28.1 (from versions: none)
ERROR: No matching distribution found for horovod==0.28.1
"""
FULL_FOR_PIP = """\
ERROR: Could not install packages due to an OSError: ("Connection broken: OSError(28, 'No space left on device')", \
OSError(28, 'No space left on device'))
"""


@pytest.mark.parametrize(
    "output, cause, advice",
    [
        (GCC_12, "horovod/common/group_table.h:2: ‘strin’ is not a member of ‘std’", "CXX="),
        (NO_HEADERS, "b.cc:1: Python.h: No such file or directory", "python3-dev"),
        (GCC_14, "span.cc:2: assignment of read-only member ‘span<T>::count_’", "CXX="),
        (GCC_16, "gt.h:5: ‘string’ is not a member of ‘std’", "CXX="),
        (CLANG_14, "a.cc:2: no member named 'strin' in namespace 'std'", "CXX="),
        (CLANG_NO_HEADERS, "b.cc:1: 'Python.h' file not found", "python3-dev"),
        (CLANG_LINKER, "undefined reference to `missing()'", "libstdc++"),
        (CLANG_OLD, "invalid value 'c++20'", "GCC 11 or Clang 14"),
        (CLANG_FULL, "No space left on device", "The disk is full"),
        (NVCC, 'd.cu:1: identifier "undefined_thing" is undefined', "CXX="),
        (LINKER, "undefined reference to `missing()'", "libstdc++"),
        (FULL, "No space left on device", "The disk is full"),
        (FULL_GCC, "No space left on device", "The disk is full"),
        (CMAKE, "Could NOT find MPI", "development package"),
        (UNKNOWN_TO_PIP, "No matching distribution found for tensorflow-cpu", "Python 3.14.0"),
        (NO_NETWORK, "Failed to establish a new connection", "network"),
        (FULL_FOR_PIP, "No space left on device", "The disk is full"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_30'\n", "compute_30", "HOROVOD_BUILD_CUDA_CC_LIST"),
        ("g++: error: unrecognized command-line option ‘-std=c++20’\n", "-std=c++20", "GCC 11"),
        ("g++: fatal error: Killed signal terminated program cc1plus\n", "Killed signal", "MAKEFLAGS=-j1"),
        ("/usr/bin/ld: cannot find -lnccl: No such file\n", "cannot find -lnccl", "HOROVOD_NCCL_HOME"),
        ("error: externally-managed-environment\n\n× This environment\n", "externally-managed", "python3 -m venv"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'fee'\n", "KeyError: 'fee'", "log"),
        ("it just stopped\n", "it just stopped", "log"),
        ("", "printed nothing", "log"),
    ],
)
def test_a_build_failure_names_cause_advice_and_log(output: str, cause: str, advice: str) -> None:
    lines = failures.explain(output, LOG, "3.14.0", "g++ 12.2 (c++)").splitlines()
    assert cause in lines[0]
    assert advice in next(line for line in lines[:3] if line.startswith("what to do: "))
    assert lines[-1] == f"log: {LOG}"


def test_only_compiler_errors_name_the_compiler() -> None:
    compiled = failures.explain(GCC_12, LOG, "3.11.7", "g++ 12.2 (c++)").splitlines()
    assert compiled[1] == "compiler: g++ 12.2 (c++)"
    assert "g++" not in failures.explain(NO_NETWORK, LOG, "3.11.7", "g++ 12.2 (c++)")


def test_warnings_and_configure_tests_are_not_errors() -> None:
    output = (
        "-- Performing Test HAVE_X - Failed\nx.cc:3:1: warning: error handling is missing\n"
        "    inlined from ‘void Eigen::internal::throw_std_bad_alloc()’ at Memory.h:67: warning: out of memory\n"
        "-- Looking for error.h - not found\nreal.cc:9:2: error: this one\n"
    )
    assert failures.first_error(output) == ("real.cc:9: this one", failures.COMPILER_DEFAULT)
    assert failures.explain(output, LOG).startswith("real.cc:9: this one\n")


def test_a_disk_that_fills_while_compiling_is_named(tmp_path: Path) -> None:
    (tmp_path / "ok.cc").write_text("int main() {}\n")
    command = ["c++", "-c", str(tmp_path / "ok.cc"), "-o", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    assert done.returncode
    lines = failures.explain(done.stderr, LOG).splitlines()
    assert "No space left on device" in lines[0] and "The disk is full" in lines[1]
