"""The rules for prometheus-adapter give the custom metrics API the metrics that the chart's autoscalers ask for."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import needs_helm, one, rendered

ROOT = Path(__file__).parents[2]
RULES: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text())["rules"]["custom"]
METRICS = {"nanochat_engine_requests_waiting", "nanochat_engine_kv_cache_usage_ratio"}


@needs_helm
def test_each_metric_of_an_autoscaler_has_a_rule() -> None:
    targets = ("engine.autoscaling.waitingRequests=4", "engine.autoscaling.cachePercent=85")
    scaler = one(rendered("engine.autoscaling.enabled=true", *targets), "HorizontalPodAutoscaler", "engine")["spec"]
    asked = {each["pods"]["metric"]["name"] for each in scaler["metrics"] if each["type"] == "Pods"}
    assert asked == METRICS
    (rule,) = RULES
    (pattern,) = re.findall(r'__name__=~"(.+?)"', rule["seriesQuery"])
    assert all(re.fullmatch(pattern, name) for name in asked)
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_query_of_the_rule_is_the_mean_of_each_pod_over_the_last_minute(tmp_path: Path) -> None:
    query = RULES[0]["metricsQuery"]
    filled = {
        "GroupBy": "pod",
        "Series": "nanochat_engine_requests_waiting",
        "LabelMatchers": 'namespace="n",pod=~"a|b"',
    }
    for name, text in filled.items():
        query = query.replace(f"<<.{name}>>", text)
    series = {"a": "0 6 0 6 0", "b": "1 1 1 1 1", "c": "9 9 9 9 9"}
    test = {
        "interval": "12s",
        "input_series": [
            {
                "series": f'nanochat_engine_requests_waiting{{namespace="n",pod="{pod}",instance="{pod}"}}',
                "values": values,
            }
            for pod, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "48s",
                "exp_samples": [{"labels": '{pod="a"}', "value": 2.4}, {"labels": '{pod="b"}', "value": 1}],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"evaluation_interval": "12s", "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
