"""Shared by every test: bounded hypothesis runs, and an environment without stray settings."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Timing is not what these tests are about, and a shared machine must not fail them.
settings.register_profile("default", deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

_KEPT_VARIABLES = {"ELASTICKV_VECTORS"}


@pytest.fixture(autouse=True)
def no_stray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own ELASTICKV_ variables must not reach a node that a test starts."""
    for name in list(os.environ):
        if name.startswith("ELASTICKV_") and name not in _KEPT_VARIABLES:
            monkeypatch.delenv(name)
