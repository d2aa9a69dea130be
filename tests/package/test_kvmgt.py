# SPDX-License-Identifier: MIT
"""The package with kvmgt, in a new Debian with its own kernel, compiler and dkms; only the VM loads modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, Final

import pytest

from tests.package.conftest import ROOT, run
from tests.package.test_debian import packages
from vfio_mig import __version__

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["packages"]  # the fixture

NAME: Final = "vfio-mig-kvmgt"
TREE: Final = f"/usr/src/{NAME}-{__version__}"
CACHE: Final = f"/var/cache/{NAME}"
GVT: Final = "drivers/gpu/drm/i915/gvt"
INCLUDED: Final = "ca-certificates dkms python3-pyelftools patch xz-utils kmod linux-headers-amd64 linux-image-amd64"
JOBS: Final = ("tests/vm/test_gvt_migration.py", "tests/vm/test_gvt_v2.py")
"""The whole job by the RFC and by protocol v2, on what is built here."""
MUTATED: Final = "test_conform_finds_a_driver_that_loses_the_queue"
"""It takes a module that is broken, which no package has."""
# The kernel that comes later: of Debian 12 a newer one besides, of Debian 13 the same once more, which changes nothing.
UPDATES: Final = {
    "bookworm": "linux-image-6.12-amd64 linux-headers-6.12-amd64",
    "trixie": '--reinstall "linux-image-$first"',
}
SCRIPT: Final = f"""\
export DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8
mkdir -p /out
first=$(ls /lib/modules | head -n 1)
loaded() {{ modinfo -k "${{1:-$first}}" -F filename kvmgt; }}
stock() {{ sha256sum <"$(find "/lib/modules/$first/kernel" -name 'kvmgt.ko*')"; }}
# step NAME COMMAND...: what it said, its status, and which module would then be loaded
step() {{
	name=$1
	shift
	"$@" >"/out/$name" 2>&1 && echo 0 >"/out/$name.status" || echo $? >"/out/$name.status"
	loaded >"/out/$name.loaded"
}}
again() {{ dkms remove -m {NAME} -v {__version__} -k "$first"; /usr/lib/{NAME}/rebuild "$first"; }}
stock >/out/stock
step install apt-get install -y --no-install-recommends /debs/{NAME}-dkms_*.deb
step status {TREE}/kvmgt status --kernel "$first"
step dkms dkms status
ls /usr/include/vfio-mig >/out/headers
modinfo -k "$first" kvmgt >/out/modinfo
cp -r {TREE} /root/tree
cp -r {CACHE} /root/cache
mkdir -p /out/built && cp /root/cache/modules/kvmgt-*/kvmgt.ko /out/built/ && echo "$first" >/out/built/release

# Secure Boot, of which a kernel would say so here
cat >/root/secure <<-'END'
	efi=/sys/firmware/efi/efivars
	mount -t tmpfs tmpfs /sys/firmware && mkdir -p $efi
	printf '\\6\\0\\0\\0\\1' >$efi/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c
	"$@"
END
step secure unshare -m --propagation unchanged bash /root/secure {TREE}/kvmgt status --kernel "$first"

# a source that somebody has changed: one constant
source=$(echo {CACHE}/sources/kvmgt-*/)
sed -i '/define GVT_DEFAULT_TIME_SLICE/s/1000000/2000000/' $source/{GVT}/sched_policy.c
step tampered again
stock >/out/tampered.stock
# one of another version: a structure of i915's has another layout
rm -r {CACHE} && cp -r /root/cache {CACHE}
sed -i 's/^struct drm_i915_private {{/&\\n\\tunsigned long newer[4];/' $source/drivers/gpu/drm/i915/i915_drv.h
step newer again
stock >/out/newer.stock
# none at all
rm -r {CACHE} && mv /etc/apt/sources.list /root/
step none again
mv /root/sources.list /etc/apt/
cp -r /root/cache {CACHE}
step whole again

# a dkms that was killed between its two steps
if [ -e "/var/lib/dkms/{NAME}/original_module" ]; then
	rm "/lib/modules/$first/updates/dkms/"kvmgt.ko* "/var/lib/dkms/{NAME}/kernel-$first-x86_64"
	depmod "$first"
fi
step killed again

step update apt-get install -y --no-install-recommends @UPDATE@
newest=$(ls -v /lib/modules | tail -n 1)
loaded "$newest" >/out/update.newest

# a kernel of another version and the same name: its image says that it is, and no source of it can be had
image=/boot/vmlinuz-$first
cp "$image" /root/image
sed -i -E 's/(Debian [0-9.]+-)[0-9] \\(/\\19 (/' "$image"
step changed /etc/kernel/postinst.d/{NAME} "$first"
stock >/out/changed.stock
cp /root/image "$image"
step purge apt-get purge -y {NAME}-dkms
stock >/out/purge.stock
loaded "$newest" >/out/purge.newest
find / -xdev -name '*vfio-mig*' ! -path '/proc/*' ! -path '/debs/*' ! -path '/root/*' ! -path '/out/*' >/out/left

export VFIO_MIG_CACHE=/root/cache
step script-install /root/tree/kvmgt install --kernel "$first"
step script-status /root/tree/kvmgt status --kernel "$first"
step script-remove /root/tree/kvmgt remove --kernel "$first"
stock >/out/script.stock
"""


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Go through it all in a new Debian of that release; returns the directory with what was found."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    room = tmp_path_factory.mktemp(request.param)
    (room / "script").write_text(SCRIPT.replace("@UPDATE@", UPDATES[request.param]), "utf-8")
    (package,) = packages.glob(f"{NAME}-dkms_*.deb")
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(INCLUDED.split())}",
            '--customize-hook=mkdir "$1/debs"',
            f"--customize-hook=copy-in {package} /debs",
            f"--customize-hook=copy-in {room}/script /root",
            '--customize-hook=chroot "$1" bash /root/script',
            f"--customize-hook=copy-out /out {room}",
            request.param,
            "/dev/null",
        ],
        room,
        PATH="/usr/sbin:/usr/bin:/sbin:/bin",
        TMPDIR=os.environ.get("TMPDIR", "/tmp"),
    )
    return room / "out"


def said(debian: Path, name: str, status: int = 0) -> str:
    """Read what a step said."""
    text = (debian / name).read_text("utf-8")
    assert (debian / f"{name}.status").read_text() == f"{status}\n", text
    return text


def loaded(debian: Path, name: str) -> str:
    return (debian / f"{name}.loaded").read_text().strip()


def is_stock(path: str) -> bool:
    return "/kernel/drivers/gpu/drm/i915/kvmgt.ko" in path


def test_it_is_built_where_the_gate_is_passed_and_refused_elsewhere(debian: Path) -> None:
    stock = (debian / "stock").read_text()
    assert f"vfio_mig {__version__} for" in said(debian, "install")
    assert "/updates/dkms/kvmgt.ko" in loaded(debian, "install")
    assert "signed by DKMS module signing key" in said(debian, "status")
    assert ": installed" in said(debian, "dkms")
    assert f"version:        {__version__}" in (debian / "modinfo").read_text()
    assert (debian / "headers").read_text().split() == ["gvt_image.h", "gvt_migration.h", "gvt_rfc.h"]
    assert "mokutil --import /var/lib/dkms/mok.pub" in said(debian, "secure")

    for name in ("tampered", "newer"):
        text = said(debian, name)
        assert "gate: kvmgt built from" in text
        assert "bytes in both, not the same from" in text or "a relocation is" in text
        assert "the distribution's stays in place" in text
        assert is_stock(loaded(debian, name))
        assert (debian / f"{name}.stock").read_text() == stock
    assert "linux-source" in said(debian, "none")
    assert is_stock(loaded(debian, "none"))
    assert "/updates/dkms/" in loaded(debian, "whole")
    assert "/updates/dkms/" in loaded(debian, "killed")


def test_it_follows_the_kernel_and_leaves_it_as_it_was(debian: Path) -> None:
    stock = (debian / "stock").read_text()
    is_new = (debian / "update.newest").read_text().split("/")[3] not in loaded(debian, "update")
    assert (f"vfio_mig {__version__} for" in said(debian, "update")) is is_new
    assert "/updates/dkms/kvmgt.ko" in loaded(debian, "update")
    assert "/updates/dkms/kvmgt.ko" in (debian / "update.newest").read_text()
    assert "has changed since its kvmgt was built" in said(debian, "changed")
    assert "-9" in said(debian, "changed")
    assert is_stock(loaded(debian, "changed"))
    assert (debian / "changed.stock").read_text() == stock
    said(debian, "purge")
    assert is_stock(loaded(debian, "purge"))
    assert is_stock((debian / "purge.newest").read_text())
    assert (debian / "purge.stock").read_text() == stock
    assert (debian / "left").read_text() == ""


def test_the_script_does_the_same_without_a_package(debian: Path) -> None:
    assert said(debian, "script-install").splitlines()[-1] == loaded(debian, "script-install")
    assert "/updates/vfio-mig/kvmgt.ko" in loaded(debian, "script-install")
    assert f"vfio_mig {__version__} for" in said(debian, "script-status")
    said(debian, "script-remove")
    assert is_stock(loaded(debian, "script-remove"))
    assert (debian / "script.stock").read_text() == (debian / "stock").read_text()


def test_the_module_that_dkms_built_does_the_whole_job(debian: Path) -> None:
    """On the emulated GPU, with the kernel that it was built for: scripts/vm has Debian 12's own."""
    release = (debian / "built" / "release").read_text().strip()
    done = run_vm(["uname", "-r"])
    if done.stdout.split() != [release]:
        pytest.skip(f"scripts/vm --kernel 6.1 has {done.stdout.strip()}, and this Debian {release}")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".built-") as visible:  # in the VM; it has a /tmp of its own
        shutil.copy(debian / "built" / "kvmgt.ko", visible)
        done = run_vm(["pytest", "-q", "-p", "no:cacheprovider", "-k", f"not {MUTATED}", *JOBS], VFIO_MIG_KVMGT=visible)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def run_vm(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["--kernel", "6.1", "--gvt", "--gpu", "kbl", "--no-module", "--memory", "2G", "--timeout", "1500"]
    return subprocess.run(
        [str(ROOT / "scripts/vm"), *options, "--", *command], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, env={**os.environ, "VFIO_MIG_REQUIRE_VM": "1", **environment}, check=False,
    )  # fmt: skip
