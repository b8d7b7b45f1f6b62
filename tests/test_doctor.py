"""Every installation problem is reported, and none on a sound machine."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hvdlm import plugins
from hvdlm.protocols.framework import Probe
from hvdlm_backends import doctor_command as doctor
from hvdlm_backends import probes
from hvdlm_backends.machine_checks import check

LIBRARY = "/env/lib/libmpi.so.40"


def framework(version: str) -> dict[str, Any]:
    built = {"mpi_built": True, "gloo_built": True, "nccl_built": False, "mpi_threads_supported": True}
    built["patched"] = True
    return {"version": version, "gpus": 0, "libmpi": [LIBRARY], **built}


SOUND: dict[str, Any] = {
    "frameworks": plugins.probes(),
    "torch": framework("2.13.0"),
    "tensorflow": framework("2.21.0"),
    "mpi4py": {"version": "4.1.2", "library": "Open MPI v4.1.8, package: Open MPI", "libmpi": [LIBRARY]},
    "installed": {"hvdlm": "0.1.0", "keras": "3.15.1", "horovod": "0.28.1"},
    "mpirun": {"path": "/env/bin/mpirun", "version": "mpirun (Open MPI) 4.1.8"},
    "cores": 2,
    "quota": None,
    "environment": {},
    "root": False,
    "home": True,
    "remote_shell": "ssh",
    "host": {"name": "node1"},
    "cache": "/home/user/.cache/hvdlm",
    "free_bytes": 50e9,
}
MISSING = {"error": "ModuleNotFoundError: No module named 'x'"}
V5 = {"path": "mpirun", "version": "mpirun (Open MPI) 5.0.11"}
NAMELESS = {"name": "node1", "error": "gaierror"}
UNPATCHED = {**framework("2.13.0"), "patched": False}
OTHER_MPI = {**framework("2.13.0"), "libmpi": ["/usr/lib/libmpi.so.12"]}
NO_HOROVOD = {"version": "2.13.0", "error": "ImportError: undefined symbol"}
NOT_BUILT = {"version": "2.13.0", "error": "ModuleNotFoundError: No module named 'horovod'"}
GPU_WITHOUT_NCCL = {**framework("2.13.0"), "gpus": 1}
CRASHED = {k: v for k, v in framework("2.13.0").items() if k != "mpi_threads_supported"}

NO_SSH = {"path": "mpirun", "version": "mpirun (Open MPI) 4.1.8", "start_error": "-----\n plm_rsh_agent: ssh : rsh"}
BROKEN_MPIRUN = {"path": "mpirun", "version": "mpirun (Open MPI) 4.1.8", "start_error": "------\nall slots are taken"}

PROBLEMS = [
    ({"tensorflow": MISSING}, "warning", "tensorflow", 'make setup FRAMEWORKS="tensorflow"'),
    ({"torch": MISSING, "tensorflow": MISSING}, "problem", "torch", 'FRAMEWORKS="torch"'),
    ({"torch": NO_HOROVOD}, "problem", "horovod.torch", "undefined symbol"),
    ({"torch": NOT_BUILT}, "warning", "horovod.torch", "ranks communicate over mpi4py"),
    ({"torch": NOT_BUILT, "mpi4py": MISSING}, "problem", "horovod.torch", "only one process can train"),
    ({"torch": OTHER_MPI}, "problem", "one MPI", "two MPI libraries"),
    ({"torch": GPU_WITHOUT_NCCL}, "warning", "horovod.torch", "HOROVOD_GPU_OPERATIONS=NCCL"),
    ({"torch": CRASHED}, "warning", "horovod.torch", "cannot start"),
    ({"torch": {**framework("2"), "mpi_threads_supported": False}}, "warning", "horovod.torch", "thread support"),
    ({"mpi4py": MISSING}, "problem", "mpi4py", "make setup"),
    ({"mpirun": {}}, "warning", "mpirun", "not on PATH"),
    ({"mpirun": V5}, "problem", "mpirun", "belongs to Open MPI 5.0"),
    ({"mpirun": V5, "torch": UNPATCHED, "tensorflow": UNPATCHED}, "warning", "horovodrun", "--binding-args"),
    ({"root": True}, "warning", "root", "--allow-run-as-root"),
    ({"remote_shell": ""}, "warning", "ssh", "only ranks on several hosts need it"),
    ({"mpirun": NO_SSH}, "problem", "mpirun", "export OMPI_MCA_plm_rsh_agent=false"),
    ({"mpirun": BROKEN_MPIRUN}, "problem", "mpirun", "(all slots are taken)"),
    ({"home": False}, "warning", "home folder", "export HOME"),
    ({"host": NAMELESS}, "warning", "host name", '"127.0.0.1 node1" to /etc/hosts'),
    ({"host": NAMELESS, "torch": UNPATCHED}, "problem", "host name", "horovodrun --gloo crashes"),
    ({"quota": 1.0}, "warning", "cores", "1 of 2 cores"),
    ({"environment": {"OMP_NUM_THREADS": "64"}}, "warning", "OMP_NUM_THREADS", "unset"),
    ({"environment": {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}}, "warning", "HOROVOD_DYNAMIC_PROCESS_SETS", "unset"),
    ({"environment": {"HOROVOD_STALL_CHECK_DISABLE": "1"}}, "warning", "HOROVOD_STALL_CHECK_DISABLE", "in silence"),
    ({"environment": {"HOROVOD_FUSION_THRESHOLD": "0"}}, "warning", "HOROVOD_FUSION_THRESHOLD", "nothing is fused"),
    ({"environment": {"HOROVOD_CYCLE_TIME": "0.1"}}, "warning", "HOROVOD_CYCLE_TIME", "unset it"),
    ({"environment": {"HOROVOD_CACHE_CAPACITY": "0"}}, "warning", "HOROVOD_CACHE_CAPACITY", "negotiates"),
    ({"environment": {"OMPI_MCA_mpi_yield_when_idle": "0"}}, "warning", "OMPI_MCA_mpi_yield_when_idle", "where needed"),
    ({"torch": {**framework("2"), "patched": False}}, "warning", "horovod.torch", "python -m hvdlm horovod build"),
    ({"free_bytes": 1e6}, "problem", "disk", "free some"),
]


def test_a_sound_machine_has_neither_warnings_nor_problems() -> None:
    findings = check(copy.deepcopy(SOUND))
    table = doctor.table(findings)
    assert {f.level for f in findings} == {"ok"} and "0 problem(s), 0 warning(s)" in table, table


@pytest.mark.parametrize("change, level, subject, words", PROBLEMS)
def test_each_problem_is_reported_with_its_remedy(change: dict[str, Any], level: str, subject: str, words: str) -> None:
    findings = check({**copy.deepcopy(SOUND), **change})
    matching = [f for f in findings if f.level == level and f.subject == subject and words in f.text]
    assert matching, doctor.table(findings)


@pytest.mark.parametrize("chosen, shown", [({}, "unset: hvdlm sets 1000"), ({"GOMP_SPINCOUNT": "7"}, "7 (how")])
def test_the_doctor_shows_how_threads_wait(chosen: dict[str, str], shown: str) -> None:
    findings = check({**copy.deepcopy(SOUND), "environment": chosen})
    assert [f.text.startswith(shown) for f in findings if f.subject == "GOMP_SPINCOUNT"] == [True]


def test_a_framework_that_horovod_lacks_gets_no_advice_on_it() -> None:
    third = {"frameworks": {**plugins.probes(), "third": Probe("", "pip install third")}, "third": {"version": "1"}}
    about = [f for f in check({**copy.deepcopy(SOUND), **third}) if "third" in f.subject]
    assert [(f.level, f.text) for f in about] == [("ok", "1, 0 GPU(s)")]
    about = [f for f in check({**copy.deepcopy(SOUND), **third, "third": MISSING}) if "third" in f.subject]
    assert [(f.level, f.text) for f in about] == [("warning", "is not installed: pip install third")]


def test_root_with_permission_is_no_problem() -> None:
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert "root" not in [f.subject for f in check({**SOUND, "root": True, "environment": allowed})]


@pytest.mark.parametrize("broken, code", [({}, 0), ({"mpi4py": MISSING}, 1)])
def test_the_exit_code_is_1_if_there_is_a_problem(
    broken: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "gather", lambda frameworks: {**SOUND, **broken})
    assert doctor.examine_machine() == code


def test_a_probe_keeps_values_reported_before_a_crash() -> None:
    facts = probes.probe("report(version='1')\nraise RuntimeError('broken here')", 30)
    assert facts == {"version": "1", "error": "RuntimeError: broken here"}


def test_a_hanging_probe_is_ended_and_keeps_its_values() -> None:
    facts = probes.probe("report(version='1')\nimport time; time.sleep(60)", 1)
    assert facts["version"] == "1" and "no answer" in facts["error"]
