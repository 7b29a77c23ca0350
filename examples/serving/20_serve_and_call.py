"""Serve a model and call it with tritonclient, over HTTP and gRPC: the outputs are eager PyTorch's.

python examples/serving/20_serve_and_call.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import tritonclient.grpc
import tritonclient.http
from my_models import Classifier
from server import serving

images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
with torch.inference_mode():
    expected = Classifier().eval()(torch.from_numpy(images)).numpy()

with serving(Path(__file__).with_name("20_serve.toml")) as address:
    for kind, module in (("http", tritonclient.http), ("grpc", tritonclient.grpc)):
        with module.InferenceServerClient(address[kind]) as client:
            given = module.InferInput("input0", list(images.shape), "FP32")
            given.set_data_from_numpy(images)
            logits = client.infer("classifier", [given]).as_numpy("output0")
        same = np.allclose(logits, expected, rtol=1e-5, atol=1e-6)
        print(f"{kind}: classes {logits.argmax(1).tolist()}, equal to eager PyTorch: {same}")
        assert same
