"""A Ray of two nodes and a spare one on this machine's loopback, as long as its standard input is open.

python -m tests.helpers.ray_cluster        prints its address
"""

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster()
    for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        cluster.add_node(
            num_cpus=2,
            node_ip_address=address,
            object_store_memory=80 << 20,
            include_dashboard=False,
        )
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
