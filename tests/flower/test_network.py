"""Three hosts in network namespaces, one of which is cut off for a while."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.flower.deployment import Deployment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
    ),
]

SERVER, HOSTS = "fl-server", ("fl-host-1", "fl-host-2")
ROUTER = "fl-router"


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


def inside(namespace: str, *words: str) -> None:
    ip("netns", "exec", namespace, "ip", *words)


def address(number: int, *, router: bool = False) -> str:
    return f"10.77.{number}.{1 if router else 2}"


@pytest.fixture
def network() -> Iterator[None]:
    """Every host has a network of its own; a router, itself without a way out, joins them."""
    namespaces = (ROUTER, SERVER, *HOSTS)
    for name in namespaces:
        ip("netns", "del", name, check=False)
    try:
        for name in namespaces:
            ip("netns", "add", name)
            inside(name, "link", "set", "lo", "up")
        for number, name in enumerate((SERVER, *HOSTS)):
            there = f"to{number}"
            ip("-n", ROUTER, "link", "add", there, "type", "veth", "peer", "out", "netns", name)
            inside(ROUTER, "addr", "add", f"{address(number, router=True)}/24", "dev", there)
            inside(ROUTER, "link", "set", there, "up")
            inside(name, "addr", "add", f"{address(number)}/24", "dev", "out")
            inside(name, "link", "set", "out", "up")
            inside(name, "route", "add", "default", "via", address(number, router=True))
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run(["ip", "netns", "exec", ROUTER, "sh", "-c", forward], check=True)
        yield
    finally:
        for name in namespaces:
            ip("netns", "del", name, check=False)


@pytest.mark.usefixtures("network")
def test_a_host_that_is_cut_off_for_a_while_rejoins(tmp_path):
    deployment = Deployment(tmp_path, nodes=2, rounds=10, more="deadline = 120", host=address(0))
    deployment("keys")
    try:
        deployment("superlink", inside=SERVER)
        for number, host in enumerate(HOSTS, start=1):
            deployment("node", str(number), inside=host)
        playing = deployment.begin("run", inside=SERVER, attempts=3)
        deployment.until(lambda: len(deployment.records()) >= 1)
        rule = ("rule", "add", "from", address(2), "blackhole")
        inside(ROUTER, *rule)
        deployment.until(lambda: any(record["left_out"] for record in deployment.records()))
        inside(ROUTER, "rule", "del", *rule[2:])
        playing.wait()
    finally:
        deployment("stop", check=False)
    records = deployment.records()
    assert len(records) == 10
    assert all(record["certificate"]["held"] for record in records)
    left_out = {c["client"] for record in records for c in record["left_out"]}
    assert left_out == {"client-01"}
    everyone = {"client-00", "client-01"}
    assert {c["client"] for c in records[0]["clients"]} == everyone
    assert {c["client"] for c in records[-1]["clients"]} == everyone
