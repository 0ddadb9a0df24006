"""serve --workers: several predictions at a time, in processes that may hang or die."""

from __future__ import annotations

import concurrent.futures
import io
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from untrained import make_bundle, picture
from worker_job import numbered

import everseg
from everseg.deploy.bundle import open_bundle
from everseg.deploy.http_server import RefusedError
from everseg.deploy.serve import Server, predictor
from everseg.deploy.workers import Job, Workers
from everseg.errors import CheckpointError, ConfigError


def test_processes_that_hang_or_die_are_replaced() -> None:
    workers = Workers(2, Job(numbered, {"first": 1}), timeout=1.0)
    try:
        first = set(workers.processes)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            assert list(threads.map(workers.call, ["a", "bb", "ccc", "dddd"])) == [2, 3, 4, 5]
        assert set(workers.processes) == first
        for word, status in (("refuse", 413), ("fail", 500), ("die", 500), ("hang", 504)):
            with pytest.raises(RefusedError) as refused:
                workers.call(word)
            assert refused.value.status == status, word
        assert len(set(workers.processes) - first) in (1, 2)
        assert workers.call("ok") == 3
    finally:
        workers.close()
    assert not any(worker.process.is_alive() for worker in workers._all)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", {"all": ["background", "red"]})
    with pytest.raises(ConfigError, match="--workers 0"):
        Server([bundle], 0, workers=0)
    with pytest.raises(ConfigError, match="--model"):
        Server([bundle], 0, workers=2, builder=lambda **_: None)


def test_a_process_that_begins_later_serves_the_same_bundle_or_none(tmp_path: Path) -> None:
    """A server may run for weeks before one of its processes dies and is replaced."""
    bundle = make_bundle(tmp_path / "b", {"all": ["background", "red"]})
    digest = open_bundle(bundle).digest
    threads = torch.get_num_threads()
    assert predictor([(str(bundle), digest)], None, None, threads)
    shutil.rmtree(bundle)
    make_bundle(bundle, {"all": ["background", "green"]})
    with pytest.raises(CheckpointError, match="another bundle"):
        predictor([(str(bundle), digest)], None, None, threads)


def test_the_page_of_the_command_gets_the_key_and_every_other_option(call: Callable, monkeypatch) -> None:
    given: dict[str, object] = {}

    def serve(*bundles: object, **options: object) -> None:
        given.update(options)
        raise ConfigError("not started")

    monkeypatch.setattr("everseg.api.serve", serve)
    line = (
        "--port",
        1,
        "--require-signature",
        "me.pub",
        "--workers",
        3,
        "--timeout",
        7,
        "--precision",
        "int8",
    )
    assert call("serve", "b", *line, "--quiet")[0] == 2
    assert given == {
        "port": 1, "builder": None, "precision": "int8", "require_signature": Path("me.pub"), "workers": 3,
        "timeout": 7.0, "quiet": True,
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes_answer_as_one_does(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", {"all": ["background", "red", "green"]})
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    with Server([bundle], 0, workers=2) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def ask(_: int) -> dict[str, object]:
            request = urllib.request.Request(
                f"{server.url}predict", file.getvalue(), {"Content-Type": "image/png"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(ask, range(6)))
        found = everseg.load(bundle).predict(picture()).ids
        assert all(one["mask"] == answers[0]["mask"] for one in answers)
        assert sum(answers[0]["pixels"].values()) == found.size
        assert answers[0]["pixels"] == {
            str(i): int((found == i).sum()) for i in range(3) if (found == i).any()
        }
        assert 'predictions_total{bundle="0"} 6' in server.metrics()
        request = urllib.request.Request(f"{server.url}predict", b"no picture", {"Content-Type": "image/png"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 400
        server.shutdown()
        thread.join()
    assert not any(worker.process.is_alive() for worker in server.workers._all)
