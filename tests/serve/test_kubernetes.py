"""The file of Kubernetes that users are given, against Kubernetes' own schemas."""

from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).resolve().parents[2] / "experiments" / "serving_kubernetes.yaml"


def test_each_object_is_one_of_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    objects = list(yaml.safe_load_all(FILE.read_text()))
    assert [each["kind"] for each in objects] == ["Service", "StatefulSet"]
    version = kubernetes_validate.latest_version()
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)
    objects[1]["spec"]["nonsense"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(objects[1], version, strict=True)


def test_its_parts_name_one_another_and_its_command_is_serves():
    service, replicas = yaml.safe_load_all(FILE.read_text())
    template = replicas["spec"]["template"]
    (container,) = template["spec"]["containers"]
    labels = template["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == replicas["spec"]["selector"]["matchLabels"]
    assert replicas["spec"]["serviceName"] == service["metadata"]["name"]
    (port,) = (each["containerPort"] for each in container["ports"])
    assert service["spec"]["ports"][0]["targetPort"] == port
    assert f"--set=port={port}" in container["args"]
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    claims = [each["metadata"]["name"] for each in replicas["spec"]["volumeClaimTemplates"]]
    assert set(mounted) == {*claims, *(each["name"] for each in template["spec"]["volumes"])}
    drain_s = next(int(each.split("=")[-1]) for each in container["args"] if "drain_s" in each)
    assert drain_s < template["spec"]["terminationGracePeriodSeconds"]
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")}
    assert paths == {"/health"}
