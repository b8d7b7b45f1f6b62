"""Edits for machines whose host name, home folder or user id Horovod 0.28.1 does not expect."""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

EDITS: tuple[Edit, ...] = (
    Edit(
        "horovod/common/gloo/gloo_context.cc",
        "  attr device_attr;\n"
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n"
        "\n"
        "  global_ctx = global_context.ctx;\n",
        "  gloo_iface_ = global_context.gloo_iface_;\n"
        "  attr device_attr;\n"
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n"
        "\n"
        "  global_ctx = global_context.ctx;\n",
        "Process sets, the global one too, ignored the interface that horovodrun --gloo chose and bound to the host "
        "name's address: without one (no line in /etc/hosts) every rank aborted, and with several networks it could be "
        "that of another one.",
    ),
    Edit(
        "horovod/runner/launch.py",
        "    if not args.disable_cache:\n",
        "    if not args.disable_cache and os.access(os.path.expanduser('~'), os.W_OK):\n",
        "horovodrun ended with a PermissionError where the home folder can't be written (/ in containers that run with "
        "any user id), and made a folder called ~ where there is none. The cache only saves checks of other hosts.",
    ),
    Edit(
        "horovod/runner/launch.py",
        "CACHE_FOLDER = os.path.join(os.path.expanduser('~'), '.horovod')\n",
        "if os.path.expanduser('~') == '~':\n"
        "    os.environ['HOME'] = '/'\n"
        "CACHE_FOLDER = os.path.join(os.path.expanduser('~'), '.horovod')\n",
        "mpirun of Open MPI crashes where HOME is unset and the user id has no entry in /etc/passwd.",
    ),
    Edit(
        "horovod/runner/common/util/safe_shell_exec.py",
        "    try:\n"
        "        p.wait(timeout=GRACEFUL_TERMINATION_TIME_S)\n"
        "    except psutil.TimeoutExpired:\n"
        "        try:\n"
        "            p.kill()\n"
        "        except psutil.NoSuchProcess:\n"
        "            pass\n",
        "    # Without waitpid: the exit code is for the thread that waits for the command.\n"
        "    deadline = time.monotonic() + GRACEFUL_TERMINATION_TIME_S\n"
        "    try:\n"
        "        while p.status() != psutil.STATUS_ZOMBIE:\n"
        "            if time.monotonic() > deadline:\n"
        "                p.kill()\n"
        "                break\n"
        "            time.sleep(0.1)\n"
        "    except psutil.NoSuchProcess:\n"
        "        pass\n",
        "horovodrun ended with code 0 after a signal, now and then: the thread that ends a rank's shell also waited "
        "for it, and where it came first, the one that asks for its exit code got 0. Schedulers and supervisors took "
        "the run for a finished one.",
    ),
)
