"""A node that cannot run safely does not run: real processes, one per mistake, each with the file
and the remedy on stderr and its exit code."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from elastickv import certs
from elastickv.errors import ExitCode
from tests.keys_process.doctor_shell import BOUND_BY_MODES, elastickv


def run_node(directory: Path, *flags: str, timeout_s: float = 60,
             launcher: Sequence[str] = (),
             variables: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and stderr of a node that is expected to end by itself."""
    code, _, errors = elastickv("node", "--raftId", "n1", "--raftBootstrap", "--raftDataDir",
                                str(directory / "data"), *flags, timeout_s=timeout_s,
                                launcher=launcher, variables=variables)
    return code, errors


def short(path: Path) -> None:
    path.write_bytes(bytes(31))
    path.chmod(0o600)


def long(path: Path) -> None:
    path.write_bytes(bytes(33))
    path.chmod(0o600)


def readable_by_others(path: Path) -> None:
    path.write_bytes(bytes(32))
    path.chmod(0o644)


def fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def directory(path: Path) -> None:
    path.mkdir(mode=0o700)


def missing(path: Path) -> None:
    return


def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [missing, short, long, readable_by_others, fifo, directory,
                                  dangling_link], ids=lambda make: make.__name__)
def test_kek_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    kek = tmp_path / "kek.key"
    make(kek)
    code, errors = run_node(tmp_path, "--insecure", "--encryption-enabled", "--kekFile", str(kek))
    assert code == ExitCode.STARTUP_REFUSED
    assert str(kek) in errors
    assert "Remedy:" in errors
    assert "Traceback" not in errors


def test_encryption_without_a_kek(tmp_path: Path) -> None:
    code, errors = run_node(tmp_path, "--insecure", "--encryption-enabled")
    assert code == ExitCode.STARTUP_REFUSED
    assert "--kekFile" in errors
    assert "Traceback" not in errors


def test_kek_file_that_the_user_may_not_read(tmp_path: Path) -> None:
    kek = tmp_path / "kek.key"
    kek.write_bytes(bytes(32))
    kek.chmod(0)
    code, errors = run_node(tmp_path, "--insecure", "--encryption-enabled", "--kekFile", str(kek),
                            launcher=BOUND_BY_MODES)
    assert code == ExitCode.STARTUP_REFUSED
    assert "Remedy: run this as the user that runs the node" in errors


def test_data_directory_that_the_user_may_not_make(tmp_path: Path) -> None:
    """It is no matter of the file system."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code, errors = run_node(closed, "--insecure", launcher=BOUND_BY_MODES)
    assert code == ExitCode.STARTUP_REFUSED
    assert f"install -d -o <user> -m 700 {closed / 'data'}" in errors.split("Remedy:")[-1]
    code, out, _ = elastickv("doctor", "--raftId", "n1", "--raftBootstrap", "--insecure",
                             "--raftDataDir", str(closed / "data"), launcher=BOUND_BY_MODES)
    assert code == ExitCode.ERROR
    assert "install -d -o <user>" in out


def test_a_tls_file_that_a_variable_names(tmp_path: Path) -> None:
    """As in the shell of an operator, whose own certificate is in it."""
    certs.create_ca(tmp_path)
    alice, n1 = certs.create_client(tmp_path, "alice"), certs.create_node(tmp_path, "n1")
    variables = {"ELASTICKV_TLS_CERT": str(alice.cert), "ELASTICKV_TLS_KEY": str(n1.key)}
    code, errors = run_node(tmp_path, "--tls-key", str(alice.key), "--tls-ca",
                            str(tmp_path / "ca.crt"), variables=variables)
    assert code == ExitCode.USAGE
    assert "is not a certificate of node n1" in errors
    assert "--tls-cert is set by the variable ELASTICKV_TLS_CERT" in errors
    assert "ELASTICKV_TLS_KEY" not in errors
    code, out, _ = elastickv("doctor", "--raftId", "n1", "--raftBootstrap", "--raftDataDir",
                             str(tmp_path / "data"), "--tls-key", str(alice.key), "--tls-ca",
                             str(tmp_path / "ca.crt"), variables=variables)
    assert code == ExitCode.ERROR
    assert "--tls-cert is set by the variable ELASTICKV_TLS_CERT" in out


def test_data_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to("/proc")
    code, errors = run_node(tmp_path, "--insecure")
    assert code == ExitCode.STARTUP_REFUSED
    assert "Remedy:" in errors
    assert "Traceback" not in errors


def test_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    code, errors = run_node(tmp_path, "--insecure")
    assert code == ExitCode.STARTUP_REFUSED
    assert str(tmp_path / "data") in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("flag", ["--address", "--raftAddress"])
def test_address_in_use(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, errors = run_node(tmp_path, "--insecure", flag, address)
    assert code == ExitCode.BIND_FAILED
    assert address in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key", "--tls-ca"])
def test_tls_file(tmp_path: Path, flag: str, damage: str) -> None:
    certs.create_ca(tmp_path)
    certs.create_node(tmp_path, "n1")
    files = {"--tls-cert": tmp_path / "n1.crt", "--tls-key": tmp_path / "n1.key",
             "--tls-ca": tmp_path / "ca.crt"}
    bad = files[flag] = tmp_path / "bad.pem"
    if damage != "missing":
        bad.write_text("" if damage == "empty" else "-----BEGIN nothing")
        bad.chmod(0o600)
    flags = [text for name, path in files.items() for text in (name, str(path))]
    code, errors = run_node(tmp_path, *flags)
    assert code == ExitCode.USAGE
    assert flag in errors
    assert str(bad) in errors
    assert "Traceback" not in errors


def test_insecure_on_a_real_address(tmp_path: Path) -> None:
    code, errors = run_node(tmp_path, "--insecure", "--address", "192.0.2.1:50051")
    assert code == ExitCode.USAGE
    assert "--insecure is refused" in errors
    assert not (tmp_path / "data").exists()


def test_doctor_judges_the_tls_files(tmp_path: Path) -> None:
    """A node with these would end with the same words."""
    certs.create_ca(tmp_path)
    certs.create_node(tmp_path, "n1")
    certs.create_node(tmp_path, "n2")

    def doctor(name: str) -> tuple[int, str]:
        pair = certs.pair_paths(tmp_path, name)
        done = subprocess.run(
            [sys.executable, "-m", "elastickv", "doctor", "--raftId", "n1", "--raftBootstrap",
             "--raftDataDir", str(tmp_path / "data"), "--tls-cert", str(pair.cert), "--tls-key",
             str(pair.key), "--tls-ca", str(tmp_path / "ca.crt")],
            capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout

    code, said = doctor("n1")
    assert (code, "tls-files\tpass" in said) == (ExitCode.OK, True)
    code, said = doctor("n2")
    assert (code, "tls-files\tfail" in said) == (ExitCode.ERROR, True)
    assert "is not a certificate of node n1" in said


def test_addresses_that_others_cannot_use_are_warnings(tmp_path: Path) -> None:
    """Clients may reach the node under another name, and members may all be on one machine."""
    certs.create_ca(tmp_path)
    pair = certs.create_node(tmp_path, "n1")
    flags = ["--raftId", "n1", "--raftBootstrap", "--raftDataDir", str(tmp_path / "data"),
             "--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tls-ca",
             str(tmp_path / "ca.crt"), "--address", "192.0.2.1:50051"]
    done = subprocess.run([sys.executable, "-m", "elastickv", "doctor", *flags],
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "tls-files\twarn" in done.stdout) == (ExitCode.OK, True), done.stdout
    assert "--host 192.0.2.1" in done.stdout
    (tmp_path / "data").write_text("so that the node ends by itself")
    code, errors = run_node(tmp_path, *flags[2:])
    assert code == ExitCode.STARTUP_REFUSED
    assert "is not valid for 192.0.2.1" in errors
    assert "127.0.0.1:50151 is a loopback address" in errors


def test_signals_on_the_way_out_change_nothing(tmp_path: Path) -> None:
    """A service manager and an operator may both send SIGTERM."""
    with contextlib.ExitStack() as servers:
        listening = [servers.enter_context(socket.create_server(("127.0.0.1", 0)))
                     for _ in range(2)]
        address, raft_address = (f"127.0.0.1:{one.getsockname()[1]}" for one in listening)
    with subprocess.Popen(
            [sys.executable, "-m", "elastickv", "node", "--raftId", "n1", "--raftBootstrap",
             "--raftDataDir", str(tmp_path / "data"), "--insecure", "--address", address,
             "--raftAddress", raft_address, "--log-format", "json"],
            stderr=subprocess.PIPE, text=True) as node:
        assert node.stderr is not None
        for line in node.stderr:
            if '"node started"' in line:
                break
        while node.poll() is None:
            node.terminate()
            time.sleep(0.0001)
        assert node.returncode == ExitCode.OK, node.stderr.read()
