# SPDX-License-Identifier: MIT
"""The private apt configuration: which suites, at which mirror, and that nothing unsigned gets in."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tools.vm import suites
from tools.vm.apt import Apt
from tools.vm.errors import RunnerError
from tools.vm.suites import RELEASES, Newer, Suite, UnknownKeyError, available, codename, host_keyring, mirrors, newer

BOOKWORM = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_CODENAME=bookworm\nID=debian\n'
BACKPORTS = Suite("trixie-backports", "trixie")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOOKWORM, "bookworm"),
        ('ID="debian"\nVERSION_CODENAME="trixie"\n', "trixie"),
        ("ID=debian\n", None),
        ("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n", None),
        ("", None),
    ],
)
def test_the_host_s_release_is_read_from_os_release(text: str, expected: str | None) -> None:
    assert codename(text) == expected


def test_backports_of_the_next_release_come_before_those_of_the_host_s_own() -> None:
    assert [suite.name for suite in newer("bookworm")] == ["trixie-backports", "bookworm-backports", "trixie"]
    assert [suite.name for suite in newer(RELEASES[-1])] == [f"{RELEASES[-1]}-backports"]
    assert newer("sarge") == []


def uris(*names: str) -> str:
    return "".join(f"'{name}' some_name 0 \n" for name in names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (uris("http://a.example/debian/dists/bookworm/InRelease"), ["http://a.example/debian"]),
        (uris("mirror+file:/etc/apt/list/dists/bookworm/InRelease"), ["mirror+file:/etc/apt/list"]),
        (uris("http://a.example/debian/dists/oldstable/InRelease"), ["http://a.example/debian"]),
        # another vendor's, whose suites have the same names, is listed first
        (
            uris(
                "https://b.example/linux/debian/dists/bookworm/InRelease",
                "http://a.example/debian/dists/bookworm/InRelease",
                "http://a.example/debian/dists/bookworm-updates/InRelease",
            ),
            ["http://a.example/debian", "https://b.example/linux/debian"],
        ),
        (uris("http://a.example/debian-security/dists/bookworm-security/InRelease"), []),
        (uris("http://a.example/debian/dists/sid/InRelease"), []),
        (uris("http://a.example/debian/dists/bookworm/main/binary-amd64/Packages.xz"), []),
        ("E: Malformed entry\n", []),
    ],
)
def test_the_mirror_is_the_one_that_the_host_s_own_sources_name(text: str, expected: list[str]) -> None:
    assert mirrors(text, "bookworm") == expected


def test_the_keyring_has_one_of_two_names(tmp_path: Path) -> None:
    assert host_keyring(tmp_path) is None
    (tmp_path / "debian-archive-keyring.gpg").touch()
    assert host_keyring(tmp_path) == tmp_path / "debian-archive-keyring.gpg"
    (tmp_path / "debian-archive-keyring.pgp").touch()
    assert host_keyring(tmp_path) == tmp_path / "debian-archive-keyring.pgp"


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    path = tmp_path / "keys of the host.gpg"
    path.write_bytes(b"keys")
    return path


def test_apt_sees_one_mirror_s_suite_no_installed_package_and_the_distribution_s_keys_only(
    tmp_path: Path, keyring: Path
) -> None:
    directory = tmp_path / "a directory"
    directory.mkdir()
    Newer(directory, BACKPORTS, "http://a.example/debian", keyring)
    Newer(directory, BACKPORTS, "http://a.example/debian", keyring)  # what is there already is replaced
    assert (directory / "sources.list").read_text() == (
        "deb http://a.example/debian trixie main\ndeb http://a.example/debian trixie-backports main\n"
    )
    assert (directory / "status").read_text() == ""
    assert [path.read_bytes() for path in (directory / "keys").iterdir()] == [b"keys"]


@pytest.mark.skipif(shutil.which("apt-config") is None, reason="apt is not there")
def test_apt_itself_reads_it_so(tmp_path: Path, keyring: Path) -> None:
    host = tmp_path / "host.conf"
    host.write_text(
        'APT::Get::AllowUnauthenticated "true";\nAcquire::AllowInsecureRepositories "true";\n'
        'APT::Update::Post-Invoke { "touch /hook"; };\nDPkg::Post-Invoke { "touch /hook"; };\n'
        'APT::Default-Release "bookworm";\nAPT::Architectures { "amd64"; "i386"; };\n'
    )
    apt = Newer(tmp_path, BACKPORTS, "http://a.example/debian", keyring)
    seen = subprocess.run(
        ["apt-config", *apt._options, "dump"],
        env={"PATH": "/usr/bin:/bin", "APT_CONFIG": str(host)}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert not [line for line in seen if "Invoke" in line and "/hook" in line]
    assert {
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";',
        'Dir::Etc::sourceparts "/dev/null";',
        f'Dir::Etc::trustedparts "{tmp_path}/keys";',
        f'Dir::State::status "{tmp_path}/status";',
        f'Dir::State::Lists "{tmp_path}/lists";'.replace("Lists", "lists"),
        'APT::Get::AllowUnauthenticated "false";',
        'Acquire::AllowInsecureRepositories "false";',
        'APT::Default-Release "trixie-backports";',
    } <= set(seen)
    assert [line for line in seen if line.startswith("APT::Architectures:")] == ['APT::Architectures:: "amd64";']


def answer(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> list[list[str]]:
    asked: list[list[str]] = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_a_suite_that_nobody_known_has_signed_is_refused(
    tmp_path: Path, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = (
        "W: GPG error: http://a.example trixie InRelease: The following signatures couldn't be verified because the "
        "public key is not available: NO_PUBKEY 6ED0E7B82643E131\nE: The repository 'x' is not signed.\n"
    )
    apt = Newer(tmp_path, BACKPORTS, "http://a.example/debian", keyring)
    answer(monkeypatch, 100, stderr)
    with pytest.raises(UnknownKeyError, match=r"trixie-backports is signed with keys that .*keys of the host.gpg does"):
        apt.update()


def test_a_suite_that_the_mirror_lacks_is_an_error_with_apt_s_reason(
    tmp_path: Path, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = Newer(tmp_path, BACKPORTS, "http://a.example/debian", keyring)
    asked = answer(monkeypatch, 100, "W: no matter\nE: The repository 'x' does not have a Release file.\n")
    with pytest.raises(RunnerError, match=r"^trixie-backports: The repository 'x' does not have a Release file\.$"):
        apt.update()
    assert "--error-on=any" in asked[0]  # else apt goes on with what else there is


def test_a_package_comes_with_all_it_depends_on_and_none_is_installed(
    tmp_path: Path, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = Newer(tmp_path, BACKPORTS, "http://a.example/debian", keyring)
    target = tmp_path / "packages"
    target.mkdir()
    asked = answer(monkeypatch, 0, "")
    apt.download_with_dependencies(["x=1"], target)
    assert asked[0][0] == "apt-get"
    assert asked[0][-3:] == ["--download-only", "install", "x=1"]
    answer(monkeypatch, 100, "E: Unable to locate package x\n")
    with pytest.raises(RunnerError, match=r"could not download x=1 of trixie-backports:\nE: Unable to locate"):
        apt.download_with_dependencies(["x=1"], tmp_path / "cache")


class Host(Apt):
    """The host's own sources: one mirror, and a newer keyring or none."""

    newer_keys = b"newer keys"

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        assert (program, arguments, cwd) == ("apt-get", ("update", "--print-uris"), None)
        return subprocess.CompletedProcess([], 0, uris("http://a.example/debian/dists/bookworm/InRelease"), "")

    def update(self) -> None:
        pass

    def download(self, packages: list[str], directory: Path) -> None:
        assert packages == ["debian-archive-keyring"]
        if not self.newer_keys:
            raise RunnerError("apt-get could not download debian-archive-keyring:\n404")
        (directory / "tree/usr/share/keyrings").mkdir(parents=True)
        (directory / "tree/usr/share/keyrings/debian-archive-keyring.gpg").write_bytes(self.newer_keys)


@pytest.fixture
def os_release(tmp_path: Path, keyring: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suites, "Apt", Host)
    monkeypatch.setattr(suites, "host_keyring", lambda *where: host_keyring(*where) if where else keyring)
    path = tmp_path / "os-release"
    path.write_text(BOOKWORM)
    return path


def knows(suite_keys: bytes, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Let the suites be signed with *suite_keys*; return what is tried."""
    tried: list[tuple[str, bytes]] = []

    def update(apt: Newer) -> None:
        keys = apt.keyring.read_bytes()
        tried.append((apt.suite.name, keys))
        if keys != suite_keys:
            raise UnknownKeyError(f"{apt.suite.name} is signed with keys that the keyring does not have")

    monkeypatch.setattr(Newer, "update", update)
    return tried


def test_each_suite_is_tried_with_the_host_s_keys(
    tmp_path: Path, os_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = knows(b"keys", monkeypatch)
    failures: list[str] = []
    opened = [apt.suite.name for apt in available(tmp_path / "cache", failures, os_release)]
    assert opened == ["trixie-backports", "bookworm-backports", "trixie"]
    assert tried == [(name, b"keys") for name in opened]
    assert failures == []


def test_an_old_keyring_gives_way_to_the_newest_in_the_host_s_own_checked_sources(
    tmp_path: Path, os_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = knows(b"newer keys", monkeypatch)
    failures: list[str] = []
    opened = next(available(tmp_path / "cache", failures, os_release))
    assert opened.suite == BACKPORTS
    assert tried == [("trixie-backports", b"keys"), ("trixie-backports", b"newer keys")]
    assert failures == []


@pytest.mark.parametrize(
    ("newest", "reason"),
    [
        (b"newer keys", "nor has the newest debian-archive-keyring of this host's own sources"),
        (b"", "404"),
    ],
)
def test_a_key_that_nobody_here_has_is_said_and_nothing_is_taken(
    tmp_path: Path, os_release: Path, monkeypatch: pytest.MonkeyPatch, newest: bytes, reason: str
) -> None:
    knows(b"keys of next year", monkeypatch)
    monkeypatch.setattr(Host, "newer_keys", newest)
    failures: list[str] = []
    assert list(available(tmp_path / "cache", failures, os_release)) == []
    assert len(failures) == 3
    assert all(reason in failure for failure in failures)


def test_without_a_keyring_nothing_is_fetched(
    tmp_path: Path, os_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "host_keyring", lambda: None)
    failures: list[str] = []
    assert list(available(tmp_path / "cache", failures, os_release)) == []
    assert "install debian-archive-keyring" in failures[0]


def test_another_distribution_has_no_suites_of_debian_s(tmp_path: Path) -> None:
    failures: list[str] = []
    assert list(available(tmp_path / "cache", failures, tmp_path / "none")) == []
    assert "Debian" in failures[0]
