"""Of rendered manifests: who reaches which port through the NetworkPolicies, and which keys of Secrets are read.

Pure: from documents to sentences. :mod:`deploy.manifests` asks here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from baton.config import Config

SECRETS = {  # what the documentation has operators create
    "baton-secrets": {"cluster-key", "api-keys", "operator-key"},
    "baton-redis": {"password"},
    "baton-tls": {"tls.crt", "tls.key"},
}
APP = "app.kubernetes.io/name"

Doc = dict[str, Any]


class Group(Protocol):
    """What is asked of the head and of worker groups."""

    @property
    def name(self) -> str: ...
    @property
    def pod(self) -> Doc: ...
    @property
    def container(self) -> Doc: ...
    @property
    def labels(self) -> dict[str, str]: ...
    @property
    def ports(self) -> dict[str, int]: ...
    @property
    def env(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who wants in: the labels of the pod and, where it is another one, of its namespace."""

    name: str
    pod: Mapping[str, str]
    namespace: Mapping[str, str] | None = None  # None: Baton's own

    def admitted(self, peer: Doc) -> bool:
        """By one entry of a rule's ``from``."""
        spaces = peer.get("namespaceSelector")
        if spaces is None:
            inside = self.namespace is None
        else:
            inside = self.namespace is not None and _selects(spaces, self.namespace)
        return inside and _selects(peer.get("podSelector", {}), self.pod)


BATON = Caller("Baton's pods", {APP: "baton"})
CLIENT = Caller("clients", {}, {"baton.dev/clients": "true"})
OPERATOR = Caller("KubeRay's operator", {APP: "kuberay-operator"}, {})
PROMETHEUS = Caller("Prometheus", {APP: "prometheus"}, {})


def network(docs: Sequence[Doc], groups: Sequence[Group]) -> Iterator[str]:
    """What is closed and must be open, what is open to everybody, and rules for ports that no pod has."""
    policies = [doc for doc in docs if doc["kind"] == "NetworkPolicy"]
    yield from _counted_once(docs)
    for policy in policies:
        yield from _sound(policy, groups)
    for caller, group, port in _needed(docs, groups):
        mine = [policy for policy in policies if _selects(policy["spec"]["podSelector"], group.labels)]
        if not any(_opens(rule, caller, port) for policy in mine for rule in policy["spec"].get("ingress", [])):
            where = "every port" if port is None else f"port {port}"
            yield f"no NetworkPolicy lets {caller.name} reach {where} of {group.name}"


def _sound(policy: Doc, groups: Sequence[Group]) -> Iterator[str]:
    name, spec = policy["metadata"]["name"], policy["spec"]
    chosen = [group for group in groups if _selects(spec["podSelector"], group.labels)]
    for rule in spec.get("ingress", []):
        if not rule.get("from"):
            yield f"NetworkPolicy {name} opens pods to everybody"
        for port in (entry["port"] for entry in rule.get("ports", [])):
            without = [group.name for group in chosen if port not in group.ports.values()]
            if without:
                yield f"NetworkPolicy {name} opens port {port}, which {', '.join(without)} does not have"


def _needed(docs: Sequence[Doc], groups: Sequence[Group]) -> Iterator[tuple[Caller, Group, int | None]]:
    """Who must reach which port, None being all of them."""
    for group in groups:
        yield BATON, group, None
        wanted = {"head": [(OPERATOR, "dashboard"), (OPERATOR, "serve")],
                  "router": [(CLIENT, "serve"), (CLIENT, "serve-grpc")]}  # fmt: skip
        for caller, port in wanted.get(group.name, []):
            yield caller, group, group.ports.get(port, 0)
    for monitor in (doc for doc in docs if doc["kind"] == "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for group in groups:
                if _selects(monitor["spec"]["selector"], group.labels):
                    yield PROMETHEUS, group, group.ports.get(endpoint["port"], 0)


def _counted_once(docs: Sequence[Doc]) -> Iterator[str]:
    """Each ingress leads to any router, and that one answers for all: there must be one target (ADR 17)."""
    for monitor in (doc for doc in docs if doc["kind"] == "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            kept = [one["regex"] for one in endpoint.get("relabelings", []) if one.get("action") == "keep"]
            if endpoint["port"] == "serve" and kept != ["head"]:
                yield f"PodMonitor {monitor['metadata']['name']} counts every router once for each pod of {kept}"


def _opens(rule: Doc, caller: Caller, port: int | None) -> bool:
    ports = [entry["port"] for entry in rule.get("ports", [])]
    return (not ports or port in ports) and any(caller.admitted(peer) for peer in rule.get("from", []))


def _selects(selector: Doc, labels: Mapping[str, str]) -> bool:
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def secrets(docs: Sequence[Doc], config: Config, groups: Sequence[Group]) -> Iterator[str]:
    """Every key of a Secret that is read is one that the documentation has operators create."""
    for name, key in (found for doc in docs for found in _references(doc)):
        if key not in SECRETS.get(name, set()):
            yield f"Secret {name} has no key {key}"
    for group in groups:
        mounted = {mount["mountPath"]: mount["name"] for mount in group.container.get("volumeMounts", [])}
        volumes = {volume["name"]: volume for volume in group.pod.get("volumes", [])}
        for path in _read(config, group):
            volume = volumes.get(mounted.get(str(path.parent), ""), {})
            name = volume.get("secret", {}).get("secretName", "")
            if path.name not in SECRETS.get(name, set()):
                yield f"{group.name}: {path} is no key of a Secret that is mounted there"


def _read(config: Config, group: Group) -> Iterator[PurePosixPath]:
    """Files that Baton reads and that only a Secret should hold."""
    security, folder = config.security, group.env.get("BATON_TLS_DIR")
    for path in filter(None, (security.cluster_key_file, security.api_keys_file)):
        yield PurePosixPath(path)
    if folder:
        yield from (PurePosixPath(folder) / name for name in ("tls.crt", "tls.key"))


def _references(value: Any) -> Iterator[tuple[str, str]]:
    """Names and keys in every ``secretKeyRef`` of pods and every ``credentials`` of monitors below ``value``."""
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secretKeyRef", "credentials"):
                yield inner["name"], inner["key"]
            else:
                yield from _references(inner)
