#!/usr/bin/env python3
"""A training step of the UNet of Stable Diffusion 1.5 in PyTorch, on a GPU: one JSON line.

    python3 gpu_train.py --mode eager --batch 16 --out train.jsonl [--steps 3] [--compile-seconds 150]

The step of `ldm train diffusion`, as PyTorch users take it: latents 64×64, 77 tokens, mean squared error, bf16 autocast over f32
weights, gradients clipped to a norm of 1, fused AdamW, an average of the weights by foreach; channels last, attention by the flash
kernel alone. `--mode compiled` is torch.compile of the UNet as it comes: the seconds of its first step, which compiles, are apart.
A batch that does not fit is halved until one does, and the line says so. Like the engine's, a step's time ends when its loss and
norm have been read. `--device cpu --tiny` tries the script without a GPU: its times mean nothing.
"""
import argparse
import json
import os
import signal
import statistics
import time

import torch
import torch.nn.functional as F

from gpu_unet import UNet

TINY = {"channels": (32, 64), "cross": (1, 0), "context": 32, "groups": 8}


def stepper(a, batch):
    """The step as a function that gives loss and norm, for one batch of random data."""
    side, width = (8, 32) if a.tiny else (64, 768)
    torch.manual_seed(1)
    with torch.device(a.device):
        unet = UNet(**(TINY if a.tiny else {})).train().to(memory_format=torch.channels_last)
        x, target = (torch.randn(batch, 4, side, side).to(memory_format=torch.channels_last) for _ in range(2))
        t, context = torch.arange(batch) * (1000 / batch), torch.randn(batch, 77, width)
    weights = list(unet.parameters())
    average = [w.detach().clone() for w in weights]
    optimiser = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2, fused=True)
    call = torch.compile(unet, dynamic=False) if a.mode == "compiled" else unet

    def step():
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(a.device, torch.bfloat16):
            y = call(x, t, context)
        loss = F.mse_loss(y.float(), target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)
        found = loss.item(), norm.item()
        if a.device == "cuda":
            torch.cuda.synchronize()
        return found

    return step, sum(w.numel() for w in weights)


def timed(step):
    start = time.perf_counter()
    found = step()
    return time.perf_counter() - start, found


def measure(a, batch):
    """What a line says beside the settings. The first step compiles, or makes cuDNN search; a second one is not counted either."""
    if a.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, count = stepper(a, batch)
    signal.alarm(a.compile_seconds if a.mode == "compiled" else 0)
    first, _ = timed(step)
    signal.alarm(0)
    step()
    rows = [timed(step) for _ in range(a.steps)]
    seconds = [round(s, 6) for s, _ in rows]
    loss, norm = rows[-1][1]
    result = {"parameters": count, "first_seconds": round(first, 3), "median_seconds": statistics.median(seconds)}
    if a.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return {**result, "seconds": seconds, "loss": round(loss, 4), "norm": round(norm, 4)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=3, help="steps that count")
    p.add_argument("--compile-seconds", type=int, default=150, help="with --mode compiled: give up where the first step takes longer")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a small UNet")
    p.add_argument("--out", help="a file of JSON lines, to which this one is added")
    a = p.parse_args()
    card = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    line = {"part": "train", "mode": a.mode, "dtype": "bf16", "batch": a.batch, "card": card, "torch": torch.__version__}

    def say(more):
        text = json.dumps({**line, **more})
        print(text, flush=True)
        if a.out:
            with open(a.out, "a") as f:
                f.write(text + "\n")

    def late(*_):
        say({"error": f"the first step took longer than {a.compile_seconds} s"})
        os._exit(0)  # the compiler's processes are waited for otherwise

    signal.signal(signal.SIGALRM, late)
    if a.device == "cuda":
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.benchmark = True
    while True:
        try:
            return say(measure(a, line["batch"]))
        except torch.OutOfMemoryError as e:
            if line["batch"] == 1:
                return say({"error": str(e).splitlines()[0].replace('"', "'")[:200]})
        # Behind the handler, which holds the step's tensors.
        line["too_large"] = line["batch"]
        line["batch"] //= 2
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
