"""A build on a Ray cluster of two machines gives the bytes of a local one, also when one of them is lost."""

from __future__ import annotations

import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lwm_data import ray_pool
from lwm_data.build import build
from lwm_data.engine import run_units
from lwm_data.ray_pool import RayCluster, connect_ray

ray = pytest.importorskip("ray")
# Ray starts its processes by forking; JAX, which an earlier test may have started in this one, warns of that.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

TOKENS = {"min": 150, "max": 200}
SOURCES = [
    {"name": "books", "type": "books", "path": "books/*.txt"},
    {"name": "chats", "type": "chats", "path": "chats.jsonl"},
    {"name": "needles", "type": "needles", "count": 600, "haystack": "books/*.txt", "tokens": TOKENS},
]
KEYS: dict[str, Any] = {"shard_size": 8192, "row_length": 200, "sources": SOURCES}


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """Two nodes of one processor each, on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20},
    )
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(machines: Any) -> RayCluster:
    return connect_ray(machines.address)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _when(is_time: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Does `act` once, in a thread, as soon as it is time."""

    def wait() -> None:
        end = time.monotonic() + 120
        while not is_time() and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def _workers_at_work() -> list[int]:
    """The processes that Ray has given a unit: it names them by what they run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::_run"):
                found.append(int(process.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("model", [False, True])
def test_results_come_in_the_units_order(cluster: RayCluster, model: bool) -> None:
    found = list(run_units(operator.add, 1, range(50), cluster, model=model))
    assert found == list(range(1, 51))


def test_an_error_of_a_unit_reaches_the_caller_as_it_is(cluster: RayCluster, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as error:
        list(run_units(operator.call, os.stat, [str(tmp_path), missing], cluster))
    assert error.value.filename == missing


def test_a_unit_that_always_ends_its_worker_ends_the_run_with_a_remedy(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "RETRIES", 1)
    with pytest.raises(OSError, match=r"lost with its worker 2 times.*finished work is kept"):
        list(run_units(operator.call, os._exit, [9], cluster, model=True))


def test_a_build_that_loses_a_worker_and_a_machine_gives_the_bytes_of_a_local_one(
    project: Callable[..., Path], machines: Any, cluster: RayCluster
) -> None:
    here = build(project("here", **KEYS)).out
    manifest = project("there", **KEYS)
    out, store = manifest.parent / "out", manifest.parent / "token-store"
    killed: list[int] = []

    def kill_worker() -> None:
        for pid in _workers_at_work()[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    machine = machines.worker_nodes.copy().pop()
    lost_worker = _when(lambda: any(store.glob("*.arrow")) and bool(_workers_at_work()), kill_worker)
    lost_machine = _when(
        lambda: any(out.glob("shard-*.tar")), lambda: machines.remove_node(machine, allow_graceful=False)
    )
    build(manifest, workers=cluster)
    lost_worker.join()
    lost_machine.join()
    assert killed and not machines.worker_nodes
    assert _bytes(out) == _bytes(here)
    assert _bytes(store) == _bytes(here.parent / "token-store")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:99999999", ""])
def test_an_address_where_no_cluster_is_says_what_to_do(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"--ray: got .*ray start --head"):
        connect_ray(address)


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lwm\[ray\]'"):
        connect_ray("auto")
