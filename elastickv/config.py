"""Settings of a node: one table, three sources, one frozen result.

`SETTINGS` declares every setting once. The command line, the `ELASTICKV_*` variables, the TOML file
of `--config` and `docs/reference/flags.md` are all derived from it. A flag wins over a variable, a
variable over the file, the file over the default. An empty variable counts as not set, so that it
takes nothing away that the file sets.

The rules are pure functions: text in, `NodeSettings` or `ConfigError` out. Only `read_file` and
`load` touch the disk; files that a setting names are checked by whoever opens them.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from elastickv.errors import ConfigError

MIB = 1024 * 1024
VARIABLE_PREFIX = "ELASTICKV_"

MAX_COMMON_NAME_CHARACTERS = 64
"""Of a certificate (RFC 5280, appendix A)."""

_NODE_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


class Kind(enum.Enum):
    """How a setting's text is read."""

    NODE_ID = "id"
    ADDRESS = "host:port"
    MEMBERS = "id=host:port,..."
    NAMES = "name,..."
    PATH = "path"
    BOOL = "bool"
    INT = "integer"
    CHOICE = "choice"
    DURATION = "duration"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the settings table.

    `name` is the attribute of `NodeSettings`; the kebab-case flag, the variable and the key in the
    file follow from it. `go_flag` is the spelling of the Go node where that differs.
    `minimum` and `maximum` are inclusive bounds of an INT.
    """

    name: str
    kind: Kind
    help: str
    default: str = ""
    go_flag: str = ""
    minimum: int = 0
    maximum: int = 0
    choices: tuple[str, ...] = ()
    required: bool = False

    @property
    def key(self) -> str:
        """The key in the configuration file."""
        return self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """Every spelling on the command line, the one used in messages first."""
        kebab = f"--{self.key}"
        return (f"--{self.go_flag}", kebab) if self.go_flag else (kebab,)

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"{VARIABLE_PREFIX}{self.name.upper()}"


SETTINGS: tuple[Setting, ...] = (
    Setting("raft_id", Kind.NODE_ID, "This node's id: the name of its certificate and its place in "
            "the membership. Fixed for the life of its data directory.",
            go_flag="raftId", required=True),
    Setting("address", Kind.ADDRESS, "Where clients reach this node (gRPC).",
            default="127.0.0.1:50051"),
    Setting("raft_address", Kind.ADDRESS, "Where the other members reach this node.",
            default="127.0.0.1:50151", go_flag="raftAddress"),
    Setting("raft_listen_address", Kind.ADDRESS, "Where this node listens for the other members, "
            "and from which host it dials them, if that is not --raftAddress: behind address "
            "translation or a proxy. With a wildcard the system chooses the host."),
    Setting("raft_data_dir", Kind.PATH, "Directory of the log, the store and the wrapped keys. "
            "Created owner-only if absent.", default="data", go_flag="raftDataDir"),
    Setting("raft_bootstrap", Kind.BOOL, "Found a new cluster on the first start; ignored once the "
            "data directory holds a log. Without --raftBootstrapMembers it has one member.",
            default="false", go_flag="raftBootstrap"),
    Setting("raft_bootstrap_members", Kind.MEMBERS, "Members of the cluster to found, this node "
            "included, the same on every one of them. Implies --raftBootstrap.",
            go_flag="raftBootstrapMembers"),
    Setting("raft_join", Kind.MEMBERS, "Members of the cluster that this node is to join, any of "
            "them; it asks them for the membership and waits until it is added (elastickv admin "
            "raft add-learner, add-voter). Ignored once it has joined.", go_flag="raftJoin"),
    Setting("kek_file", Kind.PATH, "File that holds the key-encryption key: exactly 32 bytes, "
            "readable by its owner only.", go_flag="kekFile"),
    Setting("encryption_enabled", Kind.BOOL, "Open the gate for operations that change "
            "encryption. Needs a KEK.", default="false"),
    Setting("encryption_rotate_on_startup", Kind.BOOL, "Rotate both DEKs once if this node leads "
            "after its start, or if whoever does ends before it has.", default="false"),
    Setting("dek_max_age", Kind.DURATION, "Age at which the leader rotates a DEK by itself: a "
            "number and s, m, h or d. 0 = never.", default="0"),
    Setting("dek_max_writes", Kind.INT, "Writes under one DEK: the leader rotates it at 90 % of "
            "them, and refuses writes at 100 %. The same on every member.",
            default=str(1 << 32), minimum=100, maximum=1 << 40),
    Setting("tls_cert", Kind.PATH, "This node's certificate (PEM), alone or followed by the chain "
            "to --tls-ca. --raftId is one of its DNS names; the host of --address should be "
            "another, or one of its IP addresses."),
    Setting("tls_key", Kind.PATH, "The certificate's private key (PEM). Keep it from other users."),
    Setting("tls_ca", Kind.PATH, "Root authority of the certificates of members and clients (PEM). "
            "May hold several: the old and the new one while one replaces the other."),
    Setting("insecure", Kind.BOOL, "No TLS and no client authentication, between members and with "
            "clients. Refused unless every address of clients and members is loopback.",
            default="false"),
    Setting("admin_names", Kind.NAMES, "Common names of the client certificates that may change "
            "keys and membership, the same on every member. Empty = every client; an empty "
            "variable leaves what the file says."),
    Setting("grpc_front", Kind.CHOICE, "What serves gRPC: `h2` is this project's own HTTP/2 front, "
            "several times cheaper per call than `grpc`, which is grpc.aio.", default="h2",
            choices=("h2", "grpc")),
    Setting("grpc_reflection", Kind.BOOL, "Serve gRPC reflection.", default="false"),
    Setting("accept_loops", Kind.INT, "Servers of the `grpc` front on the client port; more accept "
            "more concurrent calls.", default="8", minimum=1, maximum=64),
    Setting("metrics_address", Kind.ADDRESS, "Where /metrics, /livez and /readyz are served over "
            "plain HTTP; not served when empty."),
    Setting("audit_log", Kind.PATH, "File to which a line is appended for every administrative "
            "call: who, what, which key ids, the result. Empty = `audit.log` in --raftDataDir."),
    # A log entry holds 64 MiB, of which 2 MiB are for keys, conditions and what sealing adds.
    Setting("max_value_bytes", Kind.INT, "Largest value a write may carry.",
            default=str(8 * MIB), minimum=1, maximum=62 * MIB),
    Setting("flush_interval_ms", Kind.INT, "Longest time that applied writes stay only in the log "
            "and in memory before they go to the store; 8 MiB go at once. A flush competes with "
            "the fsync of the log; what is not flushed is applied again after a crash.",
            default="5000", minimum=1, maximum=60_000),
    Setting("snapshot_entries", Kind.INT, "Entries in the log at which its beginning, which the "
            "store holds, is deleted in whole segments. A member that needs what was deleted is "
            "sent the store.", default="100000", minimum=1, maximum=1_000_000_000),
    Setting("snapshot_log_bytes", Kind.INT, "Size of the log at which its beginning is deleted, as "
            "with --snapshot-entries. What follows a snapshot that a member "
            "is being sent is kept.", default=str(256 * MIB), minimum=MIB, maximum=1 << 40),
    Setting("log_level", Kind.CHOICE, "Least severe level that is logged.", default="info",
            choices=("debug", "info", "warning", "error")),
    Setting("log_format", Kind.CHOICE, "Log lines as JSON objects or as text, on stderr.",
            default="json", choices=("json", "text")),
)

CONFIG_FLAG = "--config"
CONFIG_VARIABLE = "ELASTICKV_CONFIG"


class Address(NamedTuple):
    """`host` (an IPv6 address without its brackets) and `port`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True for 127.0.0.0/8, ::1 and `localhost`; no name is resolved."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_wildcard(self) -> bool:
        """True for 0.0.0.0 and ::, which nobody can connect to."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


class MemberAddress(NamedTuple):
    """One `id=host:port` of --raftBootstrapMembers or --raftJoin."""

    node_id: str
    address: Address


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of a certificate, its private key, and the authority that signs its peers."""

    cert: Path
    key: Path = field(repr=False)
    ca: Path


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What `elastickv node` runs with. Checked: see `resolve`."""

    raft_id: str
    address: Address
    raft_address: Address
    raft_listen_address: Address | None
    raft_data_dir: Path
    raft_bootstrap: bool
    raft_bootstrap_members: tuple[MemberAddress, ...]
    raft_join: tuple[MemberAddress, ...]
    kek_file: Path | None
    encryption_enabled: bool
    encryption_rotate_on_startup: bool
    dek_max_age: int
    dek_max_writes: int
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    insecure: bool
    admin_names: tuple[str, ...]
    grpc_front: str
    grpc_reflection: bool
    accept_loops: int
    metrics_address: Address | None
    audit_log: Path | None
    max_value_bytes: int
    flush_interval_ms: int
    snapshot_entries: int
    snapshot_log_bytes: int
    log_level: str
    log_format: str

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files, or None with --insecure."""
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)

    @property
    def audit_file(self) -> Path:
        """Where the audit log is."""
        return self.audit_log or self.raft_data_dir / "audit.log"

    @property
    def raft_listen(self) -> Address:
        """Where this node listens for the other members."""
        return self.raft_listen_address or self.raft_address

    @property
    def raft_dial_from(self) -> str:
        """The host that connections to other members come from; "" when the system chooses."""
        listen = self.raft_listen_address
        return "" if listen is None or listen.is_wildcard else listen.host

    @property
    def founding_members(self) -> tuple[MemberAddress, ...]:
        """Members of the cluster to found on the first start; empty when this node founds none."""
        if self.raft_bootstrap_members:
            return self.raft_bootstrap_members
        if self.raft_bootstrap:
            return (MemberAddress(self.raft_id, self.raft_address),)
        return ()


# --- reading text ----------------------------------------------------------------------------


def parse_address(text: str, where: str) -> Address:
    """`host:port` or `[ipv6]:port`. `where` names the source in the `ConfigError`."""
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        valid_host = is_ip_address(host)
    else:
        valid_host = bool(_HOST_NAME.fullmatch(host))
    if not (colon and valid_host and port_text.isascii() and port_text.isdigit()
            and len(port_text) <= 5 and 1 <= int(port_text) <= 65535):
        raise ConfigError(f"{where}: {text!r} is not host:port with a port from 1 to 65535",
                          remedy="give for example 127.0.0.1:50051 or [::1]:50051")
    return Address(host, int(port_text))


def is_ip_address(host: str) -> bool:
    """Whether `host` is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_node_id(text: str, where: str) -> str:
    """A node id: the common name and DNS name of a certificate, so at most 64 plain characters."""
    if not _NODE_ID.fullmatch(text):
        raise ConfigError(f"{where}: {text!r} is not a node id",
                          remedy="use 1 to 64 letters, digits, dots, underscores or hyphens, "
                                 "with a letter or digit first and last")
    return text


def require_certifiable(node_id: str) -> None:
    """Raise `ConfigError` for an id by which no certificate could tell a node."""
    if node_id == "localhost":
        raise ConfigError("localhost cannot be the id of a new node: the certificate of every node"
                          " has this name", remedy="choose another one")


def parse_members(text: str, where: str) -> tuple[MemberAddress, ...]:
    """`n1=host:port,n2=host:port`; neither an id nor an address may appear twice."""
    members: list[MemberAddress] = []
    for part in text.split(","):
        node_id, equals, address = part.strip().partition("=")
        if not equals:
            raise ConfigError(f"{where}: {part.strip()!r} is not id=host:port",
                              remedy="give for example n1=10.0.0.1:50151,n2=10.0.0.2:50151")
        members.append(MemberAddress(parse_node_id(node_id, where),
                                     parse_address(address, where)))
    for attribute in ("node_id", "address"):
        values = [getattr(member, attribute) for member in members]
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None:
            raise ConfigError(f"{where}: {repeated} is listed twice",
                              remedy="list each member once, with its own address")
    return tuple(members)


def parse_names(text: str, where: str) -> tuple[str, ...]:
    """`alice,bob`: common names of certificates, each once."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if not (name.isprintable() and 1 <= len(name) <= MAX_COMMON_NAME_CHARACTERS):
            raise ConfigError(f"{where}: {name!r} is not a certificate's common name",
                              remedy="give for example alice,bob")
        if names.count(name) > 1:
            raise ConfigError(f"{where}: {name} is listed twice", remedy="list each name once")
    return names


def _parse_bool(text: str, where: str) -> bool:
    lowered = text.lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ConfigError(f"{where}: {text!r} is neither true nor false", remedy="say true or false")


def _parse_int(setting: Setting, text: str, where: str) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        number = int(text)
        if setting.minimum <= number <= setting.maximum:
            return number
    raise ConfigError(f"{where}: {text!r} is not a whole number from {setting.minimum} to "
                      f"{setting.maximum}", remedy="give a number within the limits")


def parse_duration(text: str, where: str) -> int:
    """Seconds in `90d`, `12h`, `30m`, `45s` or `0`."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])|0", text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} is not a duration",
                          remedy="give a whole number and a unit: 45s, 30m, 12h, 90d, or 0")
    return int(match[1]) * _UNIT_S[match[2]] if match[1] else 0


def parse_value(setting: Setting, text: str, where: str) -> object:
    """The typed value of `text`, which came from `where`; "" means unset where that is allowed."""
    if text == "" and not setting.default:
        if setting.required:
            raise ConfigError(f"{where} is empty", remedy=f"give {setting.flags[0]} a value")
        return () if setting.kind in (Kind.MEMBERS, Kind.NAMES) else None
    match setting.kind:
        case Kind.NODE_ID:
            return parse_node_id(text, where)
        case Kind.ADDRESS:
            return parse_address(text, where)
        case Kind.MEMBERS:
            return parse_members(text, where)
        case Kind.NAMES:
            return parse_names(text, where)
        case Kind.BOOL:
            return _parse_bool(text, where)
        case Kind.INT:
            return _parse_int(setting, text, where)
        case Kind.DURATION:
            return parse_duration(text, where)
        case Kind.PATH:
            if text == "" or "\0" in text:
                raise ConfigError(f"{where}: not a path", remedy="name a file or directory")
            return Path(text)
        case Kind.CHOICE:
            if text not in setting.choices:
                raise ConfigError(f"{where}: {text!r} is not one of {', '.join(setting.choices)}",
                                  remedy="choose one of them")
            return text


# --- gathering the sources -------------------------------------------------------------------


def parse_file(text: str, path: Path) -> dict[str, str]:
    """A TOML configuration file as `{setting name: text}`.

    Keys are the kebab-case flag names at the top level. Raises `ConfigError` for a syntax error, an
    unknown key, and a value that is not text, a number, a boolean or (members, names) a list of
    texts.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", remedy="mend the file") from None
    by_key = {setting.key: setting for setting in SETTINGS}
    values: dict[str, str] = {}
    for key, value in document.items():
        setting = by_key.get(key)
        if setting is None:
            raise ConfigError(f"{path}: unknown key {key!r}",
                              remedy=f"use one of: {', '.join(sorted(by_key))}")
        values[setting.name] = _file_text(setting, value, f"{setting.key} in {path}")
    return values


def _file_text(setting: Setting, value: object, where: str) -> str:
    accepted: dict[Kind, type] = {Kind.BOOL: bool, Kind.INT: int}
    wanted = accepted.get(setting.kind, str)
    if setting.kind in (Kind.MEMBERS, Kind.NAMES) and isinstance(value, list) and all(
            isinstance(item, str) for item in value):
        if setting.kind is Kind.NAMES:
            for name in value:
                _require_one_name(name, where)
        return ",".join(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where}: a {type(value).__name__} where {setting.kind.value} belongs",
                          remedy=f"give a TOML {wanted.__name__}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_one_name(text: str, where: str) -> None:
    if "," in text:
        raise ConfigError(f"{where}: {text!r} is a common name with a comma",
                          remedy="give each name an item of its own; whose common name has a comma "
                                 "needs another certificate to be an administrator")
    parse_names(text, where)


def read_file(path: Path) -> dict[str, str]:
    """`parse_file` of the file at `path`; a file that cannot be read is a `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{CONFIG_FLAG}: cannot read {path}: {reason}",
                          remedy="name a readable TOML file") from None
    return parse_file(text, path)


def resolve(flags: Mapping[str, str], environment: Mapping[str, str],
            file: Mapping[str, str] | None = None, file_path: Path | None = None) -> NodeSettings:
    """Merge the sources and check the result.

    `flags` and `file` map setting names to text; `environment` is the process environment. Raises
    `ConfigError` that names the flag (or variable, or key) and the remedy.
    """
    file = file or {}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        if setting.name in flags:
            text, where = flags[setting.name], setting.flags[0]
        elif environment.get(setting.variable):
            text, where = environment[setting.variable], setting.variable
        elif setting.name in file:
            text, where = file[setting.name], f"{setting.key} in {file_path}"
        elif setting.required:
            raise ConfigError(f"{setting.flags[0]} is missing",
                              remedy=f"give {setting.flags[0]}, set {setting.variable}, or put "
                                     f"{setting.key} into the file of {CONFIG_FLAG}")
        else:
            text, where = setting.default, setting.flags[0]
        values[setting.name] = parse_value(setting, text, where)
    settings = NodeSettings(**values)
    try:
        check(settings)
    except ConfigError as error:
        raise naming_variables(error, flags, environment) from None
    return settings


def naming_variables(error: ConfigError, flags: Mapping[str, str],
                     environment: Mapping[str, str]) -> ConfigError:
    """`error`, and of the flags in its message those that nobody gave: a variable set them."""
    said = [f"{setting.flags[0]} is set by the variable {setting.variable}"
            for setting in SETTINGS
            if setting.name not in flags and environment.get(setting.variable)
            and re.search(rf"{setting.flags[0]}(?![\w-])", error.message)]
    return ConfigError("; ".join([error.message, *said]), remedy=error.remedy)


def without_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a node whose settings all come from its command line: a shell may have
    those of a client, as from the `client.env` of a local cluster."""
    return {name: value for name, value in environment.items()
            if not name.startswith(VARIABLE_PREFIX)}


def load(flags: Mapping[str, str], environment: Mapping[str, str],
         config_path: str = "") -> NodeSettings:
    """`resolve` with the file of `config_path` or of `ELASTICKV_CONFIG`, if any."""
    chosen = config_path or environment.get(CONFIG_VARIABLE, "")
    if not chosen:
        return resolve(flags, environment)
    path = Path(chosen)
    return resolve(flags, environment, read_file(path), path)


# --- rules between settings ------------------------------------------------------------------


def check(settings: NodeSettings) -> None:
    """Refuse settings that contradict each other. Raises `ConfigError`."""
    _check_addresses(settings)
    _check_members(settings)
    _check_join(settings)
    _check_transport(settings)


def _check_addresses(settings: NodeSettings) -> None:
    for flag, address in (("--address", settings.address),
                          ("--raftAddress", settings.raft_address)):
        if address.is_wildcard:
            raise ConfigError(
                f"{flag} {address} is a wildcard that nobody can connect to",
                remedy="give the address or host name under which this node is reached")
    if settings.address == settings.raft_address:
        raise ConfigError(f"--address and --raftAddress are both {settings.address}",
                          remedy="give clients and members different ports")
    if settings.raft_listen == settings.address:
        raise ConfigError(f"--address and --raft-listen-address are both {settings.address}",
                          remedy="give clients and members different ports")
    if settings.metrics_address in (settings.address, settings.raft_listen):
        raise ConfigError(f"--metrics-address {settings.metrics_address} is taken by another flag",
                          remedy="give each its own port")


def _check_join(settings: NodeSettings) -> None:
    if not settings.raft_join:
        return
    if settings.founding_members:
        raise ConfigError("--raftJoin contradicts --raftBootstrap and --raftBootstrapMembers",
                          remedy="a node either founds a cluster or joins one")
    for member in settings.raft_join:
        if settings.raft_id == member.node_id or settings.raft_address == member.address:
            raise ConfigError(f"--raftJoin lists this node, {member.node_id}={member.address}",
                              remedy="list members that the cluster has already")


def _check_members(settings: NodeSettings) -> None:
    members = settings.raft_bootstrap_members
    if not members:
        return
    own = next((member for member in members if member.node_id == settings.raft_id), None)
    if own is None:
        raise ConfigError(f"--raftBootstrapMembers does not list this node, {settings.raft_id}",
                          remedy="list every founding member, this node included")
    if own.address != settings.raft_address:
        raise ConfigError(f"--raftBootstrapMembers gives {settings.raft_id} the address "
                          f"{own.address}, but --raftAddress is {settings.raft_address}",
                          remedy="make the two equal")


def _check_transport(settings: NodeSettings) -> None:
    files = {"--tls-cert": settings.tls_cert, "--tls-key": settings.tls_key,
             "--tls-ca": settings.tls_ca}
    given = [flag for flag, path in files.items() if path is not None]
    missing = [flag for flag, path in files.items() if path is None]
    if settings.insecure:
        if given:
            raise ConfigError(f"--insecure contradicts {', '.join(given)}",
                              remedy="drop --insecure to use TLS")
        if settings.admin_names:
            raise ConfigError("--insecure contradicts --admin-names: no caller has a certificate",
                              remedy="use TLS, or drop --admin-names")
        _check_insecure_addresses(settings)
    elif missing:
        raise ConfigError(f"{', '.join(missing)} missing",
                          remedy="make certificates with `elastickv certs init` and `elastickv "
                                 "certs node`, or give --insecure on loopback addresses")


def _check_insecure_addresses(settings: NodeSettings) -> None:
    named: Sequence[tuple[str, Address]] = [
        ("--address", settings.address), ("--raftAddress", settings.raft_address),
        ("--raft-listen-address", settings.raft_listen),
        *((f"--raftBootstrapMembers {member.node_id}", member.address)
          for member in settings.raft_bootstrap_members),
        *((f"--raftJoin {member.node_id}", member.address) for member in settings.raft_join)]
    for flag, address in named:
        if not address.is_loopback:
            raise ConfigError(
                f"--insecure is refused: {flag} {address} is not a loopback address",
                remedy="use --tls-cert, --tls-key and --tls-ca, or loopback addresses")


def unreachable_founder(settings: NodeSettings) -> str:
    """Why no other machine could join the cluster that this node founds; "" = nothing is wrong.

    No reason not to start: a cluster may have one member for good, or all of them on one machine.
    """
    if not settings.founding_members or settings.address.is_loopback \
            or not settings.raft_address.is_loopback:
        return ""
    return (f"--raftAddress {settings.raft_address} is a loopback address, and a member keeps the"
            " one that it founds a cluster with: members on other machines could not reach it")


def describe(settings: NodeSettings) -> dict[str, str]:
    """The settings as text for the start-up log line. Paths only: no file's content."""
    def text(setting: Setting) -> str:
        value = getattr(settings, setting.name)
        match setting.kind:
            case Kind.MEMBERS:
                return ",".join(f"{member.node_id}={member.address}" for member in value)
            case Kind.NAMES:
                return ",".join(value)
        return str(value).lower() if isinstance(value, bool) else str(value or "")

    return {setting.name: text(setting) for setting in SETTINGS}
