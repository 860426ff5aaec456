"""helm refuses wrong values of the chart, and its message names the value."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.teach.lesson_jobs import lesson_job
from nanochat_core.lessons.records import Lesson, Plan
from services.gateway.settings import GatewaySettings
from tests.support.chart import CHART, ENVIRONMENTS, needs_helm, one, rendered, template, with_environments
from tests.support.lesson_cluster import RULES

pytestmark = needs_helm

LESSON = Lesson("demo", 7, "queued", "ada", "own.md", "", {}, Plan())


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("gatway.replicas=2", "gatway"),
        ("nameOverride=1", "nameOverride"),
        (f"fullnameOverride={'n' * 51}", "fullnameOverride"),
        ("image.pullPolicy=Sometimes", "image/pullPolicy"),
        ("image.pullSecrets=registry", "image/pullSecrets"),
        ("image.pullSecrets[0].name=registry", "image/pullSecrets/0"),
        ("image.digest=sha256:1", "digest"),
        ("store.type=nfs", "store/type"),
        ("store.type=s3", "store.s3.url"),
        ("store.s3.url=https://bucket", "store/s3/url"),
        ("store.s3.endpoint=minio:9000", "store/s3/endpoint"),
        ("store.s3.region=", "store/s3/region"),
        ("store.pvc.size=20 GB", "store/pvc/size"),
        ("store.pvc.accessModes[0]=ReadWriteAll", "store/pvc/accessModes"),
        ("store.pvc.accessModes=null", "accessModes"),
        ("bootstrap.enabled=1", "bootstrap/enabled"),
        ("bootstrap.deadlineSeconds=1", "bootstrap/deadlineSeconds"),
        ("bootstrap.recipe=speedrun", "recipe"),
        ("model=../demo", "at '/model'"),
        ("model=", "at '/model'"),
        ("models[0].replicas=2", "at '/models/0': missing property 'name'"),
        ("models[0].name=demo", "models[0].name is demo, which another engine of the release serves"),
        ("models[0].name=b/a", "models/0/name"),
        ("engine.revision=latest", "engine/revision"),
        ("gateway.image=", "gateway/image"),
        ("gateway.replicas=-1", "gateway/replicas"),
        ("gateway.replicas=two", "gateway/replicas"),
        ("gateway.service.type=Ingress", "gateway/service/type"),
        ("gateway.service.port=70000", "gateway/service/port"),
        ("gateway.drainSeconds=-1", "gateway/drainSeconds"),
        ("gateway.rollingUpdate.maxSurge=all", "gateway/rollingUpdate/maxSurge"),
        ("gateway.extraEnv.1A=b", "gateway/extraEnv"),
        ("gateway.priorityClassName=1", "gateway/priorityClassName"),
        ("gateway.autoscaling.waitingRequests=4", "waitingRequests"),
        ("gateway.autoscaling.enabled=yes", "gateway/autoscaling/enabled"),
        ("gateway.digest=latest", "gateway/digest"),
        ("gateway.podAnnotations.a=1", "gateway/podAnnotations/a"),
        ("gateway.pod.containers[0].name=a", "containers"),
        ("sandbox.pod.initContainers[0].name=a", "sandbox/pod/initContainers/0"),
        ("engine.extraVolumes[0].emptyDir.medium=Memory", "engine/extraVolumes/0"),
        ("admission.anonymousScopes[0]=admin", "admission/anonymousScopes/0"),
        ("admission.requestsPerMinute=-1", "admission/requestsPerMinute"),
        ("admission.redis.failure=ignore", "admission/redis/failure"),
        ("admission.redis.secret=redis,admission.keysSecret=keys", "admission.keysSecret and admission.redis.secret"),
        ("engine.gpu.count=-1", "engine/gpu/count"),
        ("engine.gpu.resourceName=", "engine/gpu/resourceName"),
        ("engine.startupSeconds=1", "engine/startupSeconds"),
        ("engine.cacheSize=large", "engine/cacheSize"),
        ("engine.resources.limits.memory=4 Gi", "engine/resources/limits/memory"),
        ("engine.resources.claims=1", "claims"),
        ("engine.autoscaling.minReplicas=0", "engine/autoscaling/minReplicas"),
        ("engine.autoscaling.cachePercent=101", "engine/autoscaling/cachePercent"),
        ("canary.revision=latest", "canary/revision"),
        ("canary.percent=91", "canary/percent"),
        ("canary.replicas=0", "canary/replicas"),
        ("engine.keda.enabled=true", "engine.keda.prometheusUrl"),
        ("engine.keda.minReplicas=-1", "engine/keda/minReplicas"),
        ("engine.keda.prometheusUrl=prometheus:9090", "engine/keda/prometheusUrl"),
        ("engine.keda.sequences=0", "engine/keda/sequences"),
        ("sandbox.scratchSize=-1", "sandbox/scratchSize"),
        ("sandbox.tolerations[0]=all", "sandbox/tolerations/0"),
        ("ingress.enabled=true", "ingress.host is needed"),
        ("ingress.enabled=true,gateway.httpsSecret=tls", "gateway.httpsSecret and ingress.enabled"),
        ("ingress.host=https://chat.example.org", "ingress/host"),
        ("ingress.annotations.a=1", "ingress/annotations/a"),
        ("httpRoute.enabled=true", "httpRoute.parentRefs"),
        (
            "httpRoute.enabled=true,httpRoute.parentRefs[0].name=public,gateway.httpsSecret=tls",
            "gateway.httpsSecret and httpRoute.enabled",
        ),
        ("httpRoute.parentRefs[0].namespace=ingress", "httpRoute/parentRefs/0"),
        ("httpRoute.hostnames[0]=a b", "httpRoute/hostnames/0"),
        ("httpRoute.timeoutSeconds=10m", "httpRoute/timeoutSeconds"),
        ("tls.enabled=true", "tls.secrets"),
        ("tls.certManager.kind=Vault", "tls/certManager/kind"),
        ("tracing.otlpEndpoint=collector", "tracing/otlpEndpoint"),
        ("tracing.ratio=2", "tracing/ratio"),
        ("networkPolicy.enabled=maybe", "networkPolicy/enabled"),
        ("networkPolicy.s3Ports[0]=0", "networkPolicy/s3Ports/0"),
        ("networkPolicy.dnsTo=null", "dnsTo"),
        ("podMonitor.interval=often", "podMonitor/interval"),
        ("prometheusRule.labels.release=1", "prometheusRule/labels/release"),
    ],
)
def test_wrong_value_is_named(setting: str, named: str) -> None:
    done = template(setting)
    assert done.returncode != 0
    assert named in done.stderr


def test_keda_that_cannot_work_is_refused() -> None:
    for settings, named in [
        (("engine.keda.minReplicas=5",), "engine.keda.maxReplicas is 3; it must be at least"),
        (("engine.autoscaling.enabled=true",), "engine.keda.enabled and engine.autoscaling.enabled are both true"),
        (("engine.keda.minReplicas=0", "models[0].name=other"), "engine.keda.minReplicas is 0, but"),
        (("engine.keda.minReplicas=0", "canary.revision=sft/step_1"), "engine.keda.minReplicas is 0, but"),
    ]:
        done = template("engine.keda.enabled=true", f"engine.keda.prometheusUrl={PROMETHEUS}", *settings)
        assert done.returncode != 0
        assert named in done.stderr


PROMETHEUS = "http://prometheus.monitoring:9090"


def test_keda_counts_the_sequences_of_one_models_engines_and_the_requests_in_the_gateways() -> None:
    objects = rendered("engine.keda.enabled=true", f"engine.keda.prometheusUrl={PROMETHEUS}", "models[0].name=My.Model")
    scaled = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "ScaledObject"}
    engines = [each for each in objects if each["kind"] == "Deployment" and each["metadata"]["name"] in scaled]
    assert len(engines) == 2
    assert all("replicas" not in engine["spec"] for engine in engines)
    for name, spec in scaled.items():
        assert spec["scaleTargetRef"]["name"] == name
        query = spec["triggers"][0]["metadata"]["query"]
        (engine_pods,) = set(re.findall(r'nanochat_engine_requests_\w+\{namespace="default",pod=~"(.+?)"\}', query))
        (gateway_pods,) = re.findall(r'nanochat_gateway_queue_length\{namespace="default",pod=~"(.+?)"\}', query)
        pods = [f"{name}-5d4f8c7b9-x7k2p" for name in (*scaled, "n-nanochat-gateway")]
        assert [pod for pod in pods if re.fullmatch(engine_pods, pod)] == [f"{name}-5d4f8c7b9-x7k2p"]
        assert [pod for pod in pods if re.fullmatch(gateway_pods, pod)] == [pods[-1]]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_query_of_keda_is_valid(tmp_path: Path) -> None:
    objects = rendered("engine.keda.enabled=true", f"engine.keda.prometheusUrl={PROMETHEUS}")
    query = one(objects, "ScaledObject", "engine")["spec"]["triggers"][0]["metadata"]["query"]
    rules = {"groups": [{"name": "keda", "rules": [{"record": "load", "expr": query}]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], check=True)


def test_a_request_waits_for_engines_that_have_ended() -> None:
    queue = {}
    for replicas in (0, 1):
        settings = ("engine.keda.enabled=true", f"engine.keda.prometheusUrl={PROMETHEUS}")
        gateway = one(rendered(*settings, f"engine.keda.minReplicas={replicas}"), "Deployment", "gateway")
        environment = gateway["spec"]["template"]["spec"]["containers"][0]["env"]
        queue[replicas] = [entry["value"] for entry in environment if entry["name"].endswith("QUEUE_SECONDS")]
    assert queue == {0: ["600"], 1: []}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("engine.autoscaling.minReplicas=5",), "engine.autoscaling.maxReplicas is 3; it must be at least"),
        (("engine.autoscaling.cpuPercent=0",), "engine.autoscaling has no target"),
        (("engine.resources.requests=null",), "engine.resources.requests.cpu, which is not set"),
    ],
)
def test_autoscaling_that_cannot_work_is_refused(settings: tuple[str, ...], named: str) -> None:
    done = template("engine.autoscaling.enabled=true", *settings)
    assert done.returncode != 0
    assert named in done.stderr


def test_an_empty_cluster_gets_a_job_that_trains_the_demo_model_into_the_engines_store() -> None:
    objects = rendered()
    claim = one(objects, "PersistentVolumeClaim", "store")["metadata"]["name"]
    pods = [one(objects, kind, name)["spec"]["template"]["spec"] for kind, name in OWNERS]
    assert [{"claimName": claim}] * 2 == [
        volume["persistentVolumeClaim"] for pod in pods for volume in pod["volumes"] if volume["name"] == "store"
    ]
    module, *flags = pods[0]["containers"][0]["args"][2:]
    assert (module, flags) == ("jobs.train.pipeline", ["--recipe=demo", "--model=demo", "--unless-promoted"])
    policy = one(objects, "NetworkPolicy", "bootstrap")["spec"]
    assert (policy["ingress"], policy["egress"]) == ([], [])


def test_lessons_need_a_pod_that_gives_them_and_a_gateway_that_sees_nothing_else_of_the_store() -> None:
    assert "teacher" not in template().stdout
    objects = rendered("teacher.enabled=true")
    gateway = one(objects, "Deployment", "gateway")["spec"]["template"]["spec"]
    mounts = [each for each in gateway["containers"][0]["volumeMounts"] if each["name"] == "store"]
    assert mounts == [{"name": "store", "mountPath": "/var/lib/nanochat/lessons", "subPath": "lessons"}]
    assert "affinity" in gateway, "the claim is of one node"
    teacher = one(objects, "Deployment", "teacher")["spec"]["template"]["spec"]
    assert teacher["containers"][0]["args"] == ["python", "-m", "jobs.teach.watch"]
    policy = one(objects, "NetworkPolicy", "teacher")["spec"]
    assert (policy["ingress"], policy["egress"]) == ([], [])

    s3 = ("store.type=s3", "store.s3.url=s3://b/p", "store.s3.existingSecret=all", "teacher.gatewaySecret=few")
    objects = rendered("teacher.enabled=true", *s3)
    secrets = {}
    for component in ("gateway", "teacher"):
        (container,) = one(objects, "Deployment", component)["spec"]["template"]["spec"]["containers"]
        env = {each["name"]: each for each in container["env"]}
        secrets[component] = env["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"]
    assert secrets == {"gateway": "few", "teacher": "all"}


LESSON_JOBS = ("teacher.enabled=true", "teacher.runner=pytorchjob")


def lesson_template(objects: list[Any]) -> Any:
    return yaml.safe_load(one(objects, "ConfigMap", "lesson")["data"]["podtemplate.yaml"])


def test_lessons_as_pytorch_jobs_run_in_the_pod_in_which_they_would_run_otherwise() -> None:
    own = [f"teacher.{name}" for name in ("resources.limits.memory=9Gi", "nodeSelector.disk=fast", "extraEnv.A=b")]
    own += ["teacher.podAnnotations.team=x", "store.type=s3", "store.s3.url=s3://b/p", "store.s3.existingSecret=k"]
    process = one(rendered("teacher.enabled=true", *own), "Deployment", "teacher")["spec"]["template"]
    objects = rendered(*LESSON_JOBS, "teacher.queue=training", *own)
    template = lesson_template(objects)
    assert template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert template["metadata"]["namespace"] == "default"
    pod = template["template"]
    (lesson,), (container,) = pod["spec"].pop("containers"), process["spec"].pop("containers")
    assert (lesson.pop("name"), lesson["env"].pop(0)["valueFrom"]["resourceFieldRef"]["containerName"]) == (
        "pytorch",
    ) * 2
    del container["name"], container["args"], container["env"][0]
    assert lesson == container
    assert pod["metadata"]["annotations"] == process["metadata"]["annotations"] == {"team": "x"}
    for name in ("serviceAccountName", "topologySpreadConstraints"):  # these name the component
        assert pod["spec"].pop(name) != process["spec"].pop(name)
    assert pod["spec"] == process["spec"]
    assert "kueue.x-k8s.io/queue-name" not in lesson_template(rendered(*LESSON_JOBS))["metadata"]["labels"]


def test_only_the_pod_that_creates_the_pytorch_jobs_has_rights_in_the_cluster() -> None:
    assert not [each for each in rendered("teacher.enabled=true") if each["kind"].startswith("Role")]
    objects = rendered(*LESSON_JOBS)
    role, binding = (one(objects, kind, "teacher") for kind in ("Role", "RoleBinding"))
    assert role["rules"] == RULES
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == ["n-nanochat-teacher"]
    specs = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]["spec"]
        for each in objects
        if each["kind"] in ("Deployment", "Job")
    } | {"lesson": lesson_template(objects)["template"]["spec"]}
    assert {name: spec["automountServiceAccountToken"] for name, spec in specs.items()} == {
        name: name == "teacher" for name in specs
    }
    assert specs["teacher"]["serviceAccountName"] == "n-nanochat-teacher"
    assert specs["lesson"]["serviceAccountName"] == "n-nanochat-lesson"
    accounts = {each["metadata"]["name"]: each for each in objects if each["kind"] == "ServiceAccount"}
    assert accounts["n-nanochat-lesson"]["automountServiceAccountToken"] is False


def test_the_pod_that_creates_the_pytorch_jobs_reads_their_template_and_is_small() -> None:
    objects = rendered(*LESSON_JOBS, "teacher.controller.nodeSelector.kind=small", "teacher.nodeSelector.kind=gpu")
    spec = one(objects, "Deployment", "teacher")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (flag,) = container["args"][3:]
    folder, _, file = flag.removeprefix("--cluster-jobs=").rpartition("/")
    (volume,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == folder]
    (name,) = [each["configMap"]["name"] for each in spec["volumes"] if each["name"] == volume]
    config = one(objects, "ConfigMap", "lesson")
    assert (name, [file]) == (config["metadata"]["name"], list(config["data"]))
    assert (spec["nodeSelector"], container["resources"]["requests"]["cpu"]) == ({"kind": "small"}, "50m")
    assert lesson_template(objects)["template"]["spec"]["nodeSelector"] == {"kind": "gpu"}


@pytest.mark.parametrize("store", [(), ("store.type=s3", "store.s3.url=s3://b/p", "networkPolicy.s3Ports={9000}")])
def test_a_lesson_reaches_the_store_alone_and_the_pod_that_creates_it_also_the_api_server(
    store: tuple[str, ...],
) -> None:
    def ports(component: str) -> set[int]:
        policy = one(rendered(*LESSON_JOBS, *store), "NetworkPolicy", component)["spec"]
        assert (policy["ingress"], policy["policyTypes"]) == ([], ["Ingress", "Egress"])
        assert policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == component
        return {port["port"] for rule in policy["egress"] for port in rule["ports"]}

    reached = {53, 9000} if store else set()
    assert ports("lesson") == reached
    assert ports("teacher") == reached | {443, 6443}
    api = "networkPolicy.apiServerTo[0].ipBlock.cidr=192.0.2.1/32"
    rules = one(rendered(*LESSON_JOBS, *store, api), "NetworkPolicy", "teacher")["spec"]["egress"]
    assert [rule["to"] for rule in rules if rule["ports"][0]["port"] == 443] == [
        [{"ipBlock": {"cidr": "192.0.2.1/32"}}]
    ]


def test_a_lesson_stays_near_a_volume_for_one_node() -> None:
    spec = lesson_template(rendered(*LESSON_JOBS))["template"]["spec"]
    (term,) = spec["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = term["podAffinityTerm"]["labelSelector"]["matchExpressions"]
    assert {"engine", "teacher", "lesson"} <= set(expression["values"])
    assert "affinity" not in lesson_template(rendered(*LESSON_JOBS, "store.pvc.existingClaim=mine"))["template"]["spec"]


def test_the_program_makes_a_valid_pytorch_job_from_the_template_of_the_chart() -> None:
    job = lesson_job(lesson_template(rendered(*LESSON_JOBS)), LESSON, ["python", "-m", "jobs.teach", "demo"])
    assert job["metadata"]["name"] == "n-nanochat-lesson-demo-7"
    template = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert template["spec"]["containers"][0]["args"] == ["python", "-m", "jobs.teach", "demo"]
    assert template["metadata"]["labels"]["app.kubernetes.io/component"] == "lesson", "the network policy selects it"


def test_a_runner_that_does_not_exist_is_refused() -> None:
    assert template("teacher.runner=pytorch").returncode != 0


OWNERS = [("Job", "bootstrap"), ("Deployment", "engine")]


def test_pods_of_a_volume_for_one_node_stay_together_and_others_spread() -> None:
    for settings, together in [
        ((), True),
        (("store.pvc.accessModes={ReadWriteMany}",), False),
        (("store.pvc.existingClaim=mine",), False),
        (("store.type=s3", "store.s3.url=s3://b/p"), False),
    ]:
        for kind, component in OWNERS:
            spec = one(rendered(*settings), kind, component)["spec"]["template"]["spec"]
            assert ("affinity" in spec, "topologySpreadConstraints" in spec) == (together, not together), settings
    own = "engine.pod.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution=null"
    spec = one(rendered(own), "Deployment", "engine")["spec"]["template"]["spec"]
    assert "podAffinity" not in spec["affinity"]
    assert "topologySpreadConstraints" in spec


@pytest.mark.parametrize("setting", ["model=speedrun", "bootstrap.enabled=false"])
def test_nothing_but_the_demo_model_is_trained_by_the_chart(setting: str) -> None:
    kinds = {each["kind"] for each in rendered(setting)}
    assert "Job" not in kinds
    assert "bootstrap" not in template(setting).stdout


def test_engines_serve_the_snapshots_of_the_training_that_the_chart_starts() -> None:
    for enabled in ("true", "false"):
        engine = one(rendered(f"bootstrap.enabled={enabled}"), "Deployment", "engine")["spec"]
        env = {each["name"]: each.get("value") for each in engine["template"]["spec"]["containers"][0]["env"]}
        assert env.get("NANOCHAT_ENGINE_SNAPSHOTS") == ("true" if enabled == "true" else None)


def test_engines_wait_for_their_first_model_as_long_as_its_training_may_take() -> None:
    seconds = {}
    for enabled in ("true", "false"):
        engine = one(rendered(f"bootstrap.enabled={enabled}"), "Deployment", "engine")["spec"]
        probe = engine["template"]["spec"]["containers"][0]["startupProbe"]
        seconds[enabled] = probe["periodSeconds"] * probe["failureThreshold"]
        assert engine["progressDeadlineSeconds"] > seconds[enabled]
    assert seconds == {"true": 3600 + 600, "false": 600}


def test_an_ingress_waits_as_long_as_the_longest_answer_takes() -> None:
    objects = rendered("ingress.enabled=true", "ingress.host=chat.example.org", "ingress.tlsSecret=chat-tls")
    ingress, service = (one(objects, kind, "gateway") for kind in ("Ingress", "Service"))
    assert ingress["spec"]["tls"] == [{"hosts": ["chat.example.org"], "secretName": "chat-tls"}]
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert (rule["host"], backend["name"]) == ("chat.example.org", service["metadata"]["name"])
    assert backend["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
    timeout = int(ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-read-timeout"])
    assert timeout > longest_answer()


def test_a_route_waits_as_long_as_the_longest_answer_takes() -> None:
    objects = rendered("httpRoute.enabled=true", "httpRoute.parentRefs[0].name=public", "gateway.service.port=8080")
    route, service = (one(objects, kind, "gateway") for kind in ("HTTPRoute", "Service"))
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": 8080}]
    assert int(rule["timeouts"]["request"].removesuffix("s")) > longest_answer()


PROXY_LIMITS = {
    "ingress": (
        "ingress.enabled=true",
        "ingress.host=chat.example.org",
        r"ingress.annotations.nginx\.ingress\.kubernetes\.io/proxy-read-timeout=",
    ),
    "route": ("httpRoute.enabled=true", "httpRoute.parentRefs[0].name=public", "httpRoute.timeoutSeconds="),
}


@pytest.mark.parametrize("proxy", PROXY_LIMITS)
def test_a_proxy_waits_for_an_engine_that_must_start_first(proxy: str) -> None:
    *enabled, limit = PROXY_LIMITS[proxy]
    keda = ("engine.keda.enabled=true", f"engine.keda.prometheusUrl={PROMETHEUS}", "engine.startupSeconds=700")
    longest = int(GatewaySettings().request_timeout_seconds) + 700

    def refusal(*settings: str) -> str:
        done = subprocess.run(
            ["helm", "template", "n", CHART]
            + [part for each in (*keda, *enabled) for part in ("--set", each)]
            + [part for each in settings for part in ("--set-string" if "annotations" in each else "--set", each)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == bool(done.stderr), done.stderr
        return done.stderr

    zero = "engine.keda.minReplicas=0"
    assert refusal() == ""
    assert f"set at least {longest}" in refusal(zero)
    assert limit.removesuffix("=") in refusal(zero, f"{limit}{longest - 1}")
    assert refusal(zero, f"{limit}{longest}") == ""
    assert refusal(zero, f"{limit}301", "gateway.extraEnv.NANOCHAT_GATEWAY_REQUEST_TIMEOUT_SECONDS=0.5") != ""
    shorter = "NANOCHAT_GATEWAY_QUEUE_SECONDS=30,gateway.extraEnv.NANOCHAT_GATEWAY_REQUEST_TIMEOUT_SECONDS=60.5"
    assert refusal(zero, f"{limit}91", f"gateway.extraEnv.{shorter}") == ""


def longest_answer() -> float:
    defaults = GatewaySettings()
    return defaults.request_timeout_seconds + defaults.queue_seconds


def leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value that is no mapping, with its path."""
    if not isinstance(values, dict) or not values:
        yield path, values
        return
    for name, below in values.items():
        yield from leaves(below, (*path, name))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_line_of_an_environment_changes_a_default(name: str) -> None:
    defaults = dict(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))
    chosen = yaml.safe_load((CHART / f"environments/{name}.yaml").read_text())
    # Only resources may repeat defaults, so that a reader sees all resources of a container in one place.
    same = [path for path, value in leaves(chosen) if defaults.get(path) == value and "resources" not in path]
    assert same == []
    assert with_environments(name)


@pytest.mark.parametrize("name", ["cpu", "h100", "high-availability"])
def test_environments_combine_with_s3(name: str) -> None:
    objects = with_environments(name, "s3")
    assert not [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
    spec = one(objects, "Deployment", "engine")["spec"]["template"]["spec"]
    assert "store" not in {volume["name"] for volume in spec["volumes"]}


def test_high_availability_is_more_than_one_pod_of_each_service() -> None:
    objects = with_environments("high-availability")
    assert {each["spec"]["replicas"] > 1 for each in objects if each["kind"] == "Deployment"} == {True}
    (claim,) = (each for each in objects if each["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_gpu_environment_serves_what_the_speedrun_trains_on_its_nodes() -> None:
    trained = list(yaml.safe_load_all((CHART.parents[2] / "jobs/train/speedrun.yaml").read_text()))
    (job,) = (document for document in trained if document["kind"] == "Job")
    (training,) = (each for each in trained if each["metadata"]["name"] == "speedrun-training")
    engine = one(with_environments("h100"), "Deployment", "engine")["spec"]["template"]["spec"]
    variables = {variable["name"]: variable.get("value") for variable in engine["containers"][0]["env"]}
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--model={variables['NANOCHAT_ENGINE_MODEL']}" in arguments
    assert engine["tolerations"] == training["template"]["spec"]["tolerations"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for pod in (engine, training["template"]["spec"])
        for volume in pod["volumes"]
        if volume["name"] == "store"
    ]
    assert claims == ["nanochat-store"] * 2


def test_an_upgrade_replaces_the_training_job_instead_of_changing_it() -> None:
    names = [one(rendered(f"image.tag={tag}"), "Job", "bootstrap")["metadata"]["name"] for tag in ("a", "a", "b")]
    assert names[0] == names[1] != names[2]


def test_a_canary_has_engines_of_its_own_and_the_gateways_know_its_share() -> None:
    objects = rendered("canary.revision=sft/step_000720", "canary.percent=5", "engine.autoscaling.enabled=true")
    engines = {
        each["metadata"]["name"]: each["spec"]
        for each in objects
        if each["kind"] == "Deployment" and each["metadata"]["labels"]["app.kubernetes.io/component"] == "engine"
    }
    assert list(engines) == ["n-nanochat-engine", "n-nanochat-engine-canary"]
    canary = engines["n-nanochat-engine-canary"]
    (container,) = canary["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (variables["NANOCHAT_ENGINE_MODEL"], variables["NANOCHAT_ENGINE_REVISION"]) == ("demo", "sft/step_000720")
    assert canary["replicas"] == 2
    assert len([each for each in objects if each["kind"] == "HorizontalPodAutoscaler"]) == 1
    selectors = [engine["selector"]["matchLabels"] for engine in engines.values()]
    assert selectors[0].items() ^ selectors[1].items() == {("nanochat/track", "stable"), ("nanochat/track", "canary")}
    for engine, selector in zip(engines.values(), selectors, strict=True):
        assert selector.items() <= engine["template"]["metadata"]["labels"].items()
    gateway = one(objects, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]["env"]
    told = {variable["name"]: variable.get("value") for variable in gateway}
    assert told["NANOCHAT_GATEWAY_CANARY"] == "demo/sft/step_000720"
    assert told["NANOCHAT_GATEWAY_CANARY_PERCENT"] == "5"


def test_a_taught_model_can_be_the_canary_or_the_pinned_revision() -> None:
    objects = rendered("canary.revision=lesson/step_000003", "engine.revision=lesson/step_000001")
    engines = [
        each["spec"]["template"]["spec"]["containers"][0]["env"]
        for each in objects
        if each["kind"] == "Deployment" and each["metadata"]["labels"]["app.kubernetes.io/component"] == "engine"
    ]
    revisions = [next(each["value"] for each in env if each["name"] == "NANOCHAT_ENGINE_REVISION") for env in engines]
    assert revisions == ["lesson/step_000001", "lesson/step_000003"]


def test_a_canary_that_is_no_other_revision_is_refused() -> None:
    done = template("canary.revision=sft/step_1", "engine.revision=sft/step_1")
    assert done.returncode != 0
    assert "canary.revision is sft/step_1, which engine.revision serves already" in done.stderr


@pytest.mark.parametrize(
    ("kind", "component"),
    [("Deployment", "gateway"), ("Deployment", "engine"), ("Deployment", "sandbox"), ("Job", "bootstrap")],
)
@pytest.mark.parametrize("store", ["pvc", "s3"])
def test_a_pod_can_be_extended(kind: str, component: str, store: str) -> None:
    digest = f"sha256:{'0' * 64}"
    settings = {
        "digest": digest,
        "podAnnotations.team": "chat",
        "pod.runtimeClassName": "kata",
        "pod.initContainers[0].name": "first",
        "pod.initContainers[0].image": "first:1",
        "extraVolumes[0].name": "cache",
        "extraVolumes[0].emptyDir.medium": "Memory",
        "extraVolumeMounts[0].name": "cache",
        "extraVolumeMounts[0].mountPath": "/cache",
    }
    flags = [f"{component}.{name}={value}" for name, value in settings.items()]
    pod = one(rendered(f"store.type={store}", "store.s3.url=s3://b/p", *flags), kind, component)["spec"]["template"]
    assert pod["metadata"]["annotations"]["team"] == "chat"
    assert ("checksum/store" in pod["metadata"]["annotations"]) == (component == "engine" and store == "s3")
    spec = pod["spec"]
    assert (spec["runtimeClassName"], spec["initContainers"]) == ("kata", [{"name": "first", "image": "first:1"}])
    (container,) = spec["containers"]
    assert container["image"].endswith(f"@{digest}")
    assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]
    assert {"name": "cache", "emptyDir": {"medium": "Memory"}} in spec["volumes"]


def test_cert_manager_makes_the_certificates_that_the_pods_mount() -> None:
    objects = rendered("tls.enabled=true", "tls.certManager.issuer=ca", "tls.certManager.kind=ClusterIssuer")
    for component in ("gateway", "engine", "sandbox"):
        certificate = one(objects, "Certificate", component)["spec"]
        pod = one(objects, "Deployment", component)["spec"]["template"]["spec"]
        (mounted,) = (volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume)
        assert certificate["secretName"] == mounted
        assert certificate["dnsNames"] == [f"n-nanochat-{component}"]
        assert certificate["issuerRef"] == {"name": "ca", "kind": "ClusterIssuer"}
    gateway = one(objects, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]["env"]
    (address,) = (variable["value"] for variable in gateway if variable["name"].endswith("ENGINE_ADDRESSES"))
    assert address == f"{one(objects, 'Certificate', 'engine')['spec']['dnsNames'][0]}:50051"


def test_a_policy_denies_everything_that_no_other_policy_of_a_pod_allows() -> None:
    objects = rendered("models[0].name=other", "canary.revision=sft/step_000720")
    policies = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]
        for each in objects
        if each["kind"] == "NetworkPolicy"
    }
    default = policies.pop("default")
    assert default["policyTypes"] == ["Ingress", "Egress"]
    assert (default["ingress"], default["egress"]) == ([], [])
    pods = [each["metadata"]["labels"] for each in objects if each["kind"] == "Pod"]
    pods += [
        each["spec"]["template"]["metadata"]["labels"] for each in objects if each["kind"] in ("Deployment", "Job")
    ]
    assert len(pods) == 7
    for labels in pods:
        assert default["podSelector"]["matchLabels"].items() <= labels.items()
        own = [name for name, spec in policies.items() if spec["podSelector"]["matchLabels"].items() <= labels.items()]
        assert own == [labels["app.kubernetes.io/component"]]


def test_each_further_model_has_engines_of_its_own_behind_the_same_service() -> None:
    objects = rendered("models[0].name=My.Model", "models[0].gpu.count=1", "models[0].revision=sft/step_000720")
    engines = {
        each["metadata"]["name"]: each["spec"]
        for each in objects
        if each["kind"] == "Deployment" and each["metadata"]["labels"]["app.kubernetes.io/component"] == "engine"
    }
    assert list(engines) == ["n-nanochat-engine", "n-nanochat-engine-my-model"]
    own = engines["n-nanochat-engine-my-model"]
    (container,) = own["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["NANOCHAT_ENGINE_MODEL"] == "My.Model"
    assert variables["NANOCHAT_ENGINE_REVISION"] == "sft/step_000720"
    assert container["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": 1}
    selectors = [engine["selector"]["matchLabels"] for engine in engines.values()]
    assert selectors[0].items() ^ selectors[1].items() == {("nanochat/model", "demo"), ("nanochat/model", "My.Model")}
    (service,) = (
        each for each in objects if each["kind"] == "Service" and each["metadata"]["name"].endswith("-engine")
    )
    assert all(service["spec"]["selector"].items() < selector.items() for selector in selectors)
    budgets = [each for each in objects if each["kind"] == "PodDisruptionBudget"]
    assert [each["spec"]["selector"]["matchLabels"] for each in budgets][:2] == selectors


def test_clients_know_the_pods_whose_health_they_check_before_these_are_ready() -> None:
    """A name server caches an answer for some seconds, but a ready pod should get requests immediately."""
    headless = [each for each in rendered() if each["kind"] == "Service" and each["spec"].get("clusterIP") == "None"]
    assert [each["metadata"]["name"] for each in headless] == ["n-nanochat-engine", "n-nanochat-sandbox"]
    assert all(each["spec"]["publishNotReadyAddresses"] for each in headless)


def test_dashboards_and_alerts_are_those_of_the_repository() -> None:
    objects = {each["kind"]: each for each in rendered("dashboards.enabled=true", "prometheusRule.enabled=true")}
    dashboards = {path.name: json.loads(path.read_text()) for path in (CHART / "files/dashboards").glob("*.json")}
    assert {name: json.loads(text) for name, text in objects["ConfigMap"]["data"].items()} == dashboards
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    assert objects["PrometheusRule"]["spec"] == rules


def test_an_autoscaler_takes_the_place_of_the_number_of_pods() -> None:
    objects = rendered("engine.autoscaling.enabled=true", "engine.autoscaling.cachePercent=85")
    scaler = one(objects, "HorizontalPodAutoscaler", "engine")["spec"]
    assert "replicas" not in one(objects, "Deployment", "engine")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "n-nanochat-engine"}
    cache = scaler["metrics"][-1]["pods"]
    assert cache["metric"]["name"] == "nanochat_engine_kv_cache_usage_ratio"
    assert cache["target"]["averageValue"] == "850m"
