#!/usr/bin/env python3
"""Times of PyTorch for the shapes that the engine's rooms are measured on, on a GPU, one JSON line per shape.

    python3 gpu_torch.py --shapes tests/golden/kernels/plans.tsv --mode eager --out eager.jsonl [--seconds 540]

Convolutions are channels last through cuDNN with its search for the fastest algorithm on; attention is the flash kernel
where it takes the shape; `--mode compiled` goes through torch.compile, which fuses bias and activation. What is in the file
already is not measured again; exit code 3 where time ran out before the last shape. `--device cpu` tries the script without
a GPU: its times mean nothing.

A time is the median of 7 tries, each of as many calls as take 20 ms, by events, after calls for 0.2 s. Like the engine's
benches, the same buffers are used again and again: small operands come from the second-level cache. Uniform inputs: zeros
would let the card clock higher.
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def parse(title):
    """`2x64x64x320 320x3x3x320 320 stride=1 bias`: shapes, and what is set."""
    shapes, options = [], {}
    for word in title.split():
        if word[0].isdigit() and "=" not in word:
            shapes.append([int(n) for n in word.split("x")])
        else:
            name, _, value = word.partition("=")
            options[name] = value or True
    return shapes, options


def tensor(shape, device, generator):
    return (torch.rand(shape, generator=generator) * 2 - 1).to(device, torch.bfloat16)


def activate(name):
    return {"Silu": F.silu, "Gelu": F.gelu, "QuickGelu": lambda x: x * torch.sigmoid(1.702 * x)}.get(name, lambda x: x)


def convolution(shapes, options, make):
    x, w = (make(s).permute(0, 3, 1, 2) for s in shapes[:2])  # channels last
    bias = make(shapes[2]) if "bias" in options else None
    stride, act = int(options.get("stride", 1)), activate(options.get("act"))
    top, left, bottom, right = (int(n) for n in options["pad"].split(","))
    even = top == bottom and left == right

    def call(x, w, bias):
        if "upsample" in options:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if not even:
            x = F.pad(x, (left, right, top, bottom))
        return act(F.conv2d(x, w, bias, stride=stride, padding=(top, left) if even else 0))

    return call, (x, w, bias)


def product(shapes, options, make):
    x, w = make(shapes[0]), make(shapes[1])
    bias, act = make(shapes[2]) if "bias" in options else None, activate(options.get("act"))
    return (lambda x, w, bias: act(F.linear(x, w, bias))), (x, w, bias)


def attention(shapes, options, make):
    heads, causal = int(options["heads"]), "causal" in options

    def split(t):
        return t.view(t.shape[0], -1, heads, t.shape[-1] // heads).transpose(1, 2)

    def call(q, k, v):
        y = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=causal)
        return y.transpose(1, 2).reshape(q.shape)

    return call, tuple(make(s) for s in shapes)


def group_norm(shapes, options, make):
    if options.get("given") not in (None, "Input"):
        return None  # with statistics from elsewhere: PyTorch has no such op
    x, w, b = make(shapes[0]), make(shapes[1]), make(shapes[2])
    x = x.permute(0, 3, 1, 2) if x.dim() == 4 else x
    groups, eps, act = int(options["groups"]), float(options["eps"]), activate(options.get("act"))
    return (lambda x, w, b: act(F.group_norm(x, groups, w, b, eps))), (x, w, b)


def layer_norm(shapes, options, make):
    eps = float(options["eps"])
    return (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, eps)), tuple(make(s) for s in shapes)


def geglu(shapes, options, make):
    def call(x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return call, (make(shapes[0]),)


ROOMS = {
    "conv2d": convolution,
    "linear": product,
    "attention": attention,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "geglu": geglu,
}


def clock(device, call, n):
    """Seconds of n calls."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(n):
            call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(device, call, warm, slice_):
    call()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < warm:
        clock(device, call, 1)
        calls += 1
    once = max(clock(device, call, 5) / 5, 1e-7)
    n = max(1, min(10000, round(slice_ / once)))
    return statistics.median(clock(device, call, n) / n for _ in range(7))


def graphed(call, args):
    """A call that replays a CUDA graph, so that the host's own time is not measured; the call itself where that fails."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(*args)
        return graph.replay, True
    except RuntimeError:
        return (lambda: call(*args)), False


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", required=True)
    p.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    p.add_argument("--out", required=True)
    p.add_argument("--seconds", type=float, default=540)
    p.add_argument("--device", default="cuda")
    p.add_argument("--only", default="", help="a room")
    a = p.parse_args()
    began = time.monotonic()
    done = set()
    if os.path.exists(a.out):
        with open(a.out) as f:
            done = {(r["room"], r["shape"]) for r in map(json.loads, f)}
    torch.backends.cudnn.benchmark = True
    with open(a.shapes) as f:
        rows = [line.split("\t")[:2] for line in f.read().splitlines()[1:]]
    rows = [r for r in rows if r[0] in ROOMS and a.only in ("", r[0]) and tuple(r) not in done]
    warm, slice_ = (0.2, 0.02) if a.device == "cuda" else (0.0, 0.0)
    for room, shape in rows:
        if time.monotonic() - began > a.seconds - 15:
            print(f"{len(rows)} shapes were left, some still are", file=sys.stderr)
            sys.exit(3)
        shapes, options = parse(shape)
        generator = torch.Generator().manual_seed(1)
        made = ROOMS[room](shapes, options, lambda s: tensor(s, a.device, generator))
        if made is None:
            continue
        call, args = made
        result = {"room": room, "shape": shape, "mode": a.mode, "torch": torch.__version__}
        try:
            with torch.inference_mode():
                run = torch.compile(call, dynamic=False) if a.mode == "compiled" else call
                run(*args)
                timed, result["graph"] = graphed(run, args) if a.device == "cuda" else (lambda: run(*args), False)
                result["microseconds"] = round(measure(a.device, timed, warm, slice_) * 1e6, 3)
        except Exception as e:  # one shape that fails must not cost the others
            result["error"] = str(e).splitlines()[0].replace('"', "'")[:200]
        torch._dynamo.reset()
        with open(a.out, "a") as f:
            f.write(json.dumps(result) + "\n")
        print(f"{room:10} {shape:60} {result.get('microseconds', result.get('error'))}")


if __name__ == "__main__":
    main()
