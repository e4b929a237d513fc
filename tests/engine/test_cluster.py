"""The same snapshot from a Ray cluster of three nodes on this machine; test_pipeline varies the CPUs of one node."""

from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from engine import pipeline
from engine.config import ConvertConfig
from manifests.shards import SAMPLES_FILE, load_snapshot


@pytest.mark.slow
def test_a_cluster_of_three_nodes(converted: ConvertConfig, tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 3
        config = converted.model_copy(update={"output": tmp_path / "shards", "num_cpus": 3})
        assert int(pipeline.run(config).exit_code) == 3
        expected, found = load_snapshot(converted.output), load_snapshot(config.output)
        assert found.digest == expected.digest
        for name in (SAMPLES_FILE, *(shard.path for shard in found.shards)):
            assert (config.output / name).read_bytes() == (converted.output / name).read_bytes()
    finally:
        ray.shutdown()
        cluster.shutdown()
