"""The page about running the service names what there is."""

import re
from pathlib import Path
from typing import Final

import server
from metrics import REFUSALS, Metrics
from streaming import scheduler
from wire import handler

TEXT: Final = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")


def test_every_metric_is_listed_with_its_labels() -> None:
    listed = {
        name: set(re.findall(r"\w+", labels))
        for name, labels in re.findall(r"^\| `(dragoman_\w+)` \| (.*?)\|", TEXT, re.M)
    }
    metrics = Metrics()
    families = [family for family in metrics.registry.collect() if family.name.startswith("dragoman_")]
    shown = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert shown == set(listed)
    for name, collector in metrics.registry._names_to_collectors.items():
        if name in listed:
            assert set(getattr(collector, "_labelnames", ())) == listed[name], name
    assert all(f"`{reason}`" in TEXT for reason in REFUSALS)
    asked = set(re.findall(r"\((dragoman_\w+?)(?:_sum|_bucket)?[{\[]", TEXT))
    assert len(asked) == 5 and asked <= set(listed)


def test_the_defaults() -> None:
    defaults = server.Settings()
    assert f"| `--max-sessions` | {defaults.max_sessions} |" in TEXT
    assert (defaults.max_session_s, defaults.max_lag_s, defaults.metrics) == (None, None, False)
    assert f"`--drain-s` ({defaults.drain_s:g} s)" in TEXT
    assert f"for which it waits {server.GOODBYE_TIMEOUT_S:g} s more" in TEXT
    assert f"may be behind for {scheduler._LATE_S:g} s" in TEXT
    assert f"did not take an event in {handler._SEND_TIMEOUT_S:g} s" in TEXT


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", TEXT, re.M)}
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= headings
