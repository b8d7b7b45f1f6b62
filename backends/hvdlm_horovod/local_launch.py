"""Makes Open MPI 4 start local ranks on a machine without an ssh client.

Open MPI 4.1 refuses to start any rank where it finds neither ``ssh`` nor ``rsh``, although it needs them for other
hosts only (Open MPI 5 and MPICH start local ranks without them). With a script at the end of its list of candidates,
local ranks start, and a launch on other hosts ends with the script's message.
Standard library only.
"""

from __future__ import annotations

from pathlib import Path

AGENT = "no-ssh-client"
_SCRIPT = """#!/bin/sh
echo "hvdlm: ranks on other hosts are started over ssh, and there is no ssh client on this machine: install one" \\
    "(Debian: openssh-client, Fedora: openssh-clients), or name this machine's slots only." >&2
exit 1
"""
_MARK = "# Written by hvdlm: local ranks start without an ssh client."


def allow_without_ssh(prefix: Path) -> bool:
    """Add the script to the settings of an Open MPI 4 from PyPI in ``prefix``; return whether there is one.

    With an ssh client nothing changes. A ``plm_rsh_agent`` that the file already sets is kept.
    """
    settings = prefix / "etc" / "openmpi-mca-params.conf"
    if not settings.is_file() or not (prefix / "bin" / "orted").exists():  # Open MPI 5 has prted
        return False
    text = settings.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    if any(line.split("=")[0].strip() == "plm_rsh_agent" for line in lines):
        return True
    agent = prefix / "bin" / AGENT
    agent.write_text(_SCRIPT, encoding="utf-8")
    agent.chmod(0o755)
    settings.write_text(f"{text.rstrip()}\n\n{_MARK}\nplm_rsh_agent = ssh : rsh : {agent} : false\n", encoding="utf-8")
    return True
