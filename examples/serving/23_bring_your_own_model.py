"""Bring your own model: export it with torch.export, serve the file, and add a second tenant while the first serves.

python examples/serving/23_bring_your_own_model.py
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from pathlib import Path

import torch
from my_models import Classifier
from server import serving

SERVER = "[server]\nhttp_port = 0\ngrpc_port = -1\ndevice = 'cpu'\n"
TENANT = "[[tenant]]\nname = '{name}'\nmodel = 'classifier.pt2'\nclass = 'LS'\nslo_ms = 50.0\nbatch = {{ max = 8 }}\n"

model = Classifier().eval()
image = torch.randn(2, 3, 64, 64)
batch = torch.export.Dim("batch", min=1, max=8)
program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},))


def post(url: str, body: object = None) -> dict[str, object]:
    data = json.dumps(body).encode() if body is not None else b""
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
        return json.load(answer)


with tempfile.TemporaryDirectory() as folder:
    torch.export.save(program, Path(folder) / "classifier.pt2")
    config = Path(folder) / "serve.toml"
    config.write_text(SERVER + TENANT.format(name="first"))
    with serving(config) as address:
        root = f"http://{address['http']}"
        config.write_text(SERVER + TENANT.format(name="first") + TENANT.format(name="second"))
        print("reloaded:", post(f"{root}/missile/reload"))
        tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.flatten().tolist()}
        answer = post(f"{root}/v2/models/second/infer", {"inputs": [tensor]})

served = torch.tensor(answer["outputs"][0]["data"]).view(2, 10)
with torch.inference_mode():
    print("equal to eager PyTorch:", torch.allclose(served, model(image), rtol=1e-5, atol=1e-6))
