"""The one line, the results file, the plot, and the command line's arguments."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jepsen import cli, preload
from jepsen.cli import build_parser, load_time_s, parse_names, settings_of
from jepsen.faults import FAULTS
from jepsen.history import Kind, Record, pair, write_history
from jepsen.nemesis import Window
from jepsen.network import Unsupported
from jepsen.report import Summary, longest_unavailability_s, plot, summarise, write_results
from jepsen.run import (
    Outcome,
    RunSettings,
    cluster_options,
    missing_packages,
)
from jepsen.ticks import TICK_S, until_tick_s
from jepsen.verdict import Validity, judge
from jepsen.workloads import WORKLOADS

SECOND = 1_000_000_000
HISTORY = [
    Record(Kind.INVOKE, 0, 1 * SECOND, "write", "k", 1),
    Record(Kind.OK, 0, 2 * SECOND, "write", "k", 1),
    Record(Kind.INVOKE, 0, 3 * SECOND, "write", "k", 2),
    Record(Kind.INFO, 0, 5 * SECOND, "write", "k", 2, "OutcomeUnknown"),
    Record(Kind.INVOKE, 1, 6 * SECOND, "read", "k"),
    Record(Kind.FAIL, 1, 7 * SECOND, "read", "k"),
    Record(Kind.INVOKE, 1, 8 * SECOND, "read", "k"),
    Record(Kind.OK, 1, 9 * SECOND, "read", "k", 1)]
WINDOWS = [Window("kill-one", 3 * SECOND, "kill -9 n1", 6 * SECOND),
           Window("transfer", 4 * SECOND, "to n2", 4 * SECOND, is_brief=True)]


def test_the_line_has_every_number() -> None:
    summary = summarise(pair(HISTORY), WINDOWS, [judge("a", [], {})], {"kill-one": 1},
                        ["membership"], 0, 10 * SECOND)
    assert summary.line() == (
        "ops 4: 2 ok, 1 fail, 1 info | faults: kill-one 1 (not available: membership) | "
        "longest unavailability 7.00 s | verdict: valid")


@pytest.mark.parametrize(("begin_s", "end_s", "longest_s"), [
    (0, 10, 7.0), (0, 20, 11.0), (2, 9, 7.0), (9, 30, 21.0), (3, 8, 5.0)])
def test_unavailability_counts_from_the_edges_of_the_load(begin_s: int, end_s: int,
                                                          longest_s: float) -> None:
    operations = pair(HISTORY)
    assert longest_unavailability_s(operations, begin_s * SECOND, end_s * SECOND) == longest_s


def test_results_and_plot_are_written(tmp_path: Path) -> None:
    operations = pair(HISTORY)
    verdicts = [judge("a", ["broken"], {"seen": 3}), judge("b", [], {}, ["no idea"])]
    summary = summarise(operations, WINDOWS, verdicts, {"kill-one": 1}, [], 0, 10 * SECOND)
    write_results(tmp_path / "results.json", summary, verdicts, WINDOWS, {"seed": 5})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["verdict"] == "invalid"
    assert results["settings"] == {"seed": 5}
    assert results["checkers"][1] == {"checker": "b", "verdict": "unknown",
                                      "problems": ["no idea"], "facts": {}}
    assert results["windows"][0]["what"] == "kill -9 n1"
    for number, shown in enumerate((operations, [])):
        plot(tmp_path / f"{number}.png", shown, WINDOWS, "title", 10 * SECOND)
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_names() -> None:
    assert parse_names("a,b,a", ("a", "b", "c"), "fault") == ("a", "b")
    assert parse_names("all", ("a", "b"), "fault") == ("a", "b")
    assert parse_names("all,b", ("a", "b"), "fault") == ("a", "b")
    assert parse_names("none", ("a", "b"), "fault", may_be_none=True) == ()


@pytest.mark.parametrize(("text", "message", "may_be_none"), [
    ("none", "unknown fault none; known: a, b, all", False),
    ("a,d", "unknown fault d; known: a, b, all", False),
    ("all,d", "unknown fault d; known: a, b, all", False),
    ("d,all", "unknown fault d; known: a, b, all", True),
    ("all,none", "unknown fault none; known: a, b, all", True),
    ("", "unknown fault ''", False), (",", "unknown fault ','", True)])
def test_names_that_are_refused(text: str, message: str, may_be_none: bool) -> None:
    with pytest.raises(ValueError, match=message):
        parse_names(text, ("a", "b"), "fault", may_be_none=may_be_none)


@pytest.mark.parametrize("arguments", [
    ["run", "--time", "0"], ["run", "--time", "nan"], ["run", "--time", "inf"],
    ["run", "--rate", "0"], ["run", "--rate", "-1"], ["run", "--concurrency", "0"],
    ["run", "--nodes", "4"], ["run", "--workload", "none"], ["run", "--faults", "nosuch"],
    ["run", "--out", "/proc/no/run"], ["all", "--out", "/proc/no/run"], ["all", "--budget", "0"],
    ["all", "--environment", "NAME"], ["check", "--workload", "bank", "{history}"],
    ["run", "--out", "{history}"], ["all", "--out", "{history}"],
    ["run", "--launcher", "nosuch.py"], ["all", "--launcher", ""], ["run", "--launcher", "'"],
    ["check", "--workload", "scans", "{history}"],
    ["check", "--workload", "bank", "/nowhere"]],
    ids=" ".join)
def test_what_cannot_be_run_is_refused_in_a_line(
        arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_history(tmp_path / "history", [
        Record(Kind.INVOKE, 0, 1, "read", "k"), Record(Kind.OK, 0, 2, "read", "k", 5)])
    with pytest.raises(SystemExit) as end:
        cli.main([argument.format(history=tmp_path / "history") for argument in arguments])
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [
    ("-m elastickv", ("-m", "elastickv")), ("a node.py", ("{here}/a node.py",)),
    ("'a node.py' --flag \"x y\"", ("{here}/a node.py", "--flag", "x y"))])
def test_a_launcher_is_a_file_or_a_module(text: str, words: tuple[str, ...], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a node.py").touch()
    monkeypatch.chdir(tmp_path)
    settings = settings_of(build_parser().parse_args(["run", "--launcher", text]), Path("x"))
    assert settings.launcher[1:] == tuple(word.format(here=tmp_path) for word in words)


def test_runs_of_one_second_have_directories_of_their_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.time, "strftime", lambda form: "now")
    names = [cli.make_run_directory(None, "bank", tmp_path).name for _ in range(3)]
    assert names == ["now-bank", "now-bank-2", "now-bank-3"]
    with pytest.raises(ValueError, match="now-bank exists already"):
        cli.make_run_directory(tmp_path / "now-bank", "bank")


def test_all_faults_may_be_mixed_and_named_ones_must_happen() -> None:
    for text in ("all", " all", "all,kill-one"):
        arguments = build_parser().parse_args(["run", "--faults", text, "--seed", "1"])
        mixed = settings_of(arguments, Path("x"))
        assert mixed.faults == tuple(FAULTS)
        assert not mixed.every_fault_must_happen
    options = cluster_options(mixed, mixed.faults)
    assert not options.encrypted
    assert len(options.preloads) == 2
    arguments = build_parser().parse_args(["run", "--faults", "kill-one", "--workload", "all"])
    named = settings_of(arguments, Path("x"))
    assert named.every_fault_must_happen
    assert named.workloads == tuple(WORKLOADS)
    assert cluster_options(named, named.faults).encrypted


@pytest.mark.parametrize(("left_s", "runs", "overhead_s", "load_s"), [
    (1680, 23, 25, 48.04), (60, 1, 20, 40), (30, 3, 25, 6), (-10, 2, 25, 6)])
def test_all_runs_share_the_budget(left_s: float, runs: int, overhead_s: float,
                                   load_s: float) -> None:
    assert load_time_s(left_s, runs, overhead_s) == pytest.approx(load_s, abs=0.01)


@pytest.mark.parametrize("can_mount", [True, False])
def test_where_nothing_can_be_mounted_a_full_disk_is_made_by_libfiu(
        can_mount: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "can_mount", lambda: can_mount)
    settings = settings_of(build_parser().parse_args(["run", "--seed", "1"]), Path("x"))
    options = cluster_options(settings, ["disk-full"])
    assert (options.small_disk_mib > 0) == can_mount
    assert options.preloads == (set() if can_mount else {preload.Preload.FIU})


def test_pauses_that_end_together_are_as_long_as_others() -> None:
    source = random.Random(1)
    wanted = [source.expovariate(1 / 0.2) for _ in range(2000)]
    begun = [source.uniform(1000, 2000) for _ in wanted]
    pauses = [until_tick_s(*each) for each in zip(begun, wanted, strict=True)]
    ends = {round((now_s + pause_s) / TICK_S, 3)
            for now_s, pause_s in zip(begun, pauses, strict=True) if pause_s}
    assert all(end.is_integer() for end in ends)
    assert all(pause_s >= 0 for pause_s in pauses)
    assert sum(pauses) == pytest.approx(sum(wanted), rel=0.1)


def test_a_disk_has_room_for_a_long_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "can_mount", lambda: True)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)

    def size_mib(*arguments: str) -> int:
        settings = settings_of(build_parser().parse_args(["run", "--seed", "1", *arguments]),
                               Path("x"))
        return cluster_options(settings, ["disk-full"]).small_disk_mib

    assert size_mib() == size_mib("--time", "20", "--rate", "1000") == 256
    assert size_mib("--time", "600", "--rate", "500") == 879
    assert size_mib("--time", "600", "--rate", "5000") == 1024


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_libraries(library: preload.Preload) -> list[Path]:
        raise Unsupported(f"{library} is not installed")

    monkeypatch.setattr(preload, "find_libraries", find_libraries)
    assert missing_packages(["clock", "io-error", "kill-one"]) == {
        "clock": "faketime is not installed", "io-error": "fiu is not installed"}


def test_a_run_that_breaks_down_is_unknown_and_the_others_go_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"kill-all": Validity.INVALID}
    ran: list[str] = []

    def execute(settings: RunSettings) -> Outcome:
        (fault,) = settings.faults
        ran.append(fault)
        assert settings.workloads == tuple(WORKLOADS)
        if fault == "pause":
            raise RuntimeError("out of ports")
        return Outcome(Summary(1, {}, {}, [], 0.0, verdicts.get(fault, Validity.VALID)), [])

    monkeypatch.setattr(cli, "execute", execute)
    arguments = ["all", "--seed", "1", "--out"]
    assert cli.main([*arguments, str(tmp_path / "first")]) == 1
    assert ran == list(FAULTS)
    rows = {row["fault"]: row["verdict"]
            for row in json.loads((tmp_path / "first" / "results.json").read_text())}
    assert {fault: verdict for fault, verdict in rows.items() if verdict != "valid"} == {
        "kill-all": "invalid", "pause": "unknown"}
    verdicts.clear()
    assert cli.main([*arguments, str(tmp_path / "second")]) == 1
    monkeypatch.setattr(cli, "execute_one_of_many", lambda settings: ("", Validity.VALID))
    assert cli.main([*arguments, str(tmp_path / "third")]) == 0


def test_a_history_on_disk_is_judged_again(tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.jsonl"
    for last, code, verdict in ((1, 0, "valid"), (7, 1, "invalid")):
        write_history(path, [*HISTORY[:-1], Record(Kind.OK, 1, 9 * SECOND, "read", "k", last)])
        assert cli.main(["check", "--workload", "register", str(path)]) == code
        assert capsys.readouterr().out.endswith(f"verdict: {verdict}\n")
    write_history(path, HISTORY[:4])
    assert cli.main(["check", "--workload", "register", str(path)]) == 1
    assert capsys.readouterr().out.endswith("verdict: unknown\n")
    write_history(path, [*HISTORY[:5], Record(Kind.FAIL, 1, 7 * SECOND, "read", "k", None,
                                              "IntegrityError"), *HISTORY[6:]])
    assert cli.main(["check", "--workload", "register", str(path)]) == 1
    assert capsys.readouterr().out.endswith("verdict: invalid\n")
    write_history(path, HISTORY)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert cli.main(["check", "--workload", "register", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        f"the last line is torn, as by a run that was killed, and left out: {whole[:20]}")
    path.write_text("not a record\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--workload", "register", str(path)])
    assert ended.value.code == 2


@pytest.mark.parametrize("value", [5, "text", [], [5], ["text"], {"x": []}], ids=str)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_read_of_another_form_is_never_valid(workload: str, value: object, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    f = "scan" if workload == "scans" else "read"
    write_history(tmp_path / "history", [
        Record(Kind.INVOKE, 0, 1, f, "k", 0), Record(Kind.OK, 0, 2, f, "k", value)])
    try:
        code = cli.main(["check", "--workload", workload, str(tmp_path / "history")])
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_the_history_in_the_manual_is_one(tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    manual = (Path(cli.__file__).parent / "README.md").read_text().splitlines()
    path = tmp_path / "history.jsonl"
    path.write_text("".join(f"{line}\n" for line in manual if line.startswith('    {"kind"')))
    assert cli.main(["check", "--workload", "scans", str(path)]) == 0
    assert capsys.readouterr().out == "verdict: valid\n"


def test_every_package_is_named_and_described() -> None:
    assert len(FAULTS) == 24
    for name, fault in FAULTS.items():
        assert fault.name == name
        assert fault.__doc__
    assert Validity.UNKNOWN != Validity.VALID
