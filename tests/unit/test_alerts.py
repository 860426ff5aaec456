"""Every alert rule is tested with promtool, has a runbook, and asks for metrics that the programs export."""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import yaml

from jobs.train.loop import metrics as training
from services.engine.metrics import Metrics as EngineMetrics
from services.gateway.metrics import Metrics as GatewayMetrics
from services.sandbox.metrics import Metrics as SandboxMetrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/helm/nanochat/files/alerts.yaml"
CASES = ROOT / "tests/data/alerts_test.yaml"
DASHBOARDS = sorted((ROOT / "deploy/helm/nanochat/files/dashboards").glob("*.json"))
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
NAMES = [alert["alert"] for alert in ALERTS]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("command", [("check", "rules", RULES), ("test", "rules", CASES)], ids=["check", "test"])
def test_promtool_accepts_the_rules(command: tuple[Any, ...]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_alert_is_seen_to_fire_and_to_resolve(name: str) -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    mine = [case for case in cases if case["alertname"] == name]
    fired = [bool(case.get("exp_alerts")) for case in sorted(mine, key=lambda case: int(case["eval_time"][:-1]))]
    assert fired[-2:] == [True, False]


def test_every_alert_has_a_runbook() -> None:
    page = (ROOT / "docs/alerts.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == NAMES
    for name, section in sections.items():
        for part in ("**It means**", "**Look at**", "**Do**"):
            assert part in section, name


def exported() -> set[str]:
    """Names of all series of the services and of a training run."""
    load: Any = SimpleNamespace(running=0, waiting=0, parked=0, waiting_tokens=0, blocks_used=0, blocks_total=1)
    executor: Any = SimpleNamespace(
        stats=SimpleNamespace(running=0, queued=0, warm=0),
        config=SimpleNamespace(concurrency=1),
        profile="pod",
        landlock_abi=1,
    )
    registries = [
        GatewayMetrics().registry,
        EngineMetrics(lambda: load, lambda: 1).registry,
        SandboxMetrics(executor).registry,
        prometheus_client.REGISTRY,
    ]
    assert training.TOKENS
    names = set()
    for registry in registries:
        for family in registry.collect():
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
            names |= {family.name + ending for ending in endings.get(family.type, ("",))}
    return names


@pytest.mark.parametrize("path", [RULES, *DASHBOARDS], ids=lambda path: path.name)
def test_metrics_that_alerts_and_dashboards_ask_for_exist(path: Path) -> None:
    asked = set(re.findall(r"nanochat_(?:gateway|engine|sandbox|train)_[a-z_]+", path.read_text()))
    assert asked
    assert asked <= exported()
