"""elastickv.config: one table, three sources, every refusal names its source and a remedy."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv import config
from elastickv.config import Address, Kind, MemberAddress, NodeSettings
from elastickv.errors import ConfigError, ExitCode
from elastickv.node import REQUEST_SLACK_BYTES
from elastickv.wire import MAX_ENTRY_BYTES

LOCAL = {"raft_id": "n1", "insecure": "true"}
TLS = {"raft_id": "n1", "tls_cert": "c", "tls_key": "k", "tls_ca": "a"}


def test_table_and_dataclass_agree() -> None:
    names = [setting.name for setting in config.SETTINGS]
    assert names == [field.name for field in dataclasses.fields(NodeSettings)]


def test_no_spelling_is_used_twice() -> None:
    spellings = [flag for setting in config.SETTINGS for flag in setting.flags]
    assert len(spellings) == len(set(spellings))
    assert config.CONFIG_FLAG not in spellings


def test_spellings_of_the_go_node_are_kept() -> None:
    spellings = {flag for setting in config.SETTINGS for flag in setting.flags}
    assert {"--kekFile", "--encryption-enabled", "--raftId", "--address", "--raftDataDir",
            "--raftBootstrap", "--raftBootstrapMembers"} <= spellings
    assert {"--kek-file", "--raft-id", "--raft-data-dir", "--raft-bootstrap",
            "--raft-bootstrap-members"} <= spellings


def test_defaults_parse_and_agree_with_the_api() -> None:
    settings = config.resolve(LOCAL, {})
    assert settings.address == Address("127.0.0.1", 50051)
    assert settings.max_value_bytes == 8 << 20
    assert settings.raft_data_dir == Path("data")
    assert settings.kek_file is None
    assert settings.tls is None
    assert not settings.encryption_enabled


def test_the_largest_value_fits_a_log_entry() -> None:
    limit = next(setting.maximum for setting in config.SETTINGS
                 if setting.name == "max_value_bytes")
    assert limit + 2 * REQUEST_SLACK_BYTES == MAX_ENTRY_BYTES


@pytest.mark.parametrize(("flag", "variable", "file", "expected"), [
    ("error", "warning", "debug", "error"),
    (None, "warning", "debug", "warning"),
    (None, None, "debug", "debug"),
    (None, None, None, "info"),
])
def test_precedence(flag: str | None, variable: str | None, file: str | None,
                    expected: str) -> None:
    flags = {**LOCAL, **({"log_level": flag} if flag else {})}
    environment = {"ELASTICKV_LOG_LEVEL": variable} if variable else {}
    assert config.resolve(flags, environment, {"log_level": file} if file else {}
                          ).log_level == expected


def test_a_flag_can_switch_off_what_the_file_switches_on() -> None:
    settings = config.resolve({**LOCAL, "encryption_enabled": "false"},
                              {"ELASTICKV_ENCRYPTION_ENABLED": "true"},
                              {"encryption_enabled": "true"})
    assert settings.encryption_enabled is False


def sample_of(setting: config.Setting) -> tuple[dict[str, str], str]:
    """A value of `setting` that is not its default, and what else a node needs with it."""
    base = {name: text for name, text in TLS.items() if name != setting.name}
    if setting.name == "insecure":
        base = {"raft_id": "n1"}
    if setting.name == "raft_join":
        base |= {"raft_id": "n9", "raft_address": "127.0.0.1:9"}
    return base, {
        Kind.NODE_ID: "node-7", Kind.ADDRESS: "10.0.0.7:7000", Kind.PATH: "/somewhere",
        Kind.MEMBERS: "n1=127.0.0.1:50151", Kind.BOOL: "true", Kind.INT: str(setting.maximum),
        Kind.CHOICE: setting.choices[-1] if setting.choices else "", Kind.DURATION: "90d",
        Kind.NAMES: "alice,bob",
    }[setting.kind]


@pytest.mark.parametrize("setting", config.SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_can_come_from_the_environment_and_the_file(
        setting: config.Setting) -> None:
    base, sample = sample_of(setting)
    by_variable = config.resolve(base, {setting.variable: sample})
    toml_value = {Kind.BOOL: "true", Kind.INT: sample}.get(setting.kind, f'"{sample}"')
    file = config.parse_file(f"{setting.key} = {toml_value}", Path("f.toml"))
    assert by_variable == config.resolve(base, {}, file)
    value = getattr(by_variable, setting.name)
    assert value == config.parse_value(setting, sample, "here")
    assert setting.required or value != config.parse_value(setting, setting.default, "here")


@pytest.mark.parametrize("setting", config.SETTINGS, ids=lambda setting: setting.name)
def test_an_empty_variable_counts_as_not_set(setting: config.Setting) -> None:
    """Above all it takes nothing away that the file sets: administrators, a KEK, an audit log."""
    base, sample = sample_of(setting)
    file = {setting.name: sample}
    assert config.resolve(base, {setting.variable: ""}, file) == config.resolve(base, {}, file)


@pytest.mark.parametrize(("text", "names"), [
    ("", ()), ("alice", ("alice",)), ("alice, Bob Smith ", ("alice", "Bob Smith"))])
def test_administrators_are_named_by_their_certificates(text: str, names: tuple[str, ...]) -> None:
    settings = config.resolve({**TLS, "admin_names": text}, {})
    assert settings.admin_names == names
    assert config.describe(settings)["admin_names"] == ",".join(names)
    as_list = config.parse_file(f"admin-names = {list(names)}".replace("'", '"'), Path("f.toml"))
    assert config.resolve(TLS, {}, as_list).admin_names == names


@pytest.mark.parametrize("text", ["alice,", ",", "a\nb", "alice,alice", "x" * 65])
def test_what_is_no_name_of_an_administrator(text: str) -> None:
    with pytest.raises(ConfigError, match="--admin-names"):
        config.resolve({**TLS, "admin_names": text}, {})


@pytest.mark.parametrize(("items", "words"), [
    ('["Doe, John"]', "name with a comma"), ('["alice,bob"]', "name with a comma"),
    ('[""]', "'' is not a"), ('["alice", " "]', "'' is not a")])
def test_an_item_of_the_file_s_list_is_one_administrator(items: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"admin-names in f\.toml.*{words}"):
        config.parse_file(f"admin-names = {items}", Path("f.toml"))


def test_administrators_need_tls() -> None:
    with pytest.raises(ConfigError, match="--insecure contradicts --admin-names"):
        config.resolve({**LOCAL, "admin_names": "alice"}, {})


def test_a_node_may_listen_elsewhere_than_where_members_reach_it() -> None:
    assert config.resolve(TLS, {}).raft_listen == config.resolve(TLS, {}).raft_address
    settings = config.resolve({**TLS, "raft_listen_address": "0.0.0.0:7000"}, {})
    assert str(settings.raft_listen) == "0.0.0.0:7000"
    assert settings.raft_dial_from == config.resolve(TLS, {}).raft_dial_from == ""
    inside = config.resolve({**TLS, "raft_listen_address": "10.0.0.9:7000"}, {})
    assert inside.raft_dial_from == "10.0.0.9"
    assert settings.raft_address == config.resolve(TLS, {}).raft_address


class Refusal(NamedTuple):
    """Settings, the words that the message must hold."""

    name: str
    values: dict[str, str]
    words: tuple[str, ...]


REFUSALS = [
    Refusal("no id", {"insecure": "true"}, ("--raftId is missing", "ELASTICKV_RAFT_ID")),
    Refusal("empty id", {**LOCAL, "raft_id": ""}, ("--raftId is empty",)),
    Refusal("id with a slash", {**LOCAL, "raft_id": "a/b"}, ("--raftId", "'a/b'")),
    Refusal("id of 65 characters", {**LOCAL, "raft_id": "n" * 65}, ("--raftId", "64")),
    Refusal("id that is a path", {**LOCAL, "raft_id": ".."}, ("--raftId",)),
    Refusal("no port", {**LOCAL, "address": "localhost"}, ("--address", "host:port")),
    Refusal("port 0", {**LOCAL, "address": "localhost:0"}, ("--address", "1 to 65535")),
    Refusal("port 65536", {**LOCAL, "address": "localhost:65536"}, ("--address",)),
    Refusal("huge port", {**LOCAL, "address": "localhost:" + "1" * 5000}, ("--address",)),
    Refusal("port in other digits", {**LOCAL, "address": "localhost:٥٠٠"}, ("--address",)),
    Refusal("port with leading zeros", {**LOCAL, "address": "localhost:000080"}, ("--address",)),
    Refusal("digits behind a port", {**LOCAL, "address": "localhost:0000500511"}, ("--address",)),
    Refusal("host with an empty label", {**LOCAL, "address": "n1..example.com:50051"},
            ("--address", "host:port")),
    Refusal("host with a long label", {**LOCAL, "address": f"{'a' * 64}.example:50051"},
            ("--address",)),
    Refusal("bare IPv6", {**LOCAL, "address": "::1:5000"}, ("--address",)),
    Refusal("host with a space", {**LOCAL, "address": "a b:5000"}, ("--address",)),
    Refusal("wildcard", {**TLS, "address": "0.0.0.0:50051"}, ("--address", "wildcard")),
    Refusal("IPv6 wildcard", {**TLS, "raft_address": "[::]:50151"}, ("--raftAddress", "wildcard")),
    Refusal("one address for both", {**LOCAL, "raft_address": "127.0.0.1:50051"},
            ("--address and --raftAddress",)),
    Refusal("members on the client port", {**LOCAL, "raft_listen_address": "127.0.0.1:50051"},
            ("--address and --raft-listen-address",)),
    Refusal("metrics on the members' port", {**LOCAL, "raft_listen_address": "127.0.0.1:9",
                                             "metrics_address": "127.0.0.1:9"},
            ("--metrics-address",)),
    Refusal("insecure on a real listening address",
            {**LOCAL, "raft_listen_address": "0.0.0.0:50151"},
            ("--insecure is refused", "--raft-listen-address")),
    Refusal("metrics on the client port", {**LOCAL, "metrics_address": "127.0.0.1:50051"},
            ("--metrics-address",)),
    Refusal("boolean", {**LOCAL, "encryption_enabled": "perhaps"},
            ("--encryption-enabled", "'perhaps'")),
    Refusal("integer too small", {**LOCAL, "accept_loops": "0"},
            ("--accept-loops", "from 1 to 64")),
    Refusal("integer too large", {**LOCAL, "accept_loops": "65"}, ("--accept-loops",)),
    Refusal("not an integer", {**LOCAL, "accept_loops": "4.5"}, ("--accept-loops",)),
    Refusal("endless integer", {**LOCAL, "accept_loops": "9" * 5000}, ("--accept-loops",)),
    Refusal("empty integer", {**LOCAL, "accept_loops": ""}, ("--accept-loops",)),
    Refusal("choice", {**LOCAL, "log_level": "loud"}, ("--log-level", "debug, info")),
    Refusal("path with NUL", {**LOCAL, "raft_data_dir": "a\0b"}, ("--raftDataDir",)),
    Refusal("member without an id", {**LOCAL, "raft_bootstrap_members": "127.0.0.1:1"},
            ("--raftBootstrapMembers", "id=host:port")),
    Refusal("member twice", {**LOCAL, "raft_bootstrap_members":
                             "n1=127.0.0.1:50151,n1=127.0.0.1:2"}, ("n1 is listed twice",)),
    Refusal("member address twice", {**LOCAL, "raft_bootstrap_members":
                                     "n1=127.0.0.1:50151,n2=127.0.0.1:50151"},
            ("127.0.0.1:50151 is listed twice",)),
    Refusal("trailing comma", {**LOCAL, "raft_bootstrap_members": "n1=127.0.0.1:50151,"},
            ("--raftBootstrapMembers",)),
    Refusal("not a founding member", {**LOCAL, "raft_bootstrap_members": "n2=127.0.0.1:50152"},
            ("does not list this node",)),
    Refusal("founding member elsewhere", {**LOCAL, "raft_bootstrap_members": "n1=127.0.0.1:7"},
            ("127.0.0.1:7", "127.0.0.1:50151")),
    Refusal("no transport", {"raft_id": "n1"}, ("--tls-cert, --tls-key, --tls-ca missing",)),
    Refusal("half of TLS", {"raft_id": "n1", "tls_cert": "c"}, ("--tls-key, --tls-ca missing",)),
    Refusal("insecure with TLS", {**TLS, "insecure": "true"},
            ("--insecure contradicts --tls-cert",)),
    Refusal("insecure on a real address", {**LOCAL, "address": "10.0.0.1:50051"},
            ("--insecure is refused", "--address 10.0.0.1:50051")),
    Refusal("insecure on a real raft address", {**LOCAL, "raft_address": "10.0.0.1:50151"},
            ("--insecure is refused", "--raftAddress")),
    Refusal("insecure on a host name", {**LOCAL, "address": "node1.example:50051"},
            ("--insecure is refused",)),
    Refusal("founding and joining", {**LOCAL, "raft_bootstrap": "true", "raft_join": "n2=h:2"},
            ("--raftJoin contradicts", "--raftBootstrap")),
    Refusal("joining itself by id", {**LOCAL, "raft_join": "n1=127.0.0.1:7"}, ("--raftJoin", "n1")),
    Refusal("joining itself by address", {**LOCAL, "raft_join": "n2=127.0.0.1:50151"},
            ("--raftJoin", "n2=127.0.0.1:50151")),
    Refusal("insecure with a far member to join", {**LOCAL, "raft_join": "n2=10.0.0.2:1"},
            ("--insecure is refused", "--raftJoin n2", "10.0.0.2:1")),
    Refusal("insecure with a far member", {**LOCAL, "raft_bootstrap_members":
                                           "n1=127.0.0.1:50151,n2=10.0.0.2:50151"},
            ("--insecure is refused", "n2")),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_refused(case: Refusal) -> None:
    with pytest.raises(ConfigError) as caught:
        config.resolve(case.values, {})
    for word in case.words:
        assert word in str(caught.value)
    assert caught.value.remedy
    assert caught.value.exit_code is ExitCode.USAGE


def test_the_source_is_named_when_it_is_not_a_flag() -> None:
    with pytest.raises(ConfigError, match=r"^ELASTICKV_ACCEPT_LOOPS: '0'"):
        config.resolve(LOCAL, {"ELASTICKV_ACCEPT_LOOPS": "0"})
    with pytest.raises(ConfigError, match=r"^accept-loops in /etc/e\.toml: '0'"):
        config.resolve(LOCAL, {}, {"accept_loops": "0"}, Path("/etc/e.toml"))


@pytest.mark.parametrize(("text", "word"), [
    ("raft-id = ", "not valid TOML"),
    ("raftId = 'n1'", "unknown key 'raftId'"),
    ("typo = 1", "unknown key 'typo'"),
    ("[node]\nraft-id = 'n1'", "unknown key 'node'"),
    ("accept-loops = '4'", "accept-loops"),
    ("accept-loops = true", "accept-loops"),
    ("accept-loops = 4.0", "accept-loops"),
    ("insecure = 1", "insecure"),
    ("insecure = 'true'", "insecure"),
    ("raft-id = 1", "raft-id"),
    ("raft-id = ['n1']", "raft-id"),
    ("raft-bootstrap-members = [1]", "raft-bootstrap-members"),
])
def test_file_refused(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        config.parse_file(text, Path("node.toml"))
    assert "node.toml" in str(caught.value)


def test_members_in_the_file_may_be_a_list() -> None:
    listed = config.parse_file("raft-bootstrap-members = ['n1=[::1]:1', 'n2=h:2']", Path("f"))
    assert config.parse_members(listed["raft_bootstrap_members"], "f") == (
        MemberAddress("n1", Address("::1", 1)), MemberAddress("n2", Address("h", 2)))


def test_load_reads_the_named_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("raft-id = 'n9'\ninsecure = true\n")
    assert config.load({}, {}, str(path)).raft_id == "n9"
    assert config.load({}, {"ELASTICKV_CONFIG": str(path)}).raft_id == "n9"
    assert config.load({"raft_id": "n1"}, {}, str(path)).raft_id == "n1"


@pytest.mark.parametrize("make", ["absent", "directory", "binary"])
def test_unreadable_file(tmp_path: Path, make: str) -> None:
    path = tmp_path / "node.toml"
    if make == "directory":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--config: cannot read .*node\.toml"):
        config.load({}, {}, str(path))


@pytest.mark.parametrize(("values", "expected"), [
    ({}, []),
    ({"raft_bootstrap": "true"}, ["n1=127.0.0.1:50151"]),
    ({"raft_bootstrap_members": "n2=127.0.0.1:50152, n1=127.0.0.1:50151"},
     ["n2=127.0.0.1:50152", "n1=127.0.0.1:50151"]),
], ids=["none", "alone", "listed"])
def test_founding_members(values: dict[str, str], expected: list[str]) -> None:
    settings = config.resolve({**LOCAL, **values}, {})
    assert [f"{m.node_id}={m.address}" for m in settings.founding_members] == expected


def test_a_joining_node_founds_nothing() -> None:
    settings = config.resolve({**LOCAL, "raft_join": "n2=127.0.0.1:2,n3=127.0.0.1:3"}, {})
    assert settings.founding_members == ()
    assert settings.raft_join == (MemberAddress("n2", Address("127.0.0.1", 2)),
                                  MemberAddress("n3", Address("127.0.0.1", 3)))


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
    ("LocalHost", True), ("10.0.0.1", False), ("::2", False), ("localhost.example", False),
    ("128.0.0.1", False), ("0.0.0.0", False), ("::ffff:10.0.0.1", False),
])
def test_loopback(host: str, loopback: bool) -> None:
    assert Address(host, 1).is_loopback is loopback


@given(st.ip_addresses(), st.integers(1, 65535))
def test_addresses_round_trip(ip: object, port: int) -> None:
    address = Address(str(ip), port)
    assert config.parse_address(str(address), "x") == address


@given(st.text(max_size=80))
def test_no_text_breaks_a_parser(text: str) -> None:
    for setting in config.SETTINGS:
        with contextlib.suppress(ConfigError):
            config.parse_value(setting, text, "here")


def test_description_covers_every_setting_and_is_text() -> None:
    settings = config.resolve({**LOCAL, "raft_bootstrap_members": "n1=127.0.0.1:50151"}, {})
    described = config.describe(settings)
    assert list(described) == [setting.name for setting in config.SETTINGS]
    assert described["raft_bootstrap_members"] == "n1=127.0.0.1:50151"
    assert described["insecure"] == "true"
    assert described["kek_file"] == ""
    assert described["address"] == "127.0.0.1:50051"


@pytest.mark.parametrize(("text", "seconds"), [
    ("0", 0), ("45s", 45), ("30m", 1800), ("12h", 43_200), ("90d", 7_776_000), ("0d", 0),
])
def test_durations(text: str, seconds: int) -> None:
    assert config.parse_duration(text, "--dek-max-age") == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1.5h", "1w", "90 d", "9999999999d", "1d "])
def test_what_is_no_duration_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--dek-max-age.*90d"):
        config.parse_duration(text, "--dek-max-age")


@pytest.mark.parametrize(("given", "warns"), [
    pytest.param({"address": "10.0.0.1:1", "raft_bootstrap": "true"}, True, id="default"),
    pytest.param({"address": "h1:1", "raft_address": "localhost:2", "raft_bootstrap_members":
                  "n1=localhost:2"}, True, id="named"),
    pytest.param({"address": "10.0.0.1:1", "raft_address": "10.0.0.1:2", "raft_bootstrap": "true"},
                 False, id="reachable"),
    pytest.param({"raft_bootstrap": "true"}, False, id="both loopback"),
    pytest.param({"address": "10.0.0.1:1"}, False, id="founds none"),
])
def test_a_founder_that_no_other_machine_can_reach_warns(
        given: dict[str, str], warns: bool) -> None:
    settings = config.resolve({**TLS, **given}, {})
    assert ("--raftAddress" in config.unreachable_founder(settings)) is warns


@pytest.mark.parametrize(("flags", "environment", "named"), [
    pytest.param({}, {"ELASTICKV_TLS_CERT": "c"}, ["ELASTICKV_TLS_CERT"], id="a variable"),
    pytest.param({"tls_cert": "c"}, {"ELASTICKV_TLS_CERT": "c"}, [], id="the flag won"),
    pytest.param({"tls_cert": "c"}, {"ELASTICKV_TLS_CERT": ""}, [], id="empty"),
    pytest.param({"tls_cert": "c"}, {"ELASTICKV_LOG_LEVEL": "info"}, [],
                 id="of another setting"),
    pytest.param({"tls_cert": "c"}, {"ELASTICKV_INSECURE": "true", "ELASTICKV_ADDRESS": "h:1"},
                 ["ELASTICKV_INSECURE"], id="the other of two"),
])
def test_settings_that_contradict_each_other_name_the_variables_they_came_from(
        flags: dict[str, str], environment: dict[str, str], named: list[str]) -> None:
    given = {"raft_id": "n1"} | ({} if "ELASTICKV_INSECURE" in environment
                                 else {"insecure": "true"})
    with pytest.raises(ConfigError, match="--insecure contradicts --tls-cert") as caught:
        config.resolve({**flags, **given}, environment)
    assert [name for name in ("ELASTICKV_TLS_CERT", "ELASTICKV_INSECURE", "ELASTICKV_ADDRESS",
                              "ELASTICKV_LOG_LEVEL") if name in str(caught.value)] == named
