"""Python imports this file at its start: what trains a model continues as a fork of a process that is warm.

``HVDLM_TEST_WARM`` names the folder of the sockets of server.py; without it, nothing is done. Processes in which the
environment says otherwise what Python, its libraries or a framework read when they are loaded, stay fresh.
"""

import gc
import os
import sys

# Collections would take a fifth of the time in which a process that isn't warm imports TensorFlow. hvdlm itself sets
# another figure, which test_garbage.py expects.
gc.set_threshold(90_000, 20, 20)

READ_ONCE = ("PYTHON", "LD_", "LC_", "LANG", "KMP_", "TF_", "XLA_", "MALLOC_", "TORCH", "PYTORCH")
# The former two are read at the first operation; a fork extends its path and writes as the latter two say.
NOT_READ = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "PYTHONPATH", "PYTHONUNBUFFERED")
NOT_READ += ("TORCHINDUCTOR_CACHE_DIR",)  # read when something is compiled; the import of transformers sets it
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")
FRAMEWORKS = ("torch", "tensorflow")
# JAX reads the former when it is imported, and the latter when it first computes.
READ_BY_JAX, NOT_READ_BY_JAX = ("JAX_",), ("XLA_FLAGS",)
HOST = ("net", "uts", "mnt")  # namespaces that a fork enters


def framework(arguments: list) -> str:
    """Return the framework that a command imports, "none" for a command of hvdlm that imports none, else "".

    ``HVDLM_TEST_IMPORTS`` names that of programs (``python -c CODE`` and ``python FILE``) that don't. horovodrun, which
    stays fresh with ``HVDLM_TEST_IMPORTS=``, imports TensorFlow to ask Horovod what it was built with.
    """
    module = arguments[1] if arguments[0] == "-m" and len(arguments) > 1 else ""
    tested, imported = (os.environ.get(f"HVDLM_TEST_{name}", "") for name in ("FRAMEWORK", "IMPORTS"))
    name = tested if module == "pytest" else imported if is_program(*arguments[:2]) else ""
    if os.path.basename(arguments[0]) == "horovodrun" and os.environ.get("HVDLM_TEST_IMPORTS") != "":
        return "tensorflow"
    if "--framework" in arguments[:-1]:
        name = arguments[arguments.index("--framework") + 1]
    elif module == "hvdlm":
        name = default_framework(arguments[2:])
    elif not imported and arguments[0] == "-c" and is_program(*arguments[:2]) and "cli.main()" in arguments[1]:
        name = default_framework(arguments[2:])  # launching.with_step_hook
    elif module == "hvdlm_testing.rank_worker":
        with open(arguments[2]) as file:
            name = file.read().partition('"framework": "')[2].partition('"')[0]
    if name in (*FRAMEWORKS, "none") or (name == "jax" and os.path.exists(os.path.join(_FOLDER, "jax.json"))):
        return name
    if module in ("hvdlm", "hvdlm_testing.rank_worker") or "--hvdlm-plugin" in arguments:
        return tested if tested in FRAMEWORKS else "none"  # a plugin's framework may import one of them
    return ""


def is_program(option: str, code: str = "") -> bool:
    """Return whether a command runs a program that may be warm.

    A process that a library starts inherits its files; a program that asks what is imported gets another answer.
    """
    if option == "-c":
        return "multiprocessing" not in code and "sys.modules" not in code
    return option.endswith(".py") and "site-packages" not in option


def default_framework(arguments: list) -> str:
    """Return the framework of a command of hvdlm that names none, if it imports one."""
    computes = arguments[:1] in (["train"], ["generate"], ["evaluate"], ["bench"]) or "--measure" in arguments
    computes = computes or (arguments[0:1] and arguments[0][:2] == "--")
    if not computes or {"--help", "-h", "--dry_run", "--version"} & set(arguments):
        return ""
    for option, file in (("--config", ""), ("--run", "config.yaml")):
        if option in arguments[:-1]:
            path = os.path.join(arguments[arguments.index(option) + 1], file).rstrip("/")
            try:
                with open(path) as stream:
                    lines = [line.split(":")[1].strip() for line in stream if line.startswith("framework:")]
            except (OSError, ValueError):
                return ""
            return lines[0] if lines else "torch"
    return "torch"


def shadowed() -> bool:
    """Return whether Python's path has another framework, or another hvdlm, before the server's."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    own = [f"{root}/", f"{root}/backends/", f"{root}/plugins/"]
    # The conformance suite's ranks have the whole path of its process, site-packages among them.
    installed = [os.path.join(os.path.realpath(path), "") for path in sys.path if path.endswith("site-packages")]
    installed = [folder for folder in installed if folder.startswith(os.path.join(sys.prefix, ""))]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [os.path.join(os.path.realpath(path), "") for path in paths if path]
    served: set = set()
    for folder in (os.path.join(os.path.realpath(os.getcwd()), ""), *folders):
        names = {name for name in os.listdir(folder) if is_imported(name, own)} if os.path.isdir(folder) else set()
        if folder not in own + installed and names - served:
            return True
        served |= names if folder in folders else set()
    return False


def is_imported(name: str, own: list) -> bool:
    """Return whether a server imports a package of this name, of a framework or of hvdlm."""
    ours = name.startswith("hvdlm") and any(os.path.isdir(folder + name) for folder in own)
    return ours or name in FRAMEWORKS


def read_once(environment: dict, server: str) -> dict:
    """Return the environment variables that are read when Python, its libraries or a server's framework are loaded."""
    once, later = (READ_ONCE + READ_BY_JAX, NOT_READ + NOT_READ_BY_JAX) if server == "jax" else (READ_ONCE, NOT_READ)
    read = {n: value for n, value in environment.items() if n.startswith(once) and n not in later}
    # An mpirun that is started by its path adds the folders of its libraries, which are found without that.
    folders = read.pop("LD_LIBRARY_PATH", "").split(os.pathsep)
    return read | {"LD_LIBRARY_PATH": [folder for folder in folders if folder and not folder.startswith(sys.prefix)]}


def namespaces_to_enter(connection: object) -> list:
    """Return open files of the namespaces of this process that the server isn't in: those of a host of its own.

    Raises:
        PermissionError: the fork may not enter them.
    """
    import socket
    import struct

    (pid, _, _) = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    names = [(kind, f"ns/{kind}") for kind in ("user", "pid", *HOST)]
    kinds = [kind for kind, name in names if os.readlink(f"/proc/{pid}/{name}") != os.readlink(f"/proc/self/{name}")]
    if kinds and (os.geteuid() or {"user", "pid"} & set(kinds)):
        raise PermissionError(f"another process may not enter {kinds}")
    return [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in kinds]


def forward(connection: object, number: int) -> None:
    """Forward a signal to the fork."""
    try:
        connection.send(bytes([number]))
    except OSError:  # the fork has ended: so will this process, which would run the command itself after an error here
        pass


def continue_as_fork(folder: str, server: str, arguments: list) -> None:
    """Pass this process to a server, forward signals to the fork, and end as it does."""
    import array
    import json
    import signal
    import socket

    with open(os.path.join(folder, "jax.json" if server == "jax" else "environment.json")) as file:
        served = json.load(file)
    if read_once(served, server) != read_once(dict(os.environ), server):
        return
    if server == "jax" and served["PYTHONPATH"].split(os.pathsep)[0] not in sys.path:
        return
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.path.join(folder, server))
        host = namespaces_to_enter(connection)
    except (ConnectionRefusedError, PermissionError):  # the server has died, or this is another user
        return
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    request |= {"cores": sorted(os.sched_getaffinity(0)), "umask": os.umask(0)}
    os.umask(request["umask"])
    data = json.dumps(request).encode()
    files = array.array("i", [0, 1, 2, *host])
    connection.sendmsg([len(data).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(data)
    for name in FORWARDED:
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), lambda number, _: forward(connection, number))
    try:
        answer = connection.recv(4)
    except ConnectionResetError:
        answer = b""
    if not answer:
        sys.stderr.write("the server of warm processes has ended (tests/warm/server.py)\n")
    code = int.from_bytes(answer or b"\1", "little", signed=True)
    if code < 0:  # by a signal
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


_FOLDER = os.environ.get("HVDLM_TEST_WARM")
_SERVER = framework(sys.orig_argv[1:]) if _FOLDER and len(sys.orig_argv) > 1 else ""
if _SERVER and not shadowed():
    continue_as_fork(_FOLDER, _SERVER, sys.orig_argv[1:])
