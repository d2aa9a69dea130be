# SPDX-License-Identifier: MIT
"""`doctor --report` says what is needed of a host, and nothing that is private, whatever its files hold."""

from __future__ import annotations

import doctest
import json
import os
import pwd
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.saved_images import run
from vfio_mig.errors import UsageError
from vfio_mig.host.discover import Host
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.jobs.queries import private
from vfio_mig.jobs.queries.host_report import HostReport, report_host
from vfio_mig.jobs.queries.private import Scrubber

if TYPE_CHECKING:
    from pathlib import Path

UUID: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
SECRETS: Final = {
    private.UUID: [UUID, UUID.upper(), UUID.replace("-", "")],
    private.PCI: ["0000:3b:00.1", "3b:00.1"],
    private.NETWORK: [
        "192.168.7.34", "52:54:00:ab:cd:ef", "fe80::5054:ff:feab:cdef", "2001:db8:1:2:3:4:5:6", "a.b@c.de",
    ],
    private.HOME: ["/home/annabel/linux/vfio.h", "/root/secret", "/run/user/1000/x"],
    private.NUMBER: ["6f1e9a03c55d4b2f8a7710aa"],
    private.HOST: ["blackbird", "blackbird.example.org", "BLACKBIRD"],
    private.USER: ["annabel", "Annabel Lee"],
}  # fmt: skip
ALL: Final = [secret for several in SECRETS.values() for secret in several]


@pytest.fixture(autouse=True)
def somebody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Be annabel, on blackbird."""
    names = list(os.uname())
    names[1] = "blackbird.example.org"
    names[2] = "6.12.117-blackbird+"
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(names))
    monkeypatch.setenv("SUDO_USER", "annabel")
    monkeypatch.setenv("VFIO_MIG_LOCK_DIR", str(tmp_path / "locks"))
    entry = pwd.struct_passwd(("annabel", "x", 1000, 1000, "Annabel Lee,,,", "/home/annabel", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwall", lambda: [entry])


def put(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a host with a Skylake GPU, our kvmgt and a vGPU."""
    made = tmp_path / "root"
    gpu = "sys/bus/pci/devices/0000:00:02.0"
    kind = "sys/class/mdev_bus/0000:00:02.0/mdev_supported_types/i915-GVTg_V5_4"
    ports = "0x000000000000f000 0x000000000000f03f 0x0000000000040101\n"  # no memory
    bars = "0x00000000de000000 0x00000000deffffff 0x0000000000140204\n" + "0x0 0x0 0x0\n" * 3 + ports + "0x0 0x0 0x0\n"
    for path, text in {
        f"{gpu}/class": "0x030000\n",
        f"{gpu}/vendor": "0x8086\n",
        f"{gpu}/device": "0x1912\n",
        f"{gpu}/revision": "0x06\n",
        f"{gpu}/resource": bars,
        f"{kind}/name": "GVTg_V5_4\n",
        f"{kind}/available_instances": "2\n",
        f"{kind}/description": "low_gm_size: 128MB\nhigh_gm_size: 512MB\nfence: 4\n",
        "sys/module/i915/initstate": "live\n",
        "sys/module/i915/parameters/enable_gvt": "Y\n",
        "sys/module/i915/parameters/enable_guc": "0\n",
        "sys/module/kvmgt/initstate": "live\n",
        "sys/module/kvmgt/version": "0.1.0\n",
        "sys/module/kvmgt/srcversion": "94D1D6C6C0E6AD0A4C5A0B1\n",
        "sys/module/kvmgt/parameters/migration": "v2\n",
        "sys/class/dmi/id/bios_version": "F.22\n",
        "sys/class/dmi/id/product_name": "NUC6i5SYH\n",
        "sys/class/dmi/id/product_serial": "GESY12345\n",
        "sys/class/dmi/id/product_uuid": f"{UUID}\n",
        "sys/class/iommu/dmar0/x": "",
        "proc/cpuinfo": "model name\t: Intel(R) Core(TM) i5-6260U CPU @ 1.80GHz\nflags\t\t: fpu vmx\n",
        "proc/cmdline": f"root=UUID={UUID} ip=192.168.7.34 i915.enable_gvt=1 intel_iommu=on quiet name=annabel\n",
        "proc/sys/kernel/tainted": "4096\n",
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "dev/kvm": "",
        "dev/vfio/vfio": "",
    }.items():
        put(made, path, text)
    device = made / "sys/bus/mdev/devices" / UUID
    device.mkdir(parents=True)
    (device / "iommu_group").symlink_to("../../../../kernel/iommu_groups/7")  # and no node: doctor names it
    return made


def facts(report: HostReport) -> dict[tuple[str, str], str]:
    return {(one.section, one.name): one.value for one in report.facts}


def everything(report: HostReport) -> str:
    return json.dumps(report.as_dict(), ensure_ascii=False)


def test_what_is_needed_is_there(root: Path) -> None:
    found = facts(report_host(root=str(root)))
    assert found["kernel", "option i915.enable_gvt"] == "1"
    assert found["kernel", "option intel_iommu"] == "on"
    assert found["kernel", "tainted"] == "4096"
    assert found["machine", "model"] == "NUC6i5SYH"
    assert found["machine", "firmware version"] == "F.22"
    assert found["machine", "maker"] == "unknown"
    assert found["machine", "virtual"] == "no"
    assert found["machine", "IOMMU"] == "1 units"
    assert found["GPU 1", "PCI IDs"] == "0x8086 0x1912"
    assert found["GPU 1", "generation of GVT-g"] == "Skylake"
    assert found["GPU 1", "BARs"] == "0: 16384 KiB"
    assert {name: value for (section, name), value in found.items() if section == "KVM"} == {
        "/dev/kvm": "there",
        "VFIO": "vfio/vfio",
    }
    assert found["modules", "kvmgt"] == "loaded, version 0.1.0, srcversion 94D1D6C6C0E6…, migration=v2"
    assert found["modules", "i915's enable_guc"] == "0"
    assert (found["vGPUs", "whose kvmgt"], found["vGPUs", "interface"]) == ("vfio_mig's", "v2")
    assert found["vGPUs", "i915-GVTg_V5_4"].startswith("0 made, room for 2; low_gm_size: 128MB, high_gm_size: 512MB")


def test_the_distribution_s_kvmgt_is_not_taken_for_ours(root: Path) -> None:
    (root / "sys/module/kvmgt/parameters/migration").unlink()
    found = facts(report_host(root=str(root)))
    assert found["vGPUs", "whose kvmgt"].startswith("not vfio_mig's")
    assert found["vGPUs", "interface"].startswith("none of vfio_mig's")


def test_nothing_private_is_said_of_an_ordinary_host(root: Path) -> None:
    report = report_host(Settings(uapi_header="/home/annabel/linux/vfio.h"), root=str(root))
    text = everything(report)
    assert [one for one in (*ALL, "GESY12345", "iommu_groups") if one in text] == []
    assert facts(report)["kernel", "release"] == "6.12.117-<host name>+"
    (node,) = [one for one in report.checks if one.name == "node"]
    assert node.text == "<UUID>: /dev/vfio/7 is not there; is udev running?"
    assert report.left_out[private.UUID] == 1
    assert "<path in a home directory>" in text


@pytest.mark.parametrize("secret", ALL)
def test_nothing_private_gets_out_of_a_file_that_holds_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    """Whatever is read has it: behind the value, before it, and in the middle of every line."""
    read = Host.read

    def with_secret(self: Host, *parts: str) -> str:
        text = read(self, *parts)
        return "\n".join(f"{line} {secret} ({secret}), {secret}: '{secret}'" for line in text.splitlines()) or secret

    monkeypatch.setattr(Host, "read", with_secret)
    report = report_host(root=str(root))
    assert len(report.facts) > 20
    assert secret.lower() not in everything(report).lower()
    result = run("doctor", "--report")
    assert result.exit_code == 0
    assert secret.lower() not in " ".join(result.stdout.split()).lower()


@given(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from(ALL),
    st.sampled_from(" \t'\"(),;=<>|"),
    st.sampled_from(" \t'\"(),;<>|"),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_a_secret_is_found_between_any_words(before: str, secret: str, left: str, right: str, behind: str) -> None:
    scrub = Scrubber(hosts=["blackbird.example.org"], users=["annabel", "Annabel Lee"])
    assert secret not in scrub(f"{before}{left}{secret}{right}{behind}")


@pytest.mark.parametrize(
    "text",
    [
        "6.12.117+deb12-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1 (2026-11-14)", "0x8086 0x1912", "F.22",
        "i915-GVTg_V5_4: 1 made, room for 2; low_gm_size: 128MB", "run as root", "2: 262144 KiB, 0: 16384 KiB",
        "/dev/vfio/vfio", "/run/vfio-mig", "/rooted/homely", "kvmgt: migration=v2", "AMD EPYC @ 3.00GHz",
    ],
)  # fmt: skip
def test_what_is_not_private_stays_as_it_is(text: str) -> None:
    assert Scrubber(hosts=["localhost"], users=["root", "", "x"])(text) == text


def test_the_text_fits_a_terminal_says_what_it_left_out_and_ends_with_0() -> None:
    result = run("doctor", "--report")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "left out of these lines, and how often" in lines
    assert {f"  {kind}: 0" for kind in SECRETS} & set(lines)
    assert "  release: 6.12.117-<host name>+" in lines
    assert "conform: no report of it was given (--conform FILE)" in lines


# conform's outcomes


def conform(**changes: Any) -> dict[str, Any]:
    checks = [
        {"id": "rfc.stop", "outcome": "pass", "seen": "annabel's own"},
        {"id": "rfc.bitmap", "outcome": "fail", "seen": UUID},
    ]
    report = {"device": UUID, "type": "i915-GVTg_V5_4", "driver": "kvmgt", "protocol": "gvt-rfc", "checks": checks}
    return report | changes


def test_of_conform_s_report_the_outcomes_are_told_by_name_and_no_words(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "conform.json"
    file.write_text(json.dumps(conform(kernel="of annabel's")))
    report = report_host(conform=str(file), root=str(root))
    assert {one.name: one.value for one in report.conform} == {
        "type": "i915-GVTg_V5_4", "driver": "kvmgt", "protocol": "gvt-rfc", "kernel": "unknown",
        "rfc.stop": "pass", "rfc.bitmap": "fail",
    }  # fmt: skip
    assert "annabel" not in everything(report)
    lines = run("doctor", "--report", "--conform", file).stdout.splitlines()
    assert "  1 pass" in lines
    assert "  1 fail: rfc.bitmap" in lines


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "nothing", '{"checks": 7}', '{"checks": [7]}', "[" * 100_000, '{"checks": [{"id": "a b"}]}',
        '{"checks": [{"id": "a", "outcome": "good"}]}', '{"checks": [{"id": 1, "outcome": "pass"}]}',
        json.dumps(conform(checks=[{"id": "a", "outcome": "pass"}] * 1001)), " " * (1 << 20) + json.dumps(conform()),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_conform_s_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "conform.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="vfio-mig --json conform DEVICE"):
        report_host(conform=str(file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ENOENT"):
        report_host(conform=str(tmp_path / "none"))
    result = run("doctor", "--conform", tmp_path / "none")
    assert result.exit_code == 2


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(private)
    assert result.attempted > 0
    assert result.failed == 0
