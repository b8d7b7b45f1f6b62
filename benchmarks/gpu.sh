#!/usr/bin/env bash
# Measure and check hvdlm on one machine with a GPU that may have no internet: docs/gpu.md.
#
#   benchmarks/gpu.sh pack                       with internet: files for the other machine, into build/gpu-pack
#   benchmarks/gpu.sh build [--limit SECONDS]    an environment beside the installed PyTorch, and Horovod with NCCL
#   benchmarks/gpu.sh check|speed|all [--limit SECONDS] [--fresh] [--backends NAME ...] [--short]
#   benchmarks/gpu.sh table                      the results so far
#
# Each call ends after --limit seconds (default 480) and the same call continues after it: exit code 75. `all` builds
# first. The results are in build/gpu-results: results.json, table.md, logs.
# Environment variables:
#   PYTHON  the Python that has PyTorch (default python3); for pack, one of the same version with its headers
#   JOBS    files that are compiled at once (default: the number of cores)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
environment=$root/build/gpu
python=${PYTHON:-python3}
started=$SECONDS
limit=480

usage() {
    sed -n '2,15s/^# \{0,1\}//p' "$0"
    exit "${1:-0}"
}

left() { # the seconds that remain of the limit
    echo $((limit - (SECONDS - started)))
}

build() {
    "$python" "$here/gpu_build.py" environment --environment "$environment" &&
        "$python" "$here/gpu_build.py" horovod --environment "$environment" --limit "$(left)" ${JOBS:+--jobs "$JOBS"}
}

run() { # with the environment's Python, or with $PYTHON where none was built
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    if [[ -x $environment/bin/python ]]; then
        python=$environment/bin/python
        export PATH=$environment/bin:$PATH
        [[ ! -d $environment/headers/include ]] || export CPATH=$environment/headers/include${CPATH:+:$CPATH}
    fi
    exec "$python" "$here/gpu.py" "$@" --limit "$(left)"
}

action=${1:-}
[[ -n $action ]] || usage 2
shift
options=()
while (($#)); do
    case $1 in
        --limit)
            [[ ${2-} =~ ^[0-9]+$ ]] || usage 2
            limit=$2
            shift 2
            ;;
        *)
            options+=("$1")
            shift
            ;;
    esac
done
case $action in
    pack) exec "$python" "$here/gpu_build.py" pack "${options[@]}" ;;
    build) build ;;
    all)
        # Speed needs no Horovod, so that it is measured in any case.
        build || echo "gpu.sh: continuing without Horovod" >&2
        run all "${options[@]}"
        ;;
    check | speed | table) run "$action" "${options[@]}" ;;
    -h | --help) usage ;;
    *) usage 2 ;;
esac
