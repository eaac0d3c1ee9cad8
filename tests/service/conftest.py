"""Programs for tests on mounts."""

from __future__ import annotations

from tests.clients.touchers import start_toucher, toucher_program  # noqa: F401 - fixtures
from tests.watched import events, region, start  # noqa: F401 - fixtures
