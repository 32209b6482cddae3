#!/usr/bin/env python3
"""PyTorch's side of `compare.py`: loads one part of a checkpoint, then runs it once for every line on stdin.

    torch_worker.py FOLDER unet|vae-decoder SIDE BATCH f32|bf16|f16 MODE [THREADS]

SIDE is that of the latents. MODE is `eager` or `compiled` (torch.compile, inductor with freezing), with `-nhwc` behind
it for tensors and weights in channels_last. The first line of stdout is JSON: `engine`, and `warm`, the seconds of the
runs that it took to get ready (compilation is among them). Every other line is the seconds of a run.
"""
import json
import os
import sys
import time

# Sleeping threads, not spinning ones: another engine has the cores between two runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")

import torch
import diffusers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def forward(folder, component, side, batch, dtype, layout):
    """The part as a module, and the arguments of a call."""
    randn = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    latents = randn(batch, 4, side, side).to(memory_format=layout)
    if component == "unet":
        module = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
        context = randn(batch, 77, module.config.cross_attention_dim)
        arguments = (latents, torch.tensor([481.0]), context)
    else:
        whole = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        module = torch.nn.Sequential(whole.post_quant_conv, whole.decoder)
        arguments = (latents,)
    module.eval().requires_grad_(False)
    for parameter in module.parameters():  # mapped from the file: into memory before the clock runs
        parameter.data = parameter.data.clone()
    return module.to(memory_format=layout), arguments


def main(folder, component, side, batch, dtype, mode, threads="2"):
    torch.set_num_threads(int(threads))
    kind, _, layout = mode.partition("-")
    layout = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    module, arguments = forward(folder, component, int(side), int(batch), DTYPES[dtype], layout)
    if kind == "compiled":
        import torch._inductor.config as inductor
        inductor.freezing = True
        module = torch.compile(module)

    def once():
        start = time.perf_counter()
        out = module(*arguments)
        seconds = time.perf_counter() - start
        # diffusers wraps the UNet's prediction; a sum that is not finite means that something else was timed.
        assert torch.isfinite((out if torch.is_tensor(out) else out.sample).float().sum())
        return seconds

    # Freezing needs a mode without gradients; inference_mode makes it trip over its own constants.
    with torch.no_grad() if kind == "compiled" else torch.inference_mode():
        warm = [once(), once()]
        engine = f"PyTorch {torch.__version__.split('+')[0]} {mode}, diffusers {diffusers.__version__}"
        print(json.dumps({"engine": engine, "warm": warm}), flush=True)
        for _ in sys.stdin:
            print(f"{once():.6f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (7, 8):
        sys.exit(__doc__)
    main(*sys.argv[1:])
