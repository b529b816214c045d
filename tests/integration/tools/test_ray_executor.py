"""A build on a Ray cluster that loses one of its two machines has the bytes of a build on one machine."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from tests.helpers.corpora.growing_corpus import Corpus
from tests.helpers.corpora.snapshot import snapshot


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**settings, "include_dashboard": False})
    cluster.other = cluster.add_node(**settings)
    yield cluster
    cluster.shutdown()


def test_a_lost_machine_changes_no_byte(tmp_path_factory, tmp_path, cluster):
    data = Corpus(tmp_path_factory.mktemp("ray"))
    names = ("films", "stills", "both")
    small = ("--set", "data.shard_mb=1", "--set", "frames.size=448")
    data.build(tmp_path / "one", *names, options=small)
    ray = ("--executor", "ray", "--address", cluster.address)
    command = data.command(tmp_path / "ray", *names, options=(*small, *ray))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    tasks = tmp_path / "ray" / "stage2" / "work" / "tasks"
    while process.poll() is None and not list(tasks.glob("*.tmp")):
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    cluster.remove_node(cluster.other, allow_graceful=False)
    assert process.wait(200) == 0, process.stderr.read()
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "one")
