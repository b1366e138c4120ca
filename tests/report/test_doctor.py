"""What the doctor finds: on made-up machines, and on this one."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest

from rollout.cli import main
from rollout.commands.doctor import examine, guest_image, image_tools
from rollout.doctor import Finding, Status, paging_findings, verdicts
from rollout.doctor.isolation import bubblewrap, control_groups, user_namespaces
from rollout.doctor.machine import cpu_model, disk_space, memory, memory_bytes, processes, shared_memory
from rollout.doctor.paging import kernel_same_page_merging, pagemap_scan, swap, transparent_huge_pages
from rollout.doctor.virtualisation import kvm_device, qemu, qemu_for_kvm
from rollout.sandbox.control_groups import mounted_groups
from rollout.sandbox.image.store import ImageStore


def a_program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Filename Type Size Used Priority\n", Status.OK),
        ("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n", Status.WARN),
    ],
)
def test_swap(tmp_path: Path, text: str, status: Status) -> None:
    put(tmp_path, "swaps", text)
    assert swap(tmp_path).status is status


@pytest.mark.parametrize(
    ("mode", "status"),
    [("always madvise [never]", "ok"), ("always [madvise] never", "ok"), ("[always] madvise never", "warn")],
)
def test_transparent_huge_pages(tmp_path: Path, mode: str, status: str) -> None:
    put(tmp_path, "kernel/mm/transparent_hugepage/enabled", mode)
    assert transparent_huge_pages(tmp_path).status == status


@pytest.mark.parametrize(("run", "status"), [("0", "ok"), ("1", "warn"), ("2", "ok")])
def test_same_page_merging(tmp_path: Path, run: str, status: str) -> None:
    put(tmp_path, "kernel/mm/ksm/run", f"{run}\n")
    assert kernel_same_page_merging(tmp_path).status == status


def test_what_a_kernel_lacks_is_no_error(tmp_path: Path) -> None:
    assert swap(tmp_path).status is Status.WARN
    assert transparent_huge_pages(tmp_path).status is Status.OK
    assert kernel_same_page_merging(tmp_path).status is Status.OK
    assert memory(tmp_path).status is Status.WARN
    assert memory_bytes("MemTotal", tmp_path) is None
    assert mounted_groups(tmp_path) == []
    assert control_groups(tmp_path).status is Status.WARN
    assert cpu_model(tmp_path)


@pytest.mark.parametrize(("available_kib", "status"), [(8 << 20, "ok"), (1 << 20, "warn")])
def test_memory(tmp_path: Path, available_kib: int, status: str) -> None:
    put(tmp_path, "meminfo", f"MemTotal:  {16 << 20} kB\nMemAvailable: {available_kib} kB\n")
    found = memory(tmp_path)
    assert found.status == status
    assert "of 16.0" in found.detail


def test_few_processes_are_a_warning(tmp_path: Path) -> None:
    put(tmp_path, "sys/kernel/pid_max", "1000")
    assert processes(tmp_path).status is Status.WARN
    assert "1,000" in processes(tmp_path).detail


def test_disk_space_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert disk_space(tmp_path / "a" / "b", "disk", wanted_bytes=1).status is Status.OK
    assert disk_space(tmp_path / "a", "disk", wanted_bytes=1 << 60).status is Status.WARN
    assert shared_memory(tmp_path / "shm").status is Status.WARN
    assert list(tmp_path.iterdir()) == []


def test_control_groups_are_tried(tmp_path: Path) -> None:
    """Version 2 at one place, version 1 at another, and a container that sees only its own part."""
    unified, legacy = tmp_path / "unified", tmp_path / "pids"
    put(unified, "mine/cgroup.controllers", "cpu memory\n")
    (legacy / "box").mkdir(parents=True)
    put(tmp_path / "proc", "self/cgroup", "4:pids:/outer/box\n0::/mine\n")
    mounts = (
        f"30 23 0:26 / {unified} rw shared:4 - cgroup2 cgroup rw\n"
        f"31 23 0:27 /outer {legacy} rw - cgroup cgroup rw,pids\n"
    )
    put(tmp_path / "proc", "self/mountinfo", mounts)
    groups = mounted_groups(tmp_path / "proc")
    assert [(g.version, sorted(g.controllers), g.folder) for g in groups] == [
        (2, ["cpu", "memory"], unified / "mine"),
        (1, ["pids"], legacy / "box"),
    ]
    found = control_groups(tmp_path / "proc")
    assert found.status is Status.OK
    assert found.detail == "v1+v2: may make groups for cpu (v2), memory (v2), pids (v1)"
    shutil.rmtree(legacy / "box")
    refused = control_groups(tmp_path / "proc")
    assert refused.status is Status.WARN
    assert "not for pids" in refused.detail
    assert sorted(path.name for path in (unified / "mine").iterdir()) == ["cgroup.controllers"]


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (
            '[ "$1" = --version ] && echo "QEMU emulator version 8.2.1" || echo "microvm  microvm"',
            "ok",
            "8.2.1",
        ),
        ('echo "QEMU emulator version 6.0.0"', "missing", "7.2 or later"),
        (
            '[ "$1" = --version ] && echo "QEMU emulator version 9.0.0" || echo pc',
            "missing",
            "microvm machine",
        ),
        ("exit 1", "missing", "does not tell its version"),
        ("echo garbage; head -c 100 /dev/urandom", "missing", "does not tell its version"),
    ],
)
def test_qemu(tmp_path: Path, script: str, status: str, words: str) -> None:
    found = qemu(a_program(tmp_path, "qemu", script))
    assert found.status == status
    assert words in found.detail + found.remedy


def test_a_machine_without_qemu(tmp_path: Path) -> None:
    assert qemu(str(tmp_path / "none")).remedy == "apt-get install qemu-system-x86"
    assert qemu_for_kvm(str(tmp_path / "none")).status is Status.WARN


def test_a_machine_without_kvm(tmp_path: Path) -> None:
    assert "no " in kvm_device(tmp_path / "kvm").detail
    (tmp_path / "kvm").write_text("")
    found = kvm_device(tmp_path / "kvm")
    assert found.status is Status.WARN
    assert "makes no VM" in found.detail


def test_refused_namespaces_name_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_program(tmp_path, "unshare", 'echo "unshare: unshare failed: Operation not permitted" >&2; exit 1')
    a_program(
        tmp_path, "bwrap", '[ "$1" = --version ] && echo "bubblewrap 1.0" && exit; echo refused >&2; exit 1'
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    found = user_namespaces()
    assert found.status is Status.MISSING
    assert "Operation not permitted" in found.detail
    assert "sysctl" in found.remedy
    assert bubblewrap().detail == "bubblewrap 1.0, refused: refused"
    assert verdicts([found, bubblewrap()])[1].status is Status.MISSING
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert user_namespaces().status is Status.WARN
    assert bubblewrap().remedy == "apt-get install bubblewrap"
    assert "mmdebstrap" in image_tools().remedy


def test_this_kernel_is_really_asked() -> None:
    """The ioctl came with Linux 6.7; where it is there it must find exactly the page that was written."""
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    found = pagemap_scan()
    assert found.status is (Status.OK if release >= (6, 7) else Status.WARN), found.detail
    assert all(finding.detail for finding in paging_findings())


def test_an_engine_runs_unless_something_that_it_needs_is_missing() -> None:
    findings = [
        Finding("a", Status.OK, "", needed_by=("process", "microvm")),
        Finding("b", Status.WARN, "", needed_by=("process",)),
        Finding("c", Status.MISSING, "", "install c", needed_by=("microvm",)),
        Finding("d", Status.MISSING, "", "install d", needed_by=("microvm",)),
    ]
    inline, process, microvm = verdicts(findings)
    assert (inline.status, process.status, microvm.status) == (Status.WARN, Status.OK, Status.MISSING)
    assert microvm.detail == "cannot run: c, d"
    assert microvm.remedy == "install c; install d"


def test_a_missing_image_names_the_command(tmp_path: Path) -> None:
    found = guest_image("default", ImageStore(tmp_path))
    assert found.status is Status.MISSING
    assert found.remedy == "rollout image build"
    assert found.needed_by == ("microvm",)


def test_the_command_says_one_line_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path))  # no image: KVM is not booted here
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--json"])
    groups = json.loads(capsys.readouterr().out)
    findings = [finding for group in groups.values() for finding in group]
    assert len({finding["name"] for finding in findings}) == len(findings)
    by_name = {finding["name"]: finding for finding in findings}
    assert by_name["guest image"]["status"] == "missing"
    assert by_name["engine microvm"]["status"] == "missing"
    assert "guest image" in by_name["engine microvm"]["detail"]
    walls = [by_name[f"engine {name}"]["status"] for name in ("process", "microvm")]
    assert (exit_.value.code == 0) == ("ok" in walls)
    with pytest.raises(SystemExit):
        main(["doctor"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) == len(findings)
    assert all(line.split()[0] in ("ok", "warn", "missing") for line in lines)


def test_no_engine_with_a_wall_is_a_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1
    assert "apt-get install bubblewrap" in capsys.readouterr().out


def test_examining_leaves_the_working_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    examine("default", Path("runs"))
    assert list(tmp_path.iterdir()) == []
