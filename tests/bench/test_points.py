"""What of a run of the load generator counts as calls that succeeded."""

import pytest
from h2load import LoadFailed, LoadResult
from points import check_responses, point


def result(calls: int, received_bytes: int) -> LoadResult:
    return LoadResult(rate=1.0, succeeded=calls, bytes_per_call=received_bytes / calls, p50_ms=1.0,
                      p99_ms=1.0, generator_cpu_s=0.0, server_cpu_s=0.0)


@pytest.mark.parametrize(("name", "sizes", "calls", "received_bytes", "succeeded"), [
    pytest.param("put-16x8", [21], 1000, 21_000, True, id="every response"),
    pytest.param("put-16x8", [21], 1000, 21_700, True, id="indexes have grown"),
    pytest.param("put-16x8", [21], 1000, 20_979, False, id="one call without a response"),
    pytest.param("put-16x8", [21], 1000, 0, False, id="no response at all"),
    pytest.param("mixed-16x8", [1048] * 9 + [21], 10_000, 9_453_000, True, id="an even mix"),
    pytest.param("mixed-16x8", [1048] * 9 + [21], 10_000, 9_453_000 - 128 * 1048, True,
                 id="a mix whose last round is not complete"),
    pytest.param("mixed-16x8", [1048] * 9 + [21], 10_000, 9_453_000 - 180 * 1048, False,
                 id="a mix in which calls failed"),
    pytest.param("get-16x8", [1092], 1000, 1_091_000, True, id="another key's revision"),
    pytest.param("get-16x8", [1092], 1000, 994 * 1092, False, id="reads that failed"),
])
def test_a_call_without_a_response_has_failed(
        name: str, sizes: list[int], calls: int, received_bytes: int, succeeded: bool) -> None:
    checked = result(calls, received_bytes)
    if succeeded:
        check_responses("etcd", point(name), checked, sizes)
    else:
        with pytest.raises(LoadFailed, match="failed at the gRPC level"):
            check_responses("etcd", point(name), checked, sizes)
